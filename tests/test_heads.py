"""Heads with layouts of their own: each is coded, kept and read as if it were alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SMALL, cached, make_codec, tiny_books, tiny_llama
from torchgsrq import Codebooks, GSRQConfig, GSRQTensor, dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.layout import Layout
from torchgsrq.ops import round_trip

ops = torch.ops.torchgsrq
LAYOUTS = ((Layout(16, 1, 3), Layout(16, 2, 2)), (Layout(16, 2, 4), Layout(16, 4, 4)), (Layout(16, 1, 3),) * 2)
CONFIG = GSRQConfig(sink_tokens=2, recent_tokens=8, block_tokens=4)


def heads_alone(which):
    """Key and value codecs of one head each, with these of the layouts."""
    keys = [make_codec(1, layout=LAYOUTS[x][0], seed=i, eta=4) for i, x in enumerate(which)]
    values = [make_codec(1, layout=LAYOUTS[x][1], seed=i + 9, pairs=0) for i, x in enumerate(which)]
    return keys, values


WHICH = st.lists(st.sampled_from(range(len(LAYOUTS))), min_size=1, max_size=5)


@given(which=WHICH)
def test_a_layer_of_heads_and_its_parts(which):
    alone = heads_alone(which)
    layer = LayerCodec.of_heads(*alone)
    assert [heads for heads, _ in layer.key.parts] == [heads for heads, _ in layer.value.parts]
    for side, some in zip(layer, alone, strict=True):
        assert side.heads == len(which) and side.head_bits == [c.bits for c in some]
        assert side.bits == pytest.approx(sum(side.head_bits) / len(which))
        again = Codecs.from_flat(side.tensors, side.integers)
        assert [heads for heads, _ in again.parts] == [heads for heads, _ in side.parts]
        assert len(side.parts) == len(set(which))
        for one, head in zip(some, again.by_head(), strict=True):
            assert head.layout == one.layout and all(map(torch.equal, head.tensors, one.tensors))


@given(which=WHICH)
def test_what_is_made_part_by_part_comes_in_the_order_of_heads(which):
    side = LayerCodec.of_heads(*heads_alone(which)).key
    made = [torch.tensor(heads)[None, :, None].float() for heads, _ in side.parts]
    assert side.merged(made).flatten().tolist() == list(range(len(which)))


@given(which=WHICH, n=st.integers(1, 40), first=st.sampled_from([0, 1000]), seed=st.integers(0, 9))
def test_heads_are_coded_as_if_alone(which, n, first, seed):
    keys, values = heads_alone(which)
    x = torch.randn(2, len(which), n, 16, generator=torch.Generator().manual_seed(seed))
    at = torch.arange(first, first + n).expand(2, -1)
    for side, codecs in zip((keys, values), LayerCodec.of_heads(keys, values), strict=True):
        got = round_trip(x, at, codecs)
        for h, one in enumerate(side):
            alone = ops.encode(x[:, h : h + 1], at, one.tensors, one.integers)
            want = ops.decode(alone, at, one.tensors, one.integers, torch.float32)
            assert torch.equal(got[:, h : h + 1], want)


@given(
    which=WHICH,
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    queries=st.sampled_from([1, 3, 20]),
    pad=st.integers(0, 9),
)
def test_a_buffer_of_heads_lives_as_buffers_of_each(which, chunks, queries, pad):
    """Written in chunks, grown, cropped, copied, cut, and read by attention."""
    keys, values = heads_alone(which)
    g = torch.Generator().manual_seed(len(chunks))
    start = torch.tensor([0, pad])

    def life(key, value, heads):
        pair = [
            GSRQTensor.empty(2, len(heads), 4, 16, codec=codec, config=CONFIG, start=start) for codec in (key, value)
        ]
        g.manual_seed(0)
        length = 0
        for n in [*chunks, 3]:
            x = torch.randn(2, 2, len(which), n, 16, generator=g)[:, :, heads]
            for i, new in enumerate(x):
                pair[i] = pair[i].grown(length + n)
                pair[i].index_copy_(2, torch.arange(length, length + n), new)
            length += n
        for buffer in pair:
            buffer.crop_(length - 1)
        pair = [b.select_rows(torch.tensor([1, 0, 1])).clone()[1:] for b in pair]
        q = torch.randn(2, len(which), 2, queries, 16, generator=g)[:, heads].flatten(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, *pair, enable_gqa=True)
        cut = [b[:, :, : length - 1 - length // 3].dequantize() for b in pair]
        return out.unflatten(1, (len(heads), 2)), torch.stack([b.dequantize() for b in pair], 1), torch.stack(cut, 1)

    together = life(*LayerCodec.of_heads(keys, values), list(range(len(which))))
    for h in range(len(which)):
        out, held, cut = life(keys[h], values[h], [h])
        torch.testing.assert_close(together[0][:, h : h + 1], out, rtol=1e-4, atol=1e-5)
        assert torch.equal(together[1][:, :, h : h + 1], held) and torch.equal(together[2][:, :, h : h + 1], cut)


def test_codes_that_are_not_whole_are_refused():
    key, value = LayerCodec.of_heads(*heads_alone([0, 1]))
    pair = [GSRQTensor.empty(1, 2, 40, 16, codec=c, config=CONFIG) for c in (key, value)]
    for buffer in pair:
        buffer.index_copy_(2, torch.arange(30), torch.randn(1, 2, 30, 16))
    window, start, length, encoded, *codes = pair[0].parts[: pair[0].owned]
    q = torch.randn(1, 2, 1, 16)
    codes[1] = codes[1][..., :-1]
    wrong = GSRQTensor([window, start, length, encoded, *codes, *pair[0].parts[pair[0].owned :]], pair[0].integers)
    with pytest.raises((ValueError, RuntimeError), match="codes have shape"):
        torch.nn.functional.scaled_dot_product_attention(q, wrong, pair[1])


@pytest.fixture(scope="module")
def uneven():
    """A tiny Llama of four KV heads, the codebooks of which have several rates in a layer."""
    model = tiny_llama(num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :32].mul_(8)
            layer.self_attn.o_proj.weight[:, 64:96].mul_(4)
    books = tiny_books(model, dataclasses.replace(SMALL, bits=2))
    assert any(len(layer.key.parts) > 1 for layer in books.layers.values())
    return model, books


def test_codebooks_of_heads_are_saved(uneven, tmp_path):
    _, books = uneven
    books.save(tmp_path / "books.safetensors")
    again = Codebooks.load(tmp_path / "books.safetensors")
    assert again.digest == books.digest and again.describe() == books.describe()
    assert "keys " in books.describe() and ", " in books.describe().splitlines()[1].partition(" bits")[0]


def test_a_file_whose_heads_make_no_sense_is_refused(uneven, tmp_path):
    _, books = uneven
    path = tmp_path / "wrong.safetensors"
    whole = next(i for i in books if len(books[i].key.parts) > 1)
    layer = books[whole]
    apart = LayerCodec(layer.key, LayerCodec.of_heads(*[layer.value.by_head()[:1] * 4] * 2).value)
    Codebooks({**books.layers, whole: apart}, books.metadata).save(path)
    with pytest.raises(ValueError, match=rf"heads of layer {whole} that share a codec"):
        Codebooks.load(path)
    (first, codec), *others = layer.key.parts
    for heads in ((), (-1, *first[1:]), (9, *first[1:]), others[0][0]):
        with pytest.raises(ValueError, match="are not those of a layer and of its codecs"):
            Codecs(((heads, codec), *others))


def test_what_is_not_of_these_heads_is_refused():
    codec = heads_alone([0])[0][0]
    with pytest.raises(ValueError, match=r"expected .*heads=1"):
        ops.encode(torch.randn(1, 5, 3, 16), torch.arange(3)[None], codec.tensors, codec.integers)


@torch.no_grad()
def test_a_cache_of_heads_is_saved_spliced_and_compiled(uneven, tmp_path):
    model, books = uneven
    ids = torch.randint(3, 100, (2, 70), generator=torch.Generator().manual_seed(3))
    quantize_kv_(model, dataclasses.replace(SMALL, bits=2), codebooks=books)
    try:
        cache = new_cache(model)
        model(ids, **cached(cache))
        want = model(ids[:, :1], **cached(cache)).logits
        cache.save(tmp_path / "cache.safetensors")
        loaded = new_cache(model)
        loaded.load(tmp_path / "cache.safetensors")
        for a, b in zip(cache.layers, loaded.layers, strict=True):
            assert torch.equal(a.keys.dequantize()[:, :, :71], b.keys.dequantize()[:, :, :71])
        pieces = [new_cache(model) for _ in range(2)]
        model(ids[:, :40], **cached(pieces[0]))
        model(ids[:, 40:], **cached(pieces[1]))
        pieces[0].splice(pieces[1], skip=0)
        assert int(pieces[0].get_seq_length()) == 70
        assert all(torch.isfinite(layer.keys.dequantize()).all() for layer in pieces[0].layers)
        growing = [new_cache(model) for _ in range(2)]  # past its capacity, in a graph too
        outputs = []
        for forward, one in zip((model, torch.compile(model, fullgraph=True, backend="eager")), growing, strict=True):
            model(ids.repeat(1, 3), **cached(one))
            outputs.append(forward(ids, **cached(one)).logits)
            assert one.layers[0].keys.shape[2] > 256
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        fixed = [new_cache(model, max_cache_len=96) for _ in range(2)]
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for forward, one in zip((model, step), fixed, strict=True):
            model(ids, **cached(one))
            out = forward(ids[:, :1], **cached(one)).logits
            torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
        new = [new_cache(model) for _ in range(2)]
        read = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for forward, one in zip((model, read), new, strict=True):
            forward(ids, **cached(one))
        for pair in (fixed, new):
            for a, b in zip(*(one.layers for one in pair), strict=True):
                for x, y in ((a.keys, b.keys), (a.values, b.values)):
                    assert all(map(torch.equal, x.codes, y.codes))
    finally:
        dequantize_kv_(model)
