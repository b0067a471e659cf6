"""GSRQTensor: storage, the ops it answers, and refusals that change nothing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import make_codec, make_pair
from torchgsrq import GSRQConfig, GSRQTensor
from torchgsrq.config import encoded_tokens

pytestmark = pytest.mark.core


def parts(*buffers: GSRQTensor) -> list[torch.Tensor]:
    return [p.clone() for b in buffers for p in b.parts[: b.owned]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def live(buffer: GSRQTensor) -> list[torch.Tensor]:
    """What a buffer means: codes of encoded slots, decoded contents, counters. Dead ring slots do not count."""
    coded = torch.arange(buffer.shape[2]) < buffer.encoded[:, None]
    codes = [codes * coded[:, None, :, None] for codes in buffer.codes]
    return [*codes, buffer.dequantize(), buffer.start, buffer.length, buffer.encoded]


@given(
    cuts=st.lists(st.integers(0, 80), max_size=8),
    recent=st.sampled_from([0, 1, 8, 30]),
    block=st.sampled_from([1, 4, 16]),
    sinks=st.sampled_from([0, 1, 5]),
    pad=st.integers(0, 20),
)
def test_any_chunking_gives_the_same_bytes(cuts, recent, block, sinks, pad):
    config = GSRQConfig(sink_tokens=sinks, recent_tokens=recent, block_tokens=block)
    start = torch.tensor([0, pad])
    x = torch.randn(2, 2, 80, 16, generator=torch.Generator().manual_seed(0))
    whole, _, _, _ = make_pair(2, 2, 16, 80, start=start, config=config)
    whole.index_copy_(2, torch.arange(80), x)
    parts_, _, _, _ = make_pair(2, 2, 16, 80, start=start, config=config)
    edges = [0, *sorted(cuts), 80]
    for a, b in itertools.pairwise(edges):
        parts_.index_copy_(2, torch.arange(a, b), x[:, :, a:b])
    assert same(live(whole), live(parts_))
    assert whole.encoded.tolist() == [encoded_tokens(80, recent, block), pad + encoded_tokens(80 - pad, recent, block)]


@given(
    length=st.integers(1, 100),
    pads=st.lists(st.integers(0, 110), min_size=2, max_size=4),
    cut=st.integers(0, 100),
    recent=st.sampled_from([0, 1, 8, 30]),
    block=st.sampled_from([1, 4, 32]),
    sinks=st.sampled_from([0, 4]),
)
def test_a_padded_row_is_that_row_alone(length, pads, cut, recent, block, sinks):
    """Bit for bit: which tokens are exact, the codes of the others, and what they decode to."""
    config = GSRQConfig(sink_tokens=sinks, recent_tokens=recent, block_tokens=block)
    x = torch.randn(len(pads), 2, length, 16, generator=torch.Generator().manual_seed(0))
    batch, _, _, _ = make_pair(len(pads), 2, 16, 100, start=torch.tensor(pads), config=config)
    cut = min(cut, length)
    batch.index_copy_(2, torch.arange(cut), x[:, :, :cut])
    batch.index_copy_(2, torch.arange(cut, length), x[:, :, cut:])
    got = batch.dequantize()
    for row, pad in enumerate(pads):
        own = max(0, length - pad)
        alone, _, _, _ = make_pair(1, 2, 16, 100, config=config)
        alone.index_copy_(2, torch.arange(own), x[row : row + 1, :, length - own :])
        coded = int(alone.encoded)
        assert int(batch.encoded[row]) == min(length, pad + coded)
        assert torch.equal(batch.codes_0[row, :, pad : pad + coded], alone.codes_0[0, :, :coded])
        assert torch.equal(got[row, :, length - own : length], alone.dequantize()[0, :, :own])


@given(length=st.integers(0, 90), pad=st.integers(0, 12), recent=st.sampled_from([0, 8]), sinks=st.sampled_from([0, 3]))
def test_sinks_and_window_are_exact(length, pad, recent, sinks):
    config = GSRQConfig(sink_tokens=sinks, recent_tokens=recent, block_tokens=4)
    pads = torch.tensor([0, pad])
    key, _, x, _ = make_pair(2, 2, 16, 96, length=length, start=pads, config=config)
    got = key.dequantize()
    assert not got[:, :, length:].any()
    for row, first in enumerate(pads.tolist()):
        encoded = int(key.encoded[row])
        assert torch.equal(got[row, :, encoded:length], x[row, :, encoded:])
        last = min(first + sinks, length)
        assert torch.equal(got[row, :, first:last], x[row, :, first:last])
        inside = slice(first + sinks, encoded)
        if encoded > first + sinks:
            assert not torch.equal(got[row, :, inside], x[row, :, inside])


@given(
    length=st.integers(1, 60),
    crops=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_selection_and_crop_commute_with_decode(length, crops, rows):
    key, _, _, _ = make_pair(3, 2, 16, 64, length=length)
    was = key.dequantize()
    picked = key.index_select(0, torch.tensor(rows))
    assert torch.equal(picked.dequantize(), was[rows])
    assert torch.equal(key[torch.tensor(rows)].dequantize(), was[rows])
    left = length
    for crop in crops:
        left = min(left, crop)
        key.crop_(left)
        got = key.dequantize()
        assert torch.equal(got[:, :, :left], was[:, :, :left]) and not got[:, :, left:].any()
    assert torch.equal(picked.dequantize(), was[rows]), "a selection shared memory with its source"


@given(length=st.integers(20, 50), crop=st.integers(0, 49), more=st.integers(1, 40))
def test_appending_after_a_crop(length, crop, more):
    """What remained decodes as before (or has become codes since), and what is new is exact while in the window."""
    crop = min(crop, length)
    key, _, _, _ = make_pair(1, 2, 16, 96, length=length)
    key.crop_(crop)
    was, coded = key.dequantize(), int(key.encoded.max())
    x = torch.randn(1, 2, more, 16)
    key.index_copy_(2, torch.arange(crop, crop + more), x)
    got = key.dequantize()
    assert torch.equal(got[:, :, :coded], was[:, :, :coded])
    encoded = int(key.encoded.max())
    assert encoded == max(coded, encoded_tokens(crop + more, 8, 4))
    fresh = max(crop, encoded)
    assert torch.equal(got[:, :, fresh : crop + more], x[:, :, fresh - crop :])


def test_rewinding_drops_what_lay_after():
    key, _, _, _ = make_pair(1, 2, 16, 64, length=50)
    x = torch.randn(1, 2, 6, 16)
    key[:, :, torch.arange(6)] = x
    assert int(key.length) == 6 and torch.equal(key.dequantize()[:, :, :6], x)


def test_copies_are_independent_and_views_are_not_written():
    key, _, _, _ = make_pair(2, 2, 16, 64, length=40)
    was = key.dequantize()
    for other in (key.clone(), copy.deepcopy(key), key.to(torch.float32, copy=True)):
        assert isinstance(other, GSRQTensor)
        other.zero_()
        assert torch.equal(key.dequantize(), was)
        assert not other.dequantize().any() and int(other.length) == 0
    view = key.detach()
    assert torch.equal(view.dequantize(), was)
    cut = key[:, :, :30]
    assert cut.shape == (2, 2, 30, 16) and torch.equal(cut.dequantize()[:, :, :28], was[:, :, :28])
    row = key[1:]
    assert torch.equal(row.dequantize(), was[1:])
    for piece in (cut, row, key.repeat_interleave(2, 1)):
        with pytest.raises(ValueError, match="is a view"):
            piece.index_copy_(2, torch.arange(1), torch.zeros(piece.shape[0], 2, 1, 16))


def test_dtypes_and_growth():
    key, _, x, _ = make_pair(1, 2, 16, 40, length=40)
    half = key.half()
    assert half.dtype == torch.float16 and half.dequantize().dtype == torch.float16
    torch.testing.assert_close(half.dequantize().float(), key.dequantize(), rtol=1e-2, atol=1e-2)
    grown = key.grown(100)
    assert grown.shape == (1, 2, 100, 16) and torch.equal(grown.dequantize()[:, :, :40], key.dequantize())
    grown.index_copy_(2, torch.arange(40, 41), x[:, :, :1])
    assert int(grown.length) == 41
    with pytest.raises(ValueError, match=r"dtype=torch\.int32"):
        key.to(torch.int32)


def test_copy_from_plain_and_quantized():
    key, _, _, _ = make_pair(1, 2, 16, 24, length=20)
    x = torch.randn(1, 2, 24, 16)
    key.copy_(x)
    assert int(key.length) == 24 and torch.equal(key.dequantize()[:, :, 16:], x[:, :, 16:])
    other, _, _, _ = make_pair(1, 2, 16, 24, length=3)
    other.copy_(key)
    assert torch.equal(other.dequantize(), key.dequantize())
    wide, _, _, _ = make_pair(1, 2, 16, 32)
    with pytest.raises(ValueError, match="codecs or shapes differ"):
        wide.copy_(key)


@pytest.mark.parametrize("how", ["repeat_interleave", "expand"])
def test_heads_repeat_lazily(how):
    key, value, _, _ = make_pair(2, 2, 16, 64, length=64)
    q = torch.randn(2, 6, 1, 16)

    def repeat(x):
        if how == "repeat_interleave":
            return x.repeat_interleave(3, dim=1)
        b, h, t, d = x.shape
        return x[:, :, None, :, :].expand(b, h, 3, t, d).reshape(b, h * 3, t, d)

    wide_k, wide_v = repeat(key), repeat(value)
    assert isinstance(wide_k, GSRQTensor) and wide_k.shape == (2, 6, 64, 16)
    assert wide_k.codes_0.data_ptr() == key.codes_0.data_ptr()
    got = F.scaled_dot_product_attention(q, wide_k, wide_v)
    want = F.scaled_dot_product_attention(
        q, key.dequantize().repeat_interleave(3, 1), value.dequantize().repeat_interleave(3, 1)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(wide_k.dequantize(), key.dequantize().repeat_interleave(3, 1))


def test_batch_repeats():
    key, _, _, _ = make_pair(2, 2, 16, 64, length=30)
    assert torch.equal(key.repeat_interleave(2, 0).dequantize(), key.dequantize().repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("slots", "x", "says"),
    [
        ([12, 13], (1, 2, 2, 16), "would leave a hole"),
        ([10, 12], (1, 2, 2, 16), "not consecutive"),
        ([11, 10], (1, 2, 2, 16), "not consecutive|leave a hole"),
        (list(range(10, 30)), (1, 2, 20, 16), "capacity of 24"),
        ([10], (1, 2, 2, 16), "one slot per token"),
        ([10], (1, 3, 1, 16), "takes \\[1, 2, n, 16\\]"),
        ([10], (1, 2, 1, 8), "takes \\[1, 2, n, 16\\]"),
        ([-1], (1, 2, 1, 16), "leave a hole"),
    ],
)
def test_bad_writes_are_named_and_change_nothing(slots, x, says):
    key, _, _, _ = make_pair(1, 2, 16, 24, length=10)
    before = parts(key)
    with pytest.raises(ValueError, match=says):
        key.index_copy_(2, torch.tensor(slots), torch.zeros(x))
    assert same(before, parts(key))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(poison):
    key, _, _, _ = make_pair(1, 2, 16, 24, length=10)
    x = torch.zeros(1, 2, 3, 16)
    x[0, 1, 2, 5] = poison
    before = parts(key)
    with pytest.raises(ValueError, match="NaN or inf"):
        key.index_copy_(2, torch.arange(10, 13), x)
    with pytest.raises(ValueError, match=r"float16; this cache holds torch\.float32"):
        key.index_copy_(2, torch.arange(10, 13), torch.zeros(1, 2, 3, 16).half())
    assert same(before, parts(key))


def test_unsupported_ops_are_named():
    key, value, _, _ = make_pair(1, 2, 16, 24, length=10)
    q = torch.randn(1, 2, 1, 16)
    for call in (lambda: key + 1, lambda: key.sum(), lambda: key.exp(), lambda: torch.cat((key, key), 2)):
        with pytest.raises(NotImplementedError, match=r"does not support aten\..*dequantize"):
            call()
    for call, says in (
        (lambda: key[:, 1:], "dim 1"),
        (lambda: key[:, :, 3:], "dim 2"),
        (lambda: key.index_select(2, torch.tensor([1])), "dim=2"),
        (lambda: key.index_copy_(0, torch.tensor([0]), q), "dim=0"),
        (lambda: key.view(2, 24, 16), "cannot view"),
        (lambda: key.crop_(11), "between 0 and the 10"),
        (lambda: F.scaled_dot_product_attention(q, key, value, dropout_p=0.1), r"dropout_p=0\.1"),
        (lambda: F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), key, value), "enable_gqa"),
        (lambda: F.scaled_dot_product_attention(q[..., :8], key, value), "query has shape"),
        (lambda: GSRQTensor.empty(1, 3, 8, 16, codec=make_codec(2)), "not kv_heads=3"),
        (lambda: GSRQTensor.empty(-1, 2, 8, 16, codec=make_codec(2)), "at least 0"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(TypeError, match="for both key and value"):
        F.scaled_dot_product_attention(q, key, value.dequantize())


def test_codes_of_another_codebook_are_refused():
    codec = make_codec(2)
    codes = torch.zeros(1, 2, 5, codec.layout.codes + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="another codebook"):
        torch.ops.torchgsrq.decode(
            codes, torch.zeros(1, 5, dtype=torch.long), codec.tensors, codec.integers, torch.float32
        )
    wrong = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="head_dim=16"):
        torch.ops.torchgsrq.encode(wrong, torch.zeros(1, 5, dtype=torch.long), codec.tensors, codec.integers)


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_buffers(batch):
    key, value, _, _ = make_pair(batch, 2, 16, 8, length=0)
    assert key.dequantize().shape == (batch, 2, 8, 16)
    key.index_copy_(2, torch.arange(0), torch.zeros(batch, 2, 0, 16))
    assert int(key.length) == 0 and f"GSRQTensor(shape=({batch}, 2, 8, 16), bits={key.codec.bits:g}, " in repr(key)
    assert F.scaled_dot_product_attention(torch.zeros(batch, 2, 1, 16), key, value).shape == (batch, 2, 1, 16)


def test_the_cache_of_compiled_graphs_tells_buffers_apart():
    """What differs in anything but its contents is another graph's; a copy is not."""
    key, value, _, _ = make_pair(2, 2, 16, 32, length=10)
    other, _, _, _ = make_pair(2, 2, 16, 32, config=GSRQConfig(sink_tokens=2, recent_tokens=12, block_tokens=4))
    buffers = (key, value, other, key[:1], key[:, :, :32], key[:, :, None], key.repeat_interleave(2, 1), key.half())
    hashes = [x._stable_hash_for_caching() for x in buffers]
    assert len(set(hashes)) == len(buffers) - 1 and hashes[4] == hashes[0]
    assert key.clone()._stable_hash_for_caching() == hashes[0]
    wider = key[:, :, None].expand(2, 2, 3, 32, 16)
    assert wider._stable_hash_for_caching() != wider.reshape(2, 6, 32, 16)._stable_hash_for_caching()
