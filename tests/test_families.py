"""Models of every family are quantized and right, or refused by name: the table of docs/models.md."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import families
from tests.conftest import SMALL, cached, tiny_books
from torchgsrq import new_cache, quantize_kv_
from torchgsrq.learning.statistics import collect_statistics
from torchgsrq.measure.evaluate import quantized
from torchgsrq.models import inspect_layers

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
COMMON = {  # what is run most, and one of each kind of cache: quantized layers, of all
    "llama": (4, 4),
    "qwen3": (4, 4),
    "qwen3_moe": (4, 4),
    "mistral": (4, 4),
    "gemma3_text": (2, 4),  # sliding windows
    "gpt_oss": (2, 4),  # and sink logits
    "qwen3_next": (2, 4),  # linear attention
    "nemotron_h": (1, 4),  # and layers without attention
    "lfm2": (2, 4),  # convolutions
    "falcon_h1": (4, 4),  # attention and linear attention in one layer
    "zaya": (4, 4),
    "gemma3n_text": (2, 6),  # two layers attend to what others cache
    "gemma4_text": (2, 6),
    "stablelm": (4, 4),
}


@pytest.mark.parametrize("kind", COMMON)
def test_a_family_generates_right(kind):
    found = families.outcome(kind)
    assert not found.refused and not found.unbuilt and not found.wrong, found
    assert (found.quantized, found.layers) == COMMON[kind]


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_linear", "falcon", "hrm_text"])
def test_what_attention_is_not_handed_is_decoded_for_it(kind):
    """MLA, attention outside of transformers' interface, layers used several times: codes in memory, tensors for the
    model."""
    if kind == "kimi_linear" and transformers.__version__.startswith("5.16."):
        pytest.skip("kimi_linear came with transformers 5.17")
    found = families.outcome(kind)
    assert found.decodes and found.quantized and not found.wrong, found
    model = families.tiny_model(kind)
    books = tiny_books(model)
    last = inspect_layers(model)[-1]
    latent = kind in ("deepseek_v3", "kimi_linear")  # cached as keys, and the part that RoPE turns as values
    assert (last.rope == "none") == latent and last.kv_heads == (4 if kind == "hrm_text" else 1)
    with (
        pytest.raises(ValueError, match="prefill='quantized'"),
        quantized(model, dataclasses.replace(SMALL, prefill="quantized"), books),
    ):
        pass
    with pytest.raises(ValueError, match="does not receive what it caches"):
        tiny_books(model, dataclasses.replace(SMALL, allocation="sensitivity"))
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        out = model(families.PROMPT, **cached(cache), use_cache=True).logits
        assert cache.memory().codes and (kind == "kimi_linear") == bool(cache.memory().full_precision_layers)
        out = model(families.PROMPT[:, :1], **cached(cache), use_cache=True).logits
        with pytest.raises((ValueError, RuntimeError), match="gradient"):
            out.sum().backward()


@pytest.mark.parametrize("kind", ["deepseek_v3", "falcon", "llama"])
@torch.no_grad()
def test_a_fixed_cache_without_a_mask(kind):
    """Slots that hold nothing take no part, also where no mask says so."""
    model = families.tiny_model(kind)
    with quantized(model, SMALL, tiny_books(model)):
        out = []
        for cache in (new_cache(model), new_cache(model, 64)):
            model(families.PROMPT[:, :30], **cached(cache), use_cache=True)
            steps = [families.PROMPT[:, i : i + n] for i, n in ((30, 1), (31, 1), (32, 4))]
            out.append(torch.cat([model(x, **cached(cache), use_cache=True).logits for x in steps], 1))
    torch.testing.assert_close(out[0], out[1], atol=1e-4, rtol=1e-4)


def test_one_sliding_window_cannot_be_kept_alone():
    """transformers makes one mask for all of them."""
    model = families.tiny_model("gemma3_text")
    books = tiny_books(model, dataclasses.replace(SMALL, sliding="quantize"))
    config = dataclasses.replace(SMALL, sliding="quantize", skip_layers=(0,))
    with pytest.raises(ValueError, match="layers 0 cannot be kept"), quantized(model, config, books):
        pass


@pytest.mark.parametrize("kind", ["falcon_h1", "qwen3_next"])
@torch.no_grad()
def test_rows_of_linear_attention_go_along(kind):
    model = families.tiny_model(kind)
    with quantized(model, SMALL, tiny_books(model)):
        cache = new_cache(model)
        model(families.PROMPT, **cached(cache), use_cache=True)
        rows = torch.tensor([2, 0, 1])
        twin, third = copy.deepcopy(cache), copy.deepcopy(cache)
        cache.reorder_cache(rows)
        twin.batch_select_indices(rows)
        third.batch_repeat_interleave(2)
        ids = families.PROMPT[:, :1]
        want = model(ids, **cached(cache), use_cache=True).logits
        assert torch.equal(model(ids, **cached(twin), use_cache=True).logits, want)
        got = model(ids[rows].repeat_interleave(2, 0)[:6], **cached(third), use_cache=True).logits
        assert got.shape[0] == 6 and cache.is_linear.count(True) == (0 if kind == "falcon_h1" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMON)
@torch.no_grad()
def test_a_decode_step_is_one_graph(kind):
    """Traced whole, steps say what eager ones say, and leave the same cache, across blocks that become codes: to the
    bit, but for Gemma's in transformers 5.24, up to rounding, by which a code may fall to the other side of a tie."""

    def apart(a, b):
        return float(((a - b).abs() > (1e-3 if allowed else 0)).float().mean())

    allowed = 0.03 if kind.startswith("gemma") else 0
    model = families.tiny_model(kind)
    with quantized(model, SMALL, tiny_books(model)):
        cache = new_cache(model, 64)
        model(families.PROMPT, **cached(cache), use_cache=True)
        twin = copy.deepcopy(cache)
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        for i in range(6):
            ids = families.PROMPT[:, i : i + 1]
            got, want = (f(ids, **cached(c), use_cache=True).logits for f, c in ((step, cache), (model, twin)))
            assert apart(got, want) <= allowed
        for a, b in zip(cache.quantized_layers, twin.quantized_layers, strict=True):
            assert apart(a.keys.dequantize(), b.keys.dequantize()) <= allowed
            assert apart(a.values.dequantize(), b.values.dequantize()) <= allowed


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss", "ministral"])
def test_sliding_windows_are_quantized_where_asked_for(kind):
    """Also in a model of nothing else, which is refused by default."""
    found = families.outcome(kind, config=dataclasses.replace(SMALL, sliding="quantize"))
    assert found.quantized == found.layers == 4 and not found.wrong, found


def test_a_model_of_sliding_windows_alone_is_refused_with_what_to_do():
    assert "sliding='quantize'" in families.outcome("ministral").refused


def test_windows_beside_linear_attention_are_refused_by_name(llama, monkeypatch):
    model, books = llama
    kinds = ["full_attention", "hybrid_sliding"]
    monkeypatch.setattr(sys.modules["torchgsrq.models.layers"], "layer_kinds", lambda _: kinds)
    with pytest.raises(ValueError, match="layers 1 of LlamaForCausalLM have linear attention beside a"):
        quantize_kv_(model, dataclasses.replace(SMALL, sliding="quantize"), codebooks=books)
    assert not hasattr(model, "_gsrq")


def test_layers_that_read_another_ones_cache_count_in_what_is_learned():
    """Their queries weigh the keys of the layer that caches them."""
    model = families.tiny_model("gemma3n_text")
    layers = inspect_layers(model)
    assert [(x.index, x.readers) for x in layers] == [(0, ()), (1, ()), (2, (4,)), (3, (5,))]
    stats = collect_statistics(model, layers, families.PROMPT)
    tokens = {index: sum(k.shape[1] for k in s.keys.x) for index, s in stats.items()}
    assert tokens == {0: 120, 1: 120, 2: 240, 3: 240}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "nemotron_h", "lfm2"])
@torch.no_grad()
def test_a_saved_cache_goes_on_with_linear_attention(kind, dtype, tmp_path):
    """States are in the file, in their own dtypes, and counted as full precision; a file without them is refused, and
    so is one that is too long."""
    model = families.tiny_model(kind).to(dtype)
    books = tiny_books(model)
    ids = families.PROMPT
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        model(ids, **cached(cache), use_cache=True)
        assert cache.memory().full_precision_layers > 0
        cache.save(tmp_path / "cache")
        twin = new_cache(model)
        twin.load(tmp_path / "cache")
        more = [model(ids[:, :5], **cached(c), use_cache=True).logits for c in (cache, twin)]
        assert torch.equal(*more)
        with pytest.raises(ValueError, match="holds tokens already"):
            twin.load(tmp_path / "cache")

        with safe_open(tmp_path / "cache", "pt") as file:
            meta = file.metadata()
        left = {k: t for k, t in load_file(tmp_path / "cache").items() if "recurrent" not in k and "conv" not in k}
        save_file(left, tmp_path / "less", meta)
        with pytest.raises(ValueError, match="0 states of linear attention"):
            new_cache(model).load(tmp_path / "less")
        with pytest.raises(ValueError, match="holds 40 tokens; this cache holds 16"):
            new_cache(model, 16).load(tmp_path / "cache")


def test_a_model_that_fails_to_read_is_refused_by_calibrate():
    """RoBERTa counts positions from 2, so that its config promises two more than it has."""
    assert "cannot be calibrated" in families.outcome("roberta").refused


@pytest.mark.slow
def test_the_table_is_what_happens():
    """Every family, with padding; the page is of one version of transformers."""
    page = PAGE.read_text()
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip(f"docs/models.md is not of transformers {transformers.__version__}")
    rows = re.findall(r"^\| ([\w.-]+) \| \w+ \| ([^:;|]*)", page, re.M)
    found = {kind: families.outcome(kind, ["padded"]) for kind in families.families()}
    assert {kind: families.summary(x) for kind, x in found.items()} == {kind: what.strip() for kind, what in rows}
    # Where rounding differs, a code may fall to the other side of a tie, and a router of experts with it.
    assert sum(bool(x.wrong) for x in found.values()) <= 2
