"""Calibration: what is collected, what is trained, where the text comes from, the disk cache."""

from __future__ import annotations

import dataclasses
import logging
import sys

import pytest
import torch

from tests.conftest import SMALL, Words, tiny_books, tiny_llama
from torchgsrq import Codebooks, GSRQConfig, calibrate, dequantize_kv_, quantize_kv_
from torchgsrq.codec import Codec
from torchgsrq.codec.kmeans import train_codebook
from torchgsrq.codec.layout import Layout
from torchgsrq.codec.rope import rotate
from torchgsrq.learning import text
from torchgsrq.learning.train import _balanced, train
from torchgsrq.models import inspect_layers
from torchgsrq.reference import decode, encode

module = sys.modules["torchgsrq.learning.calibrate"]
TOKENS = torch.randint(3, 100, (512,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def stats(model):
    return module.collect_statistics(model, inspect_layers(model), TOKENS.view(4, 128))


def test_statistics_are_the_formulas(model, stats):
    """Against a plain loop over far query-key pairs of one head of one window."""
    seen = {}

    def observer(layer, q, k, v, scaling, **_):
        seen[layer.layer_idx] = (q, k, v, scaling)

    from torchgsrq.models import observed, quick_products

    with torch.no_grad(), quick_products(model), observed(model, observer):
        model.base_model(TOKENS[None, 128:256], use_cache=False)
    q, k, v, scaling = *(x.float() for x in seen[1][:3]), seen[1][3]
    got = stats[1]
    info = got.info
    k_weight, v_weight = torch.zeros(128), torch.zeros(128)
    for head in (2, 3):  # the query heads of KV head 1
        for t in range(3, 128, 4):
            p = (q[0, head, t] @ k[0, 1, : t + 1].T * scaling).softmax(-1)
            o = p @ v[0, 1, : t + 1]
            for s in range(1, t - 31):
                k_weight[s] += p[s] ** 2 * (v[0, 1, s] - o).square().sum()
                v_weight[s] += p[s] ** 2
    torch.testing.assert_close(got.keys.weight[1][1], k_weight, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(got.values.weight[1][1], v_weight, rtol=1e-3, atol=1e-7)
    raw = rotate(k[0], -torch.arange(128), info.inv_freq)
    torch.testing.assert_close(got.keys.x[1], raw)
    assert len(got.keys.x) == 4 and torch.equal(got.keys.places[1].diff(), torch.ones(2, 127, dtype=torch.long))
    assert all(bool((count == 1).all()) for count in got.keys.count)


def test_the_codec_codes_what_it_was_trained_on(model, stats):
    """In sample, more codes mean less weighted error, and far less than the mean alone."""
    k = torch.stack([rotate(x, torch.arange(128), stats[0].info.inv_freq) for x in stats[0].keys.x])
    at = torch.arange(128).expand(4, -1)
    errors = []
    for bits in (0.5, 1, 2):
        codec = train(stats[0], [(SMALL, [(bits, bits)] * 2)], 512)[0].key.first
        back = decode(encode(k, at, codec), at, codec)
        root = codec.transform.mT @ codec.transform  # a metric of which each rate has a scale and directions of its own
        errors.append(
            float(torch.einsum("bhnd,hde,bhne->", back - k, root / root.norm(dim=(1, 2), keepdim=True), back - k))
        )
    assert errors[0] > errors[1] > errors[2]
    centered = rotate(torch.stack(stats[0].keys.x) - codec.mean[:, None], at[:, None], stats[0].info.inv_freq)
    whole = torch.einsum("bhnd,hde,bhne->", centered, root / root.norm(dim=(1, 2), keepdim=True), centered)
    assert errors[2] < 0.5 * float(whole)


@pytest.mark.parametrize(("recipe", "group_size"), [("gsrq", 8), ("gsrq", 32), ("gsrq-paper", 32)])
def test_every_recipe_quantizes(model, recipe, group_size):
    config = dataclasses.replace(SMALL, recipe=recipe, group_size=group_size, prefill="quantized")
    books = tiny_books(model, config)
    assert len(books) == 2 and books.metadata["config"]["recipe"] == recipe
    assert books.bits == 1
    quantize_kv_(model, config, codebooks=books)
    try:
        with torch.no_grad():
            assert model(TOKENS[None, :64], use_cache=True).logits.isfinite().all()
    finally:
        dequantize_kv_(model)


def test_recipes_are_what_they_say(model):
    default = tiny_books(model)[0].key
    assert default.frame == 32 and default.first.eta == 8 and default.first.mean.abs().max() > 0
    paper = tiny_books(model, dataclasses.replace(SMALL, recipe="gsrq-paper", group_size=32))[0].key.first
    assert paper.frame == 1 and paper.eta == 1 and not paper.mean.any() and paper.layout == Layout(32, 1, 4)
    assert torch.equal(paper.transform, torch.eye(32).expand(2, -1, -1))


def test_stages_are_nested_and_keep_a_zero():
    y = torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(0))
    w = torch.ones(2, 400)
    many, few = (train_codebook(y, w, Layout(8, 2, n), iterations=2) for n in (5, 3))
    assert torch.equal(many[:, :2], few[:, :2])
    assert not many[:, 2:, 0].any() and many[:, :2, 0].abs().sum() > 0
    assert torch.equal(many, many.half().float())


def test_same_seed_same_codebooks(model):
    a, b, c = (tiny_books(model, seed=s) for s in (0, 0, 1))
    assert a.digest == b.digest != c.digest


def test_passes_over_the_data_change_nothing(model):
    """Little memory means several passes, one layer at a time, and the same codebooks."""
    one = calibrate(model, SMALL, TOKENS, tokens=512, progress=False)
    two = calibrate(model, SMALL, TOKENS, tokens=512, progress=False, max_memory=1)
    assert one.digest == two.digest


@pytest.mark.parametrize(
    "data",
    [TOKENS, TOKENS.view(4, 128), list(TOKENS.split(100)), [{"input_ids": TOKENS[None]}], [TOKENS.tolist()]],
    ids=["tensor", "rows", "list of tensors", "batch", "lists of ids"],
)
def test_kinds_of_data(model, data):
    assert torch.equal(text.token_stream(model, data, 512), TOKENS)


def test_padding_is_no_data(model):
    mask = torch.ones(4, 128, dtype=torch.long)
    mask[:, :28] = 0
    got = text.token_stream(model, [{"input_ids": TOKENS.view(4, 128), "attention_mask": mask}], 512)
    assert torch.equal(got, TOKENS.view(4, 128)[:, 28:].flatten())


def test_strings_need_a_tokenizer(model):
    def tokenizer(text, **_):
        return type("Out", (), {"input_ids": torch.tensor([[ord(c) % 100 for c in text]])})

    got = text.token_stream(model, ["abc" * 100], 256, tokenizer)
    assert got.shape == (256,) and got[:3].tolist() == [97, 98, 99]
    with pytest.raises(ValueError, match="data holds 3 tokens; calibration needs at least 128"):
        text.token_stream(model, ["abc"], 512, tokenizer)


def test_the_model_writes_its_own_text(model, caplog):
    with caplog.at_level(logging.INFO, "torchgsrq"):
        a = text.own_text(model, 256, 64, seed=0)
    b = text.own_text(model, 256, 64, seed=0)
    assert a.shape == (4, 64) and torch.equal(a, b) and a.unique().numel() > 20
    assert not torch.equal(a, text.own_text(model, 256, 64, seed=1))


@torch.no_grad()
def test_what_data_lacks_the_model_writes(model, caplog, monkeypatch):
    """Little data is read first, own text fills up what is asked for; a model that cannot write learns from little."""
    monkeypatch.setattr(module, "WINDOW", 128)
    with caplog.at_level(logging.INFO, "torchgsrq"):
        windows, source = module.calibration_windows(model, [TOKENS[:200]], None, 512, 0)
    assert "data holds 200 of 512 tokens; the model writes the other 312 itself" in caplog.text
    assert source == "200 tokens of data, and text the model wrote itself"
    assert windows.shape == (4 + 2, 128)
    own = text.own_text(model, 312, 32, seed=0).flatten()[:312]
    assert torch.equal(windows[:4].flatten(), torch.cat((TOKENS[:200], own)))

    monkeypatch.setattr(model, "generate", None)
    windows, source = module.calibration_windows(model, [TOKENS[:200]], None, 512, 0)
    assert "calibrating on 200 tokens, where 512 are better: LlamaForCausalLM could not write" in caplog.text
    assert source == "data" and torch.equal(windows, TOKENS[None, :128])
    with pytest.raises(ValueError, match="tokens=100; calibration needs at least 128, better 32768"):
        calibrate(model, SMALL, TOKENS, tokens=100)


@torch.no_grad()
def test_how_much_is_read_by_default(model, monkeypatch):
    """Of much data more than the model would write; of little, as much as it would."""
    monkeypatch.setattr(module, "WINDOW", 128)
    monkeypatch.setattr(module, "TOKENS", 384)
    monkeypatch.setattr(module, "OWN_TOKENS", 256)
    for given, read, source in (
        (512, 384, "data"),
        (300, 256, "data"),  # whole windows
        (150, 256, "150 tokens of data, and text the model wrote itself"),
    ):
        windows, said = module.calibration_windows(model, [TOKENS[:given]], None, None, 0)
        assert said == source and torch.equal(windows.flatten()[: min(given, read)], TOKENS[: min(given, read)])
        assert windows.numel() == read + read // 2 // 128 * 128
    windows, said = module.calibration_windows(model, None, None, None, 0)
    assert said == "text the model wrote itself" and windows.numel() == 256 + 128


def test_recall_windows(model):
    """Half of a window twice, and lists that come twice, in two orders; half as many as there are windows."""
    words = Words()
    for size in (128, 256):
        windows = torch.randint(3, 100, (6, size), generator=torch.Generator().manual_seed(0))
        made = text.recall_windows(windows, words, seed=0)
        assert made.shape == (3, size) and torch.equal(made, text.recall_windows(windows, words, seed=0))
        for window, source in zip(made[:2], windows[-2:], strict=True):
            assert torch.equal(window, source[: size // 2].repeat(2))
        lines = words.decode(made[2]).split("\n")
        assert len(set(lines[:-1])) < len(lines) - 2, "most lines come twice"
        assert all(len(line.split(": ")[1]) == 5 for line in lines[:2])
        alone = text.recall_windows(windows, None, seed=0)
        assert torch.equal(alone, windows[3:, : size // 2].repeat(1, 2))
    assert text.recall_windows(windows[:1], words, seed=0).shape == (0, 256)
    words.decode = lambda ids: "?"  # a vocabulary without words
    assert torch.equal(text.recall_windows(windows, words, seed=0), alone)
    data = torch.randint(3, 100, (512,))
    windows, source = module.calibration_windows(model, data, None, 512, 0)
    assert windows.shape == (1, 512) and source == "data"


def test_disk_cache(model, tmp_path, monkeypatch, caplog):
    """The first use calibrates, on text of its own, and says so; the second reads the file."""
    monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "OWN_TOKENS", 512)
    with caplog.at_level(logging.INFO, "torchgsrq"):
        quantize_kv_(model, SMALL, progress=False)
        dequantize_kv_(model)
        files = list(tmp_path.glob("*.safetensors"))
        assert len(files) == 1
        assert "text that the model wrote itself; real text" in caplog.text
        caplog.clear()
        quantize_kv_(model, dataclasses.replace(SMALL, recent_tokens=16), progress=False)
        assert "codebooks cached at" in caplog.text and "wrote itself" not in caplog.text
        assert "LlamaForCausalLM, 1 bits per element of quantized layers\n  layers 0-1: quantized, 2" in caplog.text
        assert "2 heads of 32, RoPE half-split, frames of 1024; keys " in caplog.text
        dequantize_kv_(model)
    path = str(files[0])
    quantize_kv_(model, SMALL, codebooks=path)
    assert model._gsrq.codebooks.metadata == Codebooks.load(path).metadata
    dequantize_kv_(model)


def test_balanced_spreads_variance():
    g = torch.Generator().manual_seed(0)
    y = torch.randn(1, 2000, 8, generator=g) * torch.tensor([8.0, 6, 4, 3, 2, 1, 0.5, 0.1])
    directions = _balanced(y, torch.ones(1, 2000), Layout(8, 2, 2))
    torch.testing.assert_close(directions[0] @ directions[0].T, torch.eye(8), atol=1e-5, rtol=0)
    variance = (y @ directions.transpose(1, 2))[0].var(0)
    assert variance[:4].prod() / variance[4:].prod() < 4


def test_codec_build_inverts_its_transform():
    a = torch.randn(2, 8, 8) + 3 * torch.eye(8)
    codec = Codec.build(torch.zeros(2, 8), a, torch.zeros(2, 1, 256, 8))
    torch.testing.assert_close(codec.inverse @ a, torch.eye(8).expand(2, -1, -1), atol=1e-4, rtol=1e-4)


def test_config_only_what_calibration_needs_decides_the_file():
    assert GSRQConfig(recent_tokens=1).codec_key() == GSRQConfig().codec_key()
