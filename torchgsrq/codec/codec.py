"""Codec: how the vectors of one layer are coded. Not how that was learned (learning/)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchgsrq.codec.layout import Layout, Run, rates


@dataclass(frozen=True, eq=False)
class Codec:
    """How the vectors of one layer's keys (or values) are coded, per KV head.

    A vector at position p, frame start s = p - p % frame, means
    ``R(s) (R(p - s) mean + inverse @ sum_m codeword_m)``. Values and models without RoPE are the case of an empty
    ``inv_freq``.

    Heads may have layouts of their own. Those that share one are a run, and tables and codes are kept run by run; the
    three tables below whose shape is of a layout are then flattened, one run after the other (`by_run`).

    Tensor attributes (float32 but for ``codebook``, read only, shared by every cache):
        mean: ``[heads, head_dim]``, un-rotated, in the order of the runs.
        transform: ``[heads, layout.dims, head_dim]``, into the metric that the codewords were learned in.
        inverse: ``[heads, head_dim, layout.dims]``, and back; its inverse, or pseudo-inverse.
        codebook: float16 ``[heads, layout.codes, 256, layout.width]``, gains multiplied in.
        inv_freq: ``[pairs]``, RoPE frequencies of the frame rotation; empty for none.
        gains: ``[256]``, or empty. Where present, the first byte of a vector is the index of a gain
            that multiplies the sum of its codewords (the data-free ``universal`` recipe only).

    Non-tensor attributes:
        runs: which heads share a layout, which code of theirs writes which slice; together all heads.
        interleaved: RoPE pairs are ``(2i, 2i + 1)``.
        beam: width of the encoder's beam search.
        eta: how much more the encoder minds an error along the vector than one across it; 1: equally.
        frame: tokens per anchored frame; 1 without RoPE.
    """

    runs: tuple[Run, ...]
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
        """A codec with one layout from its mean ``[heads, head_dim]`` and tables; ``inverse`` may be left out if it
        exists."""
        inv_freq = mean.new_zeros(0) if inv_freq is None else inv_freq.float().to(mean.device)
        inverse = torch.linalg.inv(transform.double()) if inverse is None else inverse
        return cls(
            (Run(tuple(range(mean.shape[0])), layout),),
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
        return self.runs[0].layout.head_dim

    @property
    def layout(self) -> Layout:
        """The layout of all heads.

        Raises:
            ValueError: there are several.
        """
        if len(self.runs) > 1:
            raise ValueError("heads of this codec have layouts of their own: see runs and by_run")
        return self.runs[0].layout

    @property
    def num_codes(self) -> int:
        """Bytes per vector, where all heads have the same layout."""
        return self._bytes(self.layout)

    @property
    def token_bytes(self) -> int:
        """Bytes of the codes of all heads of a token."""
        return sum(len(run.heads) * self._bytes(run.layout) for run in self.runs)

    def _bytes(self, layout: Layout) -> int:
        return layout.codes + bool(self.gains.numel())

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor attributes, in the order of `from_flat`."""
        return [self.mean, self.transform, self.inverse, self.codebook, self.inv_freq, self.gains]

    @property
    def integers(self) -> list[int]:
        """The non-tensor attributes as integers, in the order of `from_flat`: what all heads share, then each run."""
        found = [self.head_dim, int(self.interleaved), self.beam, self.eta, self.frame]
        for heads, x in ((run.heads, run.layout) for run in self.runs):
            found += [x.groups, x.codes, x.dims, len(heads), *heads]
        return found

    @classmethod
    def from_flat(cls, tensors: list[Tensor], integers: list[int]) -> Codec:
        """A codec from what ops and tensor subclasses carry: `tensors` and `integers`."""
        head_dim, interleaved, beam, eta, frame, *rest = integers
        runs = []
        while rest:
            groups, codes, dims, heads, *rest = rest
            runs.append(Run(tuple(rest[:heads]), Layout(head_dim, groups, codes, dims)))
            rest = rest[heads:]
        mean, transform, inverse, codebook, inv_freq, gains = tensors
        turning = (bool(interleaved), beam, eta, frame)
        return cls(tuple(runs), mean, transform, inverse, codebook, inv_freq, gains, *turning)

    def replaced(self, **attributes: Any) -> Codec:
        """The same codec with other attributes."""
        return dataclasses.replace(self, **attributes, _copies={}, _turned=[])

    # -- heads with layouts of their own

    @classmethod
    def of_runs(cls, parts: Sequence[tuple[Sequence[int], Codec]]) -> Codec:
        """One codec from codecs of some heads each, given with these heads; each with one layout, all else alike."""
        if len(parts) == 1:
            return parts[0][1]
        first = parts[0][1]
        runs = tuple(Run(tuple(heads), codec.layout) for heads, codec in parts)
        tables = {name: _cat([getattr(codec, name).flatten() for _, codec in parts]) for name in _OF_LAYOUT}
        return first.replaced(runs=runs, mean=_cat([codec.mean for _, codec in parts]), **tables)

    def by_run(self) -> list[tuple[Any, Codec]]:
        """Of each run its heads, as an index of a dimension of heads, and their codec, which has one layout; views."""
        if len(self.runs) == 1:
            return [(slice(None), self)]
        found: list[tuple[Any, Codec]] = []
        tables = {name: getattr(self, name).split(sizes) for name, sizes in self._sizes().items()}
        for i, run in enumerate(self.runs):
            own = {name: tables[name][i].view(shape) for name, shape in run.shapes.items()}
            own["mean"] = tables["mean"][i]
            runs = (Run(tuple(range(len(run.heads))), run.layout),)
            found.append((list(run.heads), self.replaced(runs=runs, **own)))
        return found

    def _sizes(self) -> dict[str, list[int]]:
        """How much of each table is each run's: of the mean its heads, of flattened ones its elements."""
        shapes = [run.shapes for run in self.runs]
        return {"mean": [len(run.heads) for run in self.runs]} | {
            name: [math.prod(shape[name]) for shape in shapes] for name in _OF_LAYOUT
        }

    def by_head(self) -> list[Codec]:
        """The codec of each head alone, in the layer's order; views."""
        found: list[Codec] = [self] * self.heads
        for run, (_, codec) in zip(self.runs, self.by_run(), strict=True):
            for i, head in enumerate(run.heads):
                tables = {name: getattr(codec, name)[i : i + 1] for name in ("mean", *_OF_LAYOUT)}
                own = (Run((0,), run.layout),)
                found[head] = codec.replaced(runs=own, **tables)
        return found

    def merged(self, parts: Sequence[Tensor]) -> Tensor:
        """What was made run by run, ``[batch, heads of the run, ...]``, as ``[batch, heads, ...]`` in their order."""
        if len(parts) == 1:
            return parts[0]
        each = {
            head: part[:, i : i + 1]
            for run, part in zip(self.runs, parts, strict=True)
            for i, head in enumerate(run.heads)
        }
        return _cat([each[head] for head in range(self.heads)], 1)

    def codes_shape(self, batch: int, n: int) -> tuple[int, int, int, int]:
        """Shape of the codes of n tokens: ``[batch, heads, n, codes]``.

        Where heads have layouts of their own, ``[batch, units, n, unit]`` with the largest unit that each run has a
        whole number of. In memory it is still run after run, ``[heads of the run, n, codes of the run]``
        (`split_codes`).
        """
        unit = 0
        for run in self.runs:  # by Euclid, since sizes may be symbols in a graph, which math.gcd does not take
            rest, unit = unit, self._bytes(run.layout)
            while rest:
                rest, unit = unit % rest, rest
        return batch, self.token_bytes // unit, n, unit

    def split_codes(self, codes: Tensor) -> list[Tensor]:
        """The codes of each run, ``[batch, heads of the run, n, codes of the run]``; views."""
        if len(self.runs) == 1:
            return [codes]
        batch, units, n, unit = codes.shape
        shapes = [(batch, len(run.heads), n, self._bytes(run.layout)) for run in self.runs]
        flat = codes.view(batch, units * n * unit)
        return [x.view(s) for x, s in zip(flat.split([math.prod(s[1:]) for s in shapes], 1), shapes, strict=True)]

    def join_codes(self, parts: Sequence[Tensor]) -> Tensor:
        """Codes of all runs, as `split_codes` takes them apart."""
        if len(parts) == 1:
            return parts[0]
        batch, _, n, _ = parts[0].shape
        flat = _cat([x.reshape(batch, x.shape[1] * n * x.shape[3]) for x in parts], 1)
        return flat.view(self.codes_shape(batch, n))

    def padded_codes(self, codes: Tensor, n: int) -> Tensor:
        """The same codes with zeros behind them, of n tokens in all."""
        out = codes.new_zeros(self.codes_shape(codes.shape[0], n))
        for to, held in zip(self.split_codes(out), self.split_codes(codes), strict=True):
            to[:, :, : held.shape[2]] = held
        return out

    # -- rates

    def at(self, bits: float) -> Codec:
        """The same codec, of one layout, at a lower rate: a prefix of its residual stages.

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
        runs = (dataclasses.replace(self.runs[0], layout=dataclasses.replace(self.layout, codes=int(codes))),)
        codebook = self.codebook[:, : int(codes)].contiguous()
        return self.replaced(runs=runs, codebook=codebook)

    @property
    def bits(self) -> float:
        """Mean bits per element."""
        return 8 * self.token_bytes / (self.heads * self.head_dim)

    @property
    def head_bits(self) -> list[float]:
        """Bits per element of each head."""
        each = {head: 8 * self._bytes(run.layout) / self.head_dim for run in self.runs for head in run.heads}
        return [each[head] for head in range(self.heads)]

    def nested_rates(self) -> list[float]:
        """The rates that `at` takes, of a codec of one layout."""
        gain = bool(self.gains.numel())
        least, most = self.layout.groups + gain, self.layout.codes + gain
        return [bits for bits in rates(self.head_dim) if least <= bits * self.head_dim / 8 <= most]

    def with_frequencies(self, inv_freq: Tensor) -> Codec:
        """The same codec for keys that a model turned by other RoPE frequencies; the last few are kept."""
        for known in self._turned:
            if torch.equal(known.inv_freq, inv_freq.to(known.inv_freq.device)):
                return known
        turned = self.replaced(inv_freq=inv_freq.detach().to(self.inv_freq, copy=True))
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
    """The codecs of one layer. The heads of a run share the layout of their keys and that of their values, so that
    kernels can take them together: both codecs have the same runs, of other layouts."""

    key: Codec
    value: Codec

    @classmethod
    def of_heads(cls, keys: Sequence[Codec], values: Sequence[Codec]) -> LayerCodec:
        """The codecs of a layer from those of each head alone (`Codec.by_head`)."""
        sides = (keys, values)
        if all(len({codec.layout for codec in side}) == 1 for side in sides):  # there may be other numbers of them
            return cls(*(_stacked(side) for side in sides))
        runs: dict[tuple[Layout, Layout], list[int]] = {}
        for head, (key, value) in enumerate(zip(keys, values, strict=True)):
            runs.setdefault((key.layout, value.layout), []).append(head)
        return cls(*(Codec.of_runs([(h, _stacked([side[i] for i in h])) for h in runs.values()]) for side in sides))


_OF_LAYOUT = ("transform", "inverse", "codebook")  # tables whose shape is of a layout


def _stacked(codecs: Sequence[Codec]) -> Codec:
    """One codec of heads with the same layout."""
    tables = {name: _cat([getattr(codec, name) for codec in codecs]) for name in ("mean", *_OF_LAYOUT)}
    runs = (Run(tuple(range(len(codecs))), codecs[0].layout),)
    return codecs[0].replaced(runs=runs, **tables)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, within autocast too, which refuses it for float16 if its own type is another."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat(list(tensors), dim)
