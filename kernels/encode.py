"""Encode and append for GPUs, in Triton: `torchgsrq.reference.encode` and `append_`, without reading a length on the
host, so that a captured CUDA graph appends at every step and encodes when a block is due."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchgsrq.codec import Codec, Codecs
from torchgsrq.codec.layout import STAGES
from torchgsrq.codec.packed import Packed

from .common import MOST_HEADS, Shape, bits_of, coded_slots, floor_div, layer_head, turn, window

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE = 32  # vectors of a program, the rows of one product


def supports(codecs: Codecs) -> bool:
    """Whether these kernels encode with such codecs; the reference does with the others."""
    # A program keeps the codes of all stages of a group in the bytes of a number.
    return codecs.heads <= MOST_HEADS and all(codec.layout.stages <= STAGES for _, codec in codecs.parts)


@triton.jit
def _exact_dot(r, words):
    """r @ words on tensor cores with float32's precision: words are float16, and r goes in two parts of it."""
    size = tl.max(tl.abs(r), 1)[:, None]
    size = tl.where(size > 0, size, 1.0)
    r = r / size
    high = r.to(tl.float16)
    low = (r - high.to(tl.float32)).to(tl.float16)
    return tl.dot(low, words, tl.dot(high, words)) * size


@triton.jit
def _row(x, window, new_at, old_at, new, held, index, inside, SOME_OLD: tl.constexpr):
    """Elements of vectors, float32, of which some may not be new but in the window."""
    if not SOME_OLD:
        row = tl.load(x + new_at[:, None] + index[None, :], mask=held[:, None] & inside[None, :], other=0)
        return row.to(tl.float32)
    fresh = tl.load(x + new_at[:, None] + index[None, :], mask=(held & new)[:, None] & inside[None, :], other=0)
    old = tl.load(
        window + old_at[:, None] + index[None, :], mask=(held & (new == 0))[:, None] & inside[None, :], other=0
    )
    return tl.where(new[:, None], fresh.to(tl.float32), old.to(tl.float32))


@triton.jit
def encode_group(
    x, window, new_at, old_at, new, held, place, to, mean, transform, book, inv_freq, h, g, N, SOME_OLD: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr,
    FRAME: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, T: tl.constexpr, ETA: tl.constexpr,
):  # fmt: skip
    """Write the codes of group ``g`` of T vectors at positions ``place``, by head ``h`` of a codec, at ``to``."""
    i, j = tl.arange(0, BP), tl.arange(0, BR)
    first_of = i * 2 if INTERLEAVED else i
    second_of = i * 2 + 1 if INTERLEAVED else i + PAIRS
    rest_of = 2 * PAIRS + j
    in_pair, in_rest = i < PAIRS, rest_of < D
    a = _row(x, window, new_at, old_at, new, held, first_of, in_pair, SOME_OLD)
    c = _row(x, window, new_at, old_at, new, held, second_of, in_pair, SOME_OLD)
    r = _row(x, window, new_at, old_at, new, held, rest_of, in_rest, SOME_OLD)
    # R(-frame start) x - R(place in the frame) mean, in the metric of the codes
    w = tl.arange(0, WP)
    row = transform + h * (G * W * D) + (g * W + w)[None, :] * D
    inside = (w < W)[None, :]
    m = tl.load(mean + h * D + rest_of, mask=in_rest, other=0)
    y = tl.zeros([T, WP], tl.float32)
    if 2 * PAIRS < D:
        part = tl.load(row + rest_of[:, None], mask=in_rest[:, None] & inside, other=0)
        y = tl.dot(r - m[None, :], part, input_precision="tf32x3")
    if PAIRS:
        freq = tl.load(inv_freq + i, mask=in_pair, other=0)
        ma = tl.load(mean + h * D + first_of, mask=in_pair, other=0)
        mb = tl.load(mean + h * D + second_of, mask=in_pair, other=0)
        begin = floor_div(place, FRAME) * FRAME
        cos, sin = turn(begin[:, None], freq[None, :])
        place_cos, place_sin = turn((place - begin)[:, None], freq[None, :])
        ya = a * cos + c * sin - (ma * place_cos - mb * place_sin)
        yb = c * cos - a * sin - (mb * place_cos + ma * place_sin)
        part = tl.load(row + first_of[:, None], mask=in_pair[:, None] & inside, other=0)
        y = tl.dot(ya, part, y, input_precision="tf32x3")
        part = tl.load(row + second_of[:, None], mask=in_pair[:, None] & inside, other=0)
        y = tl.dot(yb, part, y, input_precision="tf32x3")
    # `torchgsrq.reference.search_group`, in `torchgsrq.codec.layout.search_steps`
    size = tl.sqrt(tl.sum(y * y, 1))[:, None]
    unit = y / tl.where(size > 0, size, 1.0)
    path = tl.zeros([T], tl.int64)  # the codes of all stages, a byte each
    word = tl.arange(0, 256)
    stages = tl.cdiv(N - g, G)
    steps = stages
    if ETA > 1:
        steps = tl.where(stages > 2, 2 * stages - 1, stages)
    for step in range(steps):
        stage = step % stages
        table = book + (h * N + stage * G + g) * (256 * W)
        old = ((path >> (8 * stage)) & 255).to(tl.int32)
        again = (tl.zeros([T, WP], tl.int32) + step >= stages) & inside  # its own word comes back
        y += tl.load(table + old[:, None] * W + w[None, :], mask=again, other=0).to(tl.float32)
        words = tl.load(table + word[None, :] * W + w[:, None], mask=(w < W)[:, None], other=0)
        wide = words.to(tl.float32)
        loss = tl.sum(wide * wide, 0)[None, :] - 2 * _exact_dot(y, words)
        if ETA > 1:
            apart = tl.sum(y * unit, 1)[:, None] - _exact_dot(unit, words)
            loss += tl.where(step >= stages - 1, ETA - 1.0, 0.0) * apart * apart
        code = tl.argmin(loss, 1)
        y -= tl.load(table + code[:, None] * W + w[None, :], mask=inside, other=0).to(tl.float32)
        path = path ^ ((old ^ code).to(tl.int64) << (8 * stage))
    for stage in range(stages):
        code = (path >> (8 * stage)) & 255
        tl.store(to + g + stage * G, code.to(tl.uint8), mask=held)


@triton.jit(do_not_specialize=["heads", "N"])
def encode_kernel(
    x, x_b, x_h, x_t, position, tokens, out, out_b, out_h, out_t, window, window_b, window_h, slots, start, encoded_,
    mean, transform, book, inv_freq, heads, HEADS, CAPACITY, N,
    APPEND: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
    INTERLEAVED: tl.constexpr, FRAME: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    T: tl.constexpr, ETA: tl.constexpr,
    SINKS: tl.constexpr, RING: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes of one group of T vectors of a row and head: of ``x``, or of the slots that are due to leave the window.
    The head is ``h`` in its codec, whose tables and codes these are, and ``head`` in the layer."""
    tile, bh, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = bh // HEADS, bh % HEADS
    head = layer_head(heads, h).to(tl.int64)
    t = tile * T + tl.arange(0, T)
    low = 0
    first = 0
    if APPEND:
        first = tl.load(slots).to(tl.int32)
        low = tl.minimum(tl.load(encoded_ + b), first)
        last = tl.minimum(first + tokens, CAPACITY)
        due = coded_slots(tl.load(start + 2 * b + 1), last, RECENT, BLOCK) - low
    else:
        due = tokens
    if tile * T < due:
        held = t < due
        if APPEND:
            slot = low + t
            place = slot - tl.load(start + 2 * b)
            new = slot >= first
            # Tokens from before this call are in the window, the others are new.
            old_at = b * window_b + head * window_h + (SINKS + slot % RING) * D
            new_at = (slot - first).to(tl.int64) * x_t
        else:
            slot = t
            place = tl.load(position + b * tokens + t, mask=held, other=0).to(tl.int32)
            new, old_at = held, t
            new_at = t.to(tl.int64) * x_t
        to = out + b * out_b + h * out_h + slot.to(tl.int64) * out_t
        encode_group(x + b * x_b + head * x_h, window, new_at, old_at, new, held, place, to, mean, transform, book,
                     inv_freq, h, g, N, APPEND, D, PAIRS, BP, BR, INTERLEAVED, FRAME, G, W, WP, T, ETA)  # fmt: skip


@triton.jit
def write_kernel(
    x, x_b, x_h, x_t, tokens, window, window_b, window_h, slots, start, length, encoded, HEADS, CAPACITY,
    D: tl.constexpr, BD: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr, RING: tl.constexpr, RECENT: tl.constexpr,
    BLOCK: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """New vectors into the ring and the sinks; then the counters. Runs after the encoding, which reads both."""
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // HEADS, bh % HEADS
    first = tl.load(slots).to(tl.int32)
    d = tl.arange(0, BD)
    source = x + b * x_b + h * x_h
    target = window + b * window_b + h * window_h
    t = tl.maximum(tokens - RING, 0) + tile * T + tl.arange(0, T)
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    v = tl.load(source + t[:, None].to(tl.int64) * x_t + d[None, :], mask=inside, other=0)
    tl.store(target + (SINKS + (first + t) % RING)[:, None] * D + d[None, :], v, mask=inside)
    if tile == 0:
        if SINKS:
            i = tl.arange(0, BS)
            at = tl.load(start + 2 * b + 1) + i - first
            is_new = ((i < SINKS) & (at >= 0) & (at < tokens))[:, None] & (d < D)[None, :]
            sinks = tl.load(source + at[:, None].to(tl.int64) * x_t + d[None, :], mask=is_new, other=0)
            tl.store(target + i[:, None] * D + d[None, :], sinks, mask=is_new)
        if h == 0:
            was = tl.minimum(tl.load(encoded + b), first)
            last = tl.minimum(first + tokens, CAPACITY)  # a write past the end was not checked for, and is dropped
            tl.store(encoded + b, tl.maximum(was, coded_slots(tl.load(start + 2 * b + 1), last, RECENT, BLOCK)))
            if b == 0:
                tl.store(length, last)


def constants(codec: Codec) -> dict[str, Any]:
    """The compile-time arguments of `encode_kernel` that a codec decides; of its numbers of codes, none."""
    s = Shape.of(codec)
    sizes = {"D": s.d, "G": s.g, "W": s.w, "WP": max(16, s.wp), **s.rotary}
    return {**sizes, "T": _TILE, "ETA": codec.eta, "FRAME": codec.frame}


def _launch(codecs: Codecs, x: Tensor, position: Tensor, out: list[Tensor], kv: Packed | None, due: int) -> None:
    """Run `encode_kernel` for at most ``due`` tokens, codec by codec, into ``out``, the codes of each."""
    batch, tokens = x.shape[0], x.shape[2]
    ints = {"SINKS": 0, "RING": 1, "RECENT": 0, "BLOCK": 1, "APPEND": False}
    held, slots, start, encoded = x, position, position, position
    if kv is not None:
        ints = {**window(kv), "APPEND": True}
        held, start, encoded = kv.window, kv.start, kv.encoded
    with torch.cuda.device_of(x):  # Triton launches on the current device
        for (heads, codec), to in zip(codecs.parts, out, strict=True):
            encode_kernel[triton.cdiv(due, _TILE), batch * codec.heads, codec.layout.groups](
                x, *x.stride()[:3], position, tokens, to, *to.stride()[:3], held, *held.stride()[:2], slots, start,
                encoded, codec.mean, codec.transform, codec.codebook,
                codec.inv_freq if codec.inv_freq.numel() else codec.mean, bits_of(heads), codec.heads,
                to.shape[2], codec.layout.codes, **constants(codec), **ints, num_warps=8, num_stages=1,
            )  # fmt: skip


def encode(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """`torchgsrq.reference.encode`, for codecs that `supports` accepts."""
    out = torch.empty((*x.shape[:3], codec.layout.codes), dtype=torch.uint8, device=x.device)
    if out.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        _launch(Codecs.of(codec), x, position.contiguous(), [out], None, x.shape[2])
    return out


def append_(kv: Packed, x: Tensor, slots: Tensor) -> None:
    """`torchgsrq.reference.append_`, for codecs that `supports` accepts. The slots are taken to be consecutive."""
    batch, heads, n, _ = x.shape
    if n == 0 or batch == 0:
        return
    x = x if x.stride(3) == 1 else x.contiguous()
    _launch(kv.codec, x, slots, kv.codes, kv, n + kv.block_tokens - 1)
    grid = (triton.cdiv(min(n, kv.ring), _TILE), batch * heads)
    with torch.cuda.device_of(x):
        write_kernel[grid](
            x, *x.stride()[:3], n, kv.window, *kv.window.stride()[:2], slots, kv.start, kv.length, kv.encoded, heads,
            kv.capacity, **write_constants(kv), num_warps=4, num_stages=1,
        )  # fmt: skip


def write_constants(kv: Packed) -> dict[str, Any]:
    """The compile-time arguments of `write_kernel`."""
    dim = kv.codec.head_dim
    wide = {"BD": triton.next_power_of_2(dim), "BS": triton.next_power_of_2(max(1, kv.sink_tokens))}
    return {"D": dim, "T": _TILE, **wide, **window(kv)}
