"""Attention on codes for GPUs, in Triton: tokens are split between programs and merged by log-sum-exp.

What it computes is `torchgsrq.reference.attention`. No length is read on the host and the grid depends on shapes
alone, so that a captured CUDA graph replays at every length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchgsrq.codec import Codec, Codecs, packed
from torchgsrq.codec.packed import Options, Packed

from .common import (
    MOST_HEADS,
    Shape,
    bits_of,
    coded_slots,
    codewords,
    floor_div,
    layer_head,
    place_of,
    turn,
    window,
)

LOG2E = tl.constexpr(1.4426950408889634)
WINDOW, EXACT_TAIL = tl.constexpr(packed.WINDOW), tl.constexpr(packed.EXACT_TAIL)
LAST_ALIGNED = tl.constexpr(packed.LAST_ALIGNED)


@dataclass(frozen=True)
class Plan:
    """How one call is cut up: a function of shapes alone.

    Attributes:
        rows: query rows of a program (grouped queries of one KV head share it), a power of two of at least 16.
        tokens: tokens of an iteration; all of one frame.
        splits: programs that share the codes of a row and KV head.
        warps: warps of a program.
    """

    rows: int
    tokens: int
    splits: int
    warps: int


MERGE_ROWS = 16  # query rows that a program of the merge takes


def plan(key: Codec, rows: int, capacity: int, programs: int, processors: int, half: bool) -> Plan:
    """The plan for ``rows`` query rows per KV head and ``programs`` rows of the batch times KV heads."""
    # What registers hold without spilling: see benchmarks/cross_compile.py.
    wide = key.head_dim > 128
    block = 32 if rows > 16 and half and not wide else 16
    frame = frame_of(key)
    tokens = 16
    if half:
        tokens = 128 if block == 16 and not wide else 64
    while frame % tokens:
        tokens //= 2
    tiles = programs * triton.cdiv(rows, block)
    splits = max(1, min(triton.cdiv(2 * processors, tiles), triton.cdiv(capacity, 256), 256))
    return Plan(block, tokens, splits, 8)


def frame_of(key: Codec | Codecs) -> int:
    """Tokens of a frame; without RoPE, all tokens."""
    return key.frame if key.inv_freq.numel() else 1 << 20


def supports(key: Codecs, value: Codecs) -> bool:
    """Whether these kernels read such codecs; the reference reads the others."""
    framed = not key.inv_freq.numel() or key.frame % 16 == 0
    together = [heads for heads, _ in key.parts] == [heads for heads, _ in value.parts]
    return framed and together and key.heads <= MOST_HEADS and not value.inv_freq.numel()


@triton.jit
def _finish(
    s, slots, allowed, row, head, query, batch, mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale, softcap,
    query_slot, MASK: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scale, soft cap, mask: scores [rows, tokens], -inf where a slot does not take part."""
    s = s * scale
    if SOFTCAP:
        s = softcap * (1 - 2 / (tl.exp2(2 * LOG2E * s / softcap) + 1))
    if CAUSAL:
        allowed = allowed & (slots[None, :] <= query_slot[:, None])
    if MASK:
        column = tl.minimum(slots, mask_w - 1)
        at = (
            batch * mask_b
            + head[:, None].to(tl.int64) * mask_h
            + query[:, None].to(tl.int64) * mask_q
            + column[None, :] * mask_t
        )
        extra = tl.load(mask + at, mask=allowed & row[:, None], other=0)
        if MASK == 1:
            allowed = allowed & (extra != 0)
        else:
            s = s + extra.to(tl.float32)
    return tl.where(allowed, s, -float("inf"))


@triton.jit
def _absorb(s, v, top, mass, out, PRECISION: tl.constexpr):
    """Add scores [rows, tokens] and values [tokens, width] to an online softmax."""
    peak = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(peak == -float("inf"), 0.0, peak)
    p = tl.exp2((s - safe[:, None]) * LOG2E)
    fade = tl.exp2((top - safe) * LOG2E)
    mass = mass * fade + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
    return peak, mass, out


@triton.jit
def _elements(q, row, base, index, live):
    """Elements ``index`` of query rows, float32 [rows, elements]."""
    return tl.load(q + base[:, None] + index[None, :], mask=row[:, None] & live[None, :], other=0).to(tl.float32)


@triton.jit
def exact_split(
    q, base, k_exact, k_xb, k_xh, k_xt, v_exact, v_xb, v_xh, v_xt, k_window, k_wb, k_wh, v_window, v_wb, v_wh,
    b, h, row, head, query, query_slot, place, length, low, boundary, sink, first_sink, past_sink,
    mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale, softcap, exact_out, TAIL,
    D: tl.constexpr, BD: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr, RING: tl.constexpr, VIEW: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, sink_t, old, old_t, table, page_stride, PAGE: tl.constexpr,
):  # fmt: skip
    """The newest tokens, from the ring or from what came with the queries, and the sinks. With pages of ``PAGE`` tokens
    those from before the tail are there, in ``old``, keys and values side by side."""
    top = tl.full([BM], -float("inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    d = tl.arange(0, BD)
    t = tl.arange(0, BT)
    out = tl.zeros([BM, BD], tl.float32)
    x = _elements(q, row, base, d, d < D).to(DTYPE)
    kx = k_exact + b * k_xb + h * k_xh
    vx = v_exact + b * v_xb + h * v_xh
    for first in range(low, length, BT):
        slots = first + t
        held = slots < length
        at = (slots - (length - TAIL)).to(tl.int64)
        if VIEW == WINDOW:
            at = (SINKS + slots % RING).to(tl.int64)
        k_from, v_from = kx + at * k_xt, vx + at * v_xt
        if PAGE:
            before = at < 0
            from_page = old + place_of(slots, before, old_t, table, page_stride, PAGE)
            k_from = tl.where(before, from_page, k_from)
            v_from = tl.where(before, from_page + D, v_from)
        k = tl.load(k_from[None, :] + d[:, None], mask=held[None, :] & (d < D)[:, None], other=0)
        v = tl.load(v_from[:, None] + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0)
        held = held & ((slots < first_sink) | (slots >= past_sink))
        allowed = held[None, :] & (slots[None, :] >= boundary[:, None])
        s = tl.dot(x, k.to(DTYPE), input_precision=PRECISION)
        s = _finish(s, slots, allowed, row, head, query, b, mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale,
                    softcap, query_slot, MASK, SOFTCAP, CAUSAL)  # fmt: skip
        top, mass, out = _absorb(s, v.to(DTYPE), top, mass, out, PRECISION)
    if SINKS:
        i = tl.arange(0, BS)
        slots = sink + i
        held = (i < SINKS) & (slots < length)
        kx = k_window + b * k_wb + h * k_wh
        vx = v_window + b * v_wb + h * v_wh
        k = tl.load(kx + i[None, :] * sink_t + d[:, None], mask=held[None, :] & (d < D)[:, None], other=0)
        v = tl.load(vx + i[:, None] * sink_t + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0)
        s = tl.dot(x, k.to(DTYPE), input_precision=PRECISION)
        s = _finish(s, slots, held[None, :] & row[:, None], row, head, query, b, mask, mask_b, mask_h, mask_q,
                    mask_t, mask_w, scale, softcap, query_slot, MASK, SOFTCAP, CAUSAL)  # fmt: skip
        top, mass, out = _absorb(s, v.to(DTYPE), top, mass, out, PRECISION)
    tl.store(exact_out + place[:, None] * D + d[None, :], out, mask=row[:, None] & (d < D)[None, :])
    return top, mass


@triton.jit
def _coded_query(
    q, base, row, inverse, inv_freq, position, column, inside, D: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries as codes see them in a frame that begins at ``position``: inverse^T R(-position) q, [BM, COLUMNS]."""
    y = tl.zeros([BM, COLUMNS], tl.float32)
    for first in range(0, PAIRS, 16):
        i = first + tl.arange(0, 16)
        live = i < PAIRS
        first_of = i * 2 if INTERLEAVED else i
        second_of = i * 2 + 1 if INTERLEAVED else i + PAIRS
        a = _elements(q, row, base, first_of, live)
        b = _elements(q, row, base, second_of, live)
        cos, sin = turn(position, tl.load(inv_freq + i, mask=live, other=0))
        part = tl.load(inverse + first_of[:, None] * D + column[None, :], mask=live[:, None] & inside, other=0)
        y = tl.dot(a * cos[None, :] + b * sin[None, :], part, y, input_precision=PRECISION)
        part = tl.load(inverse + second_of[:, None] * D + column[None, :], mask=live[:, None] & inside, other=0)
        y = tl.dot(b * cos[None, :] - a * sin[None, :], part, y, input_precision=PRECISION)
    for first in range(2 * PAIRS, D, 16):
        i = first + tl.arange(0, 16)
        part = tl.load(inverse + i[:, None] * D + column[None, :], mask=(i < D)[:, None] & inside, other=0)
        y = tl.dot(_elements(q, row, base, i, i < D), part, y, input_precision=PRECISION)
    return y


@triton.jit
def coded_split(
    q, base, k_codes, k_cb, k_ch, k_ct, v_codes, v_cb, v_ch, v_ct, k_mean, k_inverse, k_book, k_freq, v_book,
    b, h, split, row, head, query, query_slot, place, total, coded, boundary, origin, first_sink,
    past_sink, mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale, softcap, part_out, SPLITS,
    D: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr,
    FRAME: tl.constexpr, KG: tl.constexpr, KGP: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr, KN: tl.constexpr,
    VG: tl.constexpr, VGP: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, VN: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    DTYPE: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr, table, page_stride, PAGE: tl.constexpr,
):  # fmt: skip
    """One split of the codes, which lie in one piece, or on pages of ``PAGE`` tokens."""
    top = tl.full([BM], -float("inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    # The query, in pairs of RoPE and the rest.
    i = tl.arange(0, BP)
    first_of = i * 2 if INTERLEAVED else i
    second_of = i * 2 + 1 if INTERLEAVED else i + PAIRS
    j = tl.arange(0, BR)
    xa = _elements(q, row, base, first_of, i < PAIRS)
    xb = _elements(q, row, base, second_of, i < PAIRS)
    xr = _elements(q, row, base, 2 * PAIRS + j, 2 * PAIRS + j < D)
    freq = tl.load(k_freq + i, mask=i < PAIRS, other=0)
    # R(0..BT) mean: the key mean at each place of a tile, where the query comes to the tile.
    mean = k_mean + h * D
    ma = tl.load(mean + first_of, mask=i < PAIRS, other=0)
    mb = tl.load(mean + second_of, mask=i < PAIRS, other=0)
    mr = tl.load(mean + 2 * PAIRS + j, mask=2 * PAIRS + j < D, other=0)
    still = tl.sum(xr * mr[None, :], 1)
    t = tl.arange(0, BT)
    tile_cos, tile_sin = turn(BT, freq)
    place_cos, place_sin = turn(t[None, :], freq[:, None])
    mean_a = (ma[:, None] * place_cos - mb[:, None] * place_sin).to(DTYPE)
    mean_b = (mb[:, None] * place_cos + ma[:, None] * place_sin).to(DTYPE)

    c = tl.arange(0, KGP * KWP)  # columns of the coded space: group, element
    column = c // KWP * KW + c % KWP
    in_code = (c // KWP < KG) & (c % KWP < KW)
    inverse = k_inverse + h * (D * D)
    books = k_book + h * (KN * 256 * KW)
    values = v_book + h * (VN * 256 * VW)
    kc = k_codes + b * k_cb + h * k_ch
    vc = v_codes + b * v_cb + h * v_ch
    out = tl.zeros([BM, VGP * VWP], tl.float32)

    # Tiles are cut by position, so that none straddles two frames.
    first_tile = floor_div(0 - origin, BT)
    tiles = tl.where(coded > 0, floor_div(coded - 1 - origin, BT) + 1 - first_tile, 0)
    each = tl.cdiv(tiles, SPLITS)
    begin = first_tile + split * each
    end = tl.minimum(first_tile + tiles, begin + each)
    first_frame = floor_div(begin, FRAME // BT)
    for frame in range(first_frame, tl.where(end > begin, floor_div(end - 1, FRAME // BT) + 1, first_frame)):
        turned = _coded_query(q, base, row, inverse, k_freq, frame * FRAME, column, in_code[None, :], D, PAIRS,
                              INTERLEAVED, BM, KGP * KWP, PRECISION)  # fmt: skip
        # Codewords are float16, which holds what a metric makes of a query only when scaled.
        size = tl.max(tl.abs(turned), 1)
        size = tl.where(size > 0, size, 1.0)
        turned = (turned / size[:, None]).to(CODE)
        lower = tl.maximum(begin, frame * (FRAME // BT))
        upper = tl.minimum(end, (frame + 1) * (FRAME // BT))
        if PAIRS:  # the query where the first tile begins; a tile further on it is rotated by as much again
            cos, sin = turn(lower * BT, freq)
            here_a = xa * cos[None, :] + xb * sin[None, :]
            here_b = xb * cos[None, :] - xa * sin[None, :]
        for step in range(lower, upper):
            slots = step * BT + t + origin
            held = (slots >= 0) & (slots < coded)
            at = place_of(slots, held, k_ct, table, page_stride, PAGE)
            y = codewords(kc, books, at, held, KG, KGP, KW, KWP, KN, BT, CODE)
            s = tl.dot(turned, tl.trans(y), input_precision=PRECISION) * size[:, None]
            if PAIRS:
                s = tl.dot(here_a.to(DTYPE), mean_a, s, input_precision=PRECISION)
                s = tl.dot(here_b.to(DTYPE), mean_b, s, input_precision=PRECISION)
                ahead = here_a * tile_cos[None, :] + here_b * tile_sin[None, :]
                here_b = here_b * tile_cos[None, :] - here_a * tile_sin[None, :]
                here_a = ahead
            s += still[:, None]
            held = held & ((slots < first_sink) | (slots >= past_sink))
            allowed = held[None, :] & (slots[None, :] < boundary[:, None])
            s = _finish(s, slots, allowed, row, head, query, b, mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale,
                        softcap, query_slot, MASK, SOFTCAP, CAUSAL)  # fmt: skip
            at = place_of(slots, held, v_ct, table, page_stride, PAGE)
            v = codewords(vc, values, at, held, VG, VGP, VW, VWP, VN, BT, CODE)
            top, mass, out = _absorb(s, v, top, mass, out, PRECISION)
    c = tl.arange(0, VGP * VWP)
    live = (c // VWP < VG) & (c % VWP < VW)
    to = (split * total + place)[:, None] * D + (c // VWP * VW + c % VWP)[None, :]
    tl.store(part_out + to, out, mask=row[:, None] & live[None, :])
    return top, mass


@triton.jit(do_not_specialize=["heads", "SPLITS", "TAIL"])
def split_kernel(
    q, q_b, q_h, q_q, k_codes, k_cb, k_ch, k_ct, v_codes, v_cb, v_ch, v_ct,
    k_exact, k_xb, k_xh, k_xt, v_exact, v_xb, v_xh, v_xt, k_window, k_wb, k_wh, v_window, v_wb, v_wh,
    start, length_, encoded_, tail_start_, k_mean, k_inverse, k_book, k_freq, v_book,
    mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale, softcap, part_out, part_top, part_mass, exact_out,
    heads, HEADS, GROUP, QUERIES, TAIL, SPLITS,
    D: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    INTERLEAVED: tl.constexpr, FRAME: tl.constexpr,
    KG: tl.constexpr, KGP: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr, KN: tl.constexpr,
    VG: tl.constexpr, VGP: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, VN: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, RING: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
    VIEW: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr,
    DTYPE: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the codes for a tile of query rows of a KV head; the last split does what is exact. The head is
    ``h`` in its codec, whose tables and codes these are, and ``kv_head`` in the layer."""
    tile, bh, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = bh // HEADS, bh % HEADS
    kv_head = layer_head(heads, h)
    r = tile * BM + tl.arange(0, BM)
    row = r < GROUP * QUERIES
    head, query = kv_head * GROUP + r // QUERIES, r % QUERIES
    base = b * q_b + head.to(tl.int64) * q_h + query * q_q
    length, encoded = tl.load(length_), tl.load(encoded_ + b)
    origin, sink = tl.load(start + 2 * b), tl.load(start + 2 * b + 1)
    query_slot = query
    if CAUSAL == LAST_ALIGNED:
        query_slot = query + length - QUERIES
    # What each query reads from codes ends at its boundary.
    if VIEW == WINDOW:
        low, last = encoded, encoded
        boundary = tl.zeros([BM], tl.int32) + encoded
    else:
        low = tl.maximum(tl.load(tail_start_ + b), 0)
        if VIEW == EXACT_TAIL:
            last = low
            boundary = tl.zeros([BM], tl.int32) + low
        else:
            last = tl.maximum(coded_slots(sink, length, RECENT, BLOCK), low)
            boundary = tl.maximum(coded_slots(sink, length - QUERIES + query + 1, RECENT, BLOCK), low)
    coded = tl.minimum(last, encoded)
    first_sink = tl.where(SINKS > 0, sink, length)
    past_sink = sink + SINKS
    place = (bh * tl.num_programs(0) + tile) * BM + tl.arange(0, BM)  # of a row, among all partial results
    total = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * BM
    if split == SPLITS:
        top, mass = exact_split(
            q, base, k_exact, k_xb, k_xh, k_xt, v_exact, v_xb, v_xh, v_xt, k_window, k_wb, k_wh, v_window, v_wb, v_wh,
            b, kv_head.to(tl.int64), row, head, query, query_slot, place, length, low, boundary, sink, first_sink,
            past_sink, mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale, softcap, exact_out, TAIL,
            D, BD, SINKS, BS, RING, VIEW, CAUSAL, MASK, SOFTCAP, BM, BT, DTYPE, PRECISION, D, k_window, 0, start, 0, 0,
        )  # fmt: skip
    else:
        top, mass = coded_split(
            q, base, k_codes, k_cb, k_ch, k_ct, v_codes, v_cb, v_ch, v_ct, k_mean, k_inverse, k_book, k_freq, v_book,
            b, h, split, row, head, query, query_slot, place, total, coded, boundary, origin,
            first_sink, past_sink, mask, mask_b, mask_h, mask_q, mask_t, mask_w, scale, softcap, part_out,
            SPLITS, D, PAIRS, BP, BR, INTERLEAVED, FRAME, KG, KGP, KW, KWP, KN, VG, VGP, VW, VWP, VN,
            CAUSAL, MASK, SOFTCAP, BM, BT, DTYPE, CODE, PRECISION, start, 0, 0,
        )  # fmt: skip
    tl.store(part_top + split * total + place, top, mask=row)
    tl.store(part_mass + split * total + place, mass, mask=row)


@triton.jit(do_not_specialize=["heads", "SPLITS"])
def merge_kernel(
    part_out, part_top, part_mass, exact_out, v_inverse, v_mean, sink_logits, out, out_b, out_h, heads,
    ROWS, HEADS, GROUP, QUERIES, SPLITS,
    D: tl.constexpr, STEP: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a tile of query rows; only here does the output leave the values' metric. Outputs of
    queries are ``STEP`` elements apart."""
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = bh % HEADS
    kv_head = layer_head(heads, h).to(tl.int64)
    r = tile * BM + tl.arange(0, BM)
    row = r < GROUP * QUERIES
    place = bh * ROWS + r  # ROWS of a KV head were written, padding included
    total = tl.num_programs(1).to(tl.int64) * ROWS
    c = tl.arange(0, BV)
    top = tl.load(part_top + SPLITS * total + place, mask=row, other=-float("inf"))
    share = tl.where(top == -float("inf"), 0.0, 1.0)  # of what is exact
    mass = tl.load(part_mass + SPLITS * total + place, mask=row, other=0.0)
    coded = tl.zeros([BM], tl.float32)  # mass of what is coded
    y = tl.zeros([BM, BV], tl.float32)
    for split in range(SPLITS):
        other = tl.load(part_top + split * total + place, mask=row, other=-float("inf"))
        peak = tl.maximum(top, other)
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        fade, weight = tl.exp2((top - safe) * LOG2E), tl.exp2((other - safe) * LOG2E)
        some = other > -float("inf")
        more = tl.load(part_mass + split * total + place, mask=row & some, other=0.0) * weight
        at = (split * total + place)[:, None] * D + c[None, :]
        part = tl.load(part_out + at, mask=(row & some)[:, None] & (c < D)[None, :], other=0.0)
        y = y * fade[:, None] + part * weight[:, None]
        coded = coded * fade + more
        mass = mass * fade + more
        share = share * fade
        top = peak
    if LOGITS:
        logit = tl.load(sink_logits + kv_head * GROUP + r // QUERIES, mask=row, other=0.0).to(tl.float32)
        peak = tl.maximum(top, logit)
        fade = tl.exp2((top - peak) * LOG2E)
        mass = mass * fade + tl.exp2((logit - peak) * LOG2E)
        y, coded, share = y * fade[:, None], coded * fade, share * fade
    held = row & (share > 0)
    mass = tl.where(mass == 0, 1.0, mass)[:, None]
    head, query = kv_head * GROUP + r // QUERIES, r % QUERIES
    to = (bh // HEADS) * out_b + head * out_h + query * STEP
    for first in range(0, D, 32):
        d = first + tl.arange(0, 32)
        inside = d < D
        inverse = tl.load(
            v_inverse + h * (D * D) + d[None, :] * D + c[:, None],
            mask=inside[None, :] & (c < D)[:, None],
            other=0.0,
        )
        mean = tl.load(v_mean + h * D + d, mask=inside, other=0.0)
        x = tl.dot(y, inverse, input_precision="tf32x3") + coded[:, None] * mean[None, :]
        exact = tl.load(exact_out + place[:, None] * D + d[None, :], mask=held[:, None] & inside[None, :], other=0.0)
        x = (x + share[:, None] * exact) / mass
        tl.store(out + to[:, None] + d[None, :], x.to(out.dtype.element_ty), mask=row[:, None] & inside[None, :])


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def attention(q: Tensor, key: Packed, value: Packed, options: Options, *, plan_: Plan | None = None) -> Tensor:
    """`torchgsrq.reference.attention`, for codecs that `supports` accepts; ``plan_`` overrides `plan`."""
    mask, scale, causal, softcap, sink_logits, key_tail, value_tail, tail_start, view = options
    batch, q_heads, queries, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    group = q_heads // key.codec.heads
    rows, capacity = group * queries, key.capacity
    exact = (key.window, value.window) if key_tail is None or value_tail is None else (key_tail, value_tail)
    exact = tuple(t if t.stride(3) == 1 else t.contiguous() for t in exact)
    windows = [t if t.stride(2) == dim and t.stride(3) == 1 else t.contiguous() for t in (key.window, value.window)]
    kind, strides, mask_ = _mask(mask, q)
    limits = {
        "BS": max(16, triton.next_power_of_2(key.sink_tokens)),
        "VIEW": view,
        "CAUSAL": causal,
        "MASK": kind,
        "SOFTCAP": softcap != 0,
    }
    sides = (zip(kv.codec.parts, kv.codes, strict=True) for kv in (key, value))
    for ((several, k), k_codes), ((_, v), v_codes) in zip(*sides, strict=True):
        heads, which = k.heads, bits_of(several)
        p = plan_ or plan(k, rows, capacity, batch * heads, processors(q.device), q.dtype != torch.float32)
        tiles = triton.cdiv(rows, p.rows)
        places = batch * heads * tiles * p.rows
        part_out = q.new_empty((p.splits, places, dim), dtype=torch.float32)
        part_top, part_mass = q.new_empty((2, p.splits + 1, places), dtype=torch.float32)
        exact_out = q.new_empty((places, dim), dtype=torch.float32)
        fixed = {**constants(k, v, p, q.dtype), **window(key), **limits}
        with torch.cuda.device_of(q):  # Triton launches on the current device
            split_kernel[(tiles, batch * heads, p.splits + 1)](
                q, *q.stride()[:3], k_codes, *k_codes.stride()[:3], v_codes, *v_codes.stride()[:3],
                exact[0], *exact[0].stride()[:3], exact[1], *exact[1].stride()[:3],
                windows[0], *windows[0].stride()[:2], windows[1], *windows[1].stride()[:2],
                key.start, key.length, key.encoded, key.encoded if tail_start is None else tail_start,
                k.mean, k.inverse, k.codebook,
                k.inv_freq if k.inv_freq.numel() else k.mean, v.codebook, mask_, *strides, scale, softcap, part_out,
                part_top, part_mass, exact_out, which, heads, group, queries, exact[0].shape[2], p.splits, **fixed,
                num_warps=p.warps, num_stages=1,
            )  # fmt: skip
            merge_kernel[(triton.cdiv(rows, MERGE_ROWS), batch * heads)](
                part_out, part_top, part_mass, exact_out, v.inverse, v.mean,
                k.mean if sink_logits is None else sink_logits, out, *out.stride()[:2], which, tiles * p.rows, heads,
                group, queries, p.splits, **merge_constants(v, sink_logits is not None, dim), num_warps=4, num_stages=1,
            )  # fmt: skip
    return out


def constants(key: Codec, value: Codec, p: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `split_kernel` that codecs and the plan decide."""
    k, v = Shape.of(key), Shape.of(value)
    full = {f"K{name}": getattr(k, name.lower()) for name in ("G", "GP", "W", "WP", "N")}
    full |= {f"V{name}": getattr(v, name.lower()) for name in ("G", "GP", "W", "WP", "N")}
    return full | {
        **k.rotary,
        "D": k.d,
        "BD": max(16, triton.next_power_of_2(k.d)),
        "FRAME": frame_of(key),
        "BM": p.rows,
        "BT": p.tokens,
        "DTYPE": DTYPES[dtype],
        "CODE": tl.float32 if dtype == torch.float32 else tl.float16,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def merge_constants(value: Codec, logits: bool, step: int) -> dict[str, Any]:
    """The compile-time arguments of `merge_kernel`."""
    dim = value.head_dim
    return {"D": dim, "STEP": step, "BV": max(16, triton.next_power_of_2(dim)), "BM": MERGE_ROWS, "LOGITS": logits}


def _mask(mask: Tensor | None, q: Tensor) -> tuple[int, list[int], Tensor]:
    """Kind of a mask (0 none, 1 bool, 2 additive), its strides (0 where broadcast) and width, and itself."""
    if mask is None:
        return 0, [0, 0, 0, 0, 1], q
    mask = mask.view((1,) * (4 - mask.ndim) + tuple(mask.shape))
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    strides = [*strides[:3], mask.stride(3), mask.shape[3]]
    return (1, strides, mask.view(torch.uint8)) if mask.dtype == torch.bool else (2, strides, mask)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a round number for the interpreter's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


__all__ = ["Plan", "attention", "constants", "merge_constants", "plan", "supports"]
