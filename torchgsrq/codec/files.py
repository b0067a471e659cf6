"""Codebook files: their content, and the checks before any of it is used."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from torchgsrq.codec.codec import TABLES, Codec, Codecs, LayerCodec
from torchgsrq.codec.layout import CODEWORDS
from torchgsrq.codec.sealed import Format

CODEBOOKS = Format("torchgsrq.codebooks", 6, "codebook file", "calibrate again")
_FIELDS = ("interleaved", "eta", "frame")


def write(layers: dict[int, LayerCodec], metadata: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write codebooks to a safetensors file."""
    tensors: dict[str, Tensor] = {}
    codecs: dict[str, dict[str, Any]] = {}
    for i, layer in layers.items():
        for kind, side in layer._asdict().items():
            name = f"{i}.{kind}"
            tensors[f"{name}.inv_freq"] = side.inv_freq
            for j, (_, codec) in enumerate(side.parts):
                tensors |= {f"{name}.{j}.{table}": getattr(codec, table) for table in TABLES}
            fields = {field: getattr(side.first, field) for field in _FIELDS}
            codecs[name] = {"heads": [heads for heads, _ in side.parts], **fields}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared storages
    CODEBOOKS.save(tensors, {"codecs": json.dumps(codecs), "metadata": json.dumps(metadata)}, path)


def read(path: str | os.PathLike[str]) -> tuple[dict[int, LayerCodec], dict[str, Any]]:
    """Read the layers and metadata of a file written by `write`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a codebook file, a damaged file, or an unknown format version.
    """
    name = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no codebook file at {name}")
    held, meta = CODEBOOKS.read(name, name)
    try:
        layers = _layers(json.loads(meta["codecs"]), held, name)
        CODEBOOKS.check_sum(held, meta, name)
        metadata = json.loads(meta["metadata"])
        if not _makes_sense(metadata, layers):
            raise ValueError(f"{name} has invalid costs of heads")
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} is damaged, not a whole codebook file: {error}") from error
    return layers, metadata


def _layers(codecs: dict[str, dict[str, Any]], held: dict[str, Tensor], name: str) -> dict[int, LayerCodec]:
    found: dict[int, dict[str, Codecs]] = {}
    for key, facts in codecs.items():
        index, kind = key.split(".")
        fields, inv_freq = {field: facts[field] for field in _FIELDS}, held[f"{key}.inv_freq"]
        parts = []
        for j, heads in enumerate(facts["heads"]):
            tables = {table: held[f"{key}.{j}.{table}"] for table in TABLES}
            _check_tables(len(heads), {**tables, "inv_freq": inv_freq}, f"{name} is damaged: the tables of {key}")
            given: dict[str, Any] = {**tables, **fields}
            parts.append((tuple(heads), Codec(inv_freq=inv_freq, **given)))
        try:
            found.setdefault(int(index), {})[kind] = Codecs(tuple(parts))
        except ValueError as error:
            raise ValueError(f"{name} is damaged: {key}: {error}") from error
    layers = {i: LayerCodec(c["key"], c["value"]) for i, c in sorted(found.items())}
    for i, layer in layers.items():
        of_keys, of_values = ([heads for heads, _ in side.parts] for side in layer)
        if of_keys != of_values and max(len(of_keys), len(of_values)) > 1:
            raise ValueError(
                f"{name} is damaged: heads of layer {i} that share a codec are {of_keys} for keys and {of_values} for "
                "values"
            )
    return layers


def _check_tables(heads: int, tables: dict[str, Tensor], what: str) -> None:
    """Refuse tables that do not fit together."""
    book, dim = tables["codebook"], tables["mean"].shape[-1]
    square = (heads, dim, dim)
    shapes = [tables[name].shape for name in ("mean", "transform", "inverse")]
    fits = book.ndim == 4 and book.shape[0] == heads and book.shape[2] == CODEWORDS and dim % book.shape[3] == 0
    if shapes != [(heads, dim), square, square] or not fits or book.shape[1] * book.shape[3] < dim:
        raise ValueError(f"{what} do not fit together")
    wrong = [x for x, t in tables.items() if t.dtype != (torch.float16 if x == "codebook" else torch.float32)]
    if wrong:
        raise ValueError(f"{what} are not all float32, with codewords of float16: {', '.join(wrong)}")


def _makes_sense(metadata: dict[str, Any], layers: dict[int, LayerCodec]) -> bool:
    """Whether the costs of heads in the metadata are usable."""
    costs, asked = metadata.get("sensitivity"), metadata.get("config")
    return costs is None or (
        all(len(costs[str(i)]) == layer.key.heads for i, layer in layers.items())
        and all(len(pair) == 2 and min(pair) >= 0 for i in layers for pair in costs[str(i)])
        and asked["bits"] > 0  # type: ignore[index]
    )
