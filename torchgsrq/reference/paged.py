"""A layer's cache on the pages of a serving engine, in plain PyTorch: writing tokens, and attention.

The newest tokens of a request, and its first ones, are held exactly, on pages of their own. A token becomes codes when
it leaves the window, or when its page of codes is full; so a full page depends on tokens and positions alone, whichever
request wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchgsrq.codec import Codecs
from torchgsrq.config import encoded_tokens
from torchgsrq.reference.attention import _Softmax
from torchgsrq.reference.coding import decode, encode
from torchgsrq.reference.storage import DECODE_BLOCK

# What a query reads exactly; it reads older tokens from codes.
CHUNK = 0  # the tokens of its own step, and what a window held before them; a single token what it holds now
DECODE = 1  # what a token-by-token decode would have held


@dataclass(frozen=True, eq=False)
class Pages:
    """The pages of one layer, and the codecs they belong to.

    Attributes:
        codes: uint8 ``[pages, bytes]``, of any stride between pages. A page holds ``block`` tokens, head after head:
            the keys of every head, then the values of every head, each ``[block, codes of that head]``. Bytes after
            those are not used.
        window: ``[pages, heads, tokens, 2 * head_dim]``, keys and values side by side; None without a window.
        sinks: pages of the same kind, one a request, for its first tokens; None without sinks.
        key, value: the codecs.
        sink_tokens: first tokens of a request that are read exactly.
        recent_tokens, block_tokens: newest tokens that are read exactly, and how many become codes together, as in
            `GSRQConfig`.
        block: tokens on a page of codes. It divides the frame of the codecs.
    """

    codes: Tensor
    window: Tensor | None
    sinks: Tensor | None
    key: Codecs
    value: Codecs
    sink_tokens: int
    recent_tokens: int
    block_tokens: int
    block: int

    def of_head(self, head: int, value: bool) -> Tensor:
        """The codes of a head's keys or values, a view ``[pages, block, codes]``."""
        first, size = self.places()[value][head]
        at = self.codes.storage_offset() + first * self.block
        return self.codes.as_strided((self.codes.shape[0], self.block, size), (self.codes.stride(0), size, 1), at)

    def places(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Where the codes of each head begin, and how many bytes a token has there: of keys, and of values. A page has
        ``block`` times as many bytes before and of a head."""
        first, found = 0, []
        for codecs in (self.key, self.value):
            some = []
            for size in head_bytes(codecs):
                some.append((first, size))
                first += size
            found.append(some)
        return found[0], found[1]

    def decoded(self, table: Tensor, first: int, last: int) -> list[Tensor]:
        """Keys and values of a request's tokens ``[first, last)``, each ``[1, heads, last - first, head_dim]``."""
        tokens = torch.arange(first, last, device=table.device)
        page, place = table[tokens // self.block].long(), tokens % self.block
        found = []
        for value, codecs in enumerate((self.key, self.value)):
            parts = []
            for heads, codec in codecs.parts:
                codes = torch.stack([self.of_head(head, bool(value))[page, place] for head in heads])
                parts.append(decode(codes[None], tokens[None], codec))
            found.append(codecs.merged(parts))
        return found

    def exact(self, requests: Requests, r: int, first: int, last: int) -> Tensor:
        """Keys and values of a request's tokens ``[first, last)`` on pages of the window,
        ``[last - first, heads, 2 * head_dim]``."""
        assert self.window is not None and requests.window_table is not None
        tokens, size = torch.arange(first, last, device=self.window.device), self.window.shape[2]
        return self.window[requests.window_table[r][tokens // size].long(), :, tokens % size]


@dataclass(frozen=True, eq=False)
class Requests:
    """The requests of a step, and where their tokens are. All tensors are int32.

    Attributes:
        query_start: ``[requests + 1]``, where the new tokens of each request begin among those of the step.
        lengths: ``[requests]``, tokens of each request, the new ones included.
        held_from: ``[requests]``, the first of the older tokens that are on pages of the window, up to the new ones.
        table: ``[requests, pages]``, pages of codes.
        window_table: the same for pages of the window; entries before ``held_from`` are not read.
        sink_pages: ``[requests]``, the page of each request's sinks.
    """

    query_start: Tensor
    lengths: Tensor
    held_from: Tensor
    table: Tensor
    window_table: Tensor | None
    sink_pages: Tensor | None


def head_bytes(codecs: Codecs) -> list[int]:
    """Bytes of a token's codes in each head."""
    sizes = {head: codec.layout.codes for heads, codec in codecs.parts for head in heads}
    return [sizes[head] for head in range(codecs.heads)]


def coded_tokens(length: int, recent_tokens: int, block_tokens: int, block: int) -> int:
    """How many tokens of a request are on pages of codes, as a function of its length alone: those that left the
    window, and all of a page that is full, since other requests may hit it then."""
    return max(encoded_tokens(length, recent_tokens, block_tokens), length // block * block)


def paged_append_(pages: Pages, requests: Requests, k: Tensor, v: Tensor) -> None:
    """Write as codes, in place, what a step makes due: new tokens, and tokens that the window holds until now.

    Args:
        k, v: the new tokens ``[tokens, heads, head_dim]``, keys after RoPE.
    """
    starts = requests.query_start.tolist()
    for r, (first, last) in enumerate(pairwise(starts)):
        length = int(requests.lengths[r])
        held = length - (last - first)
        low, high = (coded_tokens(n, pages.recent_tokens, pages.block_tokens, pages.block) for n in (held, length))
        if low >= high:
            continue
        new = torch.cat((k[first:last], v[first:last]), -1)
        past = pages.exact(requests, r, low, held) if low < held else new[:0]
        due = torch.cat((past, new[max(0, low - held) :]))[: high - low]
        tokens = torch.arange(low, high, device=k.device)
        page, place = requests.table[r][tokens // pages.block].long(), tokens % pages.block
        for value, (x, codecs) in enumerate(zip(due.split(k.shape[-1], -1), (pages.key, pages.value), strict=True)):
            for heads, codec in codecs.parts:
                codes = encode(x[:, list(heads)].transpose(0, 1)[None], tokens[None], codec)[0]
                for head, found in zip(heads, codes, strict=True):
                    pages.of_head(head, bool(value))[page, place] = found


def paged_hold_(held: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write tokens of any requests exactly, in place.

    What a ring of pages holds must be read before it is written over: attention of a step comes before its new tokens
    are held in the window.

    Args:
        held: ``[pages, heads, tokens, 2 * head_dim]``, of the window or of sinks.
        k, v: ``[tokens, heads, head_dim]``.
        slots: integer ``[tokens]``, ``page * tokens of a page + place``; below 0 for a token that is not held.
    """
    some = (slots >= 0).nonzero().flatten()
    page, place = slots[some] // held.shape[2], slots[some] % held.shape[2]
    held[page, :, place] = torch.cat((k[some], v[some]), -1).to(held.dtype)


def first_exact(held: int, length: int, held_from: int, recent_tokens: int, block_tokens: int, view: int) -> Tensor:
    """The first token that each query of a request reads exactly, int64 ``[length - held]``.

    Args:
        held, length: tokens of the request before and after this step.
        held_from: see `Requests`.
        view: ``CHUNK`` or ``DECODE``.
    """
    seen = torch.arange(held, length) + 1
    if view == CHUNK and length - held > 1:
        seen = torch.full_like(seen, held)
    coded = (seen - recent_tokens).clamp(min=0) // block_tokens * block_tokens  # `encoded_tokens` of each length
    return coded.clamp(min=held_from)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    requests: Requests,
    *,
    scale: float,
    softcap: float = 0.0,
    view: int = CHUNK,
) -> Tensor:
    """Causal attention of the new tokens of each request to all of its tokens. The new ones were written before.

    Args:
        q: ``[tokens, query heads, head_dim]``; query heads a multiple of the KV heads.
        k, v: the new tokens themselves, ``[tokens, heads, head_dim]``.
        scale: multiplies ``q . k``.
        softcap: ``cap * tanh(score / cap)``; 0 is off.
        view: ``CHUNK`` or ``DECODE``.

    Returns:
        ``[tokens, query heads, head_dim]`` in the dtype of ``q``; zeros for tokens of no request.
    """
    out = q.new_zeros(q.shape)
    starts = requests.query_start.tolist()
    for r, (first, last) in enumerate(pairwise(starts)):
        if first < last:
            some = slice(first, last)
            out[some] = _of_request(q[some], k[some], v[some], pages, requests, r, scale, softcap, view)
    return out


def _of_request(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, requests: Requests, r: int, scale: float, softcap: float, view: int
) -> Tensor:
    queries, q_heads, head_dim = q.shape
    heads, length = pages.key.heads, int(requests.lengths[r])
    held, held_from, sinks = length - queries, int(requests.held_from[r]), pages.sink_tokens
    group = q_heads // heads
    qf = (q.float() * scale).transpose(0, 1).reshape(1, heads, group * queries, head_dim)
    seen = _Softmax(qf, group, None, torch.arange(held, length, device=q.device), softcap)
    boundary = first_exact(held, length, held_from, pages.recent_tokens, pages.block_tokens, view).to(q.device)

    def absorb(keys: Tensor, values: Tensor, first: int, exact: bool) -> None:
        slots = torch.arange(first, first + keys.shape[2], device=q.device)[None]
        allowed = (slots >= boundary[:, None]) == exact
        seen.absorb_plain(keys, values, slots, (allowed & (slots >= sinks))[None])

    for first in range(0, int(boundary.max()), DECODE_BLOCK):
        last = min(first + DECODE_BLOCK, int(boundary.max()))
        keys, values = pages.decoded(requests.table[r], first, last)
        absorb(keys, values, first, exact=False)
    low = int(boundary.min())
    if low < held:
        past = pages.exact(requests, r, low, held).transpose(0, 1)[None]
        absorb(past[..., :head_dim], past[..., head_dim:], low, exact=True)
    absorb(k.transpose(0, 1)[None], v.transpose(0, 1)[None], held, exact=True)
    if sinks:
        assert pages.sinks is not None and requests.sink_pages is not None
        there = min(sinks, length)
        slots = torch.arange(there, device=q.device)[None]
        first_ones = pages.sinks[int(requests.sink_pages[r]), :, :there][None]
        everyone = torch.ones(1, queries, there, dtype=torch.bool, device=q.device)
        seen.absorb_plain(first_ones[..., :head_dim], first_ones[..., head_dim:], slots, everyone)
    out = seen.result(None).view(q_heads, queries, head_dim).transpose(0, 1)
    return out.to(q.dtype)
