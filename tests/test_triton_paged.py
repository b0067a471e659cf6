"""The Triton kernels on an engine's pages do what the reference says, on the same codes: on a GPU, or in Triton's
interpreter without one."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import by_turns, close, make_codec
from torchgsrq import ops
from torchgsrq import paged as gpu_ops
from torchgsrq.codec import Codecs
from torchgsrq.codec.layout import Layout
from torchgsrq.reference import paged as reference
from torchgsrq.reference.paged import CHUNK, DECODE, Pages, Requests, coded_tokens, head_bytes

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from torchgsrq.kernels import paged  # after the interpreter was chosen (conftest.py)
from torchgsrq.kernels.attention import Plan

pytestmark = pytest.mark.core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
HEADS, NOWHERE = 2, 1 << 20  # the latter in tables where nothing may be looked up


def i32(x) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.int32)


def codecs(dim: int, frame: int, mixed: bool, eta: int = 1) -> tuple[Codecs, Codecs]:
    """Of keys and values; ``mixed``: two rates by turns, so that heads are of several sizes."""
    key = make_codec(HEADS, dim, layout=Layout(dim, dim // 8, dim // 8), frame=frame, eta=eta, seed=1)
    value = make_codec(HEADS, dim, layout=Layout(dim, dim // 8, dim // 8), pairs=0, seed=2)
    if not mixed:
        return Codecs.of(key), Codecs.of(value)
    others = (
        make_codec(HEADS, dim, layout=Layout(dim, dim // 8, dim // 8 + 1), frame=frame, eta=eta, seed=3),
        make_codec(HEADS, dim, layout=Layout(dim, dim // 16, dim // 4), pairs=0, seed=4),
    )
    return by_turns(key, others[0]), by_turns(value, others[1])


class World:
    """Requests of some lengths with some new tokens each, their pages at random places, and random tokens there.

    What is on no page that may be read is NaN, and tables name no page where nothing may be looked up.
    """

    def __init__(
        self,
        lengths: list[int],
        counts: list[int],
        key: Codecs,
        value: Codecs,
        *,
        block: int = 16,
        sinks: int = 3,
        recent: int = 6,
        due: int = 4,
        window: int = 4,
        first_held: int = 0,
        group: int = 2,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.g = torch.Generator().manual_seed(seed)
        requests, dim, tokens = len(lengths), key.head_dim, sum(counts) + padding
        held = [length - n for length, n in zip(lengths, counts, strict=True)]
        held_from = [min(first_held, n) if window else n for n in held]
        table, pages = self.table([(0, n) for n in lengths], block)
        size = sum(head_bytes(key)) + sum(head_bytes(value))
        codes = torch.randint(0, 256, (pages, block * size + 24), dtype=torch.uint8, generator=self.g)
        window_table = None
        self.window = self.sinks = self.sink_pages = None
        if window:
            window_table, pages = self.table(list(zip(held_from, lengths, strict=True)), window)
            self.window = torch.full((pages, HEADS, window, 2 * dim), torch.nan, dtype=dtype)
            for r, (first, last) in enumerate(zip(held_from, held, strict=True)):
                at = torch.arange(first, last)
                some = self.randn(len(at), HEADS, 2 * dim).to(dtype)
                self.window[window_table[r][at // window].long(), :, at % window] = some
        if sinks:
            self.sink_pages = i32(torch.randperm(requests + 2, generator=self.g)[:requests])
            self.sinks = torch.full((requests + 2, HEADS, sinks + 1, 2 * dim), torch.nan, dtype=dtype)
            for page, length in zip(self.sink_pages.tolist(), lengths, strict=True):
                self.sinks[page, :, : min(sinks, length)] = self.randn(HEADS, min(sinks, length), 2 * dim).to(dtype)
        start = i32([0, *torch.tensor(counts).cumsum(0)])
        self.pages = Pages(codes, self.window, self.sinks, key, value, sinks, recent, due, block)
        self.requests = Requests(start, i32(lengths), i32(held_from), table, window_table, self.sink_pages)
        # Strided, as engines give them.
        all_ = self.randn(tokens, HEADS * (group + 2), dim).to(dtype)
        self.q, self.k, self.v = all_.split([HEADS * group, HEADS, HEADS], 1)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.g)

    def table(self, spans: list[tuple[int, int]], size: int) -> tuple[torch.Tensor, int]:
        """Pages at random places for tokens ``[first, last)`` of each request, and how many pages there are."""
        widest = max(-(-last // size) for _, last in spans)
        order = torch.randperm(len(spans) * widest + 2, generator=self.g)
        table = i32(order[: len(spans) * widest].view(len(spans), widest))
        for row, (first, last) in zip(table, spans, strict=True):
            row[: first // size], row[-(-last // size) :] = NOWHERE, NOWHERE
        return table, len(order)

    def there(self) -> tuple[Pages, Requests]:
        """The same where kernels run."""
        p = self.pages
        names = ("codes", "window", "sinks")
        parts = {name: x.to(DEVICE) for name in names if (x := getattr(p, name)) is not None}
        pages = replace(p, **parts, key=p.key.to(DEVICE), value=p.value.to(DEVICE))
        fields = {k: v.to(DEVICE) for k, v in vars(self.requests).items() if v is not None}
        return pages, replace(self.requests, **fields)

    def check(self, view: int, softcap: float = 0.0, plan: Plan | None = None) -> None:
        """Attention of the kernels is that of the reference."""
        options = {"scale": 0.2, "softcap": softcap, "view": view}
        q, k, v = (x.to(DEVICE) for x in (self.q, self.k, self.v))
        got = paged.paged_attention(q, k, v, *self.there(), **options, plan=plan).cpu()
        want = reference.paged_attention(self.q, self.k, self.v, self.pages, self.requests, **options)
        assert got.dtype == want.dtype and got.is_contiguous()
        close(got, want, TOLERANCE[got.dtype])
        assert not got[int(self.requests.query_start[-1]) :].any()


CASES = {
    # new tokens, head_dim, bits by head, frame, block, sinks, window, first held, soft cap, group, (rows, tokens, splits)
    "decode": ([1, 1, 1], 64, False, 64, 16, 3, 4, 0, 0.0, 3, (16, 64, 2)),
    "decode by head": ([1, 1, 1], 128, True, 64, 16, 3, 16, 33, 2.0, 4, (16, 16, 1)),
    "decode without a window": ([1, 1, 1], 64, False, 128, 64, 3, 0, 0, 0.0, 1, (16, 64, 3)),
    "chunks": ([1, 9, 20], 128, True, 64, 16, 3, 4, 0, 2.0, 1, (32, 64, 1)),
    "chunks, odd pages": ([1, 9, 20], 64, True, 192, 48, 3, 16, 0, 0.0, 3, (16, 64, 2)),
    "chunks, frames of a tile": ([20, 9, 1], 64, False, 16, 8, 0, 4, 0, 0.0, 3, (16, 16, 1)),
    "chunks without window and sinks": ([1, 9, 20], 64, True, 64, 64, 0, 0, 0, 0.0, 3, (32, 32, 1)),
    "some idle, after a prefix hit": ([5, 0, 20], 64, True, 64, 64, 3, 4, 33, 0.0, 4, (32, 64, 1)),
    "many heads a KV head": ([2, 0, 3], 64, False, 256, 256, 3, 4, 0, 0.0, 17, (32, 64, 1)),
}


@pytest.mark.parametrize("view", [CHUNK, DECODE], ids=["chunk", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_attention(case, view):
    """Long and short requests, one query and many, in one step, on partly used pages at random places."""
    new, dim, mixed, frame, block, sinks, window, first_held, softcap, group, plan = CASES[case]
    lengths = [2 if 9 in new and new[0] == 1 else 38, 9, 70]
    sizes = {"recent": 6, "due": 4} if window else {"recent": 0, "due": 1}
    world = World(
        lengths, new, *codecs(dim, frame, mixed), block=block, sinks=sinks, window=window, first_held=first_held,
        group=group, padding=2 * view, seed=len(case), **sizes,
    )  # fmt: skip
    world.check(view, softcap, Plan(*plan, 8))


@pytest.mark.parametrize("view", [CHUNK, DECODE])
def test_half_precision_as_planned(view):
    """Sums of codewords in float16, tiles of several pages."""
    World([300, 70], [1, 13], *codecs(64, 128, True), block=32, dtype=torch.float16).check(view)


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_nobody_there(counts):
    """Padding alone is zeros."""
    world = World([5] * len(counts) or [5], counts or [0], *codecs(64, 64, False), padding=3)
    if not counts:
        world.requests = replace(
            world.requests,
            **{k: v[:0] for k, v in vars(world.requests).items() if v is not None and k != "query_start"},
            query_start=i32([0]),
        )
    world.check(CHUNK)


@triton.jit
def _find(tiles, query_start, requests, tokens, out, EACH, MORE: tl.constexpr, BM: tl.constexpr):
    i = tl.program_id(0)
    request, at = paged.request_of(tl.load(tiles + i), query_start, requests, tokens, EACH, MORE, BM)
    tl.store(out + 2 * i, request)
    tl.store(out + 2 * i + 1, at)


@settings(max_examples=20)
@given(
    counts=st.lists(st.sampled_from([0, 1, 1, 1, 2, 17, 40]), min_size=1, max_size=12),
    copies=st.sampled_from([1, 1, 30]),
    padding=st.sampled_from([0, 0, 5]),
    each=st.sampled_from([1, 3, 16]),
    more=st.sampled_from([0, 7, 40]),
)
def test_tiles_find_their_requests(counts, copies, padding, each, more):
    """Also among more requests than are looked at together; there is a tile for all rows."""
    counts, rows = counts * copies, 16
    found = [
        (r, at) for r, n in enumerate([*counts, padding]) for at in range(-(-(n * each + more) // rows) if n else 0)
    ]
    most = paged.most_tiles(sum(counts) + padding, len(counts) + 1, each, more, rows)
    assert len(found) <= most <= (sum(counts) + padding) * -(-(each + more) // rows)
    tiles = sorted({i for i in (0, 1, 2, len(found) // 2, len(found) - 2, len(found) - 1) if 0 <= i < len(found)})
    out = torch.zeros(len(tiles) + 1, 2, dtype=torch.int32, device=DEVICE)
    given_ = [i32(x).to(DEVICE) for x in ([*tiles, len(found)], [0, *torch.tensor(counts).cumsum(0)])]
    _find[(len(tiles) + 1,)](*given_, len(counts), sum(counts) + padding, out, each, MORE=more, BM=rows)
    assert [tuple(x) for x in out.tolist()[:-1]] == [found[i] for i in tiles]
    assert out[-1, 0] == len(counts) + 1  # nobody's


@pytest.mark.parametrize(
    "new, dim, mixed, eta, window, block, due, dtype",
    [
        ([1, 1, 1], 64, False, 4, 4, 16, 4, torch.float32),
        ([1, 3, 40], 16, True, 4, 4, 8, 20, torch.float32),
        ([40, 0, 33], 16, True, 1, 4, 48, 4, torch.float16),
        ([1, 3, 40], 32, True, 4, 0, 16, 1, torch.float16),
    ],
)
def test_append(new, dim, mixed, eta, window, block, due, dtype):
    """Tokens that became due are coded as by the reference, and no other byte changes."""
    lengths = [96, 8, 59]
    recent, due = (2 * due, due) if window else (0, 1)
    world = World(
        lengths, new, *codecs(dim, 192, mixed, eta), block=block, window=window, recent=recent, due=due, dtype=dtype,
        padding=2,
    )  # fmt: skip
    before, (pages, requests) = world.pages.codes.clone(), world.there()
    if DEVICE == "cpu":
        pages = replace(pages, codes=pages.codes.clone())
    paged.paged_append_(pages, requests, world.k.to(DEVICE), world.v.to(DEVICE))
    reference.paged_append_(world.pages, world.requests, world.k, world.v)
    got, want, written = pages.codes.cpu(), world.pages.codes, torch.zeros_like(before, dtype=torch.bool)
    for r, (n, length) in enumerate(zip(new, lengths, strict=True)):
        first, last = (coded_tokens(x, recent, due, block) for x in (length - n, length))
        at = torch.arange(first, last)
        for value in (False, True):
            for head in range(HEADS):
                flags = replace(world.pages, codes=written).of_head(head, value)
                flags[world.requests.table[r][at // block].long(), at % block] = True
    assert torch.equal(got[~written], before[~written])
    assert written.any() and (got == want)[written].float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hold(dtype):
    held = torch.full((5, HEADS, 4, 32), torch.nan, dtype=dtype)
    k, v = torch.randn(9, 2 * HEADS, 16).split(HEADS, 1)
    slots = torch.tensor([3, -1, 0, 19, -1, 7, 8, -5, 12])
    want = held.clone()
    got = held.to(DEVICE)
    paged.paged_hold_(got, k.to(DEVICE), v.to(DEVICE), slots.to(DEVICE))
    reference.paged_hold_(want, k, v, slots)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("view", [CHUNK, DECODE])
@pytest.mark.parametrize("frame, block", [(64, 16), (20, 4)], ids=["kernels", "reference"])
def test_the_ops_of_a_gpu(view, frame, block, monkeypatch):
    """What torch calls on a GPU, step by step: a prompt in chunks, then single tokens, beside another request."""
    monkeypatch.setattr(ops, "_on_gpu", lambda x: True)
    key, value = codecs(16, frame, True)
    assert paged.supports(key, value) == (frame == 64)
    empty = World([60, 30], [60, 30], key, value, block=block, window=8)
    flat = (*(x for c in (key.to(DEVICE), value.to(DEVICE)) for x in (c.tensors, c.integers)), [block, 3, 6, 4])
    worlds = [empty.there()[0], empty.pages]
    worlds[0] = replace(worlds[0], **{n: getattr(worlds[0], n).clone() for n in ("codes", "window", "sinks")})
    held, all_ = [0, 0], [x.to(DEVICE) for x in (empty.q, empty.k, empty.v)]
    for new in ([17, 1], [20, 0], [1, 12]):
        last = [n + m for n, m in zip(held, new, strict=True)]
        position = torch.cat([torch.arange(*x) for x in zip(held, last, strict=True)])
        row = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(new))
        token = position + row * 60
        window_slots = empty.requests.window_table[row, position // 8] * 8 + position % 8
        sink_slots = torch.where(position < 3, empty.sink_pages[row] * empty.sinks.shape[2] + position, -1)
        where = replace(empty.requests, query_start=i32([0, new[0], sum(new)]), lengths=i32(last))
        outs = []
        for pages, on in zip(worlds, (True, False), strict=True):
            q, k, v = (x[token] for x in all_) if on else (x.cpu()[token] for x in all_)
            if not on:
                reference.paged_append_(pages, where, k, v)
                reference.paged_hold_(pages.sinks, k, v, sink_slots)
                outs.append(reference.paged_attention(q, k, v, pages, where, scale=0.25, view=view))
                reference.paged_hold_(pages.window, k, v, window_slots)
                continue
            w = replace(where, **{n: x.to(DEVICE) for n, x in vars(where).items()})
            lines = (w.query_start, w.lengths)
            gpu_ops.paged_append_(pages.codes, pages.window, k, v, *lines, w.table, w.window_table, *flat)
            gpu_ops.paged_hold_(pages.sinks, k, v, sink_slots.to(DEVICE))
            tables = (w.held_from, w.table, w.window_table, w.sink_pages)
            held_there = (pages.codes, pages.window, pages.sinks)
            outs.append(gpu_ops.paged_attention(q, k, v, *held_there, *lines, *tables, *flat, 0.25, 0.0, view).cpu())
            gpu_ops.paged_hold_(pages.window, k, v, window_slots.to(DEVICE))
        close(outs[0], outs[1], 1e-4)
        held = last
    for name in ("window", "sinks"):
        assert torch.equal(getattr(worlds[0], name).cpu().nan_to_num(), getattr(worlds[1], name).nan_to_num())
    assert (worlds[0].codes.cpu() == worlds[1].codes).float().mean() > 0.99


def test_tensors_of_several_types(monkeypatch):
    """A window in another dtype than the queries is left to the reference."""
    monkeypatch.setattr(ops, "_on_gpu", lambda x: True)
    window = torch.zeros(1, dtype=torch.float16)
    pair = codecs(16, 64, False)
    x = torch.zeros(1)
    assert ops._kernel(x, "paged_attention", *pair, alike=(x, window)) is None
    assert ops._kernel(x, "paged_attention", *pair, alike=(x, None)) is paged.paged_attention


def test_starts_agree():
    """The world of these tests is one that the reference reads without touching what is not there."""
    world = World([40, 7], [3, 7], *codecs(16, 64, False), first_held=20)
    out = reference.paged_attention(world.q, world.k, world.v, world.pages, world.requests, scale=1.0)
    assert all(b > a for a, b in pairwise(world.requests.query_start.tolist())) and not out.isnan().any()
