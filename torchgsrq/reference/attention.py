"""Attention on codes, sinks and window, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchgsrq.codec import Codec
from torchgsrq.codec.layout import CODEWORDS
from torchgsrq.codec.packed import EXACT_TAIL, UPPER_LEFT, WINDOW, Options, Packed
from torchgsrq.codec.rope import rotate
from torchgsrq.reference.coding import mean_at
from torchgsrq.reference.storage import DECODE_BLOCK, coded_slots, decoded

_TABLE_BLOCK = 4096  # slots scored by look-up at a time
_TABLE_ROWS = 16  # up to this many query rows per KV head, look-up tables are cheaper than decoding

_PLAIN = Options()


def attention(q: Tensor, key: Packed, value: Packed, options: Options = _PLAIN, *, form: str | None = None) -> Tensor:
    """Attention on codes, sinks and window with an online softmax over blocks of slots.

    Slots at or past the length never take part, nor do masked ones. A query that sees nothing gets zeros.

    Args:
        q: ``[batch, query heads, queries, head_dim]``; query heads a multiple of the KV heads.
        form: ``"tables"`` or ``"decode"`` forces how codes are read; the result is the same.

    Returns:
        ``[batch, query heads, queries, head_dim]`` in the dtype of ``q``.
    """
    mask, scale, causal, softcap, sink_logits, key_tail, value_tail, tail_start, view = options
    batch, q_heads, queries, head_dim = q.shape
    heads = key.codec.heads
    group = q_heads // heads
    rows = group * queries
    length = int(key.length)
    qf = (q.float() * scale).reshape(batch, heads, rows, head_dim)
    if form is None:
        framed = key.codec.frame > 1 or not key.codec.inv_freq.numel()  # frames of one token would not pay
        form = "tables" if rows <= _TABLE_ROWS and framed else "decode"
    newest = torch.arange(queries, device=q.device) + (length - queries if causal != UPPER_LEFT else 0)
    seen = _Softmax(qf, group, mask, newest if causal else None, softcap)
    boundary = _boundary(key, queries, tail_start, view)
    sinks = key.sink_slots()
    first_sink, past_sink = sinks[:, :1] if key.sink_tokens else length, key.sink_start[:, None] + key.sink_tokens

    def not_a_sink(slots: Tensor) -> Tensor:
        return (slots < first_sink) | (slots >= past_sink)

    coded = min(int(boundary.max()), int(key.encoded.max())) if boundary.numel() else 0
    step = _TABLE_BLOCK if form == "tables" else DECODE_BLOCK
    for first in range(0, coded, step):
        last = min(first + step, coded)
        slots = torch.arange(first, last, device=q.device)[None]
        allowed = (slots[:, None] < boundary[..., None]) & not_a_sink(slots)[:, None]
        if form == "tables":
            scores = cache_scores(qf, key, first, last)
            seen.absorb(scores, slots, allowed, lambda p, a=first, b=last: cache_values(p, value, a, b))  # type: ignore[misc]
        else:
            seen.absorb_plain(decoded(key, first, last), decoded(value, first, last), slots, allowed)

    exact_from = key.encoded if tail_start is None else tail_start
    low = max(int(exact_from.min()), 0) if batch else length
    k, v = key.recent(low, length), value.recent(low, length)
    if key_tail is not None and value_tail is not None:
        k, v = (t[:, :, t.shape[2] - (length - low) :] for t in (key_tail, value_tail))
    for first in range(0, k.shape[2], DECODE_BLOCK):
        some = slice(first, first + DECODE_BLOCK)
        slots = torch.arange(low, length, device=q.device)[None, some]
        allowed = (slots[:, None] >= boundary[..., None]) & not_a_sink(slots)[:, None]
        seen.absorb_plain(k[:, :, some], v[:, :, some], slots, allowed)

    if key.sink_tokens:
        k, v = (kv.window[:, :, : kv.sink_tokens] for kv in (key, value))
        seen.absorb_plain(k, v, sinks, (sinks < length)[:, None].expand(-1, queries, -1))
    return seen.result(sink_logits).view(batch, q_heads, queries, head_dim).to(q.dtype)


def limited(scores: Tensor, softcap: float, mask: Tensor | None, lowest: float = -torch.inf) -> Tensor:
    """Scores ``[..., queries, slots]`` after ``softcap * tanh(score / softcap)`` (0 is off) and a mask, bool (True
    takes part) or additive; ``lowest`` where a slot does not take part."""
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask.float()


def probabilities(
    scores: Tensor, softcap: float, mask: Tensor | None, sink_logits: Tensor | None, lowest: float = -torch.inf
) -> Tensor:
    """Softmax over the slots of `limited` scores; ``sink_logits``, broadcastable to ``[..., queries, 1]``, take
    probability and give nothing."""
    scores = limited(scores, softcap, mask, lowest)
    if sink_logits is None:
        return scores.softmax(-1)
    sinks = sink_logits.float().expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


def _boundary(key: Packed, queries: int, tail_start: Tensor | None, view: int) -> Tensor:
    """The first slot that each query reads in full precision, ``[batch, queries]``."""
    if view == WINDOW:
        return key.encoded.long()[:, None].expand(-1, queries)
    assert tail_start is not None
    held = tail_start.long()[:, None]
    if view == EXACT_TAIL or not queries:
        return held.expand(-1, queries)
    length, sizes = int(key.length), (key.recent_tokens, key.block_tokens)
    seen = [coded_slots(key.sink_start.long(), length - queries + i + 1, *sizes) for i in range(queries)]
    return torch.maximum(torch.stack(seen, 1), held)


class _Softmax:
    """An online softmax: slots are absorbed block by block, in any order.

    Args:
        qf: float32 ``[batch, heads, rows, head_dim]``, scaled; a KV head's rows are its query heads' queries.
        group: query heads of a KV head.
        mask, softcap: of `attention`.
        newest: the last slot that each query sees, ``[queries]``; None without a causal mask.
    """

    def __init__(self, qf: Tensor, group: int, mask: Tensor | None, newest: Tensor | None, softcap: float) -> None:
        self.qf, self.group, self.queries = qf, group, qf.shape[2] // group
        self.mask, self.newest, self.softcap = mask, newest, softcap
        self.top = torch.full_like(qf[..., :1], -torch.inf)
        self.mass = torch.zeros_like(self.top)
        self.out = torch.zeros_like(qf)

    def absorb_plain(self, k: Tensor, v: Tensor, slots: Tensor, allowed: Tensor) -> None:
        """Add slots by their keys and values ``[batch, heads, t, head_dim]``."""
        self.absorb(self.qf @ k.float().transpose(-1, -2), slots, allowed, lambda p: p @ v.float())

    def absorb(self, scores: Tensor, slots: Tensor, allowed: Tensor, weigh: Callable[[Tensor], Tensor]) -> None:
        """Add slots: scores ``[b, h, rows, t]``, slots ``[b or 1, t]``, allowed ``[b or 1, q, t]``; ``weigh`` gives the
        sum of values by their probabilities."""
        if self.newest is not None:
            allowed = allowed & (slots[:, None] <= self.newest[:, None])
        mask = None if self.mask is None else _mask_columns(self.mask, slots, self.qf.shape[1], self.group)
        scores = limited(scores.unflatten(2, (self.group, self.queries)), self.softcap, mask)
        scores = scores.masked_fill(~allowed[:, None, None], -torch.inf).flatten(2, 3)
        peak = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        safe = peak.masked_fill(peak == -torch.inf, 0)
        p = torch.exp(scores - safe)
        fade = torch.exp(self.top - safe)
        self.mass = self.mass * fade + p.sum(-1, keepdim=True)
        self.out = self.out * fade + weigh(p)
        self.top = peak

    def result(self, sink_logits: Tensor | None) -> Tensor:
        """What was absorbed, by its probabilities; ``sink_logits [query heads]`` take some, and give nothing."""
        mass, out = self.mass, self.out
        if sink_logits is not None:
            batch, heads = self.qf.shape[:2]
            logits = sink_logits.float().view(1, heads, self.group, 1, 1)
            logits = logits.expand(batch, -1, -1, self.queries, -1).flatten(2, 3)
            peak = torch.maximum(self.top, logits)
            fade = torch.exp(self.top - peak)
            out, mass = out * fade, mass * fade + torch.exp(logits - peak)
        return out / mass.masked_fill(mass == 0, 1)


def _mask_columns(mask: Tensor, slots: Tensor, heads: int, group: int) -> Tensor:
    """The mask at some slots, ``[b or 1, heads or 1, group or 1, q or 1, t]``."""
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    slots = slots.clamp(max=mask.shape[-1] - 1)
    if slots.shape[0] == 1:
        mask = mask[..., slots[0]]
    else:
        mask = mask.expand(slots.shape[0], -1, -1, -1)
        mask = mask.gather(3, slots[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    return mask.unflatten(1, (heads, group)) if mask.shape[1] > 1 else mask.unsqueeze(1)


def cache_scores(qf: Tensor, key: Packed, first: int, last: int) -> Tensor:
    """`table_scores` of queries ``[batch, heads, rows, head_dim]`` and slots ``[first, last)``."""
    position, parts = key.position(first, last), zip(key.coded(first, last), key.codec.parts, strict=True)
    return key.codec.merged(
        [table_scores(qf[:, list(heads)], codes, position, codec) for codes, (heads, codec) in parts]
    )


def cache_values(p: Tensor, value: Packed, first: int, last: int) -> Tensor:
    """`histogram_values` of probabilities ``[batch, heads, rows, n]`` and slots ``[first, last)``."""
    parts = zip(value.coded(first, last), value.codec.parts, strict=True)
    return value.codec.merged([histogram_values(p[:, list(heads)], codes, codec) for codes, (heads, codec) in parts])


def table_scores(qf: Tensor, codes: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """``q . k`` by look-up: for each frame, a table of ``q . codeword`` for every code.

    The query goes to the frame instead of the keys coming from it: with ``q' = R(-frame start) q``,
    ``q . k = sum_m (inverse^T q')[slice m] . codeword_m + q . R(position) mean``.

    Args:
        qf: float32 ``[batch, heads, rows, head_dim]``, scaled. codes: those of `encode`.
        position: ``[batch, n]``.

    Returns:
        float32 ``[batch, heads, rows, n]``.
    """
    batch, heads, rows, _ = qf.shape
    layout, n = codec.layout, codes.shape[2]
    frame = position // codec.frame if codec.inv_freq.numel() else torch.zeros_like(position)
    lowest = int(frame.min())
    starts = torch.arange(lowest, int(frame.max()) + 1, device=qf.device) * codec.frame
    turned = rotate(qf.unsqueeze(3), -starts, codec.inv_freq, codec.interleaved)
    turned = turned.expand(-1, -1, -1, starts.numel(), -1)  # [b, h, r, frames, d]
    slices = torch.einsum("bhrfd,hde->bhrfe", turned, codec.inverse).unflatten(-1, (layout.groups, layout.width))

    frame = (frame - lowest)[:, None, None]
    scores = torch.zeros(batch, heads, rows, n, dtype=torch.float32, device=qf.device)
    for m in range(layout.codes):
        table = torch.einsum("bhrfw,hcw->bhrfc", slices[..., m % layout.groups, :], codec.codebook[:, m].float())
        index = frame * CODEWORDS + codes[:, :, None, :, m].int()
        scores += table.flatten(3).gather(3, index.long().expand(-1, -1, rows, -1))
    return scores + qf @ mean_at(position, codec).transpose(-1, -2)


def histogram_values(p: Tensor, codes: Tensor, codec: Codec) -> Tensor:
    """``p @ v`` by histogram: add each probability to the bin of each of its codes, then one product per table.

    Only for codecs without frames, which value codecs are.

    Args:
        p: float32 ``[batch, heads, rows, n]``. codes: those of `encode`.

    Returns:
        float32 ``[batch, heads, rows, head_dim]``.
    """
    batch, heads, rows, _ = p.shape
    layout = codec.layout
    y = torch.zeros(batch, heads, rows, layout.groups, layout.width, dtype=torch.float32, device=p.device)
    for m in range(layout.codes):
        index = codes[:, :, None, :, m].long().expand(-1, -1, rows, -1)
        bins = torch.zeros(batch, heads, rows, CODEWORDS, dtype=torch.float32, device=p.device).scatter_add_(
            3, index, p
        )
        y[..., m % layout.groups, :] += bins @ codec.codebook[:, m].float()
    return y.flatten(-2) @ codec.inverse.transpose(1, 2) + p.sum(-1, keepdim=True) * codec.mean.unsqueeze(1)
