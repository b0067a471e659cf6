"""The state that `quantize_kv_` leaves on a model, and the hooks that pass quantized caches to its forwards."""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from torchgsrq import models
from torchgsrq.attention import NAME
from torchgsrq.cache import GSRQCache
from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.models import LayerInfo

log = logging.getLogger("torchgsrq")
_CACHE_IMPLEMENTATIONS = (None, "dynamic", "offloaded", "static", "offloaded_static")
UNSUPPORTED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@dataclass
class State:
    """The state that `quantize_kv_` leaves on a model, with all that `dequantize_kv_` needs to undo it."""

    config: GSRQConfig
    codebooks: Codebooks
    layers: list[LayerInfo]
    attention: list[tuple[PreTrainedConfig, str]]
    hooks: list[Any]
    generating: list[nn.Module]
    warned: set[str] = field(default_factory=set)  # warnings already issued
    active: bool = True  # shared by shallow copies of a model, as are its layers
    checking: bool = False  # True while `quantize_kv_` compares with a plain cache

    @property
    def decodes(self) -> bool:
        """Whether the model keeps its own attention, which reads decoded tensors."""
        return models.are_decoded(self.layers)

    def new_cache(
        self,
        model: PreTrainedModel,
        max_cache_len: int | None = None,
        template: Cache | None = None,
        config: GSRQConfig | None = None,
    ) -> GSRQCache:
        """An empty cache for a model that shares this state, or for one of its parts."""
        rotaries = models.rotaries(model, self.layers)
        about = models.text_config(model)
        cache = GSRQCache(self.codebooks, config or self.config, about, max_cache_len, template, rotaries, self.decodes)
        cache.unmovable = models.unmovable(self.layers)
        return cache


def state_of(model: nn.Module) -> State | None:
    """The state of a quantized model; None if the model is not quantized."""
    state = getattr(model, "_gsrq", None)
    return state if state is not None and state.active else None


def refuse(what: str, model: PreTrainedModel, state: State, *args: Any, **kwargs: Any) -> Any:
    """Replaces a method, named ``what``, of a quantized model that would not use its quantized cache."""
    if not state.active:  # a shallow copy was dequantized
        return getattr(type(model), what)(model, *args, **kwargs)
    raise ValueError(
        f"{what} keeps keys and values in pages of its own, which are not quantized: call dequantize_kv_ first, or "
        "generate"
    )


@torch.compiler.assume_constant_result
def _log_warning(text: str) -> None:
    """Works in traced forwards too: there it logs once, while tracing."""
    log.warning("%s", text)


class GiveCache:
    """A forward pre-hook that passes a quantized cache to a module that would create its own. In the decoder, it also
    sets where the cache's rows begin, and refuses requests that cannot be quantized.

    Args:
        module: a module between the model and its decoder, both included.
        state: the state of the model.
        is_decoder: whether the module is the decoder itself, which gets masks and positions.
    """

    def __init__(self, module: nn.Module, state: State, is_decoder: bool) -> None:
        self.names = models.parameters(module)
        self.state, self.is_decoder = state, is_decoder

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the forward, all by name."""
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given = [kwargs[name] for name in models.CACHE_NAMES if kwargs.get(name) is not None]
        if len(given) > 1 and given[0] is not given[1]:
            raise ValueError(
                f"{type(module).__name__} was given two caches, a {type(given[0]).__name__} and a "
                f"{type(given[1]).__name__} (prefix tuning brings one of its own): it takes one, of torchgsrq.new_cache"
            )
        cache, use_cache = given[0] if given else None, kwargs.get("use_cache")
        measured = self.state.config.prefill == "quantized"  # then every forward reads what is stored
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        if cache is None and module.training and (measured or use_cache) and self.is_decoder:
            self._warn("is in training mode, in which forwards run in full precision", module)
        if cache is None and not module.training and (use_cache or (measured and self.is_decoder)):
            if torch.compiler.is_exporting():
                raise ValueError(
                    "torch.export of a forward that makes its own quantized cache is not supported: export with "
                    "use_cache=False (and prefill='exact'), or a module of your own that takes GSRQTensors"
                )
            cache = self.state.new_cache(module)
            kwargs = {name: x for name, x in kwargs.items() if name not in models.CACHE_NAMES}
            kwargs |= {**models.with_cache(module, cache), "use_cache": True}
        if self.is_decoder and cache is not None and not isinstance(cache, GSRQCache):
            self._warn(
                f"was given a {type(cache).__name__}, so this text is not quantized: give it "
                "torchgsrq.new_cache(model), or no cache",
                module,
            )
        if self.is_decoder and isinstance(cache, GSRQCache):
            self._check(module, kwargs)
            if not (torch.compiler.is_compiling() and cache.rows_are_placed):
                tokens = kwargs.get("input_ids")
                tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
                if isinstance(tokens, Tensor):
                    cache.place_rows(tokens, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        return (), kwargs

    def _warn(self, what: str, module: nn.Module) -> None:
        if what not in self.state.warned and not self.state.checking:
            self.state.warned.add(what)
            _log_warning(f"{type(module).__name__} {what}")

    def _check(self, module: Any, kwargs: dict[str, Any]) -> None:
        if self.state.decodes:
            return
        name = type(module).__name__
        implementation = module.config._attn_implementation
        if implementation != NAME:
            raise ValueError(
                f"the attention implementation of {name} was set to {implementation!r} after quantize_kv_, which "
                f"cannot read a quantized cache: call dequantize_kv_ first, or set_attn_implementation({NAME!r})"
            )
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True: attention on codes never forms the weights; call dequantize_kv_ first"
            )


def _knows_static_caches(function: Any) -> bool:
    """Whether a function treats transformers' own StaticCache specially, judged by its source."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # typed into a shell, or no plain function
        return False
    return any(f"isinstance({name}, StaticCache)" in source for name in models.CACHE_NAMES)


def prepare_cache_for_generation(
    self: Any,
    state: State,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """transformers' method, with quantized layers in the cache that it creates.

    Raises:
        ValueError: a kind of cache that cannot be quantized, or RoPE that would change while tokens are generated.
    """
    prepare = functools.partial(
        type(self)._prepare_cache_for_generation,
        self,
        generation_config,
        model_kwargs,
        generation_mode,
        batch_size,
        max_cache_length,
    )
    if not state.active:  # a shallow copy was dequantized
        prepare()
        return
    kind = generation_config.cache_implementation
    if kind not in _CACHE_IMPLEMENTATIONS:
        allowed = ", ".join(repr(x) for x in _CACHE_IMPLEMENTATIONS)
        raise ValueError(f"cache_implementation={kind!r}: a model with a quantized KV cache takes one of {allowed}")
    given_tokens = [model_kwargs.get(name) for name in ("attention_mask", "position_ids")]  # no mask where all are real
    prompt = next((x.shape[-1] for x in given_tokens if isinstance(x, Tensor)), 0)
    for rotary in models.rotaries(self, state.layers).values() if generation_config.use_cache else ():
        limit = rotary.changes_within(prompt, max_cache_length)
        if limit is not None:
            raise ValueError(
                f"the text would grow from {prompt} to up to {max_cache_length + 1} tokens, and past {limit} this "
                "model's RoPE changes, which a cache of codes cannot follow: generate fewer tokens, or choose a fixed "
                "RoPE scaling"
            )
    given = models.given_cache(model_kwargs)
    prepare()
    made = models.given_cache(model_kwargs)
    if made is None or made is given:
        return
    if isinstance(made, StaticCache) and _knows_static_caches(type(self).prepare_inputs_for_generation):
        raise ValueError(
            f"cache_implementation={kind!r}: {type(self).__name__} does something for transformers' StaticCache alone; "
            "generate with the default cache"
        )
    fixed = [getattr(layer, "max_cache_len", 0) for layer in made.layers]  # of a sliding window, no more than that
    capacity = max(max_cache_length, *fixed) if isinstance(made, StaticCache) else None
    name = next(name for name, x in model_kwargs.items() if x is made)
    model_kwargs[name] = state.new_cache(self, capacity, made)
