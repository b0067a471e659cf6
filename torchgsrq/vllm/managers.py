"""Which pages of the window and of sinks a request holds. They run in vLLM's scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager, SlidingWindowManager


class RingManager(SingleTypeKVCacheManager):
    """A ring of pages for each request. Its table names them round and round, so that token t is on entry
    ``t // block_size`` as anywhere else; the null block stands for what a prefix hit brought."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.ring_blocks = kv_cache_spec.ring_blocks
        self.rings: dict[str, list[Any]] = {}
        self.before: dict[str, int] = {}  # entries of the table before the ring begins

    def _growth(self, request_id: str, num_tokens: int, before: int) -> int:
        wanted = min(self.ring_blocks, cdiv(num_tokens, self.block_size) - before)
        return max(0, wanted - len(self.rings.get(request_id, ())))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Pages that the ring still needs for this number of tokens."""
        before = self.before.get(request_id, cdiv(total_computed_tokens, self.block_size))
        return self._growth(request_id, num_tokens, before)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Note what a prefix hit brought: nothing of it is in the window."""
        if request_id not in self.before:
            computed = num_local_computed_tokens + num_external_computed_tokens
            self.before[request_id] = cdiv(computed, self.block_size)
            self.req_to_blocks[request_id].extend([self._null_block] * self.before[request_id])

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """None: KV connectors are refused."""

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """Grow the ring if it is not whole yet, and name its next pages."""
        blocks, ring = self.req_to_blocks[request_id], self.rings.setdefault(request_id, [])
        before = self.before.setdefault(request_id, len(blocks))
        ring.extend(self.block_pool.get_new_blocks(self._growth(request_id, num_tokens, before)))
        new = [ring[(j - before) % self.ring_blocks] for j in range(len(blocks), cdiv(num_tokens, self.block_size))]
        blocks.extend(new)
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The pages of the ring, each once."""
        super().pop_blocks_for_free(request_id)
        self.before.pop(request_id, None)
        return self.rings.pop(request_id, [])

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """None: the ring writes over them."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> Any:
        """Never asked: the group takes no part in prefix caching."""
        return tuple([] for _ in kv_cache_group_ids), 0


class SharedWindowManager(SlidingWindowManager):
    """vLLM's manager of sliding windows, as it is: whole chunks are held until the next step, and can be hit."""


class SinkManager(SingleTypeKVCacheManager):
    """One page for each request, shared by those that begin with the same tokens."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """One, if the request has none; one of the free queue that is hit counts as well."""
        if self.req_to_blocks.get(request_id):
            return 0
        return self._get_num_evictable_blocks(new_computed_blocks[:1]) if new_computed_blocks else 1

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the page that a prefix hit brought."""
        if self.req_to_blocks[request_id]:
            return
        hit = list(new_computed_blocks[:1])
        if hit:
            self.block_pool.touch(hit)
            self.req_to_blocks[request_id].extend(hit)
        self.num_cached_block[request_id] = len(hit)

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """None: KV connectors are refused."""

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """A page, if the request has none."""
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        blocks.extend(self.block_pool.get_new_blocks(1))
        return list(blocks)

    def cache_blocks(self, request: Any, num_tokens: int, retention_interval: int | None = None, **kwargs: Any) -> None:
        """Let later requests hit the page, once all of its tokens are there."""
        name = request.request_id
        if not self.enable_caching or self.num_cached_block.get(name) or num_tokens < self.block_size:
            return
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=self.req_to_blocks[name],
            num_cached_blocks=0,
            num_full_blocks=1,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[name] = 1

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """None: sinks are read to the end."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> Any:
        """All of ``max_length``, if the page of the sinks is there."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        if max_length >= size and len(hashes) and (hit := block_pool.get_cached_block(hashes[0], kv_cache_group_ids)):
            return tuple([block] for block in hit), max_length // alignment_tokens * alignment_tokens
        return tuple([] for _ in kv_cache_group_ids), 0
