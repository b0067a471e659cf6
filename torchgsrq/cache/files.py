"""Cache files: their content, and the checks before a cache is filled from one."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from torchgsrq.cache import kept
from torchgsrq.cache.layer import GSRQLayer
from torchgsrq.codec.sealed import Format

CACHE = Format("torchgsrq.cache", 4, "cache file", "read the prompt again")
WINDOWS = ("sink_tokens", "recent_tokens", "block_tokens")


def pack(cache: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Convert a GSRQCache to named tensors and texts.

    Raises:
        ValueError: it has sliding-window layers of fixed size.
    """
    tensors = {}
    for i, layer in enumerate(cache.layers):
        state = kept.linear_state(layer)
        tensors.update({f"{i}.{name}": tensor for name, tensor in state.items()})
        if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        if isinstance(layer, GSRQLayer):
            state = layer.state()
        elif layer.is_sliding and layer.is_compileable:
            raise ValueError(f"layer {i} is a {type(layer).__name__}, which cannot be saved; use a growing cache")
        else:  # a fixed layer has more slots than tokens
            held = layer.keys.shape[2] if layer.is_sliding else int(layer.get_seq_length())
            state = {"keys": layer.keys[:, :, :held], "values": layer.values[:, :, :held]}
        tensors.update({f"{i}.{name}": tensor for name, tensor in state.items()})
    attention = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    whole = int(cache.get_seq_length())  # linear attention has no length of its own
    lengths = [int(layer.get_seq_length()) if layer in attention else whole for layer in cache.layers]
    rows = next((layer.keys.shape[0] for layer in attention if layer.is_initialized), 0)
    windows = {field: getattr(cache.config, field) for field in WINDOWS}
    about = {"codebooks": cache.codebooks.digest, "lengths": lengths, "rows": rows}
    states = [sorted(kept.linear_state(layer)) for layer in cache.layers]
    return tensors, {"facts": json.dumps({**windows, **about, "states": states})}


def fill(cache: Any, source: str | bytes, name: str) -> None:
    """Fill an empty GSRQCache from a file with the content of `pack`, or from its bytes; ``name`` is for messages.

    Raises:
        ValueError: the file does not fit this cache, which is left unchanged.
    """
    if int(cache.get_seq_length()):
        raise ValueError("this cache holds tokens already; load into a new one")
    if any(sliding and layer.is_compileable for sliding, layer in zip(cache.is_sliding, cache.layers, strict=True)):
        raise ValueError("fixed sliding-window layers cannot be filled from a file; use a growing cache")
    tensors, meta = CACHE.read(source, name)
    lengths, rows, linear_states = _facts(cache, meta, name)
    longest = max(lengths, default=0)
    states = [
        {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == str(i)}
        for i in range(len(cache.layers))
    ]
    for i, (layer, state, length) in enumerate(zip(cache.layers, states, lengths, strict=True)):
        wrong = _wrong_with(layer, state, length, rows, linear_states[i])
        if length not in (longest, 0) and not wrong:
            wrong = f"has {length} tokens in the metadata, others have {longest}"
        if wrong:
            raise ValueError(f"{name} is damaged, not a whole cache file: layer {i} {wrong}")
    CACHE.check_sum(tensors, meta, name)
    for layer, state, length in zip(cache.layers, states, lengths, strict=True):
        linear, state = _split(state)
        kept.set_linear_state(layer, linear, cache.model_device)
        if not state:
            continue
        if isinstance(layer, GSRQLayer):
            layer.set_state(state, length, cache.model_dtype)
        else:
            keys, values = (
                state[x].to(cache.model_device, cache.model_dtype or state[x].dtype) for x in ("keys", "values")
            )
            layer.update(keys, values)
            if isinstance(getattr(layer, "cumulative_length", None), int):
                layer.cumulative_length = length  # a sliding window has seen more tokens than it holds
    cache.rows_are_placed = longest > 0


def _facts(cache: Any, meta: dict[str, str], name: str) -> tuple[list[int], int, list[list[str]]]:
    """The number of tokens of every layer, the number of rows, and the names of every layer's states, checked against
    this cache."""
    try:
        facts = json.loads(meta["facts"])
        lengths, rows = [int(x) for x in facts["lengths"]], int(facts["rows"])
        windows = {field: int(facts[field]) for field in WINDOWS}
        digest = str(facts["codebooks"])
        states = [[str(x) for x in names] for names in facts.get("states", [[]] * len(lengths))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is damaged, not a whole cache file: {error}") from error
    if digest != cache.codebooks.digest or not len(lengths) == len(states) == len(cache.layers):
        raise ValueError(f"{name} was written with other codebooks than this cache's")
    for field, value in windows.items():
        if value != getattr(cache.config, field):
            raise ValueError(
                f"{name} has {field}={value}, this cache {getattr(cache.config, field)}: quantize with the same"
            )
    longest, fits = max(lengths, default=0), [x.get_max_length() for x in cache.quantized_layers]
    if any(-1 < capacity < longest for capacity in fits):
        raise ValueError(f"{name} holds {longest} tokens; this cache holds {min(fits)}")
    return lengths, rows, states


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a file's tensors for a layer into states of linear attention, and tensors of keys and values."""
    linear = {name: x for name, x in state.items() if name.partition(".")[0] in kept.STATES}
    return linear, {name: x for name, x in state.items() if name not in linear}


def _wrong_with(layer: Any, state: dict[str, Tensor], length: int, rows: int, states: list[str]) -> str | None:
    """Describe what is wrong with a file's tensors for a layer; None if they are valid."""
    linear, state = _split(state)
    if linear or isinstance(layer, LinearAttentionCacheLayerMixin):
        wrong = kept.wrong_with_linear(layer, linear, rows, states)
        if wrong or not isinstance(layer, CacheLayerMixin):
            return wrong
    if not state:  # a layer without attention has no tensors
        missing = length and isinstance(layer, CacheLayerMixin)
        return f"is missing, and should hold {length} tokens" if missing else None
    if isinstance(layer, GSRQLayer):
        return layer.check_state(state, length, rows)
    if set(state) != {"keys", "values"}:
        return f"has {', '.join(sorted(state))} instead of keys and values"
    keys, values = state["keys"], state["values"]
    least = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    for x in (keys, values):
        if not x.is_floating_point() or x.ndim != 4 or x.shape[0] != rows or not least <= x.shape[2] <= length:
            return f"has {x.dtype} {list(x.shape)}, not {least} tokens of {rows} rows"
    return None
