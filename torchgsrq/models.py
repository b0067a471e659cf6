"""What a transformers decoder is made of: its attention layers, its RoPE, its fingerprint. Nothing is changed here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from torchgsrq.rope import rotate


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer, as a probing forward saw it.

    Attributes:
        index: its ``layer_idx``. kind: ``"full_attention"``, ``"sliding_attention"``, ...
        q_heads, kv_heads, head_dim: its shape. inv_freq: RoPE frequencies, empty where it has none that
            was recognised. interleaved: RoPE pairs are neighbours. rope: one word for the report.
    """

    index: int
    kind: str
    q_heads: int
    kv_heads: int
    head_dim: int
    inv_freq: Tensor
    interleaved: bool
    rope: str


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the decoder, also of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """Kind of every layer, as transformers names and infers them."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        chunked = getattr(config, "attention_chunk_size", None) is not None
        kind = "sliding_attention" if windowed else "chunked_attention" if chunked else "full_attention"
        kinds = [kind] * config.num_hidden_layers
    return list(kinds)


def attention_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The distinct config objects of a model's parts; each names an attention implementation."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run with another attention implementation, and put the old ones back."""
    before = [(config, config._attn_implementation) for config in attention_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


OBSERVED = "gsrq_observed"  # the attention implementation (attention.py) that calls `notify`
Observer = Callable[..., None]
_observers: list[Observer] = []


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call ``observer(module, q, k, v, **kwargs)`` in every attention of the model's forwards."""
    _observers.append(observer)
    try:
        with attention_implementation(model, OBSERVED):
            yield
    finally:
        _observers.pop()


def notify(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> None:
    """Tell the newest observer of an attention call."""
    _observers[-1](module, q, k, v, **kwargs)


def check_supported(model: nn.Module) -> PreTrainedModel:
    """Refuse, by name, what cannot be quantized.

    Raises:
        TypeError: not a transformers decoder with the attention interface.
        ValueError: an architecture whose cache is no plain keys and values per layer.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {name}; expected a transformers PreTrainedModel (for your own model see GSRQTensor)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not use transformers' attention interface, so its attention cannot be replaced")
    kinds = set(layer_kinds(model))
    odd = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if odd:
        raise ValueError(
            f"{name} has layers of kind {', '.join(sorted(odd))}, whose state is no keys and values per token"
        )
    if getattr(text_config(model), "num_kv_shared_layers", 0):
        raise ValueError(f"{name} shares keys and values between layers, which is not supported")
    return model


@torch.no_grad()
def inspect_layers(model: PreTrainedModel) -> list[LayerInfo]:
    """Probe every attention layer with one token at two positions.

    A lone token attends to itself alone, so in a model whose only use of positions is RoPE its
    un-rotated key is the same at both. Which of the model's rotary frequencies, in either pairing,
    comes nearest to that in a layer is that layer's RoPE.

    Raises:
        ValueError: a layer's keys and values differ in width (MLA) or do not divide the query heads.
    """
    kinds = layer_kinds(model)
    device = model.get_input_embeddings().weight.device
    seen: dict[int, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
    far = min(1025, getattr(text_config(model), "max_position_embeddings", 1026) - 1)
    for position in (1, far):

        def observer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, at: int = position, **_: Any) -> None:
            index = getattr(module, "layer_idx", None)
            if index is not None and not getattr(module, "is_cross_attention", False):
                seen.setdefault(index, {})[at] = (q, k, v)

        token = torch.tensor([[_any_token(model)]], device=device)
        with observed(model, observer):
            model(input_ids=token, position_ids=torch.tensor([[position]], device=device), use_cache=False)
    if not seen:
        raise ValueError(
            f"{type(model).__name__}: no attention layer was seen in a forward, so there is nothing to quantize"
        )

    frequencies = [
        buffer.detach().float()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1
    ]
    layers = []
    for index in sorted(seen):
        q, k, v = seen[index][1]
        if k.shape != v.shape or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"{type(model).__name__} layer {index}: keys are {k.shape[-1]} wide and values {v.shape[-1]} "
                f"({k.shape[1]} and {v.shape[1]} heads); MLA and other unequal caches are not supported"
            )
        inv_freq, interleaved, rope = _find_rope({at: x[1] for at, x in seen[index].items()}, frequencies)
        kind = kinds[index] if index < len(kinds) else "full_attention"
        layers.append(LayerInfo(index, kind, q.shape[1], k.shape[1], k.shape[-1], inv_freq, interleaved, rope))
    return layers


def _any_token(model: PreTrainedModel) -> int:
    """A token that is surely in the vocabulary and no padding."""
    return min(3, text_config(model).vocab_size - 1)


def _find_rope(keys: dict[int, Tensor], frequencies: list[Tensor]) -> tuple[Tensor, bool, str]:
    """The rotation that makes a token's keys at several positions most alike: frequencies, pairing, name."""
    (_, one), *_ = keys.items()
    none = one.new_zeros(0, dtype=torch.float32)
    candidates = [(none, False, "none")]
    for inv_freq in frequencies:
        if 2 * inv_freq.numel() <= one.shape[-1]:
            candidates.append((inv_freq.to(one.device), False, "half-split"))
            candidates.append((inv_freq.to(one.device), True, "interleaved"))

    def difference(candidate: tuple[Tensor, bool, str]) -> float:
        near, far = (rotate(x, torch.tensor(-at, device=x.device), *candidate[:2]) for at, x in keys.items())
        return float((near - far).norm() / near.norm().clamp_min(1e-30))

    best = min(candidates, key=difference)
    tolerance = 2e-2 if one.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return best if difference(best) <= tolerance else (none, False, "not recognised")


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of a model's shape and a sample of its weights: which model codebooks belong to."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.bfloat16().view(torch.int16).numpy().tobytes())  # the same for any dtype of a model
    return digest.hexdigest()[:16]
