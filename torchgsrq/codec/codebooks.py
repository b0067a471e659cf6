"""Codebooks: the codecs of a model, and their file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from torchgsrq.codec import files, hub
from torchgsrq.codec.codec import Codec, Codecs, LayerCodec


class Codebooks:
    """The key and value codecs of every layer, and their origin.

    Args:
        layers: layer index to `LayerCodec`; layers that stay in full precision are absent.
        metadata: JSON-serializable facts: ``model`` (`models.fingerprint`), ``config`` (the requested settings),
            ``seed``, ``source`` and ``tokens`` of the calibration text; ``name`` of a hub model; ``measured``, set by
            ``torchgsrq calibrate``; and, if each head has its own rate, ``sensitivity``: layer to the costs of the
            keys and values of each head (`learning.sensitivity`).
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
        return self  # read-only, so copies of a model share it

    def __repr__(self) -> str:
        return f"Codebooks({len(self)} layers, {self.bits:.3g} bits, source={self.metadata.get('source')!r})"

    @property
    def bits(self) -> float:
        """Mean bits per element of keys and values."""
        sizes = [(c.heads * c.head_dim, c.bits) for layer in self.layers.values() for c in layer]
        return sum(size * bits for size, bits in sizes) / max(sum(size for size, _ in sizes), 1)

    @cached_property
    def digest(self) -> str:
        """A hash of all tables: a cache's codes are valid only with these codebooks. The encoder's ``eta`` is left out,
        because it does not affect decoding."""
        found = hashlib.sha256()
        for i, layer in self.layers.items():
            for codecs in layer:
                facts = [heads for heads, _ in codecs.parts], codecs.first.interleaved, codecs.frame
                found.update(f"{i}{facts}".encode())
                for tensor in codecs.tensors:
                    found.update(f"{list(tensor.shape)}".encode())
                    found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def describe(self) -> str:
        """A line per layer with the bits per element of its keys and of its values, listed by head where they differ.
        If bits follow the cost of errors, also the layer's share of that cost at equal rates, each head alone."""
        costs = {int(i): sum(map(sum, heads)) for i, heads in self.metadata.get("sensitivity", {}).items()}
        total = max(sum(costs[i] for i in self.layers), 1e-300) if costs else 1
        lines = [
            f"layer {i}: keys {_by_head(layer.key)} bits, values {_by_head(layer.value)} bits"
            + (f", {costs[i] / total:.1%} of the cost" if costs else "")
            for i, layer in self.layers.items()
        ]
        return "\n".join((repr(self), *lines))

    def shard(self, rank: int, ranks: int) -> Codebooks:
        """The codebooks of one rank of a tensor-parallel model, which has an equal part of every layer's KV heads.

        Each head keeps its bits.

        Raises:
            ValueError: the number of ranks does not divide a layer's heads.
        """

        def part(codecs: Codecs) -> list[Codec]:
            if codecs.heads % ranks or not 0 <= rank < ranks:
                raise ValueError(f"{codecs.heads} KV heads cannot be split between ranks={ranks} (rank={rank})")
            each = codecs.heads // ranks
            return codecs.by_head()[rank * each : (rank + 1) * each]

        layers = {i: LayerCodec.of_heads(part(c.key), part(c.value)) for i, c in self.layers.items()}
        metadata = {k: v for k, v in self.metadata.items() if k != "measured"}
        if "sensitivity" in metadata:
            metadata["sensitivity"] = {
                i: heads[rank * len(heads) // ranks : (rank + 1) * len(heads) // ranks]
                for i, heads in metadata["sensitivity"].items()
            }
        return Codebooks(layers, metadata)

    def to(self, device: torch.device | str) -> Codebooks:
        """The same codebooks on a device."""
        layers = {i: LayerCodec(c.key.to(device), c.value.to(device)) for i, c in self.layers.items()}
        return Codebooks(layers, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. Codewords are stored in float16, to which training already rounds them.

        Raises:
            OSError: the file cannot be written.
        """
        files.write(self.layers, self.metadata, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebooks:
        """Read a file written by `save`, or a folder written by `save_pretrained`.

        Raises:
            FileNotFoundError: no such file, or no codebooks in the folder.
            ValueError: not a codebook file, a damaged file, or an unknown format version.
        """
        return cls(*files.read(hub.find(path) if os.path.isdir(path) else path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``codebooks.safetensors`` (see `save`) and a model card into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.save(path / hub.FILE)
        card = hub.card(self.layers, self.metadata, self.bits, self.describe())
        (path / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Codebooks:
        """Read codebooks written by `save_pretrained` or `push_to_hub`.

        Args:
            name: a folder, or a repository of the Hugging Face hub, ``"user/repo"``.
            revision: branch, tag or commit of the repository.
            token: access token for private repositories.

        Raises:
            FileNotFoundError: no such folder or repository, or no codebooks in it.
            ValueError: see `load`.
        """
        return cls(*files.read(hub.find(name, revision, token)))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Codebooks of torchgsrq",
    ) -> str:
        """Upload the files of `save_pretrained` to a hub repository, which is created if it does not exist.

        Args:
            repo_id: ``"user/repo"``.
            private: whether a new repository is private.
            token: access token with write permission.
            commit_message: message of the commit.

        Returns:
            The URL of the commit.
        """
        return hub.push(self.save_pretrained, repo_id, private, token, commit_message)


def _by_head(codecs: Codecs) -> str:
    """Bits per element, listed by head where they differ."""
    each = codecs.head_bits
    return f"{codecs.bits:g}" if len(set(each)) == 1 else ", ".join(f"{bits:g}" for bits in each)
