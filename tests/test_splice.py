"""A text read elsewhere is appended to a cache: the same codes, moved by whole frames."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.conftest import SMALL, cached, tiny_books, tiny_llama
from tests.families import tiny_model
from torchgsrq import GSRQConfig, new_cache, quantize_kv_
from torchgsrq.cache import GSRQLayer
from torchgsrq.cache.splice import _join
from torchgsrq.codec.rope import rotate
from torchgsrq.measure.evaluate import quantized
from torchgsrq.models import attention_implementation
from torchgsrq.reference import coded_slots

IDS = torch.arange(200)[None] % 80 + 3


@functools.cache
def small_books():
    return tiny_books(tiny_llama())


@given(
    here=st.integers(1, 70),
    there=st.integers(1, 70),
    pads=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    frames=st.integers(0, 5),
    recent=st.sampled_from([0, 8, 20]),
    block=st.sampled_from([1, 4, 16]),
    one=st.booleans(),
    skip=st.integers(0, 6),
)
def test_what_is_joined_decodes_as_before(here, there, pads, frames, recent, block, one, skip):
    """Codes of the piece are the same bytes and decode to what they decoded to, turned; what was exact in either is
    exact still or has become codes, and no more of it than the window cannot hold."""
    config = dataclasses.replace(SMALL, recent_tokens=recent, block_tokens=block)
    books = small_books()
    g = torch.Generator().manual_seed(0)
    layers = [GSRQLayer(books[0], config) for _ in range(2)]
    pads = [min(p, n - 1) for p, n in zip(pads, (here, there), strict=True)]
    for layer, n, pad, rows in zip(layers, (here, there), pads, (2, 1 if one else 2), strict=True):
        layer.set_row_start(torch.tensor([[0, 0], [pad, pad]][:rows], dtype=torch.int32))
        layer.update(*torch.randn(2, rows, 2, n, 32, generator=g))
    was, piece = (x.keys.dequantize() for x in layers)
    a, b = (x.keys for x in layers)
    skip = min(skip, there - 1)
    left = there - skip
    codes, old, held = (
        [x.clone() for x in b.codes],
        a.encoded.clone(),
        (b.encoded - skip).clamp(min=0).expand(2),
    )
    layers[0].reserve(here + left)
    shift = torch.where(torch.arange(left) < held[:, None], 32 * frames, 37)
    moved = torch.arange(skip, there) - b.start[:, :1].expand(2, -1) + shift
    after = torch.full((2, layers[0].keys.shape[2] - here - left), 900)
    positions = torch.cat((torch.arange(here) - a.start[:, :1], moved, after), 1)
    layers[0].set_row_start(torch.cat((a.start[:, :2], positions), 1).int())
    a = layers[0].keys
    _join(a, b, here, skip, shift)
    got = a.dequantize()[:, :, : here + left]
    turned = rotate(piece[:, :, skip:there], shift[:, None], a.inv_freq, False)
    due = coded_slots(a.start[:, 1], here + left, recent, block)
    for row in range(2):
        coded, same = int(a.encoded[row]), int(held[row])
        assert coded == max(int(due[row]), here + same if same else int(old[row]))
        for now, then in zip(a.codes, codes, strict=True):
            assert torch.equal(now[row, :, here : here + same], then[row % len(then), :, skip : skip + same])
        first = slice(0, int(old[row]))
        torch.testing.assert_close(got[row, :, first], was[row, :, first], rtol=1e-4, atol=1e-4)
        fresh = slice(max(coded, here + same), here + left)
        torch.testing.assert_close(got[row, :, fresh], turned[row, :, fresh.start - here :], rtol=1e-4, atol=1e-4)
        begin = int(b.start[row % len(b.encoded), 1]) - skip
        plain = [s for s in range(same) if not begin <= s < begin + config.sink_tokens]  # sinks were exact there
        torch.testing.assert_close(got[row][:, [here + s for s in plain]], turned[row][:, plain], rtol=1e-4, atol=1e-4)


def read(model, ids, at=0, **arguments):
    """A cache that has read ids from a position on."""
    cache = new_cache(model, **arguments)
    positions = torch.arange(at, at + ids.shape[1])[None]
    model(ids, **cached(cache), position_ids=positions, use_cache=True)
    return cache


def plain(cache, model):
    """The same tokens, decoded, in transformers' own cache."""
    twin = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        held = int(layer.keys.length)
        twin.update(layer.keys.dequantize()[:, :, :held], layer.values.dequantize()[:, :, :held], i)
    return twin


@pytest.mark.parametrize(("here", "there", "origin"), [(70, 60, 0), (64, 9, 0), (5, 60, 5), (37, 60, 5), (0, 60, 0)])
@pytest.mark.parametrize("fixed", [None, 192])
@torch.no_grad()
def test_a_piece_is_as_if_read_there(llama, here, there, origin, fixed):
    """Its codes are those of reading it whole frames away, its window is that of reading it where it follows; and the
    model goes on from it."""
    model, books = llama
    ids, doc, rest = IDS[:, :here], IDS[:, here : here + there], IDS[:, 140:160]
    with quantized(model, SMALL, books):
        cache = read(model, ids, max_cache_len=fixed) if here else new_cache(model, fixed)
        piece = read(model, doc, origin)
        cache.splice(piece, skip=0)
        at = (here - origin) // 32 * 32 + origin
        by_frames, there_itself = read(model, doc, at), read(model, doc, here)
        assert cache.get_seq_length() == here + there and piece.get_seq_length() == there
        for layer, moved, want in zip(cache.layers, by_frames.layers, there_itself.layers, strict=True):
            ours, theirs = int(layer.keys.encoded) - here, int(want.keys.encoded)
            there_too = moved.keys.packed.coded(0, theirs)
            for one, other in zip(layer.keys.packed.coded(here, here + theirs), there_too, strict=True):
                assert not theirs or (one == other).float().mean() > 0.95  # sines round differently at other positions
            exact = slice(max(ours, theirs), there)
            got = layer.keys.dequantize()[:, :, here : here + there]
            torch.testing.assert_close(got[:, :, exact], want.keys.dequantize()[:, :, exact], rtol=1e-3, atol=1e-3)
        for i in range(12):
            twin = plain(cache, model)
            got = model(rest[:, i : i + 1], **cached(cache), use_cache=True).logits
            for k, layer in enumerate(cache.layers):  # a block may have become codes before it was read
                past = twin.layers[k].keys.shape[2]
                twin.layers[k].keys, twin.layers[k].values = (
                    x.dequantize()[:, :, :past] for x in (layer.keys, layer.values)
                )
            at = torch.tensor([[here + there + i]])
            with attention_implementation(model, "sdpa"):
                want = model(rest[:, i : i + 1], **cached(twin), position_ids=at, use_cache=True).logits
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_generate_goes_on_from_a_library(llama):
    """A prompt of a system text, a document that was read alone, and a question, in a padded batch; saved and loaded."""
    model, books = llama
    head, doc, question = IDS[:, :40], IDS[:, 40:100], IDS[:, 100:110]
    batch = torch.cat((head, head)).clone()
    mask = torch.ones(2, 110, dtype=torch.long)
    mask[1, :12] = 0
    batch[1, :12] = 0
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with quantized(model, SMALL, books):
        piece = read(model, torch.cat((head[:, :2], doc), 1))
        cache = new_cache(model)
        positions = (mask[:, :40].cumsum(1) - 1).clamp(min=0)
        model(batch, attention_mask=mask[:, :40], position_ids=positions, **cached(cache), use_cache=True)
        cache.splice(piece, skip=2)
        again = new_cache(model)
        again.loads(cache.dumps())
        ids = torch.cat((batch, doc.expand(2, -1), question.expand(2, -1)), 1)
        got, same = (model.generate(ids, attention_mask=mask, **cached(x), **settings) for x in (cache, again))
        assert torch.equal(got, same)
        alone = new_cache(model)
        model(head[:, 12:], **cached(alone), use_cache=True)
        alone.splice(piece, skip=2)
        row = torch.cat((head[:, 12:], doc, question), 1)
        assert torch.equal(model.generate(row, **cached(alone), **settings)[0, -8:], got[1, -8:])
        alone.crop(-20)
        assert alone.get_seq_length() == 28 + 60 + 10 + 7 - 20


@torch.no_grad()
def test_refusals_change_nothing(llama):
    model, books = llama
    with quantized(model, SMALL, tiny_books(model, seed=1)):
        cache_of_others = new_cache(model)
    with quantized(model, SMALL, books):
        cache, piece = read(model, IDS[:, :20], max_cache_len=64), read(model, IDS[:, :60])
        before = [layer.keys.dequantize() for layer in cache.layers]
        with pytest.raises(ValueError, match="80 tokens do not fit a capacity of 64"):
            cache.splice(piece, skip=0)
        other = read(model, IDS[:, :20].expand(3, -1))
        with pytest.raises(ValueError, match="the piece has 3 rows, this cache 1"):
            cache.splice(other, skip=0)
        with pytest.raises(ValueError, match="skip=61; it must lie between 0 and the piece's 60 tokens"):
            cache.splice(piece, skip=61)
        assert all(torch.equal(a, x.keys.dequantize()) for a, x in zip(before, cache.layers, strict=True))
    with quantized(model, dataclasses.replace(SMALL, recent_tokens=12), books):
        with pytest.raises(ValueError, match="recent_tokens=8, this cache 12"):
            new_cache(model).splice(piece, skip=0)
        with pytest.raises(ValueError, match="other codebooks"):
            new_cache(model).splice(cache_of_others, skip=0)


@torch.no_grad()
def test_models_that_decode_their_cache():
    """MLA: keys are a latent without RoPE, values what RoPE turns."""
    model = tiny_model("deepseek_v3")
    config = dataclasses.replace(SMALL, allocation="uniform")
    ids, doc = IDS[:, :40], IDS[:, 40:100]
    with quantized(model, config, tiny_books(model, config)):
        cache, piece, there = read(model, ids), read(model, doc), read(model, doc, 32)
        cache.splice(piece, skip=0)
        for layer, want in zip(cache.layers, there.layers, strict=True):
            for ours, theirs in ((layer.keys, want.keys), (layer.values, want.values)):
                coded = slice(2, int(theirs.encoded))  # after the sinks
                got = ours.dequantize()[:, :, 40:100][:, :, coded]
                apart = (got - theirs.dequantize()[:, :, coded]).abs().amax(-1) > 1e-2 * got.abs().amax()
                assert apart.float().mean() < 0.05  # a code on the other side of a tie


@torch.no_grad()
def test_frequencies_of_the_piece_are_taken_over():
    """Dynamic NTK: a piece of many tokens has other frequencies than the model's codebooks."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_llama(max_position_embeddings=64, rope_parameters=rope)
    with quantized(model, SMALL, tiny_books(model)):
        piece = read(model, IDS[:, :150])
        cache, short = new_cache(model), read(model, IDS[:, :20])
        cache.splice(piece, skip=0)
        a, b = (x.layers[1].keys for x in (cache, piece))
        assert cache.layers[1].batch_size == 1
        assert torch.equal(a.inv_freq, b.inv_freq) and not torch.equal(a.inv_freq, short.layers[1].keys.inv_freq)
        torch.testing.assert_close(a.dequantize()[:, :, 2:150], b.dequantize()[:, :, 2:150], rtol=1e-4, atol=1e-4)
        cache.reset()
        cache.splice(short, skip=0)
        assert torch.equal(cache.layers[1].keys.inv_freq, short.layers[1].keys.inv_freq)
        with pytest.raises(ValueError, match="other RoPE frequencies"):
            short.splice(piece, skip=0)


@pytest.mark.parametrize("how", ["crop", "load"])
@torch.no_grad()
def test_a_second_piece_follows_the_first(llama, how):
    """Positions after a splice are known after a crop back to the prompt, and after a file."""
    model, books = llama
    head, one, two = IDS[:, :40], IDS[:, 40:70], IDS[:, 70:130]
    with quantized(model, SMALL, books):
        cache = read(model, head)
        cache.splice(read(model, one), skip=0)
        held = 40 if how == "crop" else 70
        if how == "crop":
            cache.crop(-30)
            assert cache.layers[0].keys.start.shape[1] == 2
        else:
            again = new_cache(model)
            again.loads(cache.dumps())
            cache = again
        fits = read(model, two, held % 32)
        cache.splice(fits, skip=0)
        want = read(model, two, held)
        positions = cache.layers[0].keys.packed.position(held, held + 61)
        assert positions.tolist() == [list(range(held, held + 61))]
        ours, theirs = (x.layers[0].keys.dequantize() for x in (cache, want))
        apart = (ours[:, :, held + 2 : held + 60] - theirs[:, :, 2:60]).abs().amax(-1) > 1e-2
        assert apart.float().mean() < 0.05


@torch.no_grad()
def test_what_is_refused_by_name(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        cache = read(model, IDS[:, :20])
        with pytest.raises(ValueError, match="cannot be appended to itself"):
            cache.splice(cache, skip=0)


REFUSED = {"opt": "positions are not RoPE", "lfm2": "layer 0 is a LinearAttentionLayer, whose keys or states"}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_moved(family):
    model = tiny_model(family)
    quantize_kv_(model, GSRQConfig(bits=1), codebooks=tiny_books(model, GSRQConfig(bits=1)))
    with pytest.raises(ValueError, match=REFUSED[family]):
        new_cache(model).splice(new_cache(model), skip=0)
