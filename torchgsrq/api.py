"""quantize_kv_ and dequantize_kv_: what users call."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticCache

from torchgsrq import models
from torchgsrq.attention import NAME
from torchgsrq.cache import GSRQCache
from torchgsrq.calibrate import cached_codebooks, quantizes
from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.models import LayerInfo

log = logging.getLogger("torchgsrq")

_CACHE_IMPLEMENTATIONS = (None, "dynamic", "dynamic_full", "offloaded", "static", "offloaded_static")


@dataclass
class _State:
    """What `quantize_kv_` left on a model, and needs to undo it."""

    config: GSRQConfig
    codebooks: Codebooks
    attention: list[tuple[PreTrainedConfig, str]]
    hook: Any


def quantize_kv_(
    model: PreTrainedModel,
    config: GSRQConfig | None = None,
    *,
    codebooks: Codebooks | None = None,
    progress: bool = True,
) -> None:
    """Quantize a model's KV cache, in place. Weights are not touched; `dequantize_kv_` undoes it.

    Afterwards ``generate`` (in every mode), pipelines and plain forwards with ``use_cache`` keep their
    cache in codes. Without codebooks, those of the disk cache are used, else the model is calibrated
    first, on text that it writes itself.

    Args:
        model: any transformers decoder that uses the attention interface.
        config: see `GSRQConfig`.
        codebooks: from `calibrate` or `Codebooks.load`. Of a higher rate, its first stages are used.
        progress: show bars while calibrating.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unsupported architecture, a rate not offered for the head_dim, codebooks of
            another model, or a model quantized already.
    """
    config = config or GSRQConfig()
    model = models.check_supported(model)
    if hasattr(model, "_gsrq"):
        raise ValueError(f"{type(model).__name__} is quantized already; call dequantize_kv_ first")
    layers = models.inspect_layers(model)
    if max(config.skip_layers, default=0) > max(info.index for info in layers):
        raise ValueError(f"skip_layers={config.skip_layers} names a layer that the model's {len(layers)} do not have")
    if codebooks is None and config.codebooks is not None:
        codebooks = Codebooks.load(config.codebooks)
    wanted = [info for info in layers if quantizes(info, config)]
    if codebooks is None and wanted:
        codebooks = cached_codebooks(model, config, progress)
    books = _fitting(codebooks or Codebooks({}, {}), wanted, model, config).to(model.device)

    before = [(c, c._attn_implementation) for c in models.attention_configs(model)]
    for part, _ in before:
        part._attn_implementation = NAME
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(_GiveCache(decoder, books, config), with_kwargs=True)
    model._gsrq = _State(config, books, before, hook)
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = MethodType(_prepare_cache_for_generation, model)
    log.info("%s", describe(model, layers))
    if not len(books):
        log.warning("no layer of %s was quantized: see the table above", type(model).__name__)


def dequantize_kv_(model: PreTrainedModel) -> None:
    """Undo `quantize_kv_`, exactly.

    Raises:
        ValueError: the model is not quantized.
    """
    state = getattr(model, "_gsrq", None)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not quantized")
    for part, attention in state.attention:
        part._attn_implementation = attention
    state.hook.remove()
    model.__dict__.pop("_prepare_cache_for_generation", None)
    del model._gsrq


def new_cache(model: PreTrainedModel, max_cache_len: int | None = None) -> GSRQCache:
    """An empty cache for a quantized model; of fixed capacity, for `torch.compile`, with ``max_cache_len``."""
    state = getattr(model, "_gsrq", None)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not quantized; call quantize_kv_ first")
    return GSRQCache(state.codebooks, state.config, models.text_config(model), max_cache_len)


def describe(model: PreTrainedModel, layers: list[LayerInfo]) -> str:
    """The table of what happens to every layer's cache, consecutive equal layers in one line."""
    books = model._gsrq.codebooks
    rows: list[tuple[list[int], str]] = []
    for info in layers:
        if info.index in books:
            key, value = books[info.index]
            rates = (8 * key.num_codes / info.head_dim, 8 * value.num_codes / info.head_dim)
            what = "quantized: keys {:g} bits, values {:g} bits".format(*rates)
            what += f", {info.kv_heads} heads of {info.head_dim}, RoPE {info.rope}"
            what += f", frames of {key.frame}" if key.frame > 1 else ""
        elif info.kind != "full_attention":
            what = f"kept in full precision: {info.kind} is bounded by its window"
        else:
            what = "kept in full precision: in skip_layers"
        if rows and rows[-1][1] == what:
            rows[-1][0].append(info.index)
        else:
            rows.append(([info.index], what))
    lines = [f"  layers {r[0]}-{r[-1]}: {what}" if len(r) > 1 else f"  layer {r[0]}: {what}" for r, what in rows]
    return "\n".join([f"KV cache of {type(model).__name__}", *lines])


def _fitting(books: Codebooks, wanted: list[LayerInfo], model: PreTrainedModel, config: GSRQConfig) -> Codebooks:
    """The given codebooks, checked against the model and cut to the config's layers and rate."""
    owner = books.metadata.get("model")
    if wanted and owner is not None and owner != models.fingerprint(model):
        raise ValueError(
            f"the codebooks belong to another model (fingerprint {owner}, this one {models.fingerprint(model)})"
        )
    for info in wanted:
        if info.index not in books:
            raise ValueError(
                f"the codebooks have none for layer {info.index}; add it to skip_layers, or calibrate again"
            )
        for codec in books[info.index]:
            if (codec.heads, codec.head_dim) != (info.kv_heads, info.head_dim):
                raise ValueError(
                    f"the codebooks of layer {info.index} are for {codec.heads} heads of {codec.head_dim}; "
                    f"the model has {info.kv_heads} of {info.head_dim}"
                )
    cut = Codebooks({info.index: books[info.index] for info in wanted}, books.metadata)
    if wanted:
        key, value = cut[wanted[0].index]
        have = (8 * key.num_codes / key.head_dim, 8 * value.num_codes / value.head_dim)
        if have != (config.key_rate, config.value_rate):
            cut = cut.at(config.key_rate, config.value_rate)
        if config.recipe == "gsrq":  # the paper's is greedy; here the beam is the user's to choose
            cut = cut.with_beam(config.beam)
    return cut


class _GiveCache:
    """A forward pre-hook of the decoder: give it a quantized cache where it would make its own, and tell a new
    cache where its rows begin."""

    def __init__(self, decoder: nn.Module, codebooks: Codebooks, config: GSRQConfig) -> None:
        parameters = inspect.signature(decoder.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        self.codebooks, self.config = codebooks, config

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        if cache is None and use_cache and not module.training:
            cache = kwargs["past_key_values"] = GSRQCache(self.codebooks, self.config, module.config)
        if isinstance(cache, GSRQCache) and not cache.rows_are_placed:
            tokens = kwargs.get("input_ids")
            tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
            if isinstance(tokens, Tensor):
                cache.place_rows(tokens, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        return (), kwargs


def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
) -> None:
    """What transformers does, with quantized layers in the cache that it made."""
    kind = generation_config.cache_implementation
    if kind not in _CACHE_IMPLEMENTATIONS:
        raise ValueError(
            f"cache_implementation={kind!r}: a model with a quantized KV cache takes one of {_CACHE_IMPLEMENTATIONS}"
        )
    given = model_kwargs.get("past_key_values")
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kw)
    made = model_kwargs.get("past_key_values")
    if made is None or made is given:
        return
    state = self._gsrq
    capacity = max(layer.max_cache_len for layer in made.layers) if isinstance(made, StaticCache) else None
    cache = GSRQCache(state.codebooks, state.config, models.text_config(self), capacity, template=made)
    model_kwargs["past_key_values"] = cache
