"""Append the tokens of one cache to another: codes are moved to other positions, not decoded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchgsrq import reference
from torchgsrq.cache.layer import GSRQLayer
from torchgsrq.codec.packed import positions
from torchgsrq.codec.rope import rotate
from torchgsrq.tensor import GSRQTensor

Pairs = list[tuple[GSRQLayer, GSRQLayer]]  # the quantized layers of a cache, and those of a piece


@torch.no_grad()
def splice(pairs: Pairs, held: int, more: int, skip: int, dtype: torch.dtype | None) -> bool:
    """Append ``more`` tokens of the layers of a piece, those after its first ``skip``, to the ``held`` tokens of these
    layers. See `GSRQCache.splice`; call `check` first.

    Args:
        pairs: the layers of this cache and of the piece.
        held: tokens that these layers hold.
        more: tokens to append.
        skip: tokens of the piece to leave out.
        dtype: dtype of layers that hold nothing yet; that of the piece by default.

    Returns:
        Whether every row has a real token.
    """
    layers = _written(pairs)
    ours, theirs = layers[0]
    empty = all(layer.is_empty for layer, _ in pairs)
    rows = ours.batch_size if ours.is_initialized else theirs.batch_size
    frame = math.lcm(*(codec.frame for layer, _ in layers for codec in layer.codec))
    start, shift = _moved(ours, theirs, held, more, skip, rows, frame)
    for layer, source in layers:
        if not layer.is_initialized:
            like = torch.empty(rows, source.keys.shape[1], 0, source.keys.shape[3])
            values = torch.empty(rows, source.values.shape[1], 0, source.values.shape[3])
            layer.lazy_initialization(*(x.to(source.device, dtype or source.dtype) for x in (like, values)))
        layer.prefetch()
        if empty:
            layer.follow(source.keys.inv_freq.to(layer.device))
        layer.reserve(held + more)
        layer.set_row_start(start.to(layer.device))
        for buffer, other in ((layer.keys, source.keys), (layer.values, source.values)):
            _join(buffer, other.held_on(buffer.device), held, skip, shift.to(buffer.device))
        layer.take_length(held + more)
    return bool((start[:, 1] < held + more).all())


def check(pairs: Pairs, whole: int) -> None:
    """Refuse a piece that does not fit these layers; ``whole`` is the number of tokens after the splice.

    Raises:
        ValueError: the piece does not fit.
    """
    if any(layer.is_initialized and not source.is_initialized for layer, source in pairs):
        raise ValueError("splice: the piece holds nothing in a layer that this cache has tokens of")
    empty = all(layer.is_empty for layer, _ in pairs)
    for layer, source in _written(pairs):
        capacity = layer.get_max_length()
        if -1 < capacity < whole:
            raise ValueError(f"splice: {whole} tokens do not fit a capacity of {capacity} tokens")
        if layer.is_initialized and source.batch_size not in (1, layer.batch_size):
            raise ValueError(
                f"splice: the piece has {source.batch_size} rows, this cache {layer.batch_size}; 1 or as many fit"
            )
        if not empty and not torch.equal(layer.keys.inv_freq, source.keys.inv_freq.to(layer.device)):
            raise ValueError("splice: the piece was rotated by other RoPE frequencies (those of another length)")


def _written(pairs: Pairs) -> Pairs:
    """The pairs whose piece holds tokens; a pruned model does not write to all layers."""
    return [(layer, source) for layer, source in pairs if source.is_initialized]


def _moved(
    layer: GSRQLayer, source: GSRQLayer, held: int, more: int, skip: int, rows: int, frame: int
) -> tuple[Tensor, Tensor]:
    """Where rows begin and the positions of all slots (`GSRQTensor.start`), and by how many positions each slot of the
    piece moves, ``[rows, more]``: codes by whole frames, full-precision tokens to the positions that directly
    follow."""
    theirs = _start(source).expand(rows, -1)
    places = positions(theirs, skip, skip + more)
    theirs = torch.stack((theirs[:, 0] - skip, (theirs[:, 1] - skip).clamp(min=0)), 1)  # of what is left of it
    ours = _start(layer).to(theirs.device) if layer.is_initialized else torch.zeros_like(theirs)
    begun = ours[:, 1] < held
    following = torch.where(begun, positions(ours, held, held + 1)[:, 0], 0)
    first = places.gather(1, theirs[:, 1:2].clamp(max=more - 1).long())[:, 0]
    wanted = (following - first)[:, None]
    coded = torch.arange(skip, skip + more, device=theirs.device) < source.keys.encoded[:, None]
    shift = torch.where(coded, torch.div(wanted, frame, rounding_mode="floor") * frame, wanted).expand(rows, -1)
    known = torch.cat((positions(ours, 0, held), places + shift), 1)
    ahead = following + (more - theirs[:, 1]).clamp(min=0)  # as generate counts: real tokens
    begins = torch.where(
        begun[:, None], ours[:, :2], theirs[:, :2] + torch.stack((held - shift[:, -1], 0 * first + held), 1)
    )
    counted = torch.arange(held + more + 1, device=known.device) - begins[:, :1]
    whole = torch.cat((known, ahead[:, None]), 1)
    if bool((whole == counted).all()):
        return begins.int(), shift
    return torch.cat((begins, whole), 1).int(), shift


def _start(layer: GSRQLayer) -> Tensor:
    """The `GSRQTensor.start` of a layer's keys, with the positions that its cache has."""
    return layer.keys.start if layer.row_start is None else layer.row_start.to(layer.keys.start.device)


def _join(buffer: GSRQTensor, piece: GSRQTensor, held: int, skip: int, shift: Tensor) -> None:
    """Append the tokens of a piece after ``skip``, each moved by ``shift [rows, more]`` positions. Codes of the piece
    do not change. Full-precision tokens stay in full precision as far as the window reaches."""
    more, rows = int(piece.length) - skip, buffer.shape[0]
    kv, coded = buffer.packed, (piece.encoded - skip).clamp(min=0).expand(rows)
    sinks = kv.sink_tokens

    def turned(x: Tensor, slots: slice) -> Tensor:
        return (
            rotate(x, shift[:, None, slots], kv.codec.inv_freq, kv.codec.first.interleaved)
            .to(buffer.dtype)
            .expand(rows, -1, -1, -1)
        )

    due = reference.coded_slots(kv.sink_start, held + more, kv.recent_tokens, kv.block_tokens)
    # Codes are a row's first slots: if codes are appended, all tokens before them must be encoded too.
    _encode_up_to(buffer, torch.where(coded > 0, held, due.clamp(max=held)))
    last = int(coded.max())
    for codes, moved in zip(kv.codes, piece.packed.coded(skip, skip + last), strict=True):
        kv.put(codes, held, moved, torch.ones_like(shift[:, :last], dtype=torch.bool))
    first = int(coded.min())
    slots = torch.arange(first, more, device=buffer.device)
    exact = turned(piece.packed.recent(skip + first, skip + more), slice(first, more))
    buffer.window[:, :, sinks + (held + slots).remainder(kv.ring)] = exact
    source = kv.sink_slots() - held
    new = ((source >= 0) & (source < more))[:, None, :, None]
    if bool(new.any()):  # a row without a real token, or with fewer tokens than sinks
        at = source.clamp(0, more - 1)[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
        kept = buffer.window[:, :, :sinks]
        kept.copy_(
            torch.where(new, turned(piece.dequantize()[:, :, skip : skip + more], slice(more)).gather(2, at), kept)
        )
    buffer.length.fill_(held + more)
    buffer.encoded.copy_(torch.where(coded > 0, held + coded, buffer.encoded))
    _encode_up_to(buffer, due)


def _encode_up_to(buffer: GSRQTensor, slots: Tensor) -> None:
    """Encode the window's tokens in slots before these, ``[rows]``."""
    kv = buffer.packed
    low, high = int(kv.encoded.min()), int(slots.max())
    if high <= low or not bool((slots > kv.encoded).any()):
        return
    at = torch.arange(low, high, device=buffer.device)
    due = (at >= kv.encoded[:, None]) & (at < slots[:, None])
    x, position = kv.recent(low, high), kv.position(low, high)
    for codes, (heads, codec) in zip(kv.codes, kv.codec.parts, strict=True):
        new = torch.ops.torchgsrq.encode(x[:, list(heads)], position, codec.tensors, codec.integers)
        kv.put(codes, low, new, due)
    kv.encoded.copy_(torch.maximum(kv.encoded, slots.to(kv.encoded.dtype)))
