"""Which head is given how many bits."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SMALL, tiny_books, tiny_llama
from torchgsrq import Codebooks, GSRQConfig, calibrate, dequantize_kv_, models, quantize_kv_
from torchgsrq.codec.allocation import allocate, head_rates
from torchgsrq.config import BITS, RATES
from torchgsrq.learning.sensitivity import _towards_drawn, by_head, sensitivity

pytestmark = pytest.mark.core

TOKENS = torch.randint(3, 100, (8, 64), generator=torch.Generator().manual_seed(0))


@given(
    costs=st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
    sizes=st.lists(st.sampled_from([64, 192, 1024]), min_size=8, max_size=8),
    bits=st.sampled_from(BITS),
)
def test_no_step_is_left_and_none_was_taken_in_vain(costs, sizes, bits):
    units = dict(enumerate(costs))
    weight = dict(enumerate(sizes))
    rates = allocate(units, weight, dict.fromkeys(units, BITS), bits)
    total, used = sum(weight[u] for u in units), sum(weight[u] * rates[u] for u in units)
    assert used <= bits * total + 1e-6
    for unit, rate in rates.items():
        assert rate in BITS
        higher = min((b for b in BITS if b > rate), default=None)
        assert higher is None or used + weight[unit] * (higher - rate) > bits * total
    for a in units:  # who has more bits, of those alike, needs them no less
        for b in units:
            if sizes[a] == sizes[b] and rates[a] > rates[b]:
                assert costs[a] >= costs[b]


def test_equal_costs_get_equal_rates_and_too_few_bits_are_refused():
    for cost in (2.0, 0.0):
        units = dict.fromkeys(range(6), cost)
        assert set(allocate(units, dict.fromkeys(units, 64), dict.fromkeys(units, RATES), 1).values()) == {1}
    with pytest.raises(ValueError, match=r"bits=0.5 is less than the lowest mean rate that is possible, 1\b"):
        allocate(units, dict.fromkeys(units, 64), dict.fromkeys(units, (1, 2)), 0.5)


def test_no_head_is_given_less_than_half():
    costs = {0: [(1e3, 1e-9), (1e-9, 1e-9)], 1: [(1.0, 1e-9)]}
    dims, offered = dict.fromkeys(costs, 64), dict.fromkeys(costs, BITS)
    found = head_rates(costs, dims, offered, 1)
    each = [pair for heads in found.values() for pair in heads]
    assert found[0][0][0] == 2 and min(map(min, each)) == 0.5 and sum(map(sum, each)) <= 6
    assert [len(heads) for heads in found.values()] == [2, 1]
    between = [pair for heads in head_rates(costs, dims, offered, 0.9).values() for pair in heads]
    assert min(map(min, between)) == 0.5 and 4.8 < sum(map(sum, between)) <= 5.4  # any mean may be asked for
    wide = head_rates(costs, {0: 64, 1: 128}, offered, 1)  # a head of twice the elements counts twice
    assert sum(map(sum, wide[0])) + 2 * sum(map(sum, wide[1])) <= 8


def test_a_layer_that_says_nothing_costs_nothing():
    model = tiny_llama()
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(False)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = models.inspect_layers(model)
    costs = sensitivity(model, layers, TOKENS)
    assert not costs[1].any() and costs[0].diagonal(dim1=1, dim2=2).min() > 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants
    assert all(p.grad is None for p in model.parameters())
    assert not sensitivity(model.model, layers, TOKENS)[1].any()  # without a head


def test_a_drawn_tokens_slope_is_that_of_its_log_likelihood():
    logits = torch.randn(150, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    slope = _towards_drawn(logits.detach(), torch.Generator().manual_seed(1))
    drawn = slope.argmax(1, keepdim=True)
    logits.log_softmax(-1).gather(1, drawn).sum().backward()
    torch.testing.assert_close(slope, logits.grad, atol=1e-6, rtol=1e-5)
    wanted = torch.tensor([[0.2, 0.3, 0.5]]).log().expand(20000, -1)  # and tokens are drawn in proportion
    often = _towards_drawn(wanted, torch.Generator().manual_seed(2)).argmax(1).bincount(minlength=3) / 20000
    torch.testing.assert_close(often, wanted[0].exp(), atol=0.02, rtol=0)


def test_heads_are_weighed_alone():
    """With the values of one head at nothing, that head costs nothing, and the layer what the other one costs."""
    model = tiny_llama()
    with torch.no_grad():
        layer = model.model.layers[0].self_attn
        layer.v_proj.weight[: layer.head_dim].zero_()
    costs = sensitivity(model, models.inspect_layers(model), TOKENS)
    nothing, something = by_head(costs)[0]
    assert nothing == (0, 0) and min(something) > 0
    assert something == pytest.approx(costs[0].sum((1, 2)).tolist(), rel=1e-6)


def test_what_an_estimate_says_is_what_happens():
    """The estimate of both layers together against the KL divergence of a cache quantized at the same rate, learned from
    the windows that the estimate learns from, and read on those that it reads."""
    from torchgsrq.measure.evaluate import quality

    model = tiny_llama()
    with torch.no_grad():  # as it is made, a random model hardly heeds its attention
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(4)
        model.lm_head.weight.mul_(4)
    windows = torch.randint(3, 100, (16, 256), generator=torch.Generator().manual_seed(1))
    config = GSRQConfig(allocation="uniform", sink_tokens=1, recent_tokens=32, block_tokens=1)
    costs = sensitivity(model, models.inspect_layers(model), windows)
    books = calibrate(model, config, windows[2::4], tokens=1024, progress=False)
    found = quality(model, windows[::4], {"": (config, books)})[""].kl
    assert 0.6 < float(torch.stack(list(costs.values())).sum()) / 4 / found < 1.6


def test_several_rates_from_one_reading(tmp_path, caplog):
    """Each as if it had been asked for alone; and `describe` lists the bits of heads."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.01)
    configs = [dataclasses.replace(SMALL, bits=bits) for bits in (1, 0.6)]
    tokens = torch.randint(3, 100, (512,), generator=torch.Generator().manual_seed(0))
    books, lower = calibrate(model, configs, tokens, tokens=512, progress=False)
    for config, found in zip(configs, (books, lower), strict=True):
        alone = calibrate(model, config, tokens, tokens=512, progress=False)
        assert found.bits <= config.bits and found.metadata == alone.metadata
        assert all(found[i][kind].head_bits == alone[i][kind].head_bits for i in found for kind in (0, 1))
        assert found[0].key.bits > found[1].key.bits
    lines, each = books.describe().splitlines(), dict.fromkeys(books[0].key.head_bits)
    rates = ", ".join(f"{bits:g}" for bits in (each if len(each) == 1 else books[0].key.head_bits))
    assert len(lines) == 3 and lines[1].startswith(f"layer 0: keys {rates} bits, values ") and "% of" in lines[1]
    books.save(tmp_path / "books.safetensors")
    again = Codebooks.load(tmp_path / "books.safetensors")
    assert again.digest == books.digest and repr(again).startswith("Codebooks(2 layers, 1 bits")
    for skipped in (0, 1):  # of fewer layers the mean is another, which is said
        caplog.clear()
        with caplog.at_level("WARNING", "torchgsrq"):
            quantize_kv_(model, dataclasses.replace(SMALL, bits=1, skip_layers=(skipped,)), codebooks=again)
        assert f"those left have {model._gsrq.codebooks.bits:.3g}. Calibrate with skip_layers" in caplog.text
        dequantize_kv_(model)
    good = [[1.0, 1.0], [1.0, 1.0]]
    short, negative, words = ({"0": good, "1": bad} for bad in (good[1:], [[1, 1], [1, -1]], [["a", "b"], [1, 1]]))
    for wrong in ({"0": good}, {"0": [1.0, 1.0], "1": [1.0, 1.0]}, short, negative, words, 3):
        Codebooks(books.layers, {**books.metadata, "sensitivity": wrong}).save(tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=r"wrong.safetensors (has invalid costs|is damaged)"):
            Codebooks.load(tmp_path / "wrong.safetensors")


def test_a_model_without_gradients_gets_the_same_bits_everywhere(monkeypatch, caplog):
    """With a warning; or it is refused, if gradients were asked for."""
    asked = dataclasses.replace(SMALL, allocation="sensitivity")
    model = tiny_llama()
    monkeypatch.setattr(model.model.norm, "forward", lambda x: torch.full_like(x, 0.5))  # nothing leads back
    with pytest.raises(ValueError, match=r"a backward pass of LlamaForCausalLM.*choose allocation='uniform'"):
        tiny_books(model, asked)
    with caplog.at_level("WARNING", "torchgsrq"):
        books = tiny_books(model)
    assert "all heads get the same bits: a backward pass of LlamaForCausalLM" in caplog.text
    assert {codec.bits for layer in books.layers.values() for codec in layer} == {1}

    model = tiny_llama()  # of whose first layer no gradient arrives, though the pass succeeds
    project = model.model.layers[0].self_attn.o_proj
    monkeypatch.setattr(project, "forward", lambda x: torch.nn.functional.linear(x.detach(), project.weight))
    with pytest.raises(ValueError, match=r"no gradient reached the attention of layers 0\b"):
        tiny_books(model, asked)

    model = tiny_llama()
    model.hf_quantizer = SimpleNamespace(is_trainable=False)
    with pytest.raises(ValueError, match=r"quantized weights of LlamaForCausalLM have no backward pass"):
        tiny_books(model, asked)
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(ValueError, match=r"made in inference mode"):
        tiny_books(model, asked)
    assert all(p.requires_grad for p in model.parameters())


def test_a_compiled_forward_is_not_traced_with_its_gradients():
    model = tiny_llama()
    want = sensitivity(model, models.inspect_layers(model), TOKENS)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    again = sensitivity(model, models.inspect_layers(model), TOKENS)
    assert all(torch.equal(again[i], want[i]) for i in want)


def test_recipes_other_than_the_default_are_uniform(llama):
    model, _ = llama
    assert not GSRQConfig(recipe="gsrq-paper", group_size=32).spreads_bits
    assert (
        "sensitivity" not in tiny_books(model, dataclasses.replace(SMALL, recipe="gsrq-paper", group_size=32)).metadata
    )
    with pytest.raises(
        ValueError, match=r"allocation='sensitivity' is for recipe='gsrq'; 'gsrq-paper' gives all heads"
    ):
        GSRQConfig(recipe="gsrq-paper", allocation="sensitivity")
    with pytest.raises(ValueError, match=r"allocation='best' is not offered; choose one of sensitivity, uniform"):
        GSRQConfig(allocation="best")
