"""Codec and Codebooks: what was learned, and its file. Not how it was learned (learning/)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchgsrq.allocation import layer_rates
from torchgsrq.config import GSRQConfig
from torchgsrq.kmeans import train_codebook
from torchgsrq.layout import CODEWORDS, Layout, num_codes, rates

FORMAT = "torchgsrq.codebooks"
VERSION = 4


@dataclass(frozen=True, eq=False)
class Codec:
    """How the vectors of one layer's keys (or values) are coded, per KV head.

    A vector at position p, frame start s = p - p % frame, means
    ``R(s) (R(p - s) mean + inverse @ sum_m codeword_m)``. Values and models without RoPE are the case of an empty
    ``inv_freq``.

    Tensor attributes (float32 but for ``codebook``, read only, shared by every cache):
        mean: ``[heads, head_dim]``, un-rotated.
        transform: ``[heads, layout.dims, head_dim]``, into the metric that the codewords were learned in.
        inverse: ``[heads, head_dim, layout.dims]``, and back; its inverse, or pseudo-inverse.
        codebook: float16 ``[heads, layout.codes, 256, layout.width]``, gains multiplied in.
        inv_freq: ``[pairs]``, RoPE frequencies of the frame rotation; empty for none.
        gains: ``[256]``, or empty. Where present, the first byte of a vector is the index of a gain
            that multiplies the sum of its codewords (the data-free ``universal`` recipe only).

    Non-tensor attributes:
        layout: which code writes which slice.
        interleaved: RoPE pairs are ``(2i, 2i + 1)``.
        beam: width of the encoder's beam search.
        eta: how much more the encoder minds an error along the vector than one across it; 1: equally.
        frame: tokens per anchored frame; 1 without RoPE.
    """

    layout: Layout
    mean: Tensor
    transform: Tensor
    inverse: Tensor
    codebook: Tensor
    inv_freq: Tensor
    gains: Tensor
    interleaved: bool = False
    beam: int = 4
    eta: int = 1
    frame: int = 1
    _copies: dict[torch.device, Codec] = dataclasses.field(default_factory=dict, repr=False)
    _turned: list[Codec] = dataclasses.field(default_factory=list, repr=False)

    @classmethod
    def build(
        cls,
        layout: Layout,
        mean: Tensor,
        transform: Tensor,
        codebook: Tensor,
        *,
        inverse: Tensor | None = None,
        inv_freq: Tensor | None = None,
        frame: int = 1,
        interleaved: bool = False,
        gains: Tensor | None = None,
        beam: int = 4,
        eta: int = 1,
    ) -> Codec:
        """A codec from its mean ``[heads, head_dim]`` and its tables; ``inverse`` may be left out if it exists."""
        inv_freq = mean.new_zeros(0) if inv_freq is None else inv_freq.float().to(mean.device)
        inverse = torch.linalg.inv(transform.double()) if inverse is None else inverse
        return cls(
            layout,
            mean.float().contiguous(),
            transform.float().contiguous(),
            inverse.float().contiguous(),
            codebook.half().contiguous(),
            inv_freq.contiguous(),
            mean.new_zeros(0) if gains is None else gains.float(),
            interleaved,
            beam,
            eta,
            frame if inv_freq.numel() else 1,
        )

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.mean.shape[0]

    @property
    def head_dim(self) -> int:
        """Elements of a vector."""
        return self.layout.head_dim

    @property
    def num_codes(self) -> int:
        """Bytes per vector."""
        return self.layout.codes + bool(self.gains.numel())

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor attributes, in the order of `from_flat`."""
        return [self.mean, self.transform, self.inverse, self.codebook, self.inv_freq, self.gains]

    @property
    def integers(self) -> list[int]:
        """The non-tensor attributes as integers, in the order of `from_flat`."""
        x = self.layout
        return [x.head_dim, x.groups, x.codes, x.dims, int(self.interleaved), self.beam, self.eta, self.frame]

    @classmethod
    def from_flat(cls, tensors: list[Tensor], integers: list[int]) -> Codec:
        """A codec from what ops and tensor subclasses carry: `tensors` and `integers`."""
        *layout, interleaved, beam, eta, frame = integers
        mean, transform, inverse, codebook, inv_freq, gains = tensors
        shape = Layout(*layout)
        return cls(shape, mean, transform, inverse, codebook, inv_freq, gains, bool(interleaved), beam, eta, frame)

    def at(self, bits: float) -> Codec:
        """The same codec at a lower rate: a prefix of its residual stages.

        Raises:
            ValueError: the rate is higher, no whole number of bytes, or leaves a group uncoded.
        """
        codes = bits * self.head_dim / 8 - bool(self.gains.numel())
        if codes != int(codes) or not self.layout.groups <= codes <= self.layout.codes:
            least = 8 * self.layout.groups / self.head_dim
            raise ValueError(
                f"bits={bits} is no prefix of a codec of {self.layout.bits:g} bits in {self.layout.groups} groups: it "
                f"must lie between {least:g} and {self.layout.bits:g} and give whole bytes. Calibrate at that rate"
            )
        if codes == self.layout.codes:
            return self
        layout = dataclasses.replace(self.layout, codes=int(codes))
        codebook = self.codebook[:, : int(codes)].contiguous()
        return dataclasses.replace(self, layout=layout, codebook=codebook, _copies={}, _turned=[])

    @property
    def bits(self) -> float:
        """Bits per element."""
        return 8 * self.num_codes / self.head_dim

    def nested_rates(self) -> list[float]:
        """The rates that `at` takes."""
        gain = bool(self.gains.numel())
        least, most = self.layout.groups + gain, self.layout.codes + gain
        return [bits for bits in rates(self.head_dim) if least <= bits * self.head_dim / 8 <= most]

    def with_frequencies(self, inv_freq: Tensor) -> Codec:
        """The same codec for keys that a model turned by other RoPE frequencies; the last few are kept."""
        for known in self._turned:
            if torch.equal(known.inv_freq, inv_freq.to(known.inv_freq.device)):
                return known
        turned = dataclasses.replace(
            self, inv_freq=inv_freq.detach().to(self.inv_freq, copy=True), _copies={}, _turned=[]
        )
        self._turned[:] = [turned, *self._turned[:1]]
        return turned

    def to(self, device: torch.device | str) -> Codec:
        """The same codec on a device; made once for each."""
        here, there = self.mean.device, torch.device(device)
        if here.type == there.type and there.index in (None, here.index):
            return self
        if there not in self._copies:
            self._copies[there] = Codec.from_flat([t.to(there) for t in self.tensors], self.integers)
        return self._copies[there]

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        return self  # read only

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)


class LayerCodec(NamedTuple):
    """The codecs of one layer."""

    key: Codec
    value: Codec


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
