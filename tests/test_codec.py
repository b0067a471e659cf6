"""Encode and decode: the contracts of a codec, on any input; codebook files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import make_codec
from torchgsrq import Codebooks
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.layout import Layout
from torchgsrq.codec.rope import rotate
from torchgsrq.reference import codeword_sum, decode, encode, search_group

pytestmark = pytest.mark.core

LAYOUTS = {
    "whole": Layout(16, 1, 3),
    "groups": Layout(16, 2, 4),
    "ragged": Layout(16, 4, 6),
    "one stage": Layout(16, 4, 4),
    "odd": Layout(12, 3, 7),
}
CODECS = {
    **{name: make_codec(2, layout=layout) for name, layout in LAYOUTS.items()},
    "no frames": make_codec(2, pairs=0),
    "frame of 1": make_codec(2, frame=1),
    "partial, interleaved": make_codec(2, pairs=3, interleaved=True),
    "score-aware": make_codec(2, eta=8),
}
SCALES = st.sampled_from([1.0, 1e-3, 1e3, 1e-30, 1e12, 0.0])


def vectors(codec, batch=2, n=9, seed=0, scale=1.0):
    x = torch.randn(batch, codec.heads, n, codec.head_dim, generator=torch.Generator().manual_seed(seed))
    return x * scale


def positions(batch, n, first=0):
    return (torch.arange(n) + first).expand(batch, -1)


def metric(x, codec, position):
    """Squared length in the codec's metric."""
    back = (position.remainder(codec.frame) - position)[:, None]
    y = rotate(x, back, codec.inv_freq, codec.interleaved) @ codec.transform.transpose(1, 2)
    return y.square().sum(-1)


@pytest.mark.parametrize("name", CODECS)
@given(seed=st.integers(0, 99), first=st.sampled_from([-5, 0, 7, 1000, 30000]), scale=SCALES)
def test_codes_do_not_depend_on_batch_or_chunk(name, seed, first, scale):
    codec = CODECS[name]
    x, at = vectors(codec, 3, 11, seed, scale), positions(3, 11, first)
    codes = encode(x, at, codec)
    assert codes.dtype == torch.uint8 and codes.shape == (3, 2, 11, codec.layout.codes)
    assert torch.equal(encode(x, at, codec), codes)
    rows = torch.tensor([2, 0])
    assert torch.equal(encode(x[rows], at[rows], codec), codes[rows])
    split = [encode(c, p, codec) for c, p in zip(x.split([1, 4, 6], 2), at.split([1, 4, 6], 1), strict=True)]
    assert torch.equal(torch.cat(split, 2), codes)
    assert torch.equal(decode(codes[:, :, 3:5], at[:, 3:5], codec), decode(codes, at, codec)[:, :, 3:5])


def search(y, codec, eta, steps):
    """What `search_group` finds for vectors of one group, and what that leaves."""
    codes = search_group(y, codec.codebook, eta, steps).long()
    words = (codec.codebook[:, s].float().gather(1, codes[..., s, None].expand_as(y)) for s in range(codes.shape[-1]))
    return codes, y - sum(words)


@given(seed=st.integers(0, 99), scale=SCALES, eta=st.sampled_from([1, 2, 8, 100]))
def test_a_stage_visited_again_never_raises_the_loss(seed, scale, eta):
    """The loss is at most that of fewer steps; and errors are smaller along the vector than without eta, as scores want it."""
    codec = make_codec(2, layout=Layout(8, 1, 5), pairs=0)
    y = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(seed)) * scale
    norm = y.norm(dim=-1, keepdim=True)
    unit = y / norm.masked_fill(norm == 0, 1)  # the squares of the smallest vectors are zeros
    last = None
    for steps in range(5, 15):
        error = search(y, codec, eta, steps)[1]
        loss = error.square().sum(-1) + (eta - 1) * (error * unit).sum(-1).square()
        assert last is None or (loss <= last * (1 + 1e-3) + 1e-6 * (1 + scale**2)).all()
        last = loss
    if scale == 1 and eta > 1:
        along = [(search(y, codec, x, 15)[1] * unit).sum(-1).square().mean() for x in (eta, 1)]
        assert along[0] < along[1]


@given(seed=st.integers(0, 99), scale=SCALES, kind=st.sampled_from(["random", "constant", "outlier"]))
def test_another_stage_never_hurts_greedy(seed, scale, kind):
    """Stages after the first keep a zero codeword; k-means alone does not give this."""
    y = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(seed)) * scale
    if kind == "constant":
        y = torch.full_like(y, scale)
    if kind == "outlier":
        y[..., 3] = 1e4 * scale
    codec = make_codec(2, layout=Layout(8, 1, 5), pairs=0)
    assert not codec.codebook[:, 1:, 0].any()
    last = None
    for stages in range(1, 6):
        tables = codec.codebook[:, :stages].float()
        codes = search_group(y, tables).long()
        back = sum(tables[:, s].gather(1, codes[..., s, None].expand(-1, -1, 8)) for s in range(stages))
        error = (y - back).square().sum(-1)
        if last is not None:
            assert (error <= last * (1 + 1e-5) + 1e-12).all()
        last = error


@pytest.mark.parametrize("name", CODECS)
def test_codewords_come_back(name):
    """A vector that is a sum of codewords is coded without error, wherever it is."""
    codec = CODECS[name]
    codes = torch.randint(0, 256, (1, 2, 6, codec.layout.codes), generator=torch.Generator().manual_seed(0))
    if codec.layout.stages > 1:  # only the first stage, so that greedy search finds it
        codes[..., codec.layout.groups :] = 0
    codes = codes.to(torch.uint8)
    at = positions(1, 6, 40)
    x = decode(codes, at, codec)
    torch.testing.assert_close(decode(encode(x, at, codec), at, codec), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CODECS)
def test_decode_is_what_the_codec_says(name):
    """Against the formula, one vector at a time: R(start) (R(place) mean + inverse sum of codewords)."""
    codec = CODECS[name]
    codes = torch.randint(0, 256, (1, 2, 5, codec.layout.codes), generator=torch.Generator().manual_seed(1)).byte()
    at = positions(1, 5, 30)
    got = decode(codes, at, codec)
    for h in range(2):
        for t in range(5):
            y = torch.zeros(codec.head_dim)
            for m in range(codec.layout.codes):
                start = codec.layout.start(m)
                y[start : start + codec.layout.width] += codec.codebook[h, m, int(codes[0, h, t, m])]
            place = int(at[0, t]) % codec.frame
            mean = rotate(codec.mean[h], torch.tensor(place), codec.inv_freq, codec.interleaved)
            x = mean + codec.inverse[h] @ y
            want = rotate(x, at[0, t] - place, codec.inv_freq, codec.interleaved)
            torch.testing.assert_close(got[0, h, t], want, rtol=1e-4, atol=1e-4)


def test_keys_are_coded_alike_at_any_frame():
    """The same key at the same place of another frame has the same codes: R(-start) is taken off before coding."""
    codec = make_codec(2, frame=16)
    raw = vectors(codec, 1, 16)
    codes = []
    for start in (0, 16 * 7, 16 * 2000):
        at = positions(1, 16, start)
        x = rotate(raw, at[:, None], codec.inv_freq)
        codes.append(encode(x, at, codec))
    assert torch.equal(codes[0], codes[1])
    assert (codes[0] == codes[2]).float().mean() > 0.97


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_transformers_rope(interleaved):
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved_rope
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split_rope

    inv_freq = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    x, at = torch.randn(1, 2, 5, 16), torch.arange(5)[None] + 11
    angle = at[..., None] * inv_freq
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    theirs = (interleaved_rope if interleaved else half_split_rope)(x, x, cos, sin)[0]
    torch.testing.assert_close(rotate(x, at[:, None], inv_freq, interleaved), theirs, rtol=1e-5, atol=1e-5)
    back = rotate(rotate(x, at[:, None], inv_freq, interleaved), -at[:, None], inv_freq, interleaved)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_code():
    table = torch.zeros(1, 1, 256, 4)
    table[0, 0, 7], table[0, 0, 200] = 1.0, 1.0
    assert int(search_group(torch.ones(1, 32, 4), table)[0, 0, 0]) == 7
    assert int(search_group(torch.zeros(1, 32, 4), table)[0, 0, 0]) == 0


def books() -> Codebooks:
    layers = {
        0: (make_codec(2), make_codec(2, pairs=0)),
        3: (make_codec(2, interleaved=True, pairs=3, seed=5), make_codec(2, pairs=0, seed=6)),
    }
    layers = {i: LayerCodec(*map(Codecs.of, pair)) for i, pair in layers.items()}
    return Codebooks(layers, {"model": "abc", "config": {"bits": 2.0}, "source": "data", "tokens": 5})


def test_files_are_exact(tmp_path):
    was = books()
    was.save(tmp_path / "b.safetensors")
    got = Codebooks.load(tmp_path / "b.safetensors")
    assert list(got) == [0, 3] and got.metadata == was.metadata
    for i in got:
        for a, b in zip(got[i], was[i], strict=True):
            assert a.integers == b.integers and a.first.layout == b.first.layout
            assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]
    with pytest.raises(KeyError, match="no codebooks for layer 1"):
        got[1]


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(FileNotFoundError, match="no codebook file"):
        Codebooks.load(path)
    books().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole codebook file"):
        Codebooks.load(path)
    path.write_bytes(b"hello, this is text")
    with pytest.raises(ValueError, match="not a whole codebook file"):
        Codebooks.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a torchgsrq codebook file"):
        Codebooks.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**meta, "version": "99"})
    with pytest.raises(ValueError, match="format version 99; this torchgsrq reads 6: calibrate again"):
        Codebooks.load(path)
    facts = json.loads(meta["codecs"])
    facts["0.key"]["heads"] = [[0]]
    save_file(tensors, path, {**meta, "codecs": json.dumps(facts)})
    with pytest.raises(ValueError, match=r"tables of 0\.key do not fit"):
        Codebooks.load(path)


def test_codeword_sum_reads_every_layout_alike():
    """A grouped codebook and the whole-head one that embeds it mean the same vectors."""
    codec = CODECS["groups"]
    wide = torch.zeros(2, 4, 256, 16)
    for m in range(4):
        start = codec.layout.start(m)
        wide[:, m, :, start : start + codec.layout.width] = codec.codebook[:, m]
    whole = codec.replaced(codebook=wide)
    codes = torch.randint(0, 256, (2, 2, 7, 4)).byte()
    torch.testing.assert_close(codeword_sum(codes, whole), codeword_sum(codes, codec))
