"""Attention on codes equals SDPA on the dequantized buffer: every length, mask, GQA ratio, layout and dtype."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import by_turns, close, make_codec, make_pair
from torchgsrq import GSRQConfig, reference
from torchgsrq.codec.layout import Layout
from torchgsrq.codec.packed import EXACT_TAIL, LAST_ALIGNED, NOT_CAUSAL, STREAMING, UPPER_LEFT, Options
from torchgsrq.codec.rope import rotate

pytestmark = pytest.mark.core


def oracle(q, k, v, mask=None, scale=None, softcap=0.0, sink_logits=None):
    """Attention in float64, all at once. mask is bool or additive, or None; fully masked rows give zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sink_logits is not None:
        extra = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        p = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    else:
        p = scores.softmax(-1).nan_to_num(0.0)
    return p @ v


def run(q, key, value, form=None, **kwargs):
    kwargs.setdefault("scale", q.shape[-1] ** -0.5)
    return reference.attention(q, key.packed, value.packed, Options(**kwargs), form=form)


PAIRS = {
    "groups": dict(key=make_codec(2), value=make_codec(2, pairs=0, layout=Layout(16, 4, 4), seed=1)),
    "whole, ragged": dict(
        key=make_codec(2, layout=Layout(16, 1, 3)), value=make_codec(2, pairs=0, layout=Layout(16, 4, 6), seed=1)
    ),
    "no frames": dict(key=make_codec(2, pairs=0), value=make_codec(2, pairs=0, seed=1)),
    "partial, interleaved": dict(key=make_codec(2, pairs=3, interleaved=True), value=make_codec(2, pairs=0, seed=1)),
    "by head": dict(
        key=by_turns(make_codec(2), make_codec(2, layout=Layout(16, 1, 3))),
        value=by_turns(make_codec(2, pairs=0), make_codec(2, pairs=0, layout=Layout(16, 2, 2), seed=1)),
    ),
}


@pytest.mark.parametrize("form", ["tables", "decode"])
@pytest.mark.parametrize("name", PAIRS)
@given(
    length=st.integers(1, 90),
    queries=st.integers(1, 5),
    group=st.sampled_from([1, 2, 3]),
    pad=st.integers(0, 9),
    masked=st.sampled_from(["none", "bool", "additive", "heads"]),
    softcap=st.sampled_from([0.0, 3.0]),
    sink=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_the_oracle(name, form, length, queries, group, pad, masked, softcap, sink, seed):
    start = torch.tensor([0, min(pad, length - 1)])
    key, value, _, _ = make_pair(2, 2, 16, 96, length=length, start=start, seed=seed, **PAIRS[name])
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2 * group, queries, 16, generator=g)
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, queries, 96, generator=g) < 0.7
    elif masked == "additive":
        mask = torch.randn(1, 1, queries, 96, generator=g).masked_fill(torch.rand(96, generator=g) < 0.3, -torch.inf)
    elif masked == "heads":
        mask = torch.rand(2, 2 * group, queries, 96, generator=g) < 0.7
    logits = torch.randn(2 * group, generator=g) if sink else None
    got = run(q, key, value, form, mask=mask, softcap=softcap, sink_logits=logits)
    k, v = (t.dequantize()[:, :, :length] for t in (key, value))
    want = oracle(q, k, v, None if mask is None else mask[..., :length], softcap=softcap, sink_logits=logits)
    close(got, want, 1e-5)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("length", [6, 40])
@pytest.mark.parametrize("slack", [0, 50])
@pytest.mark.parametrize("causal", [NOT_CAUSAL, UPPER_LEFT, LAST_ALIGNED])
def test_what_no_mask_means(queries, length, slack, causal):
    """q_len x empty or non-empty cache x slack in the capacity x alignment."""
    key, value, _, _ = make_pair(2, 2, 16, length + slack, length=length)
    q = torch.randn(2, 4, queries, 16, generator=torch.Generator().manual_seed(0))
    k, v = (t.dequantize()[:, :, :length] for t in (key, value))
    first = length - queries if causal == LAST_ALIGNED else 0
    mask = None if causal == NOT_CAUSAL else torch.arange(length) <= torch.arange(queries)[:, None] + first
    close(run(q, key, value, causal=causal), oracle(q, k, v, mask), 1e-5)


@pytest.mark.parametrize("view", [EXACT_TAIL, STREAMING])
@pytest.mark.parametrize("before", [0, 1, 13, 30])
@pytest.mark.parametrize("new", [2, 9, 40])
def test_what_several_new_queries_see(view, before, new):
    """EXACT_TAIL: their own tokens and the window before them. STREAMING: what one at a time would have."""
    key, value, _, _ = make_pair(2, 2, 16, 96, length=before)
    g = torch.Generator().manual_seed(7)
    nk, nv = (torch.randn(2, 2, new, 16, generator=g) for _ in range(2))
    q = torch.randn(2, 4, new, 16, generator=g)
    slots = torch.arange(before, before + new)
    key_tail, tail_start = reference.tail(key.packed, nk, slots)
    value_tail, _ = reference.tail(value.packed, nv, slots)
    old_encoded = key.encoded.clone()
    wants = []
    if view == EXACT_TAIL:
        past_k, past_v = (t.dequantize()[:, :, :before] for t in (key, value))
    for i in range(new):
        key.index_copy_(2, slots[i : i + 1], nk[:, :, i : i + 1])
        value.index_copy_(2, slots[i : i + 1], nv[:, :, i : i + 1])
        if view == STREAMING:
            seen_k, seen_v = (t.dequantize()[:, :, : before + i + 1] for t in (key, value))
        else:
            seen_k, seen_v = (torch.cat((p, n[:, :, : i + 1]), 2) for p, n in ((past_k, nk), (past_v, nv)))
        wants.append(oracle(q[:, :, i : i + 1], seen_k, seen_v))
    assert torch.equal(tail_start, old_encoded)
    tails = dict(key_tail=key_tail, value_tail=value_tail, tail_start=tail_start)
    close(run(q, key, value, causal=LAST_ALIGNED, view=view, **tails), torch.cat(wants, 2), 1e-5)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision(dtype, rel):
    key, value, _, _ = make_pair(2, 2, 16, 96, length=70, dtype=dtype)
    q = torch.randn(2, 4, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    k, v = (t.dequantize(torch.float32)[:, :, :70] for t in (key, value))
    got = run(q, key, value)
    assert got.dtype == dtype
    close(got, oracle(q, k, v), rel)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_head_dims_and_gqa(head_dim, group):
    key_codec = make_codec(1, layout=Layout.of(head_dim, 0.5), frame=64)
    value_codec = make_codec(1, layout=Layout.of(head_dim, 0.5), pairs=0)
    key, value, _, _ = make_pair(1, 1, head_dim, 80, length=80, key=key_codec, value=value_codec)
    q = torch.randn(1, group, 2, head_dim, generator=torch.Generator().manual_seed(0))
    for form in ("tables", "decode"):
        close(run(q, key, value, form), oracle(q, key.dequantize(), value.dequantize()), 1e-5)


@settings(max_examples=10)
@given(length=st.sampled_from([511, 512, 513, 1025, 4097, 4140]), seed=st.integers(0, 3))
def test_block_boundaries(length, seed):
    key, value, _, _ = make_pair(1, 2, 16, 4200, length=length, seed=seed)
    q = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(seed))
    k, v = (t.dequantize()[:, :, :length] for t in (key, value))
    want = oracle(q, k, v)
    close(run(q, key, value, "tables"), want, 1e-5)
    close(run(q, key, value, "decode"), want, 1e-5)


def test_nothing_to_see_gives_zeros():
    key, value, _, _ = make_pair(2, 2, 16, 40, length=0)
    q = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    assert not run(q, key, value).any()
    key, value, _, _ = make_pair(2, 2, 16, 40, length=30)
    assert not run(q, key, value, mask=torch.zeros(1, 1, 1, 40, dtype=torch.bool)).any()
    empty, nothing, _, _ = make_pair(0, 2, 16, 40, length=0)
    assert run(q[:0], empty, nothing).shape == (0, 2, 1, 16)


def test_no_score_matrix_of_the_whole_cache(monkeypatch):
    """Peak memory of a long prefill is that of a block, and codes are never all decoded at once."""
    seen = []
    decode = reference.decode
    module = sys.modules["torchgsrq.reference.storage"]
    monkeypatch.setattr(module, "decode", lambda codes, *a: seen.append(codes.shape[2]) or decode(codes, *a))
    key, value, _, _ = make_pair(1, 2, 16, 3000, length=3000)
    run(torch.randn(1, 2, 64, 16), key, value, "decode")
    assert max(seen) <= 512 and sum(seen) == 2 * int(key.encoded.max())


def test_rows_of_a_padded_batch_are_alone():
    """Sinks, frames and rotated means go by the row's own positions."""
    config = GSRQConfig(sink_tokens=2, recent_tokens=8, block_tokens=1)
    pads = [0, 5, 13]
    x = torch.randn(3, 2, 60, 16, generator=torch.Generator().manual_seed(0))
    key, value, _, _ = make_pair(3, 2, 16, 60, start=torch.tensor(pads), config=config)
    key.index_copy_(2, torch.arange(60), x)
    value.index_copy_(2, torch.arange(60), x)
    q = torch.randn(3, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(60) >= torch.tensor(pads)[:, None]
    got = run(q, key, value, mask=mask[:, None, None])
    for i, pad in enumerate(pads):
        alone_k, alone_v, _, _ = make_pair(1, 2, 16, 60 - pad, config=config)
        alone_k.index_copy_(2, torch.arange(60 - pad), x[i : i + 1, :, pad:])
        alone_v.index_copy_(2, torch.arange(60 - pad), x[i : i + 1, :, pad:])
        close(got[i : i + 1], run(q[i : i + 1], alone_k, alone_v).double(), 1e-5)


def test_outlier_channels_do_not_break_attention():
    """Key biases of hundreds (as in Qwen2.5) are in the mean, which is taken off before coding."""
    from torchgsrq.codec import Codec

    g = torch.Generator().manual_seed(0)
    bias = torch.zeros(2, 16)
    bias[:, 3], bias[:, 11] = 400.0, -250.0
    raw = torch.randn(1, 2, 300, 16, generator=g)
    from torchgsrq.codec.kmeans import train_codebook

    layout = Layout(16, 1, 4)
    codebook = train_codebook(raw[0], torch.ones(2, 300), layout)
    eye = torch.eye(16).expand(2, -1, -1)
    inv_freq = 1.0 / 1000 ** (torch.arange(8) / 8)
    codec = Codec.build(bias, eye, codebook, inv_freq=inv_freq, frame=64)
    at = torch.arange(300)[None]
    keys = rotate(raw + bias[None, :, None], at[:, None], inv_freq)
    v = torch.randn(1, 2, 300, 16, generator=g)
    key, value, _, _ = make_pair(1, 2, 16, 300, key=codec)
    key.index_copy_(2, torch.arange(300), keys)
    value.index_copy_(2, torch.arange(300), v)
    q = torch.randn(1, 2, 1, 16, generator=g) * 0.1
    exact_v = value.dequantize()
    got, want = oracle(q, key.dequantize(), exact_v), oracle(q, keys, exact_v)
    assert (got - want).norm() / want.norm() < 0.1
    close(run(q, key, value), got, 1e-4)


def test_sdpa_is_the_same(dtype=torch.float32):
    key, value, _, _ = make_pair(2, 2, 16, 64, length=64)
    q = torch.randn(2, 4, 3, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 3, 64) < 0.5
    mask[..., 0] = True
    plain = [t.dequantize() for t in (key, value)]
    for arguments in (
        {"enable_gqa": True},
        {"enable_gqa": True, "attn_mask": mask},
        {"enable_gqa": True, "is_causal": True},
    ):
        got = F.scaled_dot_product_attention(q, key, value, **arguments)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(q, *plain, **arguments), rtol=1e-4, atol=1e-5)
