"""The compiled CPU kernels do what the reference says, on the same codes; at any thread count, in any build."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import by_turns, close, make_codec, make_pair
from torchgsrq import GSRQConfig, kernels, reference
from torchgsrq.codec.kmeans import moments_by_code, nearest, sum_by_code
from torchgsrq.codec.layout import Layout
from torchgsrq.codec.packed import EXACT_TAIL, LAST_ALIGNED, NOT_CAUSAL, STREAMING, UPPER_LEFT, WINDOW, Options
from torchgsrq.codec.rope import rotate
from torchgsrq.ops import use_kernels

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(
        not kernels.compiler() or os.environ.get("TORCHGSRQ_KERNELS") == "0",
        reason="there are no compiled kernels without a C++ compiler, nor with TORCHGSRQ_KERNELS=0",
    ),
]
gsrq = torch.ops.torchgsrq

CODECS = {
    "groups of 8": lambda dim, bits: (Layout.of(dim, bits), Layout.of(dim, bits)),
    "groups of 64": lambda dim, bits: (Layout.of(dim, bits, 64), Layout.of(dim, bits, 64)),
    "mixed": lambda dim, bits: (Layout.of(dim, 4), Layout.of(dim, 0.5)),  # as layers are given their bits
    "ragged": lambda dim, bits: (Layout(dim, 2, 5), Layout(dim, 4, 7)),
}
SECOND = {"by head": lambda dim, bits: (Layout.of(dim, 4), Layout.of(dim, 2))}  # the layouts of every second head
CODECS["by head"] = CODECS["groups of 8"]


def run(q, key, value, mask=None, causal=NOT_CAUSAL, softcap=0.0, logits=None, tails=(None,) * 3, view=WINDOW):
    """The op."""
    parts = (key.parts, list(key.integers), value.parts, list(value.integers))
    return gsrq.attention(q, *parts, mask, q.shape[-1] ** -0.5, causal, softcap, logits, *tails, view)


def specified(q, key, value, mask=None, causal=NOT_CAUSAL, softcap=0.0, logits=None, tails=(None,) * 3, view=WINDOW):
    """The reference."""
    options = Options(mask, q.shape[-1] ** -0.5, causal, softcap, logits, *tails, view)
    return reference.attention(q, key.packed, value.packed, options)


def equal(got, want, dtype=torch.float32):
    assert got.dtype == want.dtype == dtype
    close(got, want, 1e-5 if dtype == torch.float32 else 1e-2)


def buffers(
    dim,
    length,
    bits=1.0,
    preset="groups of 64",
    *,
    batch=2,
    heads=2,
    frame=64,
    pad=0,
    seed=0,
    interleaved=False,
    config=None,
    dtype=torch.float32,
):
    """Buffers with real windows and random, skewed codes."""
    k, v = CODECS[preset](dim, bits)
    key_codec = make_codec(heads, layout=k, frame=frame, seed=seed % 2, interleaved=interleaved)
    value_codec = make_codec(heads, layout=v, pairs=0, seed=1)
    if preset in SECOND:
        more_k, more_v = SECOND[preset](dim, bits)
        other = make_codec(heads, layout=more_k, frame=frame, seed=seed % 2, interleaved=interleaved)
        key_codec = by_turns(key_codec, other)
        value_codec = by_turns(value_codec, make_codec(heads, layout=more_v, pairs=0, seed=1))
    start = torch.zeros(batch, dtype=torch.int32)
    start[-1] = min(pad, length)
    key, value, _, _ = make_pair(
        batch, heads, dim, length + 3, key=key_codec, value=value_codec, start=start, config=config, dtype=dtype
    )
    g = torch.Generator().manual_seed(seed)
    for buffer in (key, value):
        for codes in buffer.codes:
            codes.copy_(torch.randint(0, 256, codes.shape, generator=g))
            codes[torch.rand(codes.shape, generator=g) < 0.5] = 7
        buffer.window.copy_(torch.randn(buffer.window.shape, generator=g))
        buffer.length.fill_(length)
        recent, block = buffer.integers[1:3]
        buffer.encoded.fill_(max(0, (length - recent) // block * block))
    return key, value, g


def mask_of(kind, q, length, g):
    """A mask of a kind, for queries [2, heads, queries, dim]."""
    heads, queries = q.shape[1:3]
    if kind == "bool":
        return torch.rand(2, 1, queries, length + 3, generator=g) < 0.7
    if kind == "additive":
        hidden = torch.rand(length, generator=g) < 0.3
        return torch.randn(1, 1, queries, length, generator=g).masked_fill(hidden, -torch.inf)
    return torch.rand(2, heads, queries, length, generator=g) < 0.7 if kind == "heads" else None


def test_the_kernels_run():
    """Where there is a compiler they build and load; else the tests below would compare the reference with itself."""
    assert use_kernels()


@settings(max_examples=settings.default.max_examples * 2 + 10)
@given(
    dim=st.sampled_from([16, 64, 80, 96, 128]),
    bits=st.sampled_from([0.5, 1.0, 2.0]),
    preset=st.sampled_from(list(CODECS)),
    length=st.one_of(st.integers(1, 300), st.sampled_from([1024, 1033, 2056, 2057, 2060, 4121])),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 16]),
    queries=st.sampled_from([1, 1, 2, 5, 17]),
    frame=st.sampled_from([1, 16, 64, 192]),
    pad=st.integers(0, 70),
    masked=st.sampled_from(["none", "none", "bool", "additive", "heads"]),
    causal=st.sampled_from([NOT_CAUSAL, UPPER_LEFT, LAST_ALIGNED]),
    softcap=st.sampled_from([0.0, 3.0]),
    sink=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention(
    dim, bits, preset, length, group, queries, frame, pad, masked, causal, softcap, sink, interleaved, seed
):
    queries = min(queries, length)
    key, value, g = buffers(dim, length, bits, preset, frame=frame, pad=pad, seed=seed, interleaved=interleaved)
    q = torch.randn(2, 2 * group, queries, dim, generator=g)
    mask, logits = mask_of(masked, q, length, g), torch.randn(2 * group, generator=g) if sink else None
    arguments = (q, key, value, mask, causal, softcap, logits)
    equal(run(*arguments), specified(*arguments))


@pytest.mark.parametrize("view", [EXACT_TAIL, STREAMING])
@pytest.mark.parametrize("new", [2, 9, 70, 200])
def test_attention_with_tails(view, new):
    key, value, g = buffers(64, 150, pad=5)
    more = [b.grown(150 + new) for b in (key, value)]
    slots = torch.arange(150, 150 + new)
    fresh = [torch.randn(2, 2, new, 64, generator=g) for _ in range(2)]
    (k_tail, start), (v_tail, _) = (reference.tail(b.packed, x, slots) for b, x in zip(more, fresh, strict=True))
    for buffer, x in zip(more, fresh, strict=True):
        buffer.index_copy_(2, slots, x)
    q = torch.randn(2, 6, new, 64, generator=g)
    arguments = (q, *more, None, LAST_ALIGNED, 0.0, None, (k_tail, v_tail, start), view)
    equal(run(*arguments), specified(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 30])
def test_attention_in_half_precision(dtype, queries):
    key, value, g = buffers(64, 200, dtype=dtype)
    q = torch.randn(2, 6, queries, 64, generator=g).to(dtype)
    equal(run(q, key, value, causal=LAST_ALIGNED), specified(q, key, value, causal=LAST_ALIGNED), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 20, 60])
def test_a_query_that_is_not_a_number_is_seen(queries, dtype):
    """Its row is NaN, as SDPA's and the reference's are; no other row is touched."""
    key, value, g = buffers(64, 300, dtype=dtype)
    q = torch.randn(2, 4, queries, 64, generator=g).to(dtype)
    q[1, 2, -1, 5] = torch.nan
    for out in (run(q, key, value), specified(q, key, value)):
        assert out[1, 2, -1].isnan().all() and out.isnan().sum() == 64


@pytest.mark.parametrize("queries", [1, 40])
def test_views_of_buffers(queries):
    """Slices have strides of their own."""
    key, value, g = buffers(64, 300, batch=3)
    q = torch.randn(2, 4, queries, 64, generator=g)
    some = [b[1:][:, :, :280] for b in (key, value)]
    equal(run(q, *some), specified(q, *some))


def test_far_positions():
    """Rows may begin a million tokens before their first slot."""
    key, value, g = buffers(64, 600, config=GSRQConfig(recent_tokens=8, block_tokens=4))
    for buffer in (key, value):
        buffer.start[:, 0] = -1_000_003
    q = torch.randn(2, 4, 1, 64, generator=g)
    equal(run(q, key, value), specified(q, key, value))


ALONE = [preset for preset in CODECS if preset not in SECOND]  # those of one codec


@pytest.mark.parametrize("eta", [1, 8])
@pytest.mark.parametrize("preset", ALONE)
@given(
    dim=st.sampled_from([16, 64, 80, 128]),
    n=st.sampled_from([1, 3, 16, 17, 65, 130]),
    first=st.sampled_from([-5, 0, 1000, 1_000_000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings.default.max_examples * 2 // 3)
def test_encode(preset, eta, dim, n, first, dtype, interleaved, seed):
    codec = key_codec(preset, dim, eta, interleaved)
    x = torch.randn(2, 2, n, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    position = (torch.arange(n) + first).expand(2, -1)
    got = gsrq.encode(x, position, codec.tensors, codec.integers)
    check_codes(x, got, reference.encode(x, position, codec), position, codec, 1e-3)


def key_codec(preset, dim, eta, interleaved=False):
    """The key codec of a preset, at 1 bit."""
    return make_codec(2, layout=CODECS[preset](dim, 1.0)[0], frame=64, eta=eta, interleaved=interleaved)


def check_codes(x, got, want, position, codec, rtol):
    """Codes of kernels against those of the reference."""
    apart = (got != want).any(-1)
    # Sums in another order decide near-ties otherwise; then both must be as near to the input, in the metric.
    assert int(apart.sum()) <= 2 + 0.03 * apart.numel()
    # A near-tie in an early stage may end elsewhere, about as near.
    rtol = 0.3 if codec.layout.stages > 1 else rtol
    errors = [distance(x, codes, position, codec)[apart] for codes in (got, want)]
    torch.testing.assert_close(errors[0], errors[1], rtol=rtol, atol=1e-5)


def distance(x, codes, position, codec):
    """Loss of a reconstruction in the codec's metric: its squared error, and more of what lies along the vector."""
    place = position.remainder(codec.frame)

    def in_metric(v):
        turned = rotate(v, (place - position)[:, None], codec.inv_freq, codec.interleaved)
        return (turned @ codec.transform.transpose(1, 2)).unflatten(-1, (codec.layout.groups, codec.layout.width))

    error = in_metric(x.float() - reference.decode(codes, position, codec))
    y = in_metric(x.float()) - in_metric(
        rotate(reference.mean_at(place, codec), (position - place)[:, None], codec.inv_freq, codec.interleaved)
    )
    y = y / y.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return (error.square().sum(-1) + (codec.eta - 1) * (error * y).sum(-1).square()).sum(-1)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rewind=st.integers(0, 12),
    pad=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    by_head=st.booleans(),
)
def test_append(chunks, rewind, pad, dtype, by_head):
    """The same bytes as the reference leaves, after appends in chunks and a rewind."""
    start = torch.tensor([0, pad])
    codec = make_codec(2, layout=Layout(16, 2, 4))
    codec = by_turns(codec, make_codec(2, layout=Layout(16, 1, 3))) if by_head else codec
    pairs = [make_pair(2, 2, 16, 256, key=codec, start=start, dtype=dtype)[0] for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    at = 0
    for n in [*chunks, 5]:
        x = torch.randn(2, 2, n, 16, generator=g).to(dtype)
        if n == 5:
            at = max(0, at - rewind)
        slots = torch.arange(at, at + n)
        pairs[0].index_copy_(2, slots, x)
        reference.append_(pairs[1].packed, x, slots)
        at += n
    for name in ("window", "length", "encoded"):
        assert torch.equal(getattr(pairs[0], name), getattr(pairs[1], name)), name
    done = int(pairs[0].encoded.max())
    for got, want in zip(*(pair.packed.coded(0, done) for pair in pairs), strict=True):
        assert not done or (got == want).float().mean() > 0.95


@given(n=st.integers(1, 130), width=st.integers(1, 40), count=st.integers(1, 256), seed=st.integers(0, 9))
def test_clustering_steps(n, width, count, seed):
    g = torch.Generator().manual_seed(seed)
    x, centers = torch.randn(2, n, width, generator=g), torch.randn(2, count, width, generator=g)
    code, error = gsrq.nearest(x, centers)
    want_code, want_error = nearest(x, centers)
    torch.testing.assert_close(error, want_error, rtol=1e-4, atol=1e-4)
    assert (code == want_code).float().mean() > 0.98
    torch.testing.assert_close(gsrq.sum_by_code(x, code, count), sum_by_code(x, code, count), rtol=1e-5, atol=1e-5)
    weight = torch.rand(x.shape[:2])
    want = moments_by_code(x, weight, code, count)
    torch.testing.assert_close(gsrq.moments_by_code(x, weight, code, count), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 40])
def test_the_number_of_threads_changes_nothing(queries):
    key, value, g = buffers(64, 5000)
    q = torch.randn(2, 6, queries, 64, generator=g)
    x, codec = torch.randn(2, 2, 300, 64, generator=g), key.codec.first
    position = torch.arange(300).expand(2, -1)
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            codes = gsrq.encode(x, position, codec.tensors, codec.integers)
            found.append((run(q, key, value, causal=LAST_ALIGNED), codes))
    finally:
        torch.set_num_threads(1)
    for out, codes in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(codes, found[0][1])


def test_without_a_compiler_the_reference_runs(tmp_path):
    """It says so once, and gives the same."""
    script = (
        "import torch, logging; logging.basicConfig();"
        "from tests.conftest import make_pair; import torch.nn.functional as F;"
        "k, v, *_ = make_pair(length=50); q = torch.randn(2, 2, 1, 16);"
        "a = F.scaled_dot_product_attention(q, k, v); a = F.scaled_dot_product_attention(q, k, v);"
        "torch.testing.assert_close(a, F.scaled_dot_product_attention(q, k.dequantize()[:, :, :50],"
        " v.dequantize()[:, :, :50]), rtol=1e-4, atol=1e-4)"
    )
    env = {**os.environ, "CXX": "/nonexistent/c++", "TORCHGSRQ_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be built, so the slower reference runs") == 1


@pytest.mark.slow
@pytest.mark.parametrize("build", ["scalar", "address sanitizer"])
def test_other_builds(tmp_path, build):
    """The scalar twin computes the same, and no access is out of bounds."""
    library = tmp_path / "kernels.so"
    # Fewer examples of each property: those of the plain build are many.
    env = {**os.environ, "TORCHGSRQ_KERNELS": str(library), "HYPOTHESIS_PROFILE": "few"}
    if build == "scalar":
        kernels.build(library, scalar=True, extra=("-O1",))
    else:
        find = [*kernels.compiler(), "-print-file-name=libasan.so"]
        runtime = subprocess.run(find, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(runtime):
            pytest.skip("this compiler has no libasan.so, which must be preloaded into Python (clang has another)")
        kernels.build(library, extra=("-fsanitize=address", "-g", "-O1"))
        env |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__, "-k", "not compiler", "-p", "no:xdist"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
