"""The parts of a transformers decoder, and `LayerInfo`, the facts about each of its attention layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torchgsrq.models.signature import parameters, takes_cache

UNBOUNDED = ("full_attention", "hybrid")  # kinds of layers whose keys and values grow with the text


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer, as found by a probing forward.

    Attributes:
        index: its ``layer_idx``.
        kind: ``"full_attention"``, ``"sliding_attention"``, ...
        q_heads, kv_heads, head_dim: its shape.
        inv_freq: RoPE frequencies ``[pairs]``; empty if no RoPE was recognized, negative if it rotates in the other
            direction.
        interleaved: RoPE pairs are neighbors.
        rope: one word for the report.
        rotary: if the frequencies depend on the length of the input, the dotted name of the decoder's buffer with the
            current ones; empty if they are fixed.
        readers: other layers that attend to this layer's keys and values, and have none of their own.
        value: if attention does not get what the model caches (MLA; attention outside of transformers' interface), the
            facts about the cached values, with their own heads, width and RoPE. Such layers are decoded on every read.
        sample: some elements of a fixed input's keys and values, by which `same_model` recognizes a model.
    """

    index: int
    kind: str
    q_heads: int
    kv_heads: int
    head_dim: int
    inv_freq: Tensor
    interleaved: bool
    rope: str
    rotary: str = ""
    readers: tuple[int, ...] = ()
    value: LayerInfo | None = None
    sample: tuple[float, ...] = field(default=(), repr=False)


def are_decoded(layers: Iterable[LayerInfo]) -> bool:
    """Whether a model's attention reads decoded tensors; this holds for all of its layers or for none."""
    return any(info.value is not None for info in layers)


def cached_by(layers: Iterable[LayerInfo]) -> dict[int | None, int]:
    """Layer to the layer whose keys and values it attends to: itself, except for readers."""
    return {index: info.index for info in layers for index in (info.index, *info.readers)}


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrapper of `torch.compile` or PEFT, whose adapters are in its own layers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
    return inner


def check_supported(model: nn.Module) -> PreTrainedModel:
    """Refuse, by name, models that cannot be quantized. `inspect_layers` refuses those that only a forward reveals.

    Returns:
        The transformers model, without wrappers.

    Raises:
        TypeError: not a transformers model.
        ValueError: prefix tuning, an encoder-decoder model, or float64 weights.
    """
    tuning = str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).rpartition(".")[2]
    if tuning in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"{type(model).__name__} with {tuning} gives every forward keys and values of its own, in a cache that is "
            "not quantized: use an adapter that changes weights (LoRA), or prompt tuning"
        )
    model = unwrap(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {name}; expected a transformers PreTrainedModel (for your own model see GSRQTensor)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    if model.dtype == torch.float64:
        raise ValueError(f"{name} is float64; the cache holds float32, float16 or bfloat16: call model.float() first")
    return model


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the decoder, also of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part that maps token embeddings to hidden states and writes the KV cache, without a head or image encoder."""
    found = model
    while True:
        inner = found.get_decoder()
        if inner is None or inner is found or not takes_cache(inner):
            return found
        found = inner


def rope_span(model: PreTrainedModel) -> int:
    """The maximum distance between a query and a key, in tokens: the context that the model supports."""
    return getattr(text_config(model), "max_position_embeddings", None) or 8192


def path_to_decoder(model: PreTrainedModel) -> list[nn.Module]:
    """The modules from the model down to its decoder, both included: any of them may create a cache or generate."""
    inner = decoder(model)
    name = next(name for name, module in model.named_modules() if module is inner)
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost part that maps token IDs to logits; the decoder if the model has no head."""
    path: list[Any] = path_to_decoder(model)
    heads = [part for part in path if getattr(part, "get_output_embeddings", lambda: None)() is not None]
    return heads[-1] if heads else path[-1]


def input_device(model: nn.Module) -> torch.device:
    """The device for inputs; for weights offloaded by accelerate, the device that they are executed on."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    held = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(held, torch.device("cpu"))


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """The kind of every layer, as transformers names and infers them."""
    return kinds_of_layers(text_config(model))


def kinds_of_layers(config: PreTrainedConfig) -> list[str]:
    """The same from a decoder's config."""
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


def foreign_attention(model: nn.Module) -> str:
    """The name of an attention implementation that comes neither from transformers nor from a kernel hub; else ""."""
    for config in attention_configs(model):
        name = config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        home = getattr(inspect.unwrap(function), "__module__", "") if callable(function) else "transformers"
        if "/" not in (name or "") and home.split(".")[0] not in ("transformers", "torchgsrq"):
            return str(name)
    return ""


def some_input(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """A fixed decoder input of one row: made-up embeddings, or token IDs if the decoder takes nothing else."""
    config, device = text_config(model), input_device(model)
    takes = parameters(decoder(model))
    looked_up_again = getattr(config, "hidden_size_per_layer_input", None)  # in every layer: Gemma 3n and 4
    if "inputs_embeds" not in takes or looked_up_again:
        return {"input_ids": torch.arange(tokens, device=device)[None] % config.vocab_size}
    width = (
        getattr(config, "word_embed_proj_dim", None) or getattr(config, "embedding_size", None) or config.hidden_size
    )
    noise = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return {"inputs_embeds": noise.to(device, model.dtype)[None]}
