"""The ops as torch sees them: schemas, fakes and mutation, checked by `torch.library.opcheck`."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_pair
from torchgsrq import reference

pytestmark = pytest.mark.core

ops = torch.ops.torchgsrq
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def buffers(length: int = 30):
    key, value, _, _ = make_pair(2, 2, 16, 48, length=length)
    return key, value


def flat(kv):
    return [p.clone() for p in kv.parts], list(kv.integers)


def test_encode_and_decode():
    key, _ = buffers()
    codec = key.codec.first
    at = torch.arange(7).expand(2, -1)
    x = torch.randn(2, 2, 7, 16)
    torch.library.opcheck(ops.encode.default, (x, at, codec.tensors, codec.integers), test_utils=TESTS)
    codes = ops.encode(x, at, codec.tensors, codec.integers)
    y = reference.to_metric(x, at, codec)[:, :14]
    torch.library.opcheck(ops.search.default, (y, codec.tensors, codec.integers), test_utils=TESTS)
    assert torch.equal(ops.search(y, codec.tensors, codec.integers).view(2, 2, 7, -1).transpose(0, 1), codes)
    with pytest.raises(ValueError, match="expected float32"):
        ops.search(y[:, :, :-1], codec.tensors, codec.integers)
    torch.library.opcheck(
        ops.decode.default, (codes, at, codec.tensors, codec.integers, torch.float16), test_utils=TESTS
    )


def test_append():
    tensors, integers = flat(buffers()[0])
    arguments = (tensors[:5], tensors[5:], integers, torch.randn(2, 2, 5, 16), torch.arange(30, 35))
    torch.library.opcheck(ops.append_.default, arguments, test_utils=TESTS)


def test_append_pair():
    parts = [flat(buffer) for buffer in buffers()]
    sides = [(tensors[:5], tensors[5:], integers) for tensors, integers in parts]
    x, slots = torch.randn(2, 2, 5, 16), torch.arange(30, 35)
    torch.library.opcheck(ops.append_pair_.default, (*sides[0], *sides[1], x, -x, slots, True), test_utils=TESTS)
    before = [[t.clone() for t in tensors] for tensors, _ in parts]
    bad = (((x, x / 0), "values: x holds NaN or inf in row"), ((x / 0, x), "keys: x holds NaN or inf in row"))
    bad = (*bad, ((x, x[..., :8]), "values: x has shape"), ((x[:, :1], x), "keys: x has shape"))
    for pair, says in bad:
        with pytest.raises(ValueError, match=says):
            ops.append_pair_(*sides[0], *sides[1], *pair, slots, False)
    for (tensors, _), old in zip(parts, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, old, strict=True)), "neither was written"
    assert not any(t.numel() for t in ops.append_pair_(*sides[0], *sides[1], x, -x, slots, False))
    pair = buffers()
    wanted = [reference.tail(buffer.packed, y, slots) for buffer, y in zip(pair, (x, -x), strict=True)]
    found = ops.kv_append_pair_(*pair, x, -x, slots, True)
    assert all(map(torch.equal, found, (wanted[0][0], wanted[1][0], wanted[0][1])))
    for buffer, one, y, (tensors, _) in zip(pair, buffers(), (x, -x), parts, strict=True):
        one.index_copy_(2, slots, y)
        for other in (buffer.parts, one.parts):
            assert all(torch.equal(a, b) for a, b in zip(other, tensors, strict=True))


def test_dequantize():
    tensors, integers = flat(buffers()[0])
    torch.library.opcheck(ops.dequantize.default, (tensors, integers, torch.float32), test_utils=TESTS)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    (key, key_integers), (value, value_integers) = (flat(b) for b in buffers())
    q = torch.randn(2, 4, 3, 16)
    mask = torch.rand(2, 1, 3, 48) < 0.5 if masked else None
    logits = torch.randn(4) if masked else None
    arguments = (q, key, key_integers, value, value_integers, mask, 0.25, 0, 2.0, logits, None, None, None, 0)
    torch.library.opcheck(ops.attention.default, arguments, test_utils=TESTS)


def test_ops_on_buffers_agree_with_ops_on_their_parts():
    key, value = buffers()
    q = torch.randn(2, 4, 3, 16)
    rest = (None, 0.25, 2, 0.0, None, None, None, None, 0)
    (k, kl), (v, vl) = flat(key), flat(value)
    assert torch.equal(ops.kv_attention(q, key, value, *rest), ops.attention(q, k, kl, v, vl, *rest))


def test_buffer_ops_refuse_plain_tensors():
    x = torch.zeros(1, 2, 3, 16)
    with pytest.raises(TypeError, match="take a GSRQTensor"):
        ops.kv_append_pair_(x, x, x, x, torch.arange(3), False)
    key, value = buffers()
    with pytest.raises(TypeError, match="value is a plain tensor"):
        ops.kv_attention(
            torch.zeros(2, 2, 1, 16), key, value.dequantize(), None, 0.25, 0, 0.0, None, None, None, None, 0
        )


def test_mismatched_caches_are_refused():
    key, _ = buffers(30)
    _, value = buffers(20)
    q = torch.zeros(2, 2, 1, 16)
    with pytest.raises(ValueError, match="keys hold 30 tokens and the values 20"):
        ops.kv_attention(q, key, value, None, 0.25, 0, 0.0, None, None, None, None, 0)
    key, value = buffers(30)
    with pytest.raises(ValueError, match="must cover the 30 tokens"):
        ops.kv_attention(q, key, value, torch.ones(1, 1, 1, 9), 0.25, 0, 0.0, None, None, None, None, 0)
