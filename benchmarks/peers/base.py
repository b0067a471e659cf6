"""What every method of the comparison does: decode what it would store, and count its bits.

The model's own cache keeps exact keys and values; attention shows each query the method's decoded tokens where a
token-by-token decode would have stored them, and exact ones in the sinks and the recent window. So a prompt is read
through the quantized cache in one forward, and nothing of a method's quality depends on a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from torchgsrq import Codec
from torchgsrq.codec import Codecs
from torchgsrq.codec.rope import rotate
from torchgsrq.learning.statistics import Statistics, Vectors
from torchgsrq.models import LayerInfo
from torchgsrq.ops import round_trip

NAME = "torchgsrq_peer"


class Method:
    """A way to store keys and values.

    Attributes:
        name: in tables. sinks, recent, block: tokens kept exact at the beginning and the end, and how many leave the
            window at a time.
        forgets: what leaves the window is gone. layers: of the model, by index.
    """

    name = "full precision"
    sinks, recent, block = 1, 32, 1
    forgets = False

    def __init__(self) -> None:
        self.layers: dict[int, LayerInfo] = {}
        self.errors: dict[int, Tensor] = {}  # of the attention output, and its size, squared

    def fit(self, stats: dict[int, Statistics]) -> None:
        """Learn from calibration statistics what the method learns beforehand."""
        self.layers = {index: s.info for index, s in stats.items()}
        for index, s in stats.items():
            self.fit_layer(index, s)

    def fit_layer(self, index: int, stats: Statistics) -> None:
        """Learn what one layer needs."""

    def keys(self, index: int, k: Tensor) -> Tensor:
        """Rotated keys ``[b, heads, n, d]`` of the tokens 0 to n, as the method would decode them."""
        return k

    def values(self, index: int, v: Tensor) -> Tensor:
        """Values ``[b, heads, n, d]``, decoded."""
        return v

    def bits(self, info: LayerInfo) -> float:
        """Stored bits per element of a token outside the window, with scales and indices, without codebooks."""
        return 32.0

    def codebook_bytes(self) -> int:
        """Bytes of what is learned beforehand."""
        return 0

    def output_errors(self) -> dict[int, float]:
        """Relative squared error of the attention output by layer, over all texts that were read."""
        return {index: float(wrong / size) for index, (wrong, size) in sorted(self.errors.items())}

    def true_bits(self, tokens: int, codebooks: bool = True) -> float:
        """Bits per element of a cache of this many tokens in 16 bits, everything counted, or all but codebooks."""
        elements = sum(2 * info.kv_heads * info.head_dim for info in self.layers.values())
        exact = min(tokens, self.sinks + self.recent)
        coded = sum(2 * info.kv_heads * info.head_dim * self.bits(info) for info in self.layers.values())
        learned = 8 * self.codebook_bytes() if codebooks else 0
        total = exact * 16 * elements + (tokens - exact) * coded + learned
        return total / (elements * tokens)


def before_rope(k: Tensor, info: LayerInfo) -> Tensor:
    """Keys ``[b, heads, n, d]`` as they were before RoPE, float32."""
    return rotate(k.float(), -torch.arange(k.shape[2], device=k.device), info.inv_freq, info.interleaved)


def after_rope(k: Tensor, info: LayerInfo) -> Tensor:
    """The inverse of `before_rope`."""
    return rotate(k, torch.arange(k.shape[2], device=k.device), info.inv_freq, info.interleaved)


def as_decoded(x: Tensor, codec: Codec | Codecs, position: Tensor | None = None) -> Tensor:
    """Vectors ``[b, heads, n, d]`` after one of this project's codecs; positions ``[n]`` matter to keys in frames."""
    at = torch.zeros(x.shape[2], dtype=torch.long) if position is None else position
    return round_trip(x, at.expand(x.shape[0], -1), codec)


_method: Method | None = None
_stored: dict[int, tuple[Tensor, Tensor]] = {}  # what a layer last read from an empty cache, decoded


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert _method is not None
    index = module.layer_idx
    rows, n, first = key.shape[0], key.shape[2], key.shape[2] - query.shape[2]
    if not first:
        _stored[index] = _method.keys(index, key).to(key.dtype), _method.values(index, value).to(value.dtype)
    keys, values = (x.expand(rows, -1, -1, -1) for x in _stored[index])  # of a text that several questions follow
    at = torch.arange(first, n, device=key.device)[:, None]
    boundary = (at + 1 - _method.recent).clamp_min(0) // _method.block * _method.block
    if int(boundary.max()) > keys.shape[2]:
        raise ValueError(f"{query.shape[2]} tokens after a text are more than the {_method.recent} of the window")

    def seen(tokens: int, stored: bool) -> Tensor:
        slots = torch.arange(tokens, device=key.device)
        inside = (slots >= _method.sinks) & (slots < boundary)
        return (slots <= at) & (inside if stored else ~inside)

    given, mask = (key, value), seen(n, False)
    if not _method.forgets:
        key, value = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        mask = torch.cat((seen(keys.shape[2], True), mask), 1)
    attend = functools.partial(F.scaled_dot_product_attention, query, scale=scaling, enable_gqa=True)
    out = attend(key, value, attn_mask=mask)
    if not first:
        exact = attend(*given, is_causal=True)
        sums = torch.stack(((out - exact).square().sum(), exact.square().sum())).double()
        _method.errors[index] = _method.errors.get(index, torch.zeros(2)) + sums
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def all_of(vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Keys or values ``[heads, n, d]`` of all tokens that were read, and what their errors cost ``[heads, n]``.

    Raises:
        ValueError: of a long text a part is kept alone, drawn by what errors cost, which is for `train` to put right.
    """
    if any(bool((count > 1).any()) for count in vectors.count):
        raise ValueError("a method that learns from all vectors cannot be measured at so many --tokens; use 16384")
    return torch.cat(vectors.x, 1), torch.cat(vectors.weight, 1)


@contextmanager
def through(model: PreTrainedModel, method: Method) -> Iterator[None]:
    """Forwards read their past as the method would have stored it.

    Rows have no padding and begin at position 0; or they follow a single row that was read before, by fewer tokens than
    the window holds.
    """
    global _method
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _method = method
    try:
        yield
    finally:
        _method = None
        _stored.clear()
        model.set_attn_implementation(before)
