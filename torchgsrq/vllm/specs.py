"""What vLLM plans memory with: specs of the window and of the sinks, each a cache group beside that of the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class RingSpec(AttentionSpec):
    """The newest tokens of each request, on a ring of pages that is its own, and that no other request can hit.

    Attributes:
        held_tokens: tokens before the newest one that stay readable.
    """

    held_tokens: int

    @property
    def ring_blocks(self) -> int:
        """Pages of a full ring."""
        return cdiv(self.held_tokens, self.block_size)

    @property
    def prefix_cacheable(self) -> bool:
        """Never: a hit reads the missing tokens of the window from codes."""
        return False

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most pages that a request ever holds."""
        return min(self.ring_blocks, cdiv(max_model_len, self.block_size))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request."""
        return self.page_size_bytes * self.max_admission_blocks_per_request(0, vllm_config.model_config.max_model_len)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers can share a table."""
        return all(isinstance(s, RingSpec) and s.held_tokens == self.held_tokens for s in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class SharedWindowSpec(SlidingWindowSpec):
    """The newest tokens on pages that later requests can hit: for ``prefill="quantized"``, where a prefix hit must
    bring the window that a token-by-token decode would have had."""

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers can share a table."""
        window, specs = self.sliding_window, kv_cache_specs.values()
        return all(isinstance(s, SharedWindowSpec) and s.sliding_window == window for s in specs)


@dataclass(frozen=True, kw_only=True)
class SinkSpec(AttentionSpec):
    """The first tokens of each request: one page, which requests with the same beginning share."""

    @property
    def uses_slot_mapping(self) -> bool:
        """The position of a sink is its place on the page."""
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        """A table has one entry."""
        return None

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request."""
        return self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Pages of one request."""
        return 1

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers can share a table."""
        return all(isinstance(s, SinkSpec) for s in kv_cache_specs.values())


def register_specs() -> None:
    """Register the manager of each spec with vLLM."""
    from torchgsrq.vllm.managers import RingManager, SharedWindowManager, SinkManager

    KVCacheSpecRegistry._ensure_registered()  # vLLM registers its own only while the list is empty
    for spec, manager in ((RingSpec, RingManager), (SharedWindowSpec, SharedWindowManager), (SinkSpec, SinkManager)):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
