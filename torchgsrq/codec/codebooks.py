"""Codebooks: the codecs of a model, and their file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchgsrq.codec.allocation import layer_rates
from torchgsrq.codec.codec import Codec, LayerCodec
from torchgsrq.codec.kmeans import train_codebook
from torchgsrq.codec.layout import CODEWORDS, Layout, num_codes
from torchgsrq.config import GSRQConfig

FORMAT = "torchgsrq.codebooks"
VERSION = 4


class Codebooks:
    """One key and one value codec per layer, and where they came from.

    Args:
        layers: layer index to `LayerCodec`; layers that stay in full precision are absent.
        metadata: JSON-able facts: ``model`` (`models.fingerprint`), ``config`` (what was asked), ``source``,
            ``tokens``; where layers have rates of their own, ``sensitivity``: layer to the costs of its keys and values
            (`learning.sensitivity`).
    """

    def __init__(self, layers: dict[int, LayerCodec], metadata: dict[str, Any]) -> None:
        self.layers = dict(layers)
        self.metadata = dict(metadata)

    def __getitem__(self, layer: int) -> LayerCodec:
        if layer not in self.layers:
            raise KeyError(f"no codebooks for layer {layer}; there are some for {sorted(self.layers)}")
        return self.layers[layer]

    def __contains__(self, layer: int) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Codebooks:
        return self  # read only, so copies of a model share it

    def __repr__(self) -> str:
        return f"Codebooks({len(self)} layers, {self.bits:.3g} bits, source={self.metadata.get('source')!r})"

    @property
    def bits(self) -> float:
        """Mean bits per element of keys and values."""
        sizes = [(c.heads * c.head_dim, c.bits) for layer in self.layers.values() for c in layer]
        return sum(size * bits for size, bits in sizes) / max(sum(size for size, _ in sizes), 1)

    @classmethod
    def universal(cls, config: GSRQConfig, num_layers: int, num_kv_heads: int, head_dim: int) -> Codebooks:
        """Codebooks that need no model and no data: an 8-bit gain and residual stages for the sphere.

        One byte of a vector's rate is its norm, in steps of 1/8 octave. A rough fallback: it knows
        neither the mean of the keys nor what attention does with them.

        Raises:
            ValueError: the rate is no whole number of bytes, or leaves none for the shape.
        """
        codecs = {}
        for bits in {config.key_rate, config.value_rate}:
            codes = num_codes(head_dim, bits) - 1
            if codes < 1:
                raise ValueError(f"bits={bits} leaves no byte for the shape of a vector of head_dim={head_dim}")
            x = torch.randn(
                1, 8192, head_dim, dtype=torch.float32, generator=torch.Generator().manual_seed(config.seed)
            )
            x = x / x.norm(dim=-1, keepdim=True)
            layout = Layout(head_dim, 1, codes)
            codebook = train_codebook(
                x, torch.ones(1, 8192, dtype=torch.float32), layout, seed=config.seed, iterations=5
            )
            gains = torch.exp2((torch.arange(CODEWORDS, dtype=torch.float32) - 128) / 8)
            eye = torch.eye(head_dim, dtype=torch.float32).repeat(num_kv_heads, 1, 1)
            mean = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32)
            codebook = codebook.repeat(num_kv_heads, 1, 1, 1)
            codecs[bits] = Codec.build(layout, mean, eye, codebook, inverse=eye, gains=gains, beam=config.beam_width)
        layer = LayerCodec(codecs[config.key_rate], codecs[config.value_rate])
        metadata = {"config": config.codec_fields(), "model": None, "source": "none", "tokens": 0}
        return cls(dict.fromkeys(range(num_layers), layer), metadata)

    @cached_property
    def digest(self) -> str:
        """A hash of all tables: codes of a cache mean something with these codebooks alone. How the encoder searches
        (beam and eta) changes nothing in what codes mean."""
        found = hashlib.sha256()
        for i, layer in self.layers.items():
            for codec in layer:
                found.update(f"{i}{codec.layout}{codec.interleaved}{codec.frame}".encode())
                for tensor in codec.tensors:
                    found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def at(self, bits: float, value_bits: float | None = None) -> Codebooks:
        """The same codebooks at a lower rate; residual stages are nested (see `Codec.at`).

        Where layers have rates of their own, the mean is at most ``bits``, and is spread over them anew.

        Raises:
            ValueError: the rate is higher, or not nested in every codec.
        """
        value_bits = bits if value_bits is None else value_bits
        each = dict.fromkeys(self.layers, (bits, value_bits))
        if "sensitivity" in self.metadata and self.layers:
            each = self._spread(bits, value_bits)
        layers = {i: LayerCodec(c.key.at(each[i][0]), c.value.at(each[i][1])) for i, c in self.layers.items()}
        config = {**self.metadata.get("config", {}), "key_bits": float(bits), "value_bits": float(value_bits)}
        return Codebooks(layers, {**self.metadata, "config": config})

    def _spread(self, key_bits: float, value_bits: float) -> dict[int, tuple[float, float]]:
        """Rates of every layer's keys and values at a lower mean."""
        have = self.metadata["config"]["key_bits"], self.metadata["config"]["value_bits"]
        if key_bits > have[0] or value_bits > have[1]:
            raise ValueError(
                f"bits={max(key_bits, value_bits)} is more than these codebooks were calibrated for ({have[0]:g} for "
                f"keys, {have[1]:g} for values): calibrate at that rate"
            )
        costs = {i: self.metadata["sensitivity"][str(i)] for i in self.layers}
        sizes = {i: c.key.heads * c.key.head_dim for i, c in self.layers.items()}
        offered = {i: (c.key.nested_rates(), c.value.nested_rates()) for i, c in self.layers.items()}
        try:
            return layer_rates(costs, sizes, offered, key_bits, value_bits)
        except ValueError as error:
            raise ValueError(f"{error}: calibrate at that rate") from error

    def describe(self) -> str:
        """A line for every layer: bits per element of its keys and of its values; and, where these follow what errors
        cost, its share of the cost of all layers if they had the same rate."""
        costs = {int(i): sum(pair) for i, pair in self.metadata.get("sensitivity", {}).items()}
        total = max(sum(costs[i] for i in self.layers), 1e-300) if costs else 1
        lines = [
            f"layer {i}: keys {layer.key.bits:g} bits, values {layer.value.bits:g} bits"
            + (f", {costs[i] / total:.1%} of the cost" if costs else "")
            for i, layer in self.layers.items()
        ]
        return "\n".join((repr(self), *lines))

    def with_beam(self, beam: int) -> Codebooks:
        """The same codebooks, encoding with another width of the beam search."""
        if all(codec.beam == beam for layer in self.layers.values() for codec in layer):
            return self
        layers = {
            i: LayerCodec(*(dataclasses.replace(c, beam=beam, _copies={}, _turned=[]) for c in layer))
            for i, layer in self.layers.items()
        }
        return Codebooks(layers, self.metadata)

    def shard(self, rank: int, ranks: int) -> Codebooks:
        """Those of one rank of a tensor-parallel model, which has an equal part of every layer's KV heads.

        Raises:
            ValueError: the heads of a layer cannot be dealt equally.
        """

        def part(codec: Codec) -> Codec:
            if codec.heads % ranks or not 0 <= rank < ranks:
                raise ValueError(f"{codec.heads} KV heads cannot be dealt to rank={rank} of ranks={ranks}")
            each = codec.heads // ranks
            mine = slice(rank * each, (rank + 1) * each)
            tables = {x: getattr(codec, x)[mine].contiguous() for x in ("mean", "transform", "inverse", "codebook")}
            return dataclasses.replace(codec, **tables, _copies={}, _turned=[])

        layers = {i: LayerCodec(part(c.key), part(c.value)) for i, c in self.layers.items()}
        return Codebooks(layers, self.metadata)

    def to(self, device: torch.device | str) -> Codebooks:
        """The same codebooks on a device."""
        layers = {i: LayerCodec(c.key.to(device), c.value.to(device)) for i, c in self.layers.items()}
        return Codebooks(layers, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. Codewords are float16 (they are rounded to it when learned)."""
        tensors: dict[str, Tensor] = {}
        codecs: dict[str, dict[str, Any]] = {}
        written: dict[int, str] = {}
        for i, layer in self.layers.items():
            for name, codec in layer._asdict().items():
                if id(codec) in written:  # layers may share one
                    codecs[f"{i}.{name}"] = {"same_as": written[id(codec)]}
                    continue
                written[id(codec)] = f"{i}.{name}"
                tensors[f"{i}.{name}.codebook"] = codec.codebook
                for part in ("mean", "transform", "inverse", "inv_freq", "gains"):
                    tensors[f"{i}.{name}.{part}"] = getattr(codec, part).clone().contiguous()
                codecs[f"{i}.{name}"] = {
                    "groups": codec.layout.groups,
                    "frame": codec.frame,
                    "interleaved": codec.interleaved,
                    "beam": codec.beam,
                    "eta": codec.eta,
                }
        texts = {"codecs": json.dumps(codecs), "metadata": json.dumps(self.metadata)}
        meta = {"format": FORMAT, "version": str(VERSION), **texts, "checksum": checksum(tensors, *texts.values())}
        partial = f"{os.fspath(path)}.{os.getpid()}-{threading.get_ident()}.partial"
        save_file(tensors, partial, meta)
        os.replace(partial, path)  # a killed process leaves no half-written file behind

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebooks:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a codebook file, damaged, or of an unknown format version.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"no codebook file at {os.fspath(path)}")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise ValueError(
                        f"{os.fspath(path)} is not a torchgsrq codebook file (format={meta.get('format')!r})"
                    )
                if meta.get("version") != str(VERSION):
                    raise ValueError(
                        f"{os.fspath(path)} has format version {meta.get('version')}; this torchgsrq reads {VERSION}: "
                        "calibrate again"
                    )
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                layers: dict[int, dict[str, Codec]] = {}
                for name, facts in json.loads(meta["codecs"]).items():
                    index, kind = name.split(".")
                    if "same_as" in facts:
                        other, which = facts["same_as"].split(".")
                        layers.setdefault(int(index), {})[kind] = layers[int(other)][which]
                        continue
                    parts = ("mean", "transform", "inverse", "codebook", "inv_freq", "gains")
                    t = {part: held[f"{name}.{part}"] for part in parts}
                    _, codes, words, width = t["codebook"].shape
                    dims = width * facts["groups"]
                    if words != CODEWORDS or dims != t["transform"].shape[-2]:
                        raise ValueError(f"{os.fspath(path)}: the tables of {name} do not fit together")
                    layout = Layout(t["mean"].shape[-1], facts["groups"], codes, dims)
                    layers.setdefault(int(index), {})[kind] = Codec.build(
                        layout,
                        t["mean"],
                        t["transform"],
                        t["codebook"],
                        inverse=t["inverse"],
                        inv_freq=t["inv_freq"],
                        frame=facts["frame"],
                        interleaved=facts["interleaved"],
                        gains=t["gains"],
                        beam=facts["beam"],
                        eta=facts["eta"],
                    )
                if meta.get("checksum", "") not in ("", checksum(held, meta["codecs"], meta["metadata"])):
                    raise ValueError(f"{os.fspath(path)} is damaged: its checksum is not that of what it holds")
                metadata = json.loads(meta["metadata"])
                costs, asked = metadata.get("sensitivity"), metadata.get("config")
                if costs is not None and not (
                    all(len(costs[str(i)]) == 2 and all(c >= 0 for c in costs[str(i)]) for i in layers)
                    and all(asked[kind] > 0 for kind in ("key_bits", "value_bits"))
                ):
                    raise ValueError(f"{os.fspath(path)} says nothing that makes sense of how much its layers matter")
        except (SafetensorError, KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged, not a whole codebook file: {error}") from error
        return cls({i: LayerCodec(c["key"], c["value"]) for i, c in sorted(layers.items())}, metadata)


def checksum(tensors: dict[str, Tensor], *texts: str) -> str:
    """A hash of named tensors and texts, by which a file is found to be damaged."""
    found = hashlib.sha256("\n".join(texts).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}{x.dtype}{list(x.shape)}".encode())
        found.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
