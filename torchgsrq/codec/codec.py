"""Codec: how the vectors of one layer are coded. Training is in learning/."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchgsrq.codec.layout import Layout

TABLES = ("mean", "transform", "inverse", "codebook")


@dataclass(frozen=True, eq=False)
class Codec:
    """How the keys (or the values) of some KV heads of a layer are coded, all with one layout.

    A vector at position p, with frame start s = p - p % frame, decodes to
    ``R(s) (R(p - s) mean + inverse @ sum_m codeword_m)``. For values, and for models without RoPE, ``inv_freq`` is
    empty and there is no rotation.

    Tensor attributes (float32 except ``codebook``, read-only, shared by all caches):
        mean: ``[heads, head_dim]``, un-rotated.
        transform: ``[heads, head_dim, head_dim]``, into the metric in which the codewords were learned.
        inverse: ``[heads, head_dim, head_dim]``, back from the metric.
        codebook: float16 ``[heads, codes, 256, width]``, gains included; its shape determines the `layout`.
        inv_freq: ``[pairs]``, RoPE frequencies of the frame rotation; empty for no rotation.

    Non-tensor attributes:
        interleaved: RoPE pairs are ``(2i, 2i + 1)`` instead of ``(i, i + pairs)``.
        eta: weight, in the encoder's loss, of an error along the vector relative to one across it.
        frame: tokens per anchored frame; 1 without RoPE.
    """

    mean: Tensor
    transform: Tensor
    inverse: Tensor
    codebook: Tensor
    inv_freq: Tensor
    interleaved: bool = False
    eta: int = 1
    frame: int = 1

    @classmethod
    def build(
        cls,
        mean: Tensor,
        transform: Tensor,
        codebook: Tensor,
        *,
        inverse: Tensor | None = None,
        inv_freq: Tensor | None = None,
        frame: int = 1,
        interleaved: bool = False,
        eta: int = 1,
    ) -> Codec:
        """A codec from its mean ``[heads, head_dim]`` and tables, of any dtype; ``inverse`` is computed if absent."""
        inv_freq = mean.new_zeros(0) if inv_freq is None else inv_freq.float().to(mean.device)
        inverse = torch.linalg.inv(transform.double()) if inverse is None else inverse
        return cls(
            mean.float().contiguous(),
            transform.float().contiguous(),
            inverse.float().contiguous(),
            codebook.half().contiguous(),
            inv_freq.contiguous(),
            interleaved,
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
        return self.mean.shape[1]

    @property
    def layout(self) -> Layout:
        """The layout of all heads."""
        _, codes, _, width = self.codebook.shape
        return Layout(self.head_dim, self.head_dim // width, codes)

    @property
    def bits(self) -> float:
        """Bits per element."""
        return self.layout.bits

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor attributes, in the order of `from_flat`."""
        return [self.inv_freq, *(getattr(self, name) for name in TABLES)]

    @property
    def integers(self) -> list[int]:
        """The non-tensor attributes as integers, in the order of `from_flat`."""
        return [int(self.interleaved), self.eta, self.frame]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor], integers: Sequence[int]) -> Codec:
        """A codec from `tensors` and `integers`, as ops carry them."""
        inv_freq, mean, transform, inverse, codebook = tensors
        interleaved, eta, frame = integers
        return cls(mean, transform, inverse, codebook, inv_freq, bool(interleaved), eta, frame)

    def replaced(self, **attributes: Any) -> Codec:
        """The same codec with other attributes."""
        return dataclasses.replace(self, **attributes)

    def of_heads(self, heads: slice) -> Codec:
        """The codec of a slice of its heads, as views."""
        return self.replaced(**{name: getattr(self, name)[heads] for name in TABLES})

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        return self  # read-only


@dataclass(frozen=True, eq=False)
class Codecs:
    """The codecs of a layer's keys, or of its values: heads with the same rate share one.

    Attributes:
        parts: pairs of head indices, in ascending order, and their codec. Every head of the layer is in exactly one
            part. The codecs differ only in their tables.
    """

    parts: tuple[tuple[tuple[int, ...], Codec], ...]
    _said: str = dataclasses.field(default="", repr=False)  # `integers` as text: see there
    _copies: dict[torch.device, Codecs] = dataclasses.field(default_factory=dict, repr=False)
    _turned: list[Codecs] = dataclasses.field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        named = [head for heads, _ in self.parts for head in heads]
        fits = all(len(heads) == codec.heads and list(heads) == sorted(heads) for heads, codec in self.parts)
        if not named or sorted(named) != list(range(len(named))) or not fits:
            raise ValueError(f"heads={[heads for heads, _ in self.parts]} are not those of a layer and of its codecs")
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_said", " ".join(map(str, self._integers())))

    @classmethod
    def of(cls, codec: Codec | Codecs) -> Codecs:
        """`Codecs` from one codec for all heads; `Codecs` are returned unchanged."""
        return codec if isinstance(codec, Codecs) else cls(((tuple(range(codec.heads)), codec),))

    @property
    def first(self) -> Codec:
        """The first codec, for what all codecs have in common: head_dim, frames and their rotation."""
        return self.parts[0][1]

    @property
    def heads(self) -> int:
        """KV heads."""
        return sum(len(heads) for heads, _ in self.parts)

    @property
    def head_dim(self) -> int:
        """Elements of a vector."""
        return self.first.head_dim

    @property
    def inv_freq(self) -> Tensor:
        """RoPE frequencies of the frame rotation; empty for none."""
        return self.first.inv_freq

    @property
    def frame(self) -> int:
        """Tokens per anchored frame."""
        return self.first.frame

    @property
    def head_bits(self) -> list[float]:
        """Bits per element of each head."""
        return [bits for _, bits in sorted((head, codec.bits) for heads, codec in self.parts for head in heads)]

    @property
    def bits(self) -> float:
        """Mean bits per element."""
        return sum(self.head_bits) / self.heads

    @property
    def tensors(self) -> list[Tensor]:
        """All tables, in the order of `from_flat`: the frequencies once, then the tables of every part."""
        return [self.inv_freq, *(t for _, codec in self.parts for t in codec.tensors[1:])]

    @property
    def integers(self) -> list[int]:
        """The integers of the codecs, then, for every part, the number of its heads and their indices.

        They are stored as text: torch.compile guards a string, but could turn numbers into symbols, and one graph would
        then serve the codecs of several layers.
        """
        return [int(word) for word in self._said.split()] if self._said else self._integers()

    def _integers(self) -> list[int]:
        return [*self.first.integers, *(x for heads, _ in self.parts for x in (len(heads), *heads))]

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor], integers: Sequence[int]) -> Codecs:
        """`Codecs` from `tensors` and `integers`, as ops and tensor subclasses carry them."""
        shared, several = integers[:3], heads_of(integers)
        tables = [tensors[1 + 4 * i : 5 + 4 * i] for i in range(len(several))]
        codecs = [Codec.from_flat([tensors[0], *some], shared) for some in tables]
        return cls(tuple(zip(several, codecs, strict=True)))

    def by_head(self) -> list[Codec]:
        """The codec of each head alone, in order, as views."""
        each = {head: codec.of_heads(slice(i, i + 1)) for heads, codec in self.parts for i, head in enumerate(heads)}
        return [each[head] for head in range(self.heads)]

    def merged(self, parts: Sequence[Tensor]) -> Tensor:
        """Merge results of each part, ``[batch, heads of the part, ...]``, into ``[batch, heads, ...]``."""
        if len(parts) == 1:
            return parts[0]
        order = [head for heads, _ in self.parts for head in heads]
        back = sorted(range(len(order)), key=order.__getitem__)
        return _cat(parts, 1)[:, back]

    def with_frequencies(self, inv_freq: Tensor) -> Codecs:
        """The same for keys that a model rotates by other RoPE frequencies; the last two results are cached."""
        for known in self._turned:
            if torch.equal(known.inv_freq, inv_freq.to(known.inv_freq.device)):
                return known
        inv_freq = inv_freq.detach().to(self.inv_freq, copy=True)
        turned = Codecs(tuple((heads, codec.replaced(inv_freq=inv_freq)) for heads, codec in self.parts))
        self._turned[:] = [turned, *self._turned[:1]]
        return turned

    def to(self, device: torch.device | str) -> Codecs:
        """The same on a device; copied once per device."""
        here, there = self.inv_freq.device, torch.device(device)
        if here.type == there.type and there.index in (None, here.index):
            return self
        if there not in self._copies:
            self._copies[there] = Codecs.from_flat([t.to(there) for t in self.tensors], self.integers)
        return self._copies[there]

    def __deepcopy__(self, memo: dict[int, Any]) -> Codecs:
        return self  # read-only

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors)


class LayerCodec(NamedTuple):
    """The codecs of one layer: heads that share a codec for their keys also share one for their values."""

    key: Codecs
    value: Codecs

    @classmethod
    def of_heads(cls, keys: Sequence[Codec], values: Sequence[Codec]) -> LayerCodec:
        """The codecs of a layer from the codecs of single heads (`Codecs.by_head`)."""
        sides = (keys, values)
        if all(len({codec.layout for codec in side}) == 1 for side in sides):  # keys and values may differ in number
            return cls(*(Codecs.of(_stacked(side)) for side in sides))
        alike: dict[tuple[Layout, Layout], list[int]] = {}
        for head, (key, value) in enumerate(zip(keys, values, strict=True)):
            alike.setdefault((key.layout, value.layout), []).append(head)
        several = [tuple(heads) for heads in alike.values()]
        return cls(*(Codecs(tuple((h, _stacked([side[i] for i in h])) for h in several)) for side in sides))


def heads_of(integers: Sequence[int]) -> list[tuple[int, ...]]:
    """The heads of every part, from `Codecs.integers`."""
    rest, found = list(integers[3:]), []
    while rest:
        count, *rest = rest
        found.append(tuple(rest[:count]))
        rest = rest[count:]
    return found


def _stacked(codecs: Sequence[Codec]) -> Codec:
    """Stack codecs with the same layout into one."""
    return codecs[0].replaced(**{name: _cat([getattr(codec, name) for codec in codecs]) for name in TABLES})


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` that also works within autocast, which refuses float16 if its own dtype differs."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat(list(tensors), dim)
