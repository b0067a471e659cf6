"""Attention of one layer in vLLM, and its metadata of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, AttentionType

from torchgsrq.reference.paged import CHUNK, DECODE
from torchgsrq.vllm.engine import Engine, engine_of
from torchgsrq.vllm.specs import RingSpec

_ops = torch.ops.torchgsrq


@dataclass
class StepMetadata(AttentionMetadata):
    """What vLLM says of a step to one of its cache groups.

    Attributes:
        tokens: new tokens. query_start, lengths: int32, see `Requests`.
        table: int32 ``[requests, pages]``. slots: int64 ``[tokens]``, below 0 for padding.
        spec: of the group.
        step: what layers made of it, by the first of them.
    """

    tokens: int
    query_start: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor
    spec: Any
    step: Step | None = None


@dataclass
class Step:
    """What the layers of a step share, from the metadata of all three groups.

    Attributes:
        tokens: new ones. The others are what `paged_attention` and `paged_hold_` take; there are no slots of sinks if
            none of the new tokens is one.
    """

    tokens: int
    held_from: Tensor
    window_slots: Tensor | None
    window_table: Tensor | None
    sink_slots: Tensor | None
    sink_pages: Tensor | None


class StepBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Takes what a step needs from vLLM's metadata."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.spec = kv_cache_spec

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
        """Of one step and cache group."""
        m = common_attn_metadata
        return StepMetadata(
            m.num_actual_tokens, m.query_start_loc_cpu, m.seq_lens, m.block_table_tensor, m.slot_mapping, self.spec
        )


def step_of(codes: StepMetadata, window: StepMetadata | None, sinks: StepMetadata | None, sink_tokens: int) -> Step:
    """What the layers of a step share."""
    start, lengths = codes.query_start.long(), codes.lengths.long()
    queries = start[1:] - start[:-1]
    row = torch.repeat_interleave(torch.arange(len(lengths)), queries)
    held = lengths - queries
    position = torch.arange(len(row)) - start[row] + held[row]
    step = Step(len(position), held.int(), None, None, None, None)
    if window is not None:
        size = window.spec.block_size
        reach = window.spec.ring_blocks * size if isinstance(window.spec, RingSpec) else lengths.max()
        slots = window.slots[: len(row)].long()
        # Block 0 stands for no page; of a long chunk the ring keeps the newest tokens.
        kept = (slots >= size) & (position >= lengths[row] - reach)
        step.window_slots, step.window_table = slots.masked_fill(~kept, -1), window.table
        step.held_from = first_held(window.table, held, size)
    if sinks is not None:
        size, pages = sinks.spec.block_size, sinks.table[:, 0]
        step.sink_pages = pages
        first_ones = position < sink_tokens
        if bool(first_ones.any()):
            step.sink_slots = torch.where(first_ones, pages[row].long() * size + position, -1)
    return step


def first_held(table: Tensor, held: Tensor, size: int) -> Tensor:
    """The first token of each request from which on all older ones are on pages of the window, int32 ``[requests]``.

    Args:
        table: of the window, 0 where there is no page. held: tokens before the step. size: tokens of a page.
    """
    first = torch.arange(table.shape[1]) * size
    missing = (table == 0) & (first < held[:, None])
    after = torch.where(missing, first + size, 0).amax(1)
    return torch.minimum(after, held).int()


class GSRQImpl(AttentionImpl[StepMetadata]):
    """Attention of one layer on pages of codes."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        for what, there in (
            ("ALiBi", alibi_slopes is not None),
            (f"attention of type {attn_type}", attn_type != AttentionType.DECODER),
            ("layers that read the cache of another layer", kv_sharing_target_layer_name is not None),
            (", ".join(k for k, v in others.items() if v is not None), any(v is not None for v in others.values())),
        ):
            if there:
                raise ValueError(f"torchgsrq: {what} cannot be served on pages of codes")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.softcap = kv_cache_dtype, float(logits_soft_cap or 0)
        self.quantized, self.sliding = False, sliding_window is not None
        some = (num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype)
        self.given = (*some, logits_soft_cap, attn_type)  # for vLLM's own, should the layer keep its cache
        config = get_current_vllm_config()
        engine_of(config)  # refused here, before weights are read
        from torchgsrq.vllm.backend import Companion

        context = config.compilation_config.static_forward_context
        n = sum(isinstance(x, Companion) and not x.sinks for x in context.values())
        self.window = Companion(f"gsrq_window.{n}", self, sinks=False)
        self.sinks = Companion(f"gsrq_sinks.{n}", self, sinks=True)
        context.update({x.name: x for x in (self.window, self.sinks)})

    def take(self, engine: Engine, index: int) -> None:
        """Take the codecs of a layer, once it is known which one this is."""
        self.quantized, self.engine, config = True, engine, engine.config
        codec = engine.books[index]
        self.flat = (codec.key.tensors, codec.key.integers, codec.value.tensors, codec.value.integers)
        self.block = engine.sizes.block
        self.tokens = (config.sink_tokens, config.recent_tokens, config.block_tokens)
        self.append, self.hold, self.attend = (
            getattr(_ops, name).default for name in ("paged_append_", "paged_hold_", "paged_attention")
        )
        self.view = CHUNK if config.prefill == "exact" else DECODE

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new tokens and attend: codes and sinks first, the window last, since its ring is written over."""
        if attn_metadata is None:  # a warm-up
            return output.zero_()
        window_held, sinks_held = self.window.pages, self.sinks.pages
        if attn_metadata.step is None:
            metadata = get_forward_context().attn_metadata
            window = None if window_held is None else metadata[self.window.name]
            sinks = None if sinks_held is None else metadata[self.sinks.name]
            attn_metadata.step = step_of(attn_metadata, window, sinks, self.tokens[0])
        step = attn_metadata.step
        codes, n = kv_cache.flatten(1), step.tokens
        q, k, v = query[:n], key[:n], value[:n]
        m = attn_metadata
        sizes = [self.block, *self.tokens]
        where = (m.query_start, m.lengths)
        self.append(codes, window_held, k, v, *where, m.table, step.window_table, *self.flat, sizes)
        if step.sink_slots is not None:
            self.hold(sinks_held, k, v, step.sink_slots)
        output[:n] = self.attend(
            q,
            k,
            v,
            codes,
            window_held,
            sinks_held,
            *where,
            step.held_from,
            m.table,
            step.window_table,
            step.sink_pages,
            *self.flat,
            sizes,
            self.scale,
            self.softcap,
            self.view,
        ).view(output[:n].shape)
        if window_held is not None:
            self.hold(window_held, k, v, step.window_slots)
        return output


__all__ = ["GSRQImpl", "Step", "StepBuilder", "StepMetadata", "first_held", "step_of"]
