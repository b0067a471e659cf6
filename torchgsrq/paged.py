"""The ops on a serving engine's pages: schemas, shapes for tracing, and their implementations.

A layer's pages and codecs travel as plain tensors and integers; `reference.paged` says what the ops mean.
"""

from __future__ import annotations

from torch import Tensor

from torchgsrq.codec import Codecs
from torchgsrq.ops import _kernel, like_query, nothing, op
from torchgsrq.reference import paged as reference
from torchgsrq.reference.paged import Pages, Requests

_CODECS = "Tensor[] key_codec, int[] key_integers, Tensor[] value_codec, int[] value_integers"


@op(
    "(Tensor(a!) codes, Tensor? window, Tensor k, Tensor v, Tensor query_start, Tensor lengths, Tensor table, "
    f"Tensor? window_table, {_CODECS}, int[] sizes) -> ()",
    nothing,
    compiled=True,
    captured=True,
)
def paged_append_(
    codes: Tensor,
    window: Tensor | None,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    table: Tensor,
    window_table: Tensor | None,
    key_codec: list[Tensor],
    key_integers: list[int],
    value_codec: list[Tensor],
    value_integers: list[int],
    sizes: list[int],
) -> None:
    """Write as codes what a step makes due (`reference.paged.paged_append_`); ``sizes`` as in `paged_attention`."""
    requests = Requests(query_start, lengths, lengths, table, window_table, None)
    pages = _pages(codes, window, None, key_codec, key_integers, value_codec, value_integers, sizes)
    kernel = _kernel(k, "paged_append_", pages.key, pages.value, alike=(v, window))
    (kernel or reference.paged_append_)(pages, requests, k, v)


@op("(Tensor(a!) held, Tensor k, Tensor v, Tensor slots) -> ()", nothing, compiled=True, captured=True)
def paged_hold_(held: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write tokens ``[tokens, heads, head_dim]`` exactly, on pages of the window or of sinks
    (`reference.paged.paged_hold_`)."""
    (_kernel(k, "paged_hold_") or reference.paged_hold_)(held, k, v, slots)


@op(
    "(Tensor q, Tensor k, Tensor v, Tensor codes, Tensor? window, Tensor? sinks, Tensor query_start, Tensor lengths, "
    "Tensor held_from, Tensor table, Tensor? window_table, Tensor? sink_pages, "
    f"{_CODECS}, int[] sizes, float scale, float softcap, int view) -> Tensor",
    like_query,
    compiled=True,
    captured=True,
)
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: Tensor,
    window: Tensor | None,
    sinks: Tensor | None,
    query_start: Tensor,
    lengths: Tensor,
    held_from: Tensor,
    table: Tensor,
    window_table: Tensor | None,
    sink_pages: Tensor | None,
    key_codec: list[Tensor],
    key_integers: list[int],
    value_codec: list[Tensor],
    value_integers: list[int],
    sizes: list[int],
    scale: float,
    softcap: float,
    view: int,
) -> Tensor:
    """Attention of a step's new tokens ``[tokens, query heads, head_dim]`` (`reference.paged.paged_attention`).

    Args:
        sizes: tokens on a page of codes, then sink, recent and block tokens.
    """
    pages = _pages(codes, window, sinks, key_codec, key_integers, value_codec, value_integers, sizes)
    requests = Requests(query_start, lengths, held_from, table, window_table, sink_pages)
    kernel = _kernel(q, "paged_attention", pages.key, pages.value, alike=(k, v, window, sinks))
    attend = kernel or reference.paged_attention
    return attend(q, k, v, pages, requests, scale=scale, softcap=softcap, view=view)


def _pages(
    codes: Tensor,
    window: Tensor | None,
    sinks: Tensor | None,
    key_codec: list[Tensor],
    key_integers: list[int],
    value_codec: list[Tensor],
    value_integers: list[int],
    sizes: list[int],
) -> Pages:
    block, sink, recent, due = sizes
    key, value = Codecs.from_flat(key_codec, key_integers), Codecs.from_flat(value_codec, value_integers)
    return Pages(codes, window, sinks, key, value, sink, recent, due, block)
