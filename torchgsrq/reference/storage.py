"""What a buffer holds: appending and reading back, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgsrq.codec.packed import Packed
from torchgsrq.reference.coding import decode, encode

DECODE_BLOCK = 512  # slots dequantized at a time


def coded_slots(first: Tensor, length: int, recent_tokens: int, block_tokens: int) -> Tensor:
    """The slots below which rows are codes while ``length`` slots were only appended to: `config.encoded_tokens` of a
    row's own tokens, so that a padded row is as it would be alone. The padding before them counts as coded.

    Args:
        first: integer ``[batch]``, the slot of each row's first token.
    """
    own = (length - first - recent_tokens).clamp(min=0) // block_tokens * block_tokens
    return (first + own).clamp(max=length)


def decoded(kv: Packed, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes of slots ``[first, last)`` as vectors, ``[batch, heads, last - first, head_dim]``."""
    position = kv.position(first, last)
    some = zip(kv.coded(first, last), kv.codec.parts, strict=True)
    return kv.codec.merged([decode(codes, position, codec, dtype) for codes, (_, codec) in some])


def check_append(kv: Packed, x: Tensor, slots: Tensor, values: bool = True) -> None:
    """Refuse what `append_` cannot write.

    Args:
        values: look at the values of ``slots`` and ``x`` too, which takes reading them back from a GPU.

    Raises:
        ValueError: wrong shape or dtype, slots that leave a hole, are not consecutive or pass the
            capacity, or NaN/inf; names the rows that hold these.
    """
    batch, heads, capacity = kv.window.shape[0], kv.codec.heads, kv.capacity
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
        rows = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"x holds NaN or inf in row(s) {', '.join(map(str, rows))}; nothing was written")


def append_(kv: Packed, x: Tensor, slots: Tensor) -> None:
    """Write vectors at consecutive slots, in place; the oldest blocks of the window become codes.

    Writing below the length rewinds to that slot first, as a causal decoder does that reuses its
    buffers: what lay from there on is dropped.

    Args:
        x: ``[batch, heads, n, head_dim]``, finite.
        slots: integer ``[n]``, consecutive, the first at most the length, the last below the capacity: as
            `check_append` checks, which the ops call first.
    """
    heads, n = x.shape[1:3]
    if n == 0 or x.shape[0] == 0:
        return
    first = int(slots[0])
    was = kv.encoded.clamp(max=first)
    now = torch.maximum(was, coded_slots(kv.sink_start, first + n, kv.recent_tokens, kv.block_tokens))
    low, high = int(was.min()), int(now.max())
    if bool((now > was).any()):
        due = torch.cat((kv.recent(low, min(first, high)), x[:, :, : max(0, high - first)]), 2)
        at = torch.arange(low, high, device=x.device)
        position, mine = kv.position(low, high), (at >= was[:, None]) & (at < now[:, None])
        for codes, (some, codec) in zip(kv.codes, kv.codec.parts, strict=True):
            kv.put(codes, low, encode(due[:, list(some)], position, codec), mine)
    kept = torch.arange(max(int(now.min()), first), first + n, device=x.device)
    kv.window[:, :, kv.sink_tokens + kept.remainder(kv.ring)] = x[:, :, kept - first]
    if kv.sink_tokens:
        source = kv.sink_slots() - first
        inside = ((source >= 0) & (source < n))[:, None, :, None]
        index = source.clamp(0, n - 1)[:, None, :, None].expand(-1, heads, -1, x.shape[-1])
        sinks = kv.window[:, :, : kv.sink_tokens]
        sinks.copy_(torch.where(inside, x.gather(2, index), sinks))
    kv.length.fill_(first + n)
    kv.encoded.copy_(now)


def tail(kv: Packed, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """What is held in full precision just before ``x`` is appended, and ``x``: what a view other than ``WINDOW`` reads.

    Returns:
        ``[batch, heads, ring + n, head_dim]``, of which entry i is slot ``slots[0] - ring + i``, and
        int32 ``[batch]``: the first slot of it that is valid in each row.
    """
    first = slots[0].int() if slots.numel() else kv.length  # stays on its device
    before = first - kv.ring + torch.arange(kv.ring, device=slots.device)
    before = kv.window[:, :, kv.sink_tokens + before.remainder(kv.ring)]
    return torch.cat((before, x), 2), torch.minimum(kv.encoded, first)


def dequantize(kv: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Everything held, ``[batch, heads, capacity, head_dim]``: codes decoded, sinks and window exact, zeros past
    the length."""
    batch, heads, capacity = kv.window.shape[0], kv.codec.heads, kv.capacity
    length = int(kv.length)
    low, coded = (int(kv.encoded.min()), int(kv.encoded.max())) if batch else (length, 0)
    out = kv.window.new_zeros(batch, heads, capacity, kv.codec.head_dim, dtype=dtype or kv.window.dtype)
    for first in range(0, coded, DECODE_BLOCK):
        last = min(first + DECODE_BLOCK, coded)
        out[:, :, first:last] = decoded(kv, first, last, out.dtype)
    exact = torch.arange(low, length, device=out.device) >= kv.encoded[:, None]
    out[:, :, low:length] = torch.where(exact[:, None, :, None], kv.recent(low, length), out[:, :, low:length])
    for i, slots in enumerate(kv.sink_slots().T):
        rows = (slots < length).nonzero().flatten()
        out[rows, :, slots[rows]] = kv.window[rows, :, i].to(out.dtype)
    return out
