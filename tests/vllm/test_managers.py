"""Which pages requests hold, by vLLM's own coordinator: no engine."""

from __future__ import annotations

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool  # noqa: E402
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry  # noqa: E402

from torchgsrq.vllm.managers import RingManager, SharedWindowManager, SinkManager  # noqa: E402
from torchgsrq.vllm.plugin import register  # noqa: E402
from torchgsrq.vllm.specs import RingSpec, SharedWindowSpec, SinkSpec  # noqa: E402

SHAPE = {"block_size": 4, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}


def pool(blocks: int = 64) -> BlockPool:
    return BlockPool(num_gpu_blocks=blocks, enable_caching=True, hash_block_size=4)


def manager(spec, blocks: BlockPool):
    kind = KVCacheSpecRegistry.get_manager_class(spec)
    return kind(spec, block_pool=blocks, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=16)


def grow(m, name: str, tokens: int) -> list[int]:
    wanted = m.get_num_blocks_to_allocate(name, tokens, [], 0, 0, tokens)
    before = m.block_pool.get_num_free_blocks()
    m.allocate_new_blocks(name, tokens, tokens)
    assert before - m.block_pool.get_num_free_blocks() == wanted
    return [b.block_id for b in m.req_to_blocks[name]]


def test_each_spec_has_its_manager():
    register()
    register()  # in every process, and maybe twice
    for spec, kind in (
        (RingSpec(**SHAPE, held_tokens=9), RingManager),
        (SharedWindowSpec(**SHAPE, sliding_window=9), SharedWindowManager),
        (SinkSpec(**SHAPE), SinkManager),
    ):
        assert KVCacheSpecRegistry.get_manager_class(spec) is kind
        assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is type(spec)


def test_a_ring_never_grows_past_its_window():
    register()
    blocks = pool()
    m = manager(RingSpec(**SHAPE, held_tokens=11), blocks)
    free = blocks.get_num_free_blocks()
    assert m.ring_blocks == 3
    first = grow(m, "a", 5)
    assert len(first) == len(set(first)) == 2
    table = grow(m, "a", 30)
    assert len(table) == 8 and len(set(table)) == 3 and table[:2] == first
    assert all(table[j] == table[j - 3] for j in range(3, 8)), "round and round"
    assert grow(m, "b", 3) and free - blocks.get_num_free_blocks() == 4
    m.remove_skipped_blocks("a", 30)
    m.free("a")
    m.free("b")
    assert blocks.get_num_free_blocks() == free and not m.rings and not m.before and not m.req_to_blocks


def test_a_ring_after_a_prefix_hit():
    """What was hit is not in the window: the table says so with the null block."""
    register()
    blocks = pool()
    m = manager(RingSpec(**SHAPE, held_tokens=11), blocks)
    assert m.get_num_blocks_to_allocate("a", 18, [], 16, 16, 18) == 1
    m.add_local_computed_blocks("a", [], 16, 0)
    table = grow(m, "a", 18)
    assert table[:4] == [0, 0, 0, 0] and table[4] > 0 and len(table) == 5
    table = grow(m, "a", 60)
    assert len(set(table[4:])) == 3 and table[4:] == [table[4 + j % 3] for j in range(11)]
    m.free("a")
    m.free("never")


def test_sinks_are_one_page_that_requests_share():
    register()
    blocks = pool()
    m = manager(SinkSpec(**SHAPE), blocks)
    assert grow(m, "a", 100) == grow(m, "a", 200) and len(m.req_to_blocks["a"]) == 1
    page = m.req_to_blocks["a"][0]
    m.num_cached_block["a"] = 1
    m.add_local_computed_blocks("b", [page], 16, 0)
    assert m.get_num_blocks_to_allocate("b", 100, [], 16, 16, 100) == 0
    assert m.req_to_blocks["b"] == [page] and page.ref_cnt == 2
    m.free("a")
    assert page.ref_cnt == 1
    m.free("b")
    assert page.ref_cnt == 0


def test_specs_say_what_requests_take():
    ring = RingSpec(**SHAPE, held_tokens=11)
    assert ring.max_admission_blocks_per_request(2048, 4096) == 3 and not ring.prefix_cacheable
    assert ring.max_admission_blocks_per_request(2048, 8) == 2
    sinks = SinkSpec(**SHAPE)
    assert sinks.max_num_blocks_per_req(None, 4096) == 1 and sinks.max_memory_usage_bytes(None) == sinks.page_size_bytes
    assert ring.is_uniform_with_collection({"a": ring, "b": RingSpec(**SHAPE, held_tokens=11)})
    assert not ring.is_uniform_with_collection({"a": ring, "b": sinks})
