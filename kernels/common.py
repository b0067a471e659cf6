"""What the Triton kernels share: rotation angles, sums of codewords, and padded sizes of a codec."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from torchgsrq.codec import Codec
from torchgsrq.codec.packed import Packed

TWO_PI = tl.constexpr(6.283185307179586)


@dataclass(frozen=True)
class Shape:
    """Sizes of a codec as kernels want them: padded to powers of two, of at least what a product takes.

    Attributes:
        d: head_dim. pairs: pairs of the frame rotation.
        g, w, n: groups, their width, codes. gp, wp: padded.
    """

    d: int
    pairs: int
    g: int
    w: int
    n: int
    gp: int
    wp: int
    interleaved: bool

    @classmethod
    def of(cls, codec: Codec) -> Shape:
        """The sizes of a codec."""
        x = codec.layout
        groups, width = triton.next_power_of_2(x.groups), triton.next_power_of_2(x.width)
        width = max(width, 16 // groups)  # products take at least 16 columns
        pairs = codec.inv_freq.numel()
        return cls(x.head_dim, pairs, x.groups, x.width, x.codes, groups, width, codec.interleaved)

    @property
    def rotary(self) -> dict[str, int | bool]:
        """How a vector is cut: pairs, and the elements past them, both padded."""
        pairs = max(16, triton.next_power_of_2(self.pairs))
        rest = max(16, triton.next_power_of_2(self.d - 2 * self.pairs))
        return {"PAIRS": self.pairs, "BP": pairs, "BR": rest, "INTERLEAVED": self.interleaved}


MOST_HEADS = 64  # of a layer; those of a codec are the bits of a number, so that kernels need no tensor of them


def bits_of(heads: tuple[int, ...]) -> int:
    """The heads of a codec, as `layer_head` takes them."""
    return sum(1 << head for head in heads)


@triton.jit
def layer_head(heads, i):
    """Which head of the layer head ``i`` of a codec is: the place of bit ``i`` among those set in ``heads``."""
    j = tl.arange(0, 64)
    held = ((heads.to(tl.int64) >> j) & 1).to(tl.int32)
    before = tl.cumsum(held, 0) - held
    return tl.sum(tl.where((held == 1) & (before == i), j, 0), 0)


def window(kv: Packed) -> dict[str, int]:
    """Sizes of a cache's window."""
    return {"SINKS": kv.sink_tokens, "RING": kv.ring, "RECENT": kv.recent_tokens, "BLOCK": kv.block_tokens}


@triton.jit
def floor_div(a, b: tl.constexpr):
    """Division that rounds down, for |a| < 2^30; Triton's rounds towards zero."""
    big: tl.constexpr = (1 << 30) // b
    return (a + big * b) // b - big


@triton.jit
def coded_slots(first, length, RECENT: tl.constexpr, BLOCK: tl.constexpr):
    """`torchgsrq.reference.coded_slots`."""
    return tl.minimum(length, first + tl.maximum(length - first - RECENT, 0) // BLOCK * BLOCK)


@triton.jit
def place_of(slots, held, stride, table, page_stride, PAGE: tl.constexpr):
    """Where tokens are: ``stride`` after each other, in one piece (``PAGE`` is 0) or on pages of so many tokens, which
    a table names. A tile may begin anywhere on a page, so every token looks up its own."""
    at = slots * stride
    if PAGE:
        page = tl.load(table + slots // PAGE, mask=held, other=0).to(tl.int64)
        at = page * page_stride + slots % PAGE * stride
    return at


@triton.jit
def turn(position, freq):
    """Cosine and sine of RoPE angles, to 1e-6.

    The product is float64, since float32 loses the angle at far positions. Series on a quarter turn: the library's
    functions bring a slow path for large angles, and a stack for it, into every loop.
    """
    turns = position * (freq.to(tl.float64) / TWO_PI)
    quarters = tl.floor(turns * 4 + 0.5)
    x = ((turns - quarters * 0.25) * TWO_PI).to(tl.float32)  # at most pi / 4
    z = x * x
    sin = x * (1 + z * (-1.6666667e-1 + z * (8.3333310e-3 + z * (-1.9840874e-4 + z * 2.7525562e-6))))
    cos = 1 + z * (-0.5 + z * (4.1666668e-2 + z * (-1.3888889e-3 + z * 2.4801587e-5)))
    quarter = quarters.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    c, s = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def codewords(
    codes, book, at, held, G: tl.constexpr, GP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    N: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums of the codewords of tokens, [BT, GP * WP]; rows of the book are aligned, so loads are of 16 bytes."""
    g, e = tl.arange(0, GP), tl.arange(0, WP)
    if N == G:  # one stage: nothing to sum
        code = tl.load(codes + at[:, None] + g[None, :], mask=held[:, None] & (g < G)[None, :], other=0)
        row = (g[None, :] * 256 + code.to(tl.int32)) * W
        inside = (g < G)[None, :, None] & (e < W)[None, None, :]
        word = tl.load(book + row[:, :, None] + e[None, None, :], mask=inside, other=0.0)
        return tl.reshape(word.to(DTYPE), [BT, GP * WP])
    y = tl.zeros([BT, GP, WP], DTYPE)
    for first in tl.range(0, N, G, loop_unroll_factor=2):
        m = first + g
        live = (g < G) & (m < N)
        code = tl.load(codes + at[:, None] + m[None, :], mask=held[:, None] & live[None, :], other=0)
        row = (m[None, :] * 256 + code.to(tl.int32)) * W
        inside = live[None, :, None] & (e < W)[None, None, :]
        y += tl.load(book + row[:, :, None] + e[None, None, :], mask=inside, other=0.0).to(DTYPE)
    return tl.reshape(y, [BT, GP * WP])
