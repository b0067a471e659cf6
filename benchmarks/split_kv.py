"""Full-precision decode attention, split over tokens: the baseline that attention on codes has to beat on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_kernel(
    q, k, v, part, top_, mass_, scale, LENGTH, EACH, HEADS, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """One split of one KV head; its grouped queries are the rows."""
    bh, split = tl.program_id(0), tl.program_id(1)
    r, d, t = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BT)
    row = (r < GROUP)[:, None]
    x = tl.load(q + (bh * GROUP + r)[:, None] * D + d[None, :], mask=row, other=0)
    top = tl.full([BM], -float("inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    base = bh.to(tl.int64) * LENGTH * D
    for first in range(split * EACH, tl.minimum(LENGTH, (split + 1) * EACH), BT):
        at = first + t
        held = at < LENGTH
        keys = tl.load(k + base + at[None, :] * D + d[:, None], mask=held[None, :], other=0)
        s = tl.where(held[None, :], tl.dot(x, keys) * scale * LOG2E, -float("inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        p, fade = tl.exp2(s - peak[:, None]), tl.exp2(top - peak)
        values = tl.load(v + base + at[:, None] * D + d[None, :], mask=held[:, None], other=0)
        mass = mass * fade + tl.sum(p, 1)
        out = tl.dot(p.to(values.dtype), values, out * fade[:, None])
        top = peak
    to = (split * tl.num_programs(0) + bh) * BM + r
    tl.store(part + to[:, None] * D + d[None, :], out)
    tl.store(top_ + to, top)
    tl.store(mass_ + to, mass)


@triton.jit
def merge_kernel(part, top_, mass_, out, SPLITS, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """Merge the splits of one KV head."""
    bh = tl.program_id(0)
    r, d = tl.arange(0, BM), tl.arange(0, D)
    top = tl.full([BM], -1e30, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    y = tl.zeros([BM, D], tl.float32)
    for split in range(SPLITS):
        at = (split * tl.num_programs(0) + bh) * BM + r
        other = tl.load(top_ + at)
        peak = tl.maximum(top, other)
        fade, weight = tl.exp2(top - peak), tl.exp2(other - peak)
        mass = mass * fade + tl.load(mass_ + at) * weight
        y = y * fade[:, None] + tl.load(part + at[:, None] * D + d[None, :]) * weight[:, None]
        top = peak
    to = (bh * GROUP + r)[:, None] * D + d[None, :]
    tl.store(out + to, (y / mass[:, None]).to(out.dtype.element_ty), mask=(r < GROUP)[:, None])


def decode(q: Tensor, k: Tensor, v: Tensor, processors: int) -> Tensor:
    """Attention of ``q [batch, q_heads, 1, d]`` to contiguous ``k, v [batch, heads, length, d]``."""
    batch, q_heads, _, dim = q.shape
    heads, length = k.shape[1:3]
    group = q_heads // heads
    rows, tokens = max(16, triton.next_power_of_2(group)), 64
    splits = max(1, min(triton.cdiv(4 * processors, batch * heads), triton.cdiv(length, 256)))
    each = triton.cdiv(triton.cdiv(length, splits), tokens) * tokens
    splits = triton.cdiv(length, each)
    part = torch.empty(splits, batch * heads, rows, dim, device=q.device)
    top, mass = torch.empty(2, splits, batch * heads, rows, device=q.device)
    out = torch.empty_like(q)
    split_kernel[(batch * heads, splits)](
        q, k, v, part, top, mass, dim**-0.5, length, each, heads, group, dim, rows, tokens, num_warps=4, num_stages=3
    )
    merge_kernel[(batch * heads,)](part, top, mass, out, splits, group, dim, rows, num_warps=4)
    return out
