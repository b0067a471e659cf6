"""The checks at the end of quantize_kv_: does the model read a quantized cache as it reads a plain one?"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from torchgsrq import models
from torchgsrq.cache import GSRQCache, kept
from torchgsrq.cache.layer import GSRQLayer
from torchgsrq.config import GSRQConfig

log = logging.getLogger("torchgsrq")
TESTED = "5.16 to 5.24"  # versions of transformers
_TOKENS = 8
_WINDOWS: dict[str, Any] = {"sink_tokens": 1, "recent_tokens": 2, "block_tokens": 1, "prefill": "quantized"}


@torch.no_grad()
def check_entry(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Run `generate` and a forward with ``use_cache``, both without a cache. Both have to return a `GSRQCache` that
    holds tokens in every quantized layer.

    Otherwise, an API renamed in another version of transformers would silently leave the model in full precision.

    Args:
        model: a quantized model.
        layers: indices of the quantized layers.

    Raises:
        ValueError: one of them fails or returns no such cache; names the model and the versions of transformers.
    """
    ids = torch.arange(3, 7, device=models.input_device(model))[None]

    def forward(**cache: Any) -> Any:
        return model(ids, use_cache=True, **cache)

    def generate(**cache: Any) -> Any:
        writer = models.own_generation(model, max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True)
        return writer.generate(ids, attention_mask=torch.ones_like(ids), **cache)

    with models.plain_precision(model), models.evaluating(model):
        _check_cache(model, "a forward with use_cache=True", layers, forward)
        if isinstance(model, GenerationMixin) and model.can_generate():
            _check_cache(model, "generate", layers, generate)


def _check_cache(model: PreTrainedModel, what: str, layers: Iterable[int], run: Callable[..., Any]) -> None:
    name, version = type(model).__name__, f"transformers {transformers.__version__} is installed, tested are {TESTED}"
    try:
        cache = models.returned_cache(run())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        try:
            run(**models.with_cache(model, DynamicCache(config=models.text_config(model))))
        except Exception:  # it fails without quantization too, so no text can silently stay in full precision
            log.warning("%s was not checked, since it fails without a quantized cache too: %s", what, error)
            return
        what = f"{what} failed over a quantized cache ({type(error).__name__}: {error})"
        raise ValueError(f"{name} is not supported: {what}; {version}") from error
    if cache is None and not isinstance(model, GenerationMixin):
        return  # a head that drops its decoder's cache
    if not isinstance(cache, GSRQCache):
        what = f"{what} returned a {type(cache).__name__} instead of a GSRQCache, so no text would be quantized"
        raise ValueError(f"{name} is not supported: {what}; {version}")
    empty = [str(i) for i in layers if not int(cache.layers[i].get_seq_length())]
    if empty:
        raise ValueError(f"{name} is not supported: {what} cached nothing in layers {', '.join(empty)}; {version}")


def check_attention(model: PreTrainedModel, config: GSRQConfig, make_cache: Callable[[GSRQConfig], GSRQCache]) -> None:
    """Compare a decode step over a quantized cache with one over a plain cache that holds the same tokens, decoded.

    The plain forward uses the model's own eager attention. This detects every model whose attention does more with
    keys and values than transformers' attention interface specifies.

    Args:
        model: a quantized model.
        config: the config of its cache.
        make_cache: creates an empty cache for a given config.

    Raises:
        ValueError: the forward fails, or the two differ by more than rounding; names the model.
    """
    name = type(model).__name__
    inner = models.decoder(model)
    with models.refusing(f"{name} is not supported: a forward over a quantized cache failed"):
        apart = _difference(model, inner, make_cache(dataclasses.replace(config, **_WINDOWS)))
    if not apart <= (1e-2 if model.dtype == torch.float32 else 0.15):  # float32 products may be of TF32 on a GPU
        raise ValueError(
            f"{name} is not supported: over a quantized cache its hidden states differ by {apart:.1%} from those over "
            "the same cache decoded, so its attention does more to keys and values than read them"
        )


def _difference(model: PreTrainedModel, inner: PreTrainedModel, cache: GSRQCache) -> float:
    """The relative difference between the hidden states of the two forwards."""
    with models.plain_precision(model), models.evaluating(inner):
        x = models.some_input(model, _TOKENS)
        _forward(inner, x, slice(0, _TOKENS - 1), cache)
        others = {i: copy.deepcopy(layer) for i, layer in enumerate(cache.layers) if not isinstance(layer, GSRQLayer)}
        states = [{name: t.clone() for name, t in kept.linear_state(layer).items()} for layer in cache.layers]
        got = _forward(inner, x, slice(_TOKENS - 1, _TOKENS), cache)
        twin = DynamicCache(config=models.text_config(model))
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, GSRQLayer):
                past = (buffer.dequantize()[:, :, : _TOKENS - 1] for buffer in (layer.keys, layer.values))
                twin.layers[i].update(*past)
                kept.set_linear_state(twin.layers[i], states[i])
            else:
                twin.layers[i] = others[i]
        with models.attention_implementation(model, "eager"):
            want = _forward(inner, x, slice(_TOKENS - 1, _TOKENS), twin)
    return models.difference(got, want)


def _forward(inner: PreTrainedModel, x: dict[str, Tensor], tokens: slice, cache: Any) -> Tensor:
    arguments = {name: t[:, tokens].clone() for name, t in x.items()}  # some models scale their input in place
    if "position_ids" in models.parameters(inner):
        arguments["position_ids"] = torch.arange(_TOKENS, device=next(iter(x.values())).device)[None, tokens]
    out = inner(**arguments, **models.with_cache(inner, cache), use_cache=True)
    return (out[0] if isinstance(out, tuple) else next(iter(out.values()))).float()
