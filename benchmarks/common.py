"""Caches of random tokens, for timing: how fast a codec is does not depend on what is in it."""

from __future__ import annotations

import torch

from torchgsrq import Codebooks, Codec, GSRQConfig, GSRQTensor
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.allocation import head_rates
from torchgsrq.codec.layout import Layout, rates
from torchgsrq.config import encoded_tokens
from torchgsrq.learning.train import FRAME, KEY_ETA, VALUE_ETA

MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Llama-3-70B": (64, 8, 128)}  # heads, KV heads, dim


def random_codec(
    heads: int, layout: Layout, frame: int | None, device: torch.device | str = "cpu", eta: int = 1
) -> Codec:
    """A codec with random tables."""
    dim = layout.head_dim
    return Codec.build(
        torch.randn(heads, dim, device=device),
        torch.randn(heads, dim, dim, device=device) / dim**0.5,
        torch.randn(heads, layout.codes, 256, layout.width, device=device) / layout.stages**0.5,
        inverse=torch.randn(heads, dim, dim, device=device) / dim**0.5,
        inv_freq=None if frame is None else 1e5 ** (-torch.arange(dim // 2, device=device) / (dim // 2)),
        frame=frame or 1,
        eta=eta,
    )


def random_codecs(
    heads: int,
    dim: int,
    config: GSRQConfig,
    device: torch.device | str = "cpu",
    each: tuple[float, float] | None = None,
) -> tuple[Codec, Codec]:
    """Key and value codecs of a config, or with the rates that heads were given."""
    keys, values = (Layout.of(dim, bits, config.group_size) for bits in each or (config.bits, config.bits))
    return (
        random_codec(heads, keys, FRAME, device, KEY_ETA),
        random_codec(heads, values, None, device, VALUE_ETA),
    )


def random_codebooks(layers: int, heads: int, dim: int, config: GSRQConfig) -> Codebooks:
    """Random tables for a model, with rates as far apart as SmolLM2's: the speed is that of learned ones."""
    generator = torch.Generator().manual_seed(0)
    costs = {i: (10 ** (2.5 * torch.rand(heads, 2, generator=generator))).tolist() for i in range(layers)}
    each = head_rates(costs, dict.fromkeys(costs, dim), dict.fromkeys(costs, rates(dim)), config.bits)
    found = {}
    for i, pairs in each.items():
        of_heads = [random_codecs(1, dim, config, each=pair) for pair in pairs]
        found[i] = LayerCodec.of_heads(*zip(*of_heads, strict=True))
    facts = {"config": config.codec_fields(), "source": "random", "tokens": 0}
    return Codebooks(found, {**facts, "sensitivity": {str(i): cost for i, cost in costs.items()}})


def random_cache(
    batch: int,
    heads: int,
    dim: int,
    length: int,
    config: GSRQConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    codecs: tuple[Codec | Codecs, Codec | Codecs] | None = None,
    capacity: int | None = None,
) -> tuple[GSRQTensor, GSRQTensor]:
    """Key and value buffers that hold ``length`` random tokens."""
    pair = []
    for codec in codecs or random_codecs(heads, dim, config, device):
        buffer = GSRQTensor.empty(
            batch, heads, capacity or length, dim, codec=codec, device=device, dtype=dtype, config=config
        )
        fill(buffer, length, config)
        pair.append(buffer)
    return pair[0], pair[1]


def fill(buffer: GSRQTensor, length: int, config: GSRQConfig) -> None:
    """Random codes, as if ``length`` tokens had been appended."""
    for codes in buffer.codes:
        codes.random_(0, 256)
    buffer.window.normal_()
    buffer.length.fill_(length)
    buffer.encoded.fill_(encoded_tokens(length, config.recent_tokens, config.block_tokens))
