"""Encode, decode, append and attention in plain PyTorch: what they mean. Every fast path is tested against this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgsrq.codec import Codec
from torchgsrq.config import encoded_tokens
from torchgsrq.layout import CODEWORDS
from torchgsrq.rope import rotate

_TILE = 32  # products are of whole tiles of rows, so that a vector's result never depends on its batch
_ENCODE_ROWS = 128  # rows searched at a time: their distances stay in cache
_DECODE_BLOCK = 512  # slots dequantized at a time
_TABLE_BLOCK = 4096  # slots scored by look-up at a time
_TABLE_ROWS = 16  # up to this many query rows per KV head, look-up tables are cheaper than decoding

# What a query attends to in full precision; the rest is read from codes.
WINDOW = 0  # what the cache holds now: sinks and the recent window
EXACT_TAIL = 1  # the incoming tokens, and the window as it was before them
STREAMING = 2  # what the window would have held had the tokens come one at a time

# Alignment of the causal mask.
NOT_CAUSAL, UPPER_LEFT, LAST_ALIGNED = 0, 1, 2


# ---------------------------------------------------------------------------------------------------------------------
# Codec


def encode(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """Vectors to codes: a search over the residual stages of each group (`beam_search`).

    Args:
        x: ``[batch, heads, n, head_dim]``, post-RoPE keys or values.
        position: ``[batch, n]``, integer positions of the tokens in their rows.

    Returns:
        uint8 ``[batch, heads, n, codec.num_codes]``. Ties go to the lower code. Independent of
        batch and chunking.
    """
    batch, heads, n, _ = x.shape
    codes = search(to_metric(x, position, codec), codec)[:, : batch * n]
    return codes.reshape(heads, batch, n, codec.num_codes).transpose(0, 1).contiguous()


def to_metric(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """Vectors without their mean, in the metric of the codes: ``transform (R(-frame start) x - R(place) mean)``.

    Returns:
        float32 ``[heads, batch * n, dims]``, padded with rows to whole tiles.
    """
    batch, heads, n, head_dim = x.shape
    place = position.remainder(codec.frame)
    y = rotate(x.float(), (place - position).unsqueeze(1), codec.inv_freq, codec.interleaved)
    y = y - _mean_at(place, codec)
    return _tiled_product(y.transpose(0, 1).reshape(heads, batch * n, head_dim), codec.transform)


def search(y: Tensor, codec: Codec) -> Tensor:
    """Codes of vectors in their metric: float32 ``[heads, n, dims]`` to uint8 ``[heads, n, codec.num_codes]``."""
    head, n = [], y.shape[1]
    y = F.pad(y, (0, 0, 0, -n % _TILE))
    if codec.gains.numel():
        gain = (y.norm(dim=-1, keepdim=True) - codec.gains).abs().argmin(-1, keepdim=True)
        y = y / codec.gains[gain]
        head = [gain.to(torch.uint8)]
    layout = codec.layout
    codes = torch.zeros(*y.shape[:2], layout.codes, dtype=torch.uint8, device=y.device)
    for group in range(layout.groups):
        part = y[..., layout.start(group) : layout.start(group) + layout.width]
        tables = codec.codebook[:, group :: layout.groups]
        for rows in range(0, y.shape[1], _ENCODE_ROWS):
            found = beam_search(part[:, rows : rows + _ENCODE_ROWS], tables, codec.beam, codec.eta)
            codes[:, rows : rows + _ENCODE_ROWS, group :: layout.groups] = found
    return torch.cat([*head, codes], -1)[:, :n].contiguous()


def _mean_at(position: Tensor, codec: Codec) -> Tensor:
    """The mean, rotated to positions ``[batch, n]``: ``[batch, heads, n, head_dim]``, or with a size of 1 for n."""
    return rotate(codec.mean[:, None], position.unsqueeze(1), codec.inv_freq, codec.interleaved)


def _tiled_product(y: Tensor, matrix: Tensor) -> Tensor:
    """``matrix @ y`` for every row of ``y [heads, n, d]``, padded with zero rows to whole tiles."""
    return F.pad(y, (0, 0, 0, -y.shape[1] % _TILE)) @ matrix.transpose(1, 2)


def beam_search(y: Tensor, tables: Tensor, beam: int, eta: int = 1) -> Tensor:
    """Codes of one group: of low loss ``|e|^2 + (eta - 1) (e . y/|y|)^2`` of the error e.

    The queries that attend to a key are aligned with it, so that the part of an error along the vector costs attention
    more than its size says (the anisotropic loss of ScaNN, arXiv 1908.10396).

    A beam search ranks candidates by the plain error until the last stage, and by the loss there; then one sweep of
    coordinate descent gives each stage the codeword of least loss among the others. The first candidate is always the
    greedy path, so the result is never worse than it, in the loss.

    Args:
        y: ``[heads, n, width]`` float32, n a multiple of the tile. tables: ``[heads, stages, 256, width]``, any
            floating dtype. beam: candidates kept. eta: 1 for the plain squared error.

    Returns:
        uint8 ``[heads, n, stages]``.
    """
    heads, n, width = y.shape
    stages = tables.shape[1]
    norm = y.norm(dim=-1, keepdim=True)
    unit = (y / norm.masked_fill(norm == 0, 1)).unsqueeze(2)
    residual = y.unsqueeze(2)  # [heads, n, candidates, width]
    cost = residual.square().sum(-1)
    codes = torch.zeros(heads, n, 1, 0, dtype=torch.int64, device=y.device)

    def losses(residual: Tensor, table: Tensor, aligned: bool) -> Tensor:
        """Loss of every codeword for every residual, less the residual's own square: [heads, n, candidates, 256]."""
        squares = table.square().sum(-1).unsqueeze(1)
        change = torch.baddbmm(squares, residual.flatten(1, 2), table.transpose(1, 2), alpha=-2)
        change = change.view(heads, n, -1, CODEWORDS)
        if aligned and eta > 1:
            along = (unit.squeeze(2) @ table.transpose(1, 2)).unsqueeze(2)
            change += (eta - 1) * ((residual * unit).sum(-1, keepdim=True) - along).square()
        return change

    def words(table: Tensor, code: Tensor) -> Tensor:
        return table.gather(1, code.flatten(1).unsqueeze(-1).expand(-1, -1, width)).view(heads, n, -1, width)

    for stage in range(stages):
        table = tables[:, stage].float()
        last = stage + 1 == stages
        change = losses(residual, table, aligned=last)
        if last:
            pick = change.add_(cost.unsqueeze(-1)).flatten(2).argmin(-1, keepdim=True)
        else:
            pick = change[:, :, 0].argmin(-1, keepdim=True)  # candidate 0, greedily
            if beam > 1:
                total = change.add_(cost.unsqueeze(-1)).flatten(2).scatter_(2, pick, torch.inf)
                others = total.topk(beam - 1, dim=-1, largest=False).indices
                pick = torch.cat((pick, others), -1)
        parent, code = pick // CODEWORDS, pick % CODEWORDS
        residual = residual.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, width)) - words(table, code)
        cost = residual.square().sum(-1)
        before = codes.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, stage))
        codes = torch.cat((before, code.unsqueeze(-1)), -1)
    for stage in range(stages if eta > 1 and stages > 1 else 0):
        table = tables[:, stage].float()
        residual = residual + words(table, codes[..., stage])
        codes[..., stage] = losses(residual, table, aligned=True).argmin(-1)
        residual = residual - words(table, codes[..., stage])
    return codes.squeeze(2).to(torch.uint8)


def codeword_sum(codes: Tensor, codec: Codec) -> Tensor:
    """Codes to vectors in the learned metric, float32 ``[batch, heads, n, dims]``."""
    heads = codes.shape[1]
    layout = codec.layout
    gain = None
    if codec.gains.numel():
        gain, codes = codec.gains[codes[..., :1].int()], codes[..., 1:]
    rows = codec.codebook.reshape(-1, layout.width)
    base = torch.arange(heads * layout.codes, device=codes.device).view(1, heads, 1, layout.codes) * CODEWORDS
    index = base + codes.int()
    y: Any = 0
    for stage in range(layout.stages):
        first = stage * layout.groups
        words = rows[index[..., first : first + layout.groups]].float()
        y = y + F.pad(words, (0, 0, 0, layout.groups - layout.groups_in(stage)))
    y = y.flatten(-2)
    return y if gain is None else y * gain


def decode(codes: Tensor, position: Tensor, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes to vectors: ``R(frame start) (R(place) mean + inverse @ sum of codewords)``.

    Args:
        codes: uint8 ``[batch, heads, n, codec.num_codes]``.
        position: ``[batch, n]``.

    Returns:
        ``[batch, heads, n, head_dim]`` of ``dtype``.
    """
    place = position.remainder(codec.frame)
    batch, heads, n, _ = codes.shape
    y = codeword_sum(codes, codec).transpose(0, 1).reshape(heads, batch * n, codec.layout.dims)
    x = _tiled_product(y, codec.inverse)[:, : batch * n].unflatten(1, (batch, n)).transpose(0, 1)
    x = x + _mean_at(place, codec)
    return rotate(x, (position - place).unsqueeze(1), codec.inv_freq, codec.interleaved).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Storage


def positions(start: Tensor, first: int, last: int) -> Tensor:
    """Positions of slots ``[first, last)`` by a `GSRQTensor.start` that knows any number of slots, int64
    ``[batch, last - first]``; slots beyond those count on."""
    slots = torch.arange(first, last, device=start.device)
    known = start.shape[1] - 2
    if not known:
        return slots - start[:, :1]
    return start[:, 2 + slots.clamp(max=known - 1)] + (slots - (known - 1)).clamp(min=0)


def fitted(start: Tensor, capacity: int) -> Tensor:
    """A `GSRQTensor.start` that knows any number of slots, for a buffer of this many."""
    if start.shape[1] == 2:
        return start
    return torch.cat((start[:, :2], positions(start, 0, capacity)), 1).to(start.dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """The parts of one `GSRQTensor`, and the codec they belong to (tensor.py documents them)."""

    codes: Tensor
    window: Tensor
    start: Tensor
    length: Tensor
    encoded: Tensor
    codec: Codec
    sink_tokens: int
    recent_tokens: int
    block_tokens: int

    @property
    def ring(self) -> int:
        """Slots of the window after the sinks."""
        return self.window.shape[2] - self.sink_tokens

    @property
    def sink_start(self) -> Tensor:
        """First slot that each row's sinks come from, ``[batch]``."""
        return self.start[:, 1]

    def sink_slots(self) -> Tensor:
        """Slots of the sinks, ``[batch, sink_tokens]``."""
        return self.sink_start[:, None] + torch.arange(self.sink_tokens, device=self.start.device)

    def recent(self, first: int, last: int) -> Tensor:
        """Window entries of slots ``[first, last)``, ``[batch, heads, last - first, head_dim]``."""
        slots = torch.arange(first, last, device=self.window.device)
        return self.window[:, :, self.sink_tokens + slots.remainder(self.ring)]

    def position(self, first: int, last: int) -> Tensor:
        """Positions of slots ``[first, last)`` in each row, ``[batch, last - first]``."""
        return positions(self.start, first, last)


def check_append(kv: Packed, x: Tensor, slots: Tensor, values: bool = True) -> None:
    """Refuse what `append_` cannot write.

    Args:
        values: look at the values of ``slots`` and ``x`` too, which takes reading them back from a GPU.

    Raises:
        ValueError: wrong shape or dtype, slots that leave a hole, are not consecutive or pass the
            capacity, or NaN/inf.
    """
    batch, heads, capacity, _ = kv.codes.shape
    n = x.shape[2] if x.ndim == 4 else -1
    if x.shape != (batch, heads, n, kv.codec.head_dim):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; this cache takes [{batch}, {heads}, n, {kv.codec.head_dim}] "
            "(batch, KV heads, tokens, head_dim)"
        )
    if x.dtype != kv.window.dtype:
        raise ValueError(f"x is {x.dtype}; this cache holds {kv.window.dtype}")
    if slots.shape != (n,):
        raise ValueError(f"slots has shape {tuple(slots.shape)}; expected [{n}], one slot per token")
    if n == 0 or not values:
        return
    first, length = int(slots[0]), int(kv.length)
    if not bool((slots == first + torch.arange(n, device=slots.device)).all()):
        raise ValueError(f"slots={slots.tolist()[:8]} are not consecutive; a quantized cache is written in order")
    if not 0 <= first <= length:
        raise ValueError(f"slots start at {first}, but the cache holds {length} tokens: that would leave a hole")
    if first + n > capacity:
        raise ValueError(f"slots up to {first + n - 1} do not fit a capacity of {capacity} tokens")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or inf; nothing was written")


def append_(kv: Packed, x: Tensor, slots: Tensor) -> None:
    """Write vectors at consecutive slots, in place; the oldest blocks of the window become codes.

    Writing below the length rewinds to that slot first, as a causal decoder does that reuses its
    buffers: what lay from there on is dropped.

    Args:
        x: ``[batch, heads, n, head_dim]``, finite.
        slots: integer ``[n]``, consecutive, the first at most the length, the last below the capacity.

    Raises:
        ValueError: see `check_append`; nothing is written then.
    """
    check_append(kv, x, slots)
    heads, n = x.shape[1:3]
    if n == 0 or x.shape[0] == 0:
        return
    first = int(slots[0])
    was = min(int(kv.encoded), first)
    now = max(was, encoded_tokens(first + n, kv.recent_tokens, kv.block_tokens))
    if now > was:
        due = torch.cat((kv.recent(was, min(first, now)), x[:, :, : max(0, now - first)]), 2)
        kv.codes[:, :, was:now] = encode(due, kv.position(was, now), kv.codec)
    kept = torch.arange(max(now, first), first + n, device=x.device)
    kv.window[:, :, kv.sink_tokens + kept.remainder(kv.ring)] = x[:, :, kept - first]
    if kv.sink_tokens:
        source = kv.sink_slots() - first
        inside = ((source >= 0) & (source < n))[:, None, :, None]
        index = source.clamp(0, n - 1)[:, None, :, None].expand(-1, heads, -1, x.shape[-1])
        sinks = kv.window[:, :, : kv.sink_tokens]
        sinks.copy_(torch.where(inside, x.gather(2, index), sinks))
    kv.length.fill_(first + n)
    kv.encoded.fill_(now)


def tail(kv: Packed, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """What is held in full precision just before ``x`` is appended, and ``x``.

    Returns:
        ``[batch, heads, ring + n, head_dim]``, of which entry i is slot ``slots[0] - ring + i``, and
        an int32 scalar: the first slot of it that is valid.
    """
    first = slots[0].int() if slots.numel() else kv.length  # stays on its device
    before = first - kv.ring + torch.arange(kv.ring, device=slots.device)
    before = kv.window[:, :, kv.sink_tokens + before.remainder(kv.ring)]
    return torch.cat((before, x.to(before.dtype)), 2), torch.minimum(kv.encoded, first)


def dequantize(kv: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Everything held, ``[batch, heads, capacity, head_dim]``: codes decoded, sinks and window exact, zeros past
    the length."""
    batch, heads, capacity, _ = kv.codes.shape
    length, encoded = int(kv.length), int(kv.encoded)
    out = kv.window.new_zeros(batch, heads, capacity, kv.codec.head_dim, dtype=dtype or kv.window.dtype)
    for first in range(0, encoded, _DECODE_BLOCK):
        last = min(first + _DECODE_BLOCK, encoded)
        out[:, :, first:last] = decode(kv.codes[:, :, first:last], kv.position(first, last), kv.codec, out.dtype)
    out[:, :, encoded:length] = kv.recent(encoded, length)
    for i, slots in enumerate(kv.sink_slots().T):
        rows = (slots < length).nonzero().flatten()
        out[rows, :, slots[rows]] = kv.window[rows, :, i].to(out.dtype)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def attention(
    q: Tensor,
    key: Packed,
    value: Packed,
    *,
    mask: Tensor | None = None,
    scale: float,
    causal: int = NOT_CAUSAL,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    tails: tuple[Tensor, Tensor] | None = None,
    tail_start: Tensor | None = None,
    view: int = WINDOW,
    form: str | None = None,
) -> Tensor:
    """Attention on codes, sinks and window with an online softmax over blocks of slots.

    Slots at or past the length never take part, nor do masked ones. A query that sees nothing gets zeros.

    Args:
        q: ``[batch, query heads, queries, head_dim]``; query heads a multiple of the KV heads.
        mask: bool (True takes part) or additive, broadcastable to ``[batch, query heads, queries, width]`` with
            a width of at least the length; column j is slot j.
        scale: multiplies ``q . k``.
        causal: ``UPPER_LEFT`` (query i sees slots up to i) or ``LAST_ALIGNED`` (the queries are the newest tokens).
        softcap: ``cap * tanh(score / cap)`` before the mask; 0 is off.
        sink_logits: ``[query heads]``, a logit per head that takes probability and gives nothing.
        tails: full-precision keys and values of the newest slots, from `tail`, for the views below.
        tail_start: first valid slot of ``tails``.
        view: ``WINDOW``, ``EXACT_TAIL`` or ``STREAMING``; the queries are then the newest tokens.
        form: ``"tables"`` or ``"decode"`` forces how codes are read; the result is the same.

    Returns:
        ``[batch, query heads, queries, head_dim]`` in the dtype of ``q``.
    """
    batch, q_heads, queries, head_dim = q.shape
    heads = key.codec.heads
    group = q_heads // heads
    device = q.device
    length = int(key.length)
    rows = group * queries
    qf = (q.float() * scale).reshape(batch, heads, rows, head_dim)
    if form is None:
        framed = key.codec.frame > 1 or not key.codec.inv_freq.numel()
        form = "tables" if rows <= _TABLE_ROWS and framed else "decode"

    query_slot = torch.arange(queries, device=device) + (length - queries if causal != UPPER_LEFT else 0)
    if view == WINDOW:
        boundary = key.encoded.long().expand(queries)
    elif view == EXACT_TAIL:
        assert tail_start is not None
        boundary = tail_start.long().expand(queries)
    else:
        assert tail_start is not None
        seen = [encoded_tokens(length - queries + i + 1, key.recent_tokens, key.block_tokens) for i in range(queries)]
        boundary = torch.tensor(seen, device=device).clamp_min(int(tail_start))

    top = torch.full((batch, heads, rows, 1), -torch.inf, dtype=torch.float32, device=device)
    mass = torch.zeros_like(top)
    out = torch.zeros(batch, heads, rows, head_dim, dtype=torch.float32, device=device)

    def absorb(scores: Tensor, slots: Tensor, allowed: Tensor, weigh: Callable[[Tensor], Tensor]) -> None:
        """Add slots: scores ``[b, h, rows, t]``, slots ``[b or 1, t]``, allowed ``[b or 1, q, t]``."""
        nonlocal top, mass, out
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.unflatten(2, (group, queries))
        if causal:
            allowed = allowed & (slots[:, None] <= query_slot[:, None])
        if mask is not None:
            extra = _mask_columns(mask, slots, heads, group)
            hidden = extra.dtype == torch.bool
            scores = scores.masked_fill(~extra, -torch.inf) if hidden else scores + extra.float()
        scores = scores.masked_fill(~allowed[:, None, None], -torch.inf).flatten(2, 3)
        peak = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe = peak.masked_fill(peak == -torch.inf, 0)
        p = torch.exp(scores - safe)
        fade = torch.exp(top - safe)
        mass = mass * fade + p.sum(-1, keepdim=True)
        out = out * fade + weigh(p)
        top = peak

    sinks = key.sink_slots()
    first_sink, past_sink = sinks[:, :1] if key.sink_tokens else length, key.sink_start[:, None] + key.sink_tokens

    def not_a_sink(slots: Tensor) -> Tensor:
        return (slots < first_sink) | (slots >= past_sink)

    # 1. Codes.
    coded = min(int(boundary.max()) if queries else 0, int(key.encoded))
    step = _TABLE_BLOCK if form == "tables" else _DECODE_BLOCK
    for first in range(0, coded, step):
        last = min(first + step, coded)
        slots = torch.arange(first, last, device=device)[None]
        allowed = (slots[:, None] < boundary[:, None]) & not_a_sink(slots)[:, None]
        k_codes, v_codes = key.codes[:, :, first:last], value.codes[:, :, first:last]
        k_position, v_position = key.position(first, last), value.position(first, last)
        if form == "tables":
            scores = table_scores(qf, k_codes, k_position, key.codec)
            absorb(scores, slots, allowed, lambda p, c=v_codes: histogram_values(p, c, value.codec))  # type: ignore[misc]
        else:
            scores = qf @ decode(k_codes, k_position, key.codec).transpose(-1, -2)
            v = decode(v_codes, v_position, value.codec)
            absorb(scores, slots, allowed, lambda p, v=v: p @ v)  # type: ignore[misc]

    # 2. The newest tokens, in full precision.
    if tails is None:
        low = int(key.encoded)
        k, v = key.recent(low, length).float(), value.recent(low, length).float()
    else:
        assert tail_start is not None
        low = max(int(tail_start), 0)
        k, v = (t[:, :, t.shape[2] - (length - low) :].float() for t in tails)
    for first in range(0, k.shape[2], _DECODE_BLOCK):
        some_k, some_v = k[:, :, first : first + _DECODE_BLOCK], v[:, :, first : first + _DECODE_BLOCK]
        slots = torch.arange(low + first, low + first + some_k.shape[2], device=device)[None]
        allowed = (slots[:, None] >= boundary[:, None]) & not_a_sink(slots)[:, None]
        absorb(qf @ some_k.transpose(-1, -2), slots, allowed, lambda p, v=some_v: p @ v)  # type: ignore[misc]

    # 3. Sinks.
    if key.sink_tokens:
        k, v = (kv.window[:, :, : kv.sink_tokens].float() for kv in (key, value))
        allowed = (sinks < length)[:, None].expand(-1, queries, -1)
        absorb(qf @ k.transpose(-1, -2), sinks, allowed, lambda p, v=v: p @ v)  # type: ignore[misc]

    if sink_logits is not None:
        logits = sink_logits.float().view(1, heads, group, 1, 1).expand(batch, -1, -1, queries, -1).flatten(2, 3)
        peak = torch.maximum(top, logits)
        out, mass = out * torch.exp(top - peak), mass * torch.exp(top - peak) + torch.exp(logits - peak)
    out = out / mass.masked_fill(mass == 0, 1)
    return out.view(batch, q_heads, queries, head_dim).to(q.dtype)


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


def table_scores(qf: Tensor, codes: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """``q . k`` by look-up: for each frame, a table of ``q . codeword`` for every code.

    The query goes to the frame instead of the keys coming from it: with ``q' = R(-frame start) q``,
    ``q . k = sum_m (inverse^T q')[slice m] . codeword_m + q . R(position) mean``.

    Args:
        qf: float32 ``[batch, heads, rows, head_dim]``, scaled. codes: ``[batch, heads, n, codes]``.
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
    turned = turned.expand(-1, -1, -1, starts.numel(), -1)  # [b, h, rows, frames, d]
    slices = torch.einsum("bhrfd,hde->bhrfe", turned, codec.inverse).unflatten(-1, (layout.groups, layout.width))

    frame = (frame - lowest)[:, None, None]
    scores = torch.zeros(batch, heads, rows, n, dtype=torch.float32, device=qf.device)
    gains = codec.gains.numel()
    for m in range(layout.codes):
        table = torch.einsum("bhrfw,hcw->bhrfc", slices[..., m % layout.groups, :], codec.codebook[:, m].float())
        index = frame * CODEWORDS + codes[:, :, None, :, m + bool(gains)].int()
        scores += table.flatten(3).gather(3, index.long().expand(-1, -1, rows, -1))
    if gains:
        scores *= codec.gains[codes[..., 0].int()].unsqueeze(2)
    return scores + qf @ _mean_at(position, codec).transpose(-1, -2)


def histogram_values(p: Tensor, codes: Tensor, codec: Codec) -> Tensor:
    """``p @ v`` by histogram: add each probability to the bin of each of its codes, then one product per table.

    Only for codecs without frames, which value codecs are.

    Args:
        p: float32 ``[batch, heads, rows, n]``. codes: ``[batch, heads, n, codes]``.

    Returns:
        float32 ``[batch, heads, rows, head_dim]``.
    """
    batch, heads, rows, _ = p.shape
    layout = codec.layout
    gains = codec.gains.numel()
    weight = p * codec.gains[codes[..., 0].int()].unsqueeze(2) if gains else p
    y = torch.zeros(batch, heads, rows, layout.groups, layout.width, dtype=torch.float32, device=p.device)
    for m in range(layout.codes):
        index = codes[:, :, None, :, m + bool(gains)].long().expand(-1, -1, rows, -1)
        bins = torch.zeros(batch, heads, rows, CODEWORDS, dtype=torch.float32, device=p.device).scatter_add_(
            3, index, weight
        )
        y[..., m % layout.groups, :] += bins @ codec.codebook[:, m].float()
    return y.flatten(-2) @ codec.inverse.transpose(1, 2) + p.sum(-1, keepdim=True) * codec.mean.unsqueeze(1)
