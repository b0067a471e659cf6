"""The Triton kernels do what the reference says, on the same codes: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import by_turns, close, make_codec, make_pair
from tests.test_kernels import ALONE, CODECS, buffers, check_codes, distance, key_codec, mask_of, specified
from torchgsrq import GSRQConfig, GSRQTensor, ops, reference
from torchgsrq.codec import Codecs
from torchgsrq.codec.layout import Layout
from torchgsrq.codec.packed import EXACT_TAIL, LAST_ALIGNED, NOT_CAUSAL, STREAMING, UPPER_LEFT, WINDOW, Options

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

from torchgsrq.kernels import attention, encode  # after the interpreter was chosen (conftest.py)

pytestmark = pytest.mark.core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}


def run(
    q, key, value, mask=None, causal=NOT_CAUSAL, softcap=0.0, logits=None, tails=(None,) * 3, view=WINDOW, plan=None
):
    """The kernels, whatever the device."""
    q, mask, logits, *tails = (None if t is None else t.to(DEVICE) for t in (q, mask, logits, *tails))
    out = attention.attention(
        q,
        key.to(DEVICE).packed,
        value.to(DEVICE).packed,
        Options(mask, q.shape[-1] ** -0.5, causal, softcap, logits, *tails, view),
        plan_=plan,
    )
    return out.cpu()


def equal(got, want):
    assert got.dtype == want.dtype
    close(got, want, TOLERANCE[got.dtype])


@settings(max_examples=15)
@given(
    dim=st.sampled_from([16, 64, 80, 96, 128]),
    bits=st.sampled_from([0.5, 1.0, 2.0]),
    preset=st.sampled_from(list(CODECS)),
    length=st.one_of(st.integers(1, 150), st.sampled_from([160, 161, 288])),
    group=st.sampled_from([1, 2, 3, 4, 7, 16]),
    queries=st.sampled_from([1, 1, 2, 5, 17]),
    frame=st.sampled_from([16, 64, 192]),
    pad=st.integers(0, 70),
    masked=st.sampled_from(["none", "none", "bool", "additive", "heads"]),
    causal=st.sampled_from([NOT_CAUSAL, UPPER_LEFT, LAST_ALIGNED]),
    softcap=st.sampled_from([0.0, 3.0]),
    sink=st.booleans(),
    interleaved=st.booleans(),
    splits=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 99),
)
def test_attention(
    dim, bits, preset, length, group, queries, frame, pad, masked, causal, softcap, sink, interleaved, splits, seed
):
    queries = min(queries, length)
    key, value, g = buffers(dim, length, bits, preset, frame=frame, pad=pad, seed=seed, interleaved=interleaved)
    q = torch.randn(2, 2 * group, queries, dim, generator=g)
    mask, logits = mask_of(masked, q, length, g), torch.randn(2 * group, generator=g) if sink else None
    plan = attention.Plan(16 if group * queries <= 16 else 32, 16 if frame == 16 else 64, splits, 8)
    arguments = (q, key, value, mask, causal, softcap, logits)
    equal(run(*arguments, plan=plan), specified(*arguments))


@pytest.mark.parametrize(
    "dim, preset, frame, bits",
    [(64, "groups of 64", 512, 1.0), (64, "groups of 8", 1024, 1.0), (80, "groups of 8", 256, 2.0)],
)
def test_half_precision(dim, preset, frame, bits):
    """Sums of codewords in float16, and rows that begin within a frame, several tiles to each."""
    key, value, g = buffers(dim, 1300, bits, preset, frame=frame, pad=5, dtype=torch.float16)
    q = torch.randn(2, 6, 1, dim, generator=g).half()
    equal(run(q, key, value, plan=attention.Plan(16, 128, 2, 8)), specified(q, key, value))


def test_queries_that_float16_cannot_hold():
    """A metric may make any size of a query; codewords are float16, so it is scaled before it meets them."""
    key, value, g = buffers(64, 300, dtype=torch.float16)
    q = torch.randn(2, 6, 1, 64, generator=g).half()
    *held, freq, mean, transform, inverse, codebook = key.parts
    parts = [*held, freq, mean, transform, inverse * 2.0**14, codebook * 2.0**-14]
    large = GSRQTensor(parts, key.integers)
    equal(run(q, large, value), specified(q, large, value))


@pytest.mark.parametrize("view", [EXACT_TAIL, STREAMING])
@pytest.mark.parametrize("new", [2, 9, 70])
def test_attention_with_tails(view, new):
    key, value, g = buffers(64, 150, pad=5, batch=1 if new > 64 else 2)  # the interpreter takes a second a tile
    more = [b.grown(150 + new) for b in (key, value)]
    slots = torch.arange(150, 150 + new)
    fresh = [torch.randn(len(b), 2, new, 64, generator=g) for b in more]
    (k_tail, start), (v_tail, _) = (reference.tail(b.packed, x, slots) for b, x in zip(more, fresh, strict=True))
    for buffer, x in zip(more, fresh, strict=True):
        buffer.index_copy_(2, slots, x)
    q = torch.randn(len(key), 2 if new > 64 else 6, new, 64, generator=g)
    arguments = (q, *more, None, LAST_ALIGNED, 0.0, None, (k_tail, v_tail, start), view)
    equal(run(*arguments), specified(*arguments))


@pytest.mark.parametrize("dim", [192, 256])
def test_wide_heads(dim):
    key, value, g = buffers(dim, 100, batch=1)
    q = torch.randn(1, 4, 1, dim, generator=g)
    equal(run(q, key, value), specified(q, key, value))


def test_views_of_buffers():
    """Slices have strides of their own."""
    key, value, g = buffers(64, 200, batch=3)
    q = torch.randn(2, 4, 1, 64, generator=g)
    some = [b[1:][:, :, :180] for b in (key, value)]
    equal(run(q, *some), specified(q, *some))


def test_far_positions():
    """Rows may begin a million tokens before their first slot."""
    key, value, g = buffers(64, 200, config=GSRQConfig(recent_tokens=8, block_tokens=4))
    for buffer in (key, value):
        buffer.start[:, 0] = -1_000_003
    q = torch.randn(2, 4, 1, 64, generator=g)
    equal(run(q, key, value), specified(q, key, value))


def test_an_empty_cache_gives_zeros():
    key, value, g = buffers(64, 4)
    for buffer in (key, value):
        buffer.crop_(0)
    assert not run(torch.randn(2, 4, 1, 64, generator=g), key, value).any()


@pytest.mark.parametrize("eta", [1, 8])
@pytest.mark.parametrize("preset", ALONE)
@settings(max_examples=4)
@given(
    dim=st.sampled_from([16, 64, 80, 128]),
    n=st.sampled_from([1, 16, 17]),
    first=st.sampled_from([-5, 0, 1_000_000]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_encode(preset, eta, dim, n, first, dtype, interleaved, seed):
    codec = key_codec(preset, dim, eta, interleaved)
    x = torch.randn(2, 2, n, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    position = (torch.arange(n) + first).expand(2, -1)
    got = encode.encode(x.to(DEVICE), position.to(DEVICE), Codecs.of(codec).to(DEVICE).first).cpu()
    check_codes(x, got, reference.encode(x, position, codec), position, codec, 2e-3)


def test_outliers_do_not_overflow():
    """Products are of float16 parts, scaled by the row."""
    codec = make_codec(2, layout=Layout(16, 2, 4))
    x = torch.randn(1, 2, 16, 16) * 10.0 ** torch.linspace(-6, 8, 16)[:, None]
    position = torch.arange(16)[None]
    got = encode.encode(x.to(DEVICE), position.to(DEVICE), Codecs.of(codec).to(DEVICE).first).cpu()
    want = reference.encode(x, position, codec)
    errors = [distance(x, c, position, codec) for c in (got, want)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-5)


@settings(max_examples=10)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rewind=st.integers(0, 12),
    pad=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    by_head=st.booleans(),
)
def test_append(chunks, rewind, pad, dtype, by_head):
    """What is held decodes as after the reference's appends, in chunks and with a rewind."""
    codec = make_codec(2, layout=Layout(16, 2, 4))
    codec = by_turns(codec, make_codec(2, layout=Layout(16, 1, 3))) if by_head else codec
    pairs = [make_pair(2, 2, 16, 256, key=codec, start=torch.tensor([0, pad]), dtype=dtype)[0] for _ in range(2)]
    pairs[0] = pairs[0].to(DEVICE)
    g = torch.Generator().manual_seed(0)
    at = 0
    for n in [*chunks, 5]:
        x = torch.randn(2, 2, n, 16, generator=g).to(dtype)
        if n == 5:
            at = max(0, at - rewind)
        slots = torch.arange(at, at + n)
        encode.append_(pairs[0].packed, x.to(DEVICE), slots.to(DEVICE))
        reference.append_(pairs[1].packed, x, slots)
        at += n
    for name in ("length", "encoded"):
        assert torch.equal(getattr(pairs[0], name).cpu(), getattr(pairs[1], name)), name
    coded = torch.arange(256) < pairs[1].encoded[:, None]
    for got, want in zip(*(p.codes for p in pairs), strict=True):
        same = (got.cpu() == want).all(-1).transpose(1, 2)[coded]
        assert not same.numel() or same.float().mean() > 0.95
    a, b = (p.to("cpu").dequantize().transpose(1, 2) for p in pairs)
    assert torch.equal(a[~coded], b[~coded])
    assert torch.equal(pairs[0].window[:, :, :2].cpu(), pairs[1].window[:, :, :2])


@given(
    rows=st.integers(1, 200),
    capacity=st.integers(1, 300_000),
    programs=st.integers(1, 600),
    frame=st.sampled_from([16, 192, 512, 1024]),
    half=st.booleans(),
)
def test_plans(rows, capacity, programs, frame, half):
    """Iterations stay in one frame."""
    p = attention.plan(make_codec(1, frame=frame), rows, capacity, programs, 132, half)
    assert frame % p.tokens == 0 and p.tokens >= 16 and p.rows in (16, 32) and 1 <= p.splits <= 256


def test_codecs_without_a_kernel():
    """Many stages, and frames that no tile divides, are left to the reference."""
    one, other = make_codec(2), make_codec(2, pairs=0)
    plain, value = Codecs.of(one), Codecs.of(other)
    odd, deep = Codecs.of(make_codec(2, frame=20)), Codecs.of(make_codec(2, layout=Layout(16, 1, 17)))
    assert encode.supports(plain) and attention.supports(plain, value)
    assert not encode.supports(deep) and not attention.supports(odd, value)
    mixed = by_turns(one, make_codec(2, layout=Layout(16, 1, 3)))  # keys and values are launched together
    assert attention.supports(mixed, by_turns(other, make_codec(2, layout=Layout(16, 1, 3), pairs=0)))
    assert not attention.supports(mixed, value)


@pytest.mark.parametrize("frame", [64, 20])
def test_the_ops_of_a_gpu(frame, monkeypatch):
    """What torch calls on a GPU: the kernels, or the reference where a codec has none."""
    monkeypatch.setattr(ops, "_on_gpu", lambda x: True)
    key, value, g = buffers(16, 40, frame=frame)
    buffers_ = [b.grown(60).to(DEVICE) for b in (key, value)]
    x, q = (torch.randn(2, heads, 9, 16, generator=g).to(DEVICE) for heads in (2, 4))
    slots = torch.arange(43, 52, device=DEVICE)
    want, got = [b.clone() for b in buffers_], buffers_
    for buffer in (*got, *want):
        buffer.length.fill_(43)
    owned = [(a.parts[: a.owned], a.parts[a.owned :], a.integers) for a in got]
    tails = ops.append_pair_(*owned[0], *owned[1], x, x, slots, True)
    for a, b, found in zip(got, want, tails, strict=False):
        assert torch.equal(found, reference.tail(b.packed, x, slots)[0])
        reference.append_(b.packed, x, slots)
        assert int(a.length) == int(b.length) == 52
        torch.testing.assert_close(a.dequantize(), b.dequantize(), rtol=1e-4, atol=1e-4)
    rest = (None, 0.25, LAST_ALIGNED, 0.0, None, None, None, None, WINDOW)
    sides = [argument for b in got for argument in (b.parts, list(b.integers))]
    equal(
        ops.attention(q, *sides, *rest).cpu(), reference.attention(q, *(b.packed for b in want), Options(*rest)).cpu()
    )
    codec = got[0].codec.first
    codes = ops.encode(x, slots.expand(2, -1), codec.tensors, codec.integers)
    assert (codes == reference.encode(x, slots.expand(2, -1), codec)).float().mean() > 0.95
    with pytest.raises(ValueError, match="slots start at"):
        ops.append_(*owned[0], x, slots + 50)
    with pytest.raises(ValueError, match="this cache takes"):
        ops.append_pair_(*owned[0], *owned[1], x, x[:, :1], slots, False)
