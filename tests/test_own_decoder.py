"""Codebooks of a decoder that is not of transformers: `calibrate_qkv`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import tiny_llama
from torchgsrq import GSRQConfig, GSRQTensor, calibrate_qkv
from torchgsrq.learning.statistics import collect_statistics
from torchgsrq.learning.train import train
from torchgsrq.models import inspect_layers, observed

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def given():
    """A tiny Llama, the tokens that it read, and what its attention was given."""
    model = tiny_llama()
    tokens = torch.randint(3, 100, (4, 256), generator=torch.Generator().manual_seed(0))
    layers = {}
    with torch.no_grad(), observed(model, lambda module, q, k, v, **_: layers.update({module.layer_idx: (q, k, v)})):
        model.model(tokens, use_cache=False)
    return model, tokens, [layers[i] for i in sorted(layers)]


def test_it_learns_what_calibrate_learns(given, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", bool)  # which would read the model in bfloat16
    model, tokens, layers = given
    config = GSRQConfig(bits=1, allocation="uniform")
    freq = inspect_layers(model)[0].inv_freq
    own = calibrate_qkv(layers, config, inv_freq=freq, span=1000)
    stats = collect_statistics(model, inspect_layers(model), tokens)
    assert sorted(own) == sorted(stats) == [0, 1]
    for i in own:
        for a, b in zip(own[i], train(stats[i], [(config, [(1, 1)] * 2)], 1000)[0], strict=True):
            assert a.integers == b.integers
            a, b = a.first, b.first
            assert a.layout == b.layout
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(a.inverse @ a.transform, b.inverse @ b.transform, rtol=1e-2, atol=1e-2)
    assert own.bits == 1 and own.metadata["tokens"] == 1024


def test_attention_on_its_codes(given):
    """On text that was not read, far better than codebooks that know nothing."""
    model, _, layers = given
    freq = inspect_layers(model)[0].inv_freq
    books = calibrate_qkv(((x[:3] for x in layer) for layer in layers), GSRQConfig(bits=2), inv_freq=freq)
    q, k, v = (x[3:] for x in layers[1])
    config = GSRQConfig(sink_tokens=0, recent_tokens=0, block_tokens=1)
    keys, values = (
        GSRQTensor.empty(*x.shape, codec=codec, config=config) for x, codec in zip((k, v), books[1], strict=True)
    )
    keys.index_copy_(2, torch.arange(256), k)
    values.index_copy_(2, torch.arange(256), v)
    got = F.scaled_dot_product_attention(q[:, :, -8:], keys, values, enable_gqa=True)
    want = F.scaled_dot_product_attention(q[:, :, -8:], k, v, enable_gqa=True)
    assert (got - want).norm() / want.norm() < 0.4


def test_bad_input_is_named(given):
    _, _, layers = given
    q, k, v = layers[0]
    for bad, says in (
        ((q, k, v[:, :1]), r"layers\[0\] has queries .* values \[4, 1, 256, 32\]; expected"),
        ((q[:, :3], k, v), "as many query heads as a multiple"),
        ((q[:, :, :9], k[:, :, :9], v[:, :, :9]), "at least 128 tokens"),
        ((q, k * torch.inf, v), "NaN or inf"),
    ):
        with pytest.raises(ValueError, match=says):
            calibrate_qkv([bad])
    with pytest.raises(ValueError, match=r"inv_freq has shape \[17\]; expected \[pairs\]"):
        calibrate_qkv(layers, inv_freq=torch.ones(17))
    for none in ([], iter(())):
        with pytest.raises(ValueError, match="layers is empty"):
            calibrate_qkv(none)
    with pytest.raises(ValueError, match=r"layers\[0\] has 2 items; expected three tensors"):
        calibrate_qkv([(q, k)])
    with pytest.raises(ValueError, match="takes gradients of a model"):
        calibrate_qkv(layers, GSRQConfig(allocation="sensitivity"))
    with pytest.raises(ValueError, match="is not offered where all heads have the same"):
        calibrate_qkv(layers, GSRQConfig(bits=0.9))
