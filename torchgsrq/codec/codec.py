"""Codec: how the vectors of one layer are coded. Not how that was learned (learning/)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchgsrq.codec.layout import Layout, rates


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
