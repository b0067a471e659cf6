"""The inputs of ops: the tensors of a buffer, where its rows begin, and the options of an attention call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchgsrq.codec.codec import Codecs, heads_of

# What a query reads in full precision; the rest is read from codes. kernels/call.h has the same numbers.
WINDOW = 0  # what the cache holds now: sinks and the recent window
EXACT_TAIL = 1  # the incoming tokens, and the window before they came
STREAMING = 2  # what the window would have held if the tokens had come one at a time

# Alignment of the causal mask.
NOT_CAUSAL, UPPER_LEFT, LAST_ALIGNED = 0, 1, 2


class Options(NamedTuple):
    """The arguments of an attention call besides queries, keys and values, in the order of the ops' arguments.

    Attributes:
        mask: bool (True takes part) or additive, broadcastable to ``[batch, query heads, queries, width]`` with
            a width of at least the length; column j is slot j.
        scale: multiplies ``q . k``.
        causal: ``NOT_CAUSAL``, ``UPPER_LEFT`` (query i attends to slots up to i) or ``LAST_ALIGNED`` (the queries are
            the newest tokens).
        softcap: ``cap * tanh(score / cap)`` before the mask; 0 disables it.
        sink_logits: ``[query heads]``, a logit per head that takes probability and contributes no value.
        key_tail, value_tail: full-precision keys and values of the newest slots, for ``EXACT_TAIL`` and ``STREAMING``.
        tail_start: first valid slot of the tails, ``[batch]``.
        view: ``WINDOW``, ``EXACT_TAIL`` or ``STREAMING``; with a tail, the queries are the newest tokens.
    """

    mask: Tensor | None = None
    scale: float = 1.0
    causal: int = NOT_CAUSAL
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    key_tail: Tensor | None = None
    value_tail: Tensor | None = None
    tail_start: Tensor | None = None
    view: int = WINDOW


def positions(start: Tensor, first: int, last: int) -> Tensor:
    """Positions of slots ``[first, last)``, int64 ``[batch, last - first]``, from a `GSRQTensor.start` with positions
    of any number of slots; positions of later slots count up."""
    slots = torch.arange(first, last, device=start.device)
    known = start.shape[1] - 2
    if not known:
        return slots - start[:, :1]
    return start[:, 2 + slots.clamp(max=known - 1)] + (slots - (known - 1)).clamp(min=0)


def fitted(start: Tensor, capacity: int) -> Tensor:
    """A `GSRQTensor.start` with positions of any number of slots, resized to a buffer of this capacity."""
    if start.shape[1] == 2:
        return start
    return torch.cat((start[:, :2], positions(start, 0, capacity)), 1).to(start.dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """The tensors of one `GSRQTensor`, and its codecs (tensor.py documents them)."""

    window: Tensor
    start: Tensor
    length: Tensor
    encoded: Tensor
    codes: list[Tensor]
    codec: Codecs
    sink_tokens: int
    recent_tokens: int
    block_tokens: int

    @classmethod
    def from_flat(cls, tensors: Sequence[Tensor], integers: Sequence[int]) -> Packed:
        """From the arguments of ops: tensors ``window, start, length, encoded, *codes, *Codecs.tensors``, and integers:
        sink, recent and block tokens, then `Codecs.integers`."""
        sink_tokens, recent_tokens, block_tokens, *rest = integers
        window, start, length, encoded, *more = tensors
        parts = len(heads_of(rest))
        codec = Codecs.from_flat(more[parts:], rest)
        return cls(window, start, length, encoded, more[:parts], codec, sink_tokens, recent_tokens, block_tokens)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.codes[0].shape[2]

    @property
    def ring(self) -> int:
        """Number of slots of the window after the sinks."""
        return self.window.shape[2] - self.sink_tokens

    @property
    def counts_up(self) -> bool:
        """Whether positions count up with the slots in every row."""
        return self.start.shape[1] == 2

    @property
    def sink_start(self) -> Tensor:
        """The slot of each row's first sink, ``[batch]``."""
        return self.start[:, 1]

    def sink_slots(self) -> Tensor:
        """Slots of the sinks, ``[batch, sink_tokens]``."""
        return self.sink_start[:, None] + torch.arange(self.sink_tokens, device=self.start.device)

    def position(self, first: int, last: int) -> Tensor:
        """Positions of slots ``[first, last)`` in each row, ``[batch, last - first]``."""
        return positions(self.start, first, last)

    def recent(self, first: int, last: int) -> Tensor:
        """Window entries of slots ``[first, last)``, ``[batch, heads, last - first, head_dim]``."""
        slots = torch.arange(first, last, device=self.window.device)
        return self.window[:, :, self.sink_tokens + slots.remainder(self.ring)]

    def coded(self, first: int, last: int) -> list[Tensor]:
        """Codes of slots ``[first, last)``, one tensor per part of the codecs."""
        return [codes[:, :, first:last] for codes in self.codes]

    @staticmethod
    def put(held: Tensor, first: int, codes: Tensor, due: Tensor) -> None:
        """Write ``codes`` to the slots of ``held`` from ``first`` on, where ``due``, bool ``[batch, slots]``, is
        set."""
        some = held[:, :, first : first + codes.shape[2]]
        some.copy_(torch.where(due[:, None, :, None], codes, some))
