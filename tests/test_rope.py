"""RoPE in all its kinds: recognized, followed where it changes with the length, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import transformers

from tests.conftest import SMALL, TINY, cached, tiny_books
from torchgsrq import new_cache, quantize_kv_
from torchgsrq.measure.evaluate import quantized
from torchgsrq.models import inspect_layers

CONFIG = dataclasses.replace(SMALL, bits=2)
IDS = torch.randint(3, 100, (1, 100), generator=torch.Generator().manual_seed(2))


def longrope(switch, **more):
    return {
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": switch,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0 + 0.5 * i for i in range(16)],
            "original_max_position_embeddings": switch,
            **more,
        },
    }


ROPES = {
    "default": ("LlamaConfig", {}, 512),
    "dynamic NTK": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, 512),
    "longrope": ("Phi3Config", longrope(256), 256),
    "longrope, switched early": ("Phi3Config", longrope(16), 16),
    "yarn": ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                             "original_max_position_embeddings": 128}}, 512),
    "turning the other way": ("NanoChatConfig", {}, 512),
}  # fmt: skip


def build(kind, changes):
    torch.manual_seed(0)
    facts = {**TINY, "num_attention_heads": 2, **changes}
    if kind in ("Phi3Config", "PhimoeConfig"):
        facts.pop("head_dim")
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**facts)).eval()


@torch.no_grad()
def key_error(model, first):
    """Relative squared error of coded keys of the first layer, in a text whose positions begin at ``first``."""
    cache, plain = new_cache(model), transformers.DynamicCache(config=model.config)
    for one in (cache, plain):
        model(IDS, position_ids=torch.arange(100)[None] + first, **cached(one), use_cache=True)
    keys, coded = cache.layers[0].keys, int(cache.layers[0].keys.encoded.max())
    want = plain.layers[0].keys[:, :, 2:coded]
    return float((keys.dequantize()[:, :, 2:coded] - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("name", ROPES)
def test_keys_are_coded_as_well_past_the_switch(name):
    kind, changes, switch = ROPES[name]
    model = build(kind, changes)
    infos = inspect_layers(model)
    assert {info.rope for info in infos} == {"half-split"}
    assert {bool(info.rotary) for info in infos} == {"dynamic" in name or "longrope" in name}
    quantize_kv_(model, CONFIG, codebooks=tiny_books(model, CONFIG))
    reference = model
    if switch < 250:  # nothing lies before the switch: the same model with a later one
        reference = build(kind, longrope(256))
        quantize_kv_(reference, CONFIG, codebooks=tiny_books(reference, CONFIG))
    within = [key_error(reference, first) for first in (0, 60, 150)]
    beyond = [key_error(model, first) for first in (600, 1000, 3000)]
    assert sum(beyond) / 3 <= 1.2 * sum(within) / len(within), (within, beyond)


@torch.no_grad()
def test_a_cache_does_not_outlive_its_frequencies():
    """Not with an error that grows in silence: a forward past the switch is refused and leaves the cache as it was."""
    model = build("LlamaConfig", ROPES["dynamic NTK"][1])
    with quantized(model, CONFIG, tiny_books(model, CONFIG)):
        cache = new_cache(model)
        model(IDS, **cached(cache), use_cache=True)
        was = cache.layers[0].keys.dequantize()
        with pytest.raises(ValueError, match=r"layer 0: the model's RoPE frequencies changed.*100 tokens.*new cache"):
            model(IDS, position_ids=torch.arange(100)[None] + 600, **cached(cache), use_cache=True)
        assert torch.equal(cache.layers[0].keys.dequantize(), was)
        with pytest.raises(ValueError, match=r"from 100 to up to 601 tokens, and past 512"):
            model.generate(IDS, max_new_tokens=501, do_sample=False)
        assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape[1] <= 105
        cache.reset()  # empty, it takes the frequencies of what comes
        model(IDS, position_ids=torch.arange(100)[None] + 600, **cached(cache), use_cache=True)


@torch.no_grad()
def test_generating_past_the_switch_of_longrope_is_refused():
    """There transformers 5.17 drops the whole text but for one token. Texts on one side of the switch are fine."""
    arguments = {"min_new_tokens": 30, "max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    for switch, fine in ((110, False), (90, True), (200, True)):
        model = build("Phi3Config", longrope(switch))
        with quantized(model, CONFIG, tiny_books(model, CONFIG)):
            if not fine:
                with pytest.raises(ValueError, match="from 100 to up to 130 tokens, and past 110"):
                    model.generate(IDS, **arguments)
                continue
            layer = model.generate(IDS, **arguments).past_key_values.layers[0]
            assert layer.get_seq_length() == 129
            assert torch.equal(layer.keys.inv_freq, model.model.rotary_emb.inv_freq)
            assert torch.equal(layer.keys.inv_freq, layer.codec.key.inv_freq) == (switch == 200)


@torch.no_grad()
def test_a_file_keeps_the_frequencies(tmp_path):
    model = build("Phi3Config", longrope(90))
    with quantized(model, CONFIG, tiny_books(model, CONFIG)):
        cache, again = new_cache(model), new_cache(model)
        model(IDS, **cached(cache), use_cache=True)
        cache.save(tmp_path / "long.safetensors")
        again.load(tmp_path / "long.safetensors")
        one, two = (model(IDS[:, :1], **cached(c), use_cache=True).logits for c in (cache, again))
        torch.testing.assert_close(one, two)
        cache = copy.deepcopy(again)
        model(IDS[:, :1], **cached(cache), use_cache=True)


def test_rope_that_cannot_be_followed_is_refused():
    """Phi-3.5-MoE's rotary module scales long inputs, and does not use its buffer."""
    facts = longrope(64, short_mscale=1.2, long_mscale=1.3)
    model = build("PhimoeConfig", {"num_local_experts": 2, **facts})
    with pytest.raises(ValueError, match=r"PhimoeForCausalLM layer 0: RoPE changes with the length.*position \d+"):
        quantize_kv_(model, CONFIG)


def test_rope_that_is_not_recognized_is_reported(caplog):
    """HunYuan scales keys after the rotation, which is no rotation any more."""
    model = build("HunYuanDenseV1Config", {})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.key_layernorm.weight.uniform_(0.5, 1.5)
    with caplog.at_level(logging.WARNING, "torchgsrq"):
        quantize_kv_(model, CONFIG, codebooks=tiny_books(model, CONFIG))
    assert caplog.text.count("no known rotation fits the keys of layers 0, 1") == 1


def test_models_without_rope_are_not_suspected(caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=600, vocab_size=128)).eval()
    with caplog.at_level(logging.WARNING, "torchgsrq"):
        quantize_kv_(model, SMALL, codebooks=tiny_books(model))
    assert "rotation" not in caplog.text and "RoPE" not in caplog.text


def test_fixed_models_are_not_asked_for_their_frequencies(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        assert all(layer.rotary is None for layer in new_cache(model).layers)
