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
from torchgsrq.codec.allocation import head_rates
from torchgsrq.codec.codec import Codec, LayerCodec
from torchgsrq.codec.kmeans import train_codebook
from torchgsrq.codec.layout import CODEWORDS, Layout, num_codes
from torchgsrq.config import GSRQConfig


class Codebooks:
    """One key and one value codec per layer, and where they came from.

    Args:
        layers: layer index to `LayerCodec`; layers that stay in full precision are absent.
        metadata: JSON-able facts: ``model`` (`models.fingerprint`), ``config`` (what was asked), ``source``,
            ``tokens``; ``name``, of a model of a hub; ``measured``, by ``torchgsrq calibrate``; where heads have rates
            of their own, ``sensitivity``: layer to the costs of the keys and values of each head
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
                found.update(f"{i}{codec.runs}{codec.interleaved}{codec.frame}".encode())
                for tensor in codec.tensors:
                    found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def at(self, bits: float, value_bits: float | None = None) -> Codebooks:
        """The same codebooks at a lower rate; residual stages are nested (see `Codec.at`).

        Where heads have rates of their own, the mean is at most ``bits``, and is spread over them anew.

        Raises:
            ValueError: the rate is higher, or not nested in every codec.
        """
        value_bits = bits if value_bits is None else value_bits
        if "sensitivity" in self.metadata and self.layers:
            each = self._spread(bits, value_bits)
            layers = {i: _at(layer, each[i]) for i, layer in self.layers.items()}
        else:
            if any(len(codec.runs) > 1 for layer in self.layers.values() for codec in layer):
                raise ValueError("these codebooks do not say what errors of their heads cost: calibrate at that rate")
            layers = {i: LayerCodec(c.key.at(bits), c.value.at(value_bits)) for i, c in self.layers.items()}
        config = {**self.metadata.get("config", {}), "key_bits": float(bits), "value_bits": float(value_bits)}
        metadata = {**self.metadata, "config": config}
        if config != self.metadata.get("config"):
            metadata.pop("measured", None)  # at the other rate
        return Codebooks(layers, metadata)

    def _spread(self, key_bits: float, value_bits: float) -> dict[int, list[tuple[float, float]]]:
        """Rates of the keys and values of every layer's heads at a lower mean."""
        have = self.metadata["config"]["key_bits"], self.metadata["config"]["value_bits"]
        if key_bits > have[0] or value_bits > have[1]:
            raise ValueError(
                f"bits={max(key_bits, value_bits)} is more than these codebooks were calibrated for ({have[0]:g} for "
                f"keys, {have[1]:g} for values): calibrate at that rate"
            )
        costs = {i: self.metadata["sensitivity"][str(i)] for i in self.layers}
        dims = {i: c.key.head_dim for i, c in self.layers.items()}
        offered = {
            i: [(k.nested_rates(), v.nested_rates()) for k, v in zip(*(c.by_head() for c in layer), strict=True)]
            for i, layer in self.layers.items()
        }
        try:
            return head_rates(costs, dims, offered, key_bits, value_bits)
        except ValueError as error:
            raise ValueError(f"{error}: calibrate at that rate") from error

    def describe(self) -> str:
        """A line for every layer: bits per element of its keys and of its values, of each head where they differ; and,
        where these follow what errors cost, the share of its heads, each alone, if all heads had the same rate."""
        costs = {int(i): sum(map(sum, heads)) for i, heads in self.metadata.get("sensitivity", {}).items()}
        total = max(sum(costs[i] for i in self.layers), 1e-300) if costs else 1
        lines = [
            f"layer {i}: keys {_by_head(layer.key)} bits, values {_by_head(layer.value)} bits"
            + (f", {costs[i] / total:.1%} of the cost" if costs else "")
            for i, layer in self.layers.items()
        ]
        return "\n".join((repr(self), *lines))

    def with_beam(self, beam: int) -> Codebooks:
        """The same codebooks, encoding with another width of the beam search."""
        if all(codec.beam == beam for layer in self.layers.values() for codec in layer):
            return self
        layers = {i: LayerCodec(*(c.replaced(beam=beam) for c in layer)) for i, layer in self.layers.items()}
        return Codebooks(layers, self.metadata)

    def shard(self, rank: int, ranks: int) -> Codebooks:
        """Those of one rank of a tensor-parallel model, which has an equal part of every layer's KV heads.

        Each head keeps its bits: for a lower rate, take it (`at`) of all heads, and then a part.

        Raises:
            ValueError: the heads of a layer cannot be dealt equally.
        """

        def part(codec: Codec) -> list[Codec]:
            if codec.heads % ranks or not 0 <= rank < ranks:
                raise ValueError(f"{codec.heads} KV heads cannot be dealt to rank={rank} of ranks={ranks}")
            each = codec.heads // ranks
            return codec.by_head()[rank * each : (rank + 1) * each]

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
        """Write a safetensors file. Codewords are float16 (they are rounded to it when learned)."""
        files.write(self.layers, self.metadata, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebooks:
        """Read what `save` wrote, or, of a folder, `save_pretrained`.

        Raises:
            FileNotFoundError: no such file, or no codebooks in the folder.
            ValueError: not a codebook file, damaged, or of an unknown format version.
        """
        return cls(*files.read(hub.find(path) if os.path.isdir(path) else path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `save`'s file into a folder, as ``codebooks.safetensors``, and a model card beside it."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.save(path / hub.FILE)
        card = hub.card(self.layers, self.metadata, self.bits, self.describe())
        (path / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Codebooks:
        """Read what `save_pretrained` or `push_to_hub` wrote.

        Args:
            name: a folder, or a repository of the Hugging Face hub, ``"user/repo"``.
            revision: branch, tag or commit of the repository. token: for private ones.

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
        """Upload the files of `save_pretrained` to a repository of the hub, made if it is not there.

        Args:
            repo_id: ``"user/repo"``. private: of a new repository. token: with the right to write.

        Returns:
            The address of the commit.
        """
        return hub.push(self.save_pretrained, repo_id, private, token, commit_message)


def _at(layer: LayerCodec, rates: list[tuple[float, float]]) -> LayerCodec:
    """A layer's codecs with these rates of the keys and of the values of each head."""
    if rates == list(zip(layer.key.head_bits, layer.value.head_bits, strict=True)):
        return layer
    keys, values = (codec.by_head() for codec in layer)
    return LayerCodec.of_heads(
        [codec.at(bits) for codec, (bits, _) in zip(keys, rates, strict=True)],
        [codec.at(bits) for codec, (_, bits) in zip(values, rates, strict=True)],
    )


def _by_head(codec: Codec) -> str:
    """Bits per element, of each head where they differ."""
    return f"{codec.bits:g}" if len(set(codec.head_bits)) == 1 else ", ".join(f"{bits:g}" for bits in codec.head_bits)
