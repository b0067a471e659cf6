"""Attention and writing on the pages of a serving engine for GPUs, in Triton: `torchgsrq.reference.paged`.

Requests of any lengths share a launch. No length is read on the host and the grids depend on shapes alone, so that a
captured CUDA graph replays at every step: each program looks up whose tokens its tile has.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchgsrq.codec import Codecs
from torchgsrq.codec.packed import EXACT_TAIL, LAST_ALIGNED
from torchgsrq.reference import paged as reference
from torchgsrq.reference.paged import Pages, Requests

from . import attention, encode
from .attention import DTYPES, MERGE_ROWS, coded_split, exact_split
from .common import bits_of, coded_slots, layer_head, place_of
from .encode import encode_group

CHUNK, TAIL_VIEW, CAUSAL = tl.constexpr(reference.CHUNK), tl.constexpr(EXACT_TAIL), tl.constexpr(LAST_ALIGNED)


def supports(*codecs: Codecs) -> bool:
    """Whether these kernels read and write codes of such keys and values; pages of exact tokens take no codecs."""
    return not codecs or (attention.supports(*codecs) and all(map(encode.supports, codecs)))


# ---------------------------------------------------------------------------------------------------------------------
# Requests


@triton.jit
def request_of(tile, query_start, requests, tokens, EACH, MORE: tl.constexpr, BM: tl.constexpr):
    """The request of a tile of BM rows, and which of its tiles this is. A request has ``EACH`` rows for every new token
    and ``MORE``; one with no new token has none. Tokens after those of all requests belong to one request more."""
    request = 0
    first_tile = 0
    tiles_before = 0
    for first in range(0, requests + 1, 128):
        i = first + tl.arange(0, 128)
        begin = tl.load(query_start + i, mask=i <= requests, other=tokens)
        end = tl.load(query_start + i + 1, mask=i < requests, other=tokens)
        tiles = tl.where(end > begin, tl.cdiv((end - begin) * EACH + MORE, BM), 0)
        past = (tiles_before + tl.cumsum(tiles, 0) <= tile) & (i <= requests)
        request += tl.sum(past.to(tl.int32), 0)
        first_tile += tl.sum(tl.where(past, tiles, 0), 0)
        tiles_before += tl.sum(tiles, 0)
    return request, tile - first_tile


def most_tiles(tokens: int, requests: int, each: int, more: int, rows: int) -> int:
    """How many tiles `request_of` may find, as a function of shapes; as many as tokens where each has a tile."""
    return min(tokens * triton.cdiv(each + more, rows), (tokens * each + requests * (more + rows - 1)) // rows)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@triton.jit(do_not_specialize=["heads", "tokens", "requests", "SPLITS"])
def pages_kernel(
    q, q_t, q_h, k, k_t, k_h, v, v_t, v_h, codes, c_p, places, window, w_p, w_h, w_t, sinks, s_p, s_h, s_t,
    query_start, lengths, held_from, table, table_r, window_table, window_r, sink_pages,
    k_mean, k_inverse, k_book, k_freq, v_book, scale, softcap, part_out, part_top, part_mass, exact_out,
    heads, HEADS, GROUP, tokens, requests, SPLITS,
    D: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    INTERLEAVED: tl.constexpr, FRAME: tl.constexpr,
    KG: tl.constexpr, KGP: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr, KN: tl.constexpr,
    VG: tl.constexpr, VGP: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr, VN: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    WINDOW_PAGE: tl.constexpr, VIEW: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    DTYPE: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the codes for a tile of query rows of a request and KV head; the last split does what is exact. The
    head is ``h`` in its codec, whose tables these are, and ``kv_head`` in the layer. The heads of a token are rows side
    by side, so that a tile has few tokens, and reads no further than they do."""
    tile, h, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    request, tile = request_of(tile, query_start, requests, tokens, GROUP, 0, BM)
    if request <= requests:
        # Tokens of no request are those of one more, which sees nothing.
        there = request < requests
        begin = tl.load(query_start + request)
        end = tl.load(query_start + request + 1, mask=there, other=tokens)
        length = tl.load(lengths + request, mask=there, other=0)
        before = length - (end - begin)
        kv_head = layer_head(heads, h).to(tl.int64)
        r = tile * BM + tl.arange(0, BM)
        row = r < (end - begin) * GROUP
        head, token = kv_head * GROUP + r % GROUP, begin + r // GROUP
        position = before + r // GROUP
        # What each query reads from codes ends at its boundary: `torchgsrq.reference.paged.first_exact`.
        seen = position + 1
        if VIEW == CHUNK:
            seen = tl.where(end - begin > 1, before, seen)
        held = tl.load(held_from + request, mask=there, other=0)
        boundary = tl.maximum(coded_slots(0, seen, RECENT, BLOCK), held)
        coded = tl.max(tl.where(row, boundary, 0), 0)
        low = tl.min(tl.where(row, boundary, length), 0)
        last = tl.max(tl.where(row, position + 1, 0), 0)
        base = token.to(tl.int64) * q_t + head * q_h
        place = (h * GROUP + r % GROUP) * tokens + token  # of a row, among all partial results
        total = tl.num_programs(1).to(tl.int64) * GROUP * tokens
        top = tl.full([BM], -float("inf"), tl.float32)
        mass = tl.zeros([BM], tl.float32)
        if split == SPLITS:
            new = begin.to(tl.int64)
            first_ones = sinks
            if SINKS:
                first_ones += tl.load(sink_pages + request, mask=there, other=0).to(tl.int64) * s_p
            top, mass = exact_split(
                q, base, k + new * k_t, 0, k_h, k_t, v + new * v_t, 0, v_h, v_t, first_ones, 0, s_h, first_ones + D, 0,
                s_h, 0, kv_head, row, head, token, position, place, last, low, boundary, 0, 0, SINKS,
                q, 0, 0, 0, 0, 1, scale, softcap, exact_out, last - before,
                D, BD, SINKS, BS, 1, TAIL_VIEW, CAUSAL, 0, SOFTCAP, BM, BT, DTYPE, PRECISION,
                s_t, window + kv_head * w_h, w_t, window_table + request * window_r, w_p, WINDOW_PAGE,
            )  # fmt: skip
        elif coded > 0:
            k_codes = codes + tl.load(places + kv_head) * PAGE
            v_codes = codes + tl.load(places + HEADS + kv_head) * PAGE
            top, mass = coded_split(
                q, base, k_codes, 0, 0, KN, v_codes, 0, 0, VN, k_mean, k_inverse, k_book, k_freq, v_book,
                0, h, split, row, head, token, position, place, total, coded, boundary, 0, 0, SINKS,
                q, 0, 0, 0, 0, 1, scale, softcap, part_out, SPLITS, D, PAIRS, BP, BR, INTERLEAVED, FRAME,
                KG, KGP, KW, KWP, KN, VG, VGP, VW, VWP, VN, CAUSAL, 0, SOFTCAP, BM, BT, DTYPE, CODE, PRECISION,
                table + request * table_r, c_p, PAGE,
            )  # fmt: skip
        tl.store(part_top + split * total + place, top, mask=row)
        tl.store(part_mass + split * total + place, mass, mask=row)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    requests: Requests,
    *,
    scale: float,
    softcap: float = 0.0,
    view: int = reference.CHUNK,
    plan: attention.Plan | None = None,
) -> Tensor:
    """`torchgsrq.reference.paged.paged_attention`, for codecs that `supports` accepts and tensors of one dtype;
    ``plan`` overrides `attention.plan`."""
    tokens, q_heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    heads, count = pages.key.heads, requests.lengths.shape[0]
    group, capacity = q_heads // heads, requests.table.shape[1] * pages.block
    window, sinks = (x if x is not None else k[None] for x in (pages.window, pages.sinks))  # none is read
    assert not pages.sink_tokens or (pages.sinks is not None and requests.sink_pages is not None)
    sink_pages = requests.lengths if requests.sink_pages is None else requests.sink_pages
    where = (requests.query_start, requests.lengths, requests.held_from, *_tables(requests), sink_pages)
    limits = {
        **_sizes(pages),
        "SINKS": pages.sink_tokens,
        "BS": max(16, triton.next_power_of_2(pages.sink_tokens)),
        "VIEW": view,
        "SOFTCAP": softcap != 0,
    }
    for (several, key), (_, value) in zip(pages.key.parts, pages.value.parts, strict=True):
        # Rows of a request if all have as many tokens; how many each has is not known here.
        rows, programs = group * max(1, tokens // max(1, count)), max(1, count) * key.heads
        half = q.dtype != torch.float32
        p = plan or attention.plan(key, rows, capacity, programs, attention.processors(q.device), half)
        spots = key.heads * group * tokens
        part_out = q.new_empty((p.splits, spots, dim), dtype=torch.float32)
        part_top, part_mass = q.new_empty((2, p.splits + 1, spots), dtype=torch.float32)
        exact_out = q.new_empty((spots, dim), dtype=torch.float32)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            pages_kernel[(most_tiles(tokens, count + 1, group, 0, p.rows), key.heads, p.splits + 1)](
                q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], pages.codes, pages.codes.stride(0),
                _places(pages), window, *window.stride()[:3], sinks, *sinks.stride()[:3], *where,
                key.mean, key.inverse, key.codebook, key.inv_freq if key.inv_freq.numel() else key.mean, value.codebook,
                scale, softcap, part_out, part_top, part_mass, exact_out, bits_of(several), heads, group, tokens, count,
                p.splits, **attention.constants(key, value, p, q.dtype), **limits, num_warps=p.warps, num_stages=1,
            )  # fmt: skip
            attention.merge_kernel[(triton.cdiv(group * tokens, MERGE_ROWS), key.heads)](
                part_out, part_top, part_mass, exact_out, value.inverse, value.mean, key.mean, out, 0, dim,
                bits_of(several), group * tokens, key.heads, group, tokens, p.splits,
                **attention.merge_constants(value, False, q_heads * dim), num_warps=4, num_stages=1,
            )  # fmt: skip
    return out


def _tables(requests: Requests) -> tuple[Tensor, int, Tensor, int]:
    """The tables of codes and of the window, each with how far apart its rows are."""
    found = [requests.table, requests.table if requests.window_table is None else requests.window_table]
    codes, window = (table if table.stride(1) == 1 else table.contiguous() for table in found)
    return codes, codes.stride(0), window, window.stride(0)


def _sizes(pages: Pages) -> dict[str, int]:
    """Tokens: of a page of codes, of a page of the window, and when they become codes."""
    window = 0 if pages.window is None else pages.window.shape[2]
    return {
        "PAGE": pages.block,
        "WINDOW_PAGE": window,
        "RECENT": pages.recent_tokens,
        "BLOCK": pages.block_tokens,
    }


def _places(pages: Pages) -> Tensor:
    """Where the codes of each head's keys, then values, begin: bytes before them of a token."""
    return _integers(tuple(first for side in pages.places() for first, _ in side), pages.codes.device)


@functools.lru_cache(maxsize=1024)
def _integers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers that stay on a device: copied there once, before a CUDA graph is captured, which refuses such copies."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@triton.jit
def tokens_on_pages(length, RECENT: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """`torchgsrq.reference.paged.coded_tokens`."""
    return tl.maximum(coded_slots(0, length, RECENT, BLOCK), length // PAGE * PAGE)


@triton.jit(do_not_specialize=["heads", "N", "side", "tokens", "requests"])
def append_pages_kernel(
    x, x_t, x_h, window, w_p, w_h, w_t, codes, c_p, places, query_start, lengths, table, table_r, window_table,
    window_r, mean, transform, book, inv_freq, heads, N, side, tokens, requests,
    PAGE: tl.constexpr, WINDOW_PAGE: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, MORE: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr,
    FRAME: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, T: tl.constexpr, ETA: tl.constexpr,
):  # fmt: skip
    """Codes of one group of T tokens of a request and head, of those that became due with this step."""
    tile, h, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    request, tile = request_of(tile, query_start, requests, tokens, 1, MORE, T)
    if request < requests:
        begin, length = tl.load(query_start + request), tl.load(lengths + request)
        before = length - (tl.load(query_start + request + 1) - begin)
        low = tokens_on_pages(before, RECENT, BLOCK, PAGE) + tile * T
        high = tokens_on_pages(length, RECENT, BLOCK, PAGE)
        if low < high:
            head = layer_head(heads, h).to(tl.int64)
            slot = low + tl.arange(0, T)
            held, new = slot < high, slot >= before
            new_at = (begin + slot - before).to(tl.int64) * x_t
            old_at = new_at
            if WINDOW_PAGE:
                old_at = place_of(slot, held & (new == 0), w_t, window_table + request * window_r, w_p, WINDOW_PAGE)
            to = codes + tl.load(places + side + head) * PAGE
            to += place_of(slot, held, N, table + request * table_r, c_p, PAGE)
            encode_group(x + head * x_h, window + head * w_h, new_at, old_at, new, held, slot, to, mean, transform,
                         book, inv_freq, h, g, N, WINDOW_PAGE > 0, D, PAIRS, BP, BR, INTERLEAVED, FRAME, G, W, WP, T,
                         ETA)  # fmt: skip


def paged_append_(pages: Pages, requests: Requests, k: Tensor, v: Tensor) -> None:
    """`torchgsrq.reference.paged.paged_append_`, for codecs that `supports` accepts."""
    tokens, count, dim = k.shape[0], requests.lengths.shape[0], k.shape[2]
    if tokens == 0:
        return
    sizes, places = _sizes(pages), _places(pages)
    # Of the tokens before this step, so many at most wait to become codes.
    more = min(pages.recent_tokens + pages.block_tokens, pages.block) - 1
    where = (requests.query_start, requests.lengths, *_tables(requests))
    for i, (x, codecs) in enumerate(((k, pages.key), (v, pages.value))):
        x = x if x.stride(2) == 1 else x.contiguous()
        window = x[None] if pages.window is None else pages.window[..., i * dim : (i + 1) * dim]
        for several, codec in codecs.parts:
            fixed: dict[str, Any] = {**sizes, "MORE": more, **encode.constants(codec)}
            tiles = most_tiles(tokens, count, 1, more, fixed["T"])
            with torch.cuda.device_of(x):
                append_pages_kernel[(tiles, codec.heads, codec.layout.groups)](
                    x, *x.stride()[:2], window, *window.stride()[:3], pages.codes, pages.codes.stride(0), places,
                    *where, codec.mean, codec.transform, codec.codebook,
                    codec.inv_freq if codec.inv_freq.numel() else codec.mean, bits_of(several), codec.layout.codes,
                    i * codecs.heads, tokens, count, **fixed, num_warps=8, num_stages=1,
                )  # fmt: skip


@triton.jit
def hold_kernel(held, p, h, t, k, k_t, k_h, v, v_t, v_h, slots, PAGE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """A token of a head onto its page."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        d = tl.arange(0, BD)
        to = held + slot // PAGE * p + head * h + slot % PAGE * t + d
        tl.store(to, tl.load(k + token * k_t + head * k_h + d, mask=d < D), mask=d < D)
        tl.store(to + D, tl.load(v + token * v_t + head * v_h + d, mask=d < D), mask=d < D)


def paged_hold_(held: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """`torchgsrq.reference.paged.paged_hold_`."""
    tokens, heads, dim = k.shape
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    if tokens:
        with torch.cuda.device_of(k):
            hold_kernel[(tokens, heads)](
                held, *held.stride()[:3], k, *k.stride()[:2], v, *v.stride()[:2], slots.contiguous(),
                PAGE=held.shape[2], D=dim, BD=triton.next_power_of_2(dim), num_warps=1, num_stages=1,
            )  # fmt: skip


__all__ = ["DTYPES", "paged_append_", "paged_attention", "paged_hold_", "supports"]
