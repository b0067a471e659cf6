"""Attention on pages says what a token-by-token decode says, for requests of any lengths, in any cut, on any pages."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import by_turns, make_codec
from torchgsrq import GSRQConfig, GSRQTensor, paged
from torchgsrq.codec import Codecs
from torchgsrq.codec.layout import Layout
from torchgsrq.reference import paged as reference
from torchgsrq.reference.paged import CHUNK, DECODE, Pages, Requests, head_bytes

pytestmark = pytest.mark.core

HEADS, GROUP, DIM, BLOCK, WINDOW = 3, 2, 16, 16, 4
CONFIG = GSRQConfig(sink_tokens=3, recent_tokens=6, block_tokens=4)
ops = torch.ops.torchgsrq


def codecs(mixed: bool) -> tuple[Codecs, Codecs]:
    key = make_codec(HEADS, DIM, seed=1)
    value = make_codec(HEADS, DIM, pairs=0, layout=Layout(DIM, 4, 4), seed=2)
    if not mixed:
        return Codecs.of(key), Codecs.of(value)
    others = (
        make_codec(HEADS, DIM, layout=Layout(DIM, 2, 2), seed=3),
        make_codec(HEADS, DIM, pairs=0, layout=Layout(DIM, 4, 8), seed=4),
    )
    return by_turns(key, others[0]), by_turns(value, others[1])


class Engine:
    """Pages of some requests at random places, and what each request held so far."""

    def __init__(self, requests: int, longest: int, key: Codecs, value: Codecs, config=CONFIG, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        size = sum(head_bytes(key)) + sum(head_bytes(value))
        pages, held = -(-longest // BLOCK), -(-longest // WINDOW)
        total = requests * max(pages, held) + 3
        self.codes = torch.randint(0, 255, (total, BLOCK * size + 8), dtype=torch.uint8, generator=g)
        self.window = torch.full((total, HEADS, WINDOW, 2 * DIM), torch.nan)
        self.sinks = torch.full((total, HEADS, WINDOW, 2 * DIM), torch.nan)
        self.table = torch.randperm(total, generator=g)[: requests * pages].view(requests, pages).int()
        self.window_table = torch.randperm(total, generator=g)[: requests * held].view(requests, held).int()
        self.sink_pages = torch.randperm(total, generator=g)[:requests].int()
        self.lengths = [0] * requests
        self.held_from = [0] * requests
        self.key, self.value, self.config = key, value, config

    def step(
        self, new: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], view: int, op: bool
    ) -> list[torch.Tensor]:
        """New tokens ``[n, heads, dim]`` of each request; what each attends to."""
        counts = [len(q) for q, _, _ in new]
        q, k, v = (torch.cat(x) for x in zip(*new, strict=True))
        row = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(counts))
        position = torch.cat([torch.arange(n, n + c) for n, c in zip(self.lengths, counts, strict=True)])
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        window_slots = self.window_table[row, position // WINDOW] * WINDOW + position % WINDOW
        sink_slots = torch.where(position < self.config.sink_tokens, self.sink_pages[row] * WINDOW + position, -1)
        start = i32([0, *torch.tensor(counts).cumsum(0).tolist()])
        lengths, held_from = i32(self.lengths), i32(self.held_from)
        tokens = (self.config.sink_tokens, self.config.recent_tokens, self.config.block_tokens)
        where = (start, lengths, held_from, self.table, self.window_table, self.sink_pages)
        flat = (self.key.tensors, self.key.integers, self.value.tensors, self.value.integers)
        if op:
            ops.paged_append_(
                self.codes, self.window, k, v, start, lengths, self.table, self.window_table, *flat, [BLOCK, *tokens]
            )
            ops.paged_hold_(self.sinks, k, v, sink_slots)
            held = (self.codes, self.window, self.sinks)
            out = ops.paged_attention(q, k, v, *held, *where, *flat, [BLOCK, *tokens], DIM**-0.5, 0.0, view)
            ops.paged_hold_(self.window, k, v, window_slots)
        else:
            pages = Pages(self.codes, self.window, self.sinks, self.key, self.value, *tokens, BLOCK)
            reference.paged_append_(pages, Requests(*where), k, v)
            reference.paged_hold_(self.sinks, k, v, sink_slots)
            out = reference.paged_attention(q, k, v, pages, Requests(*where), scale=DIM**-0.5, view=view)
            reference.paged_hold_(self.window, k, v, window_slots)
        return list(out.split(counts))


def i32(x: list[int]) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


def texts(lengths: list[int], seed: int = 5) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    some = [[torch.randn(n, h, DIM, generator=g) for h in (HEADS * GROUP, HEADS, HEADS)] for n in lengths]
    return [tuple(x) for x in some]


def decoded(text, key: Codecs, value: Codecs, config=CONFIG) -> torch.Tensor:
    """A token-by-token decode of a text alone, on buffers of this library."""
    q, k, v = (x.transpose(0, 1)[None] for x in text)
    kv = [GSRQTensor.empty(1, HEADS, q.shape[2] + 8, DIM, codec=c, config=config) for c in (key, value)]
    out = []
    for t in range(q.shape[2]):
        for buffer, x in zip(kv, (k, v), strict=True):
            buffer.index_copy_(2, torch.tensor([t]), x[:, :, t : t + 1])
        out.append(torch.nn.functional.scaled_dot_product_attention(q[:, :, t : t + 1], *kv, enable_gqa=True))
    return torch.cat(out, 2)[0].transpose(0, 1)


@pytest.mark.parametrize("op", [False, True], ids=["reference", "op"])
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "by-head"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_any_cut_is_a_decode(chunk, mixed, op):
    key, value = codecs(mixed)
    lengths = [53, 5, 20]
    given = texts(lengths)
    engine, done = Engine(3, 56, key, value), [[] for _ in lengths]
    for first in range(0, max(lengths), chunk):
        new = [tuple(x[first : first + chunk] for x in text) for text in given]
        for mine, out in zip(done, engine.step(new, DECODE, op), strict=True):
            mine.append(out)
    for text, mine in zip(given, done, strict=True):
        torch.testing.assert_close(torch.cat(mine), decoded(text, key, value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", [CHUNK, DECODE], ids=["chunk", "decode"])
@pytest.mark.parametrize("frame", [16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_reference(view, frame, dtype):
    """Long and short requests, one query and many, in one step, on strided tensors."""
    key = by_turns(
        make_codec(HEADS, DIM, frame=frame, seed=1),
        make_codec(HEADS, DIM, layout=Layout(DIM, 2, 2), frame=frame, seed=3),
    )
    value = by_turns(
        make_codec(HEADS, DIM, pairs=0, layout=Layout(DIM, 4, 4), seed=2),
        make_codec(HEADS, DIM, pairs=0, layout=Layout(DIM, 4, 8), seed=4),
    )
    engine = Engine(6, 4600, key, value)
    for held in (engine.window, engine.sinks):
        held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(1)))
    engine.window, engine.sinks = engine.window.to(dtype), engine.sinks.to(dtype)
    lengths, counts = [4600, 1, 3000, 70, 130, 900], [1, 1, 3, 70, 1, 100]
    all_ = torch.randn(sum(counts), HEADS * (GROUP + 2), DIM, generator=torch.Generator().manual_seed(2)).to(dtype)
    q, k, v = all_.split([HEADS * GROUP, HEADS, HEADS], 1)
    start = i32([0, *torch.tensor(counts).cumsum(0).tolist()])
    where = (start, i32(lengths), i32([0, 0, 2995, 0, 0, 0]), engine.table, engine.window_table, engine.sink_pages)
    flat = (key.tensors, key.integers, value.tensors, value.integers)
    held = (engine.codes, engine.window, engine.sinks)
    first_ones = torch.full((sum(counts),), -1)
    for r, token, place in ((1, 1, 0), (3, 5, 0), (3, 6, 1), (3, 7, 2)):  # requests that begin with this step
        first_ones[token] = int(engine.sink_pages[r]) * WINDOW + place
    ops.paged_hold_(engine.sinks, k, v, first_ones)
    for softcap in (0.0, 2.0):
        out = ops.paged_attention(q, k, v, *held, *where, *flat, [BLOCK, 3, 6, 4], 0.3, softcap, view)
        pages = Pages(*held, key, value, 3, 6, 4, BLOCK)
        wanted = reference.paged_attention(q, k, v, pages, Requests(*where), scale=0.3, softcap=softcap, view=view)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out, wanted, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=2e-5 if dtype == torch.float32 else 2e-2
        )


@pytest.mark.parametrize("op", [False, True], ids=["reference", "op"])
def test_a_chunk_is_seen_exactly(op):
    """Tokens of a chunk see each other exactly, and older ones as a decode would have stored them."""
    key, value = codecs(True)
    (text,) = texts([40])
    engine = Engine(1, 48, key, value)
    engine.step([tuple(x[:25] for x in text)], CHUNK, op)
    (out,) = engine.step([tuple(x[25:] for x in text)], CHUNK, op)
    q, k, v = (x.transpose(0, 1)[None] for x in text)
    kv = []
    for codec, x in ((key, k), (value, v)):
        buffer = GSRQTensor.empty(1, HEADS, 48, DIM, codec=codec, config=CONFIG)
        buffer.index_copy_(2, torch.arange(25), x[:, :, :25])
        kv.append(torch.cat((buffer.dequantize()[:, :, :25], x[:, :, 25:]), 2))
    mask = torch.ones(15, 40, dtype=torch.bool).tril(25)
    wanted = torch.nn.functional.scaled_dot_product_attention(q[:, :, 25:], *kv, mask, enable_gqa=True)
    torch.testing.assert_close(out, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [False, True], ids=["reference", "op"])
def test_what_the_window_lacks_is_read_from_codes(op):
    """After a prefix hit, say: the exact tokens before `held_from` are not there."""
    key, value = codecs(False)
    (text,), (more,) = texts([32]), texts([1], seed=9)
    engine = Engine(1, 48, key, value)
    engine.step([text], DECODE, op)  # two full pages, which a later request hits
    engine.held_from = [32]
    engine.window.fill_(torch.nan)
    (out,) = engine.step([more], DECODE, op)
    bare = GSRQConfig(sink_tokens=3, recent_tokens=1, block_tokens=1)
    whole = tuple(torch.cat(pair) for pair in zip(text, more, strict=True))
    torch.testing.assert_close(out, decoded(whole, key, value, bare)[32:], rtol=1e-5, atol=1e-5)


def test_tokens_below_zero_are_not_written():
    key, value = codecs(True)
    engine = Engine(1, 16, key, value)
    (_, k, v), nowhere = texts([4])[0], torch.full((4,), -1)
    ops.paged_hold_(engine.window, k, v, nowhere)
    assert bool(engine.window.isnan().all())


def test_schemas():
    key, value = codecs(True)
    engine = Engine(2, 32, key, value)
    (q, k, v) = texts([4])[0]
    flat = (key.tensors, key.integers, value.tensors, value.integers)
    at = torch.arange(4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.paged_hold_.default, (engine.sinks, k, v, at), test_utils=checks)
    where = (i32([0, 1, 4]), i32([1, 3]), i32([0, 0]), engine.table, engine.window_table, engine.sink_pages)
    held = (engine.codes, engine.window.zero_(), engine.sinks.zero_())
    append = (engine.codes, engine.window, k, v, i32([0, 1, 4]), i32([1, 23]), engine.table, engine.window_table)
    torch.library.opcheck(ops.paged_append_.default, (*append, *flat, [BLOCK, 3, 6, 4]), test_utils=checks)
    torch.library.opcheck(
        ops.paged_attention.default, (q, k, v, *held, *where, *flat, [BLOCK, 3, 6, 4], 0.25, 0.0, 0), test_utils=checks
    )


def test_the_ops_are_there():
    assert {"paged_append_", "paged_hold_", "paged_attention"} <= set(dir(paged))
