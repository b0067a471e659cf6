"""Layers of a cache that stay transformers' own (sliding windows, linear attention and others), and their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from torchgsrq.tensor import GSRQTensor

STATES = ("conv_states", "recurrent_states")  # of linear attention, each a dict of tensors


def linear_state(layer: Any) -> dict[str, Tensor]:
    """The states of a layer that has linear attention, alone or beside other attention; else an empty dict."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return {}
    named = {f"{name}.{i}": t for name in STATES for i, t in getattr(layer, name).items()}
    return {name: t for name, t in named.items() if t is not None}


def set_linear_state(layer: Any, state: dict[str, Tensor], device: torch.device | None = None) -> None:
    """Fill a layer with the states of `linear_state`, in their own dtypes."""
    for name, tensor in state.items():
        which, _, index = name.partition(".")
        tensor = tensor if device is None else tensor.to(device)
        layer.lazy_initialization(**{which: tensor, "state_idx": int(index)})
        getattr(layer, which)[int(index)].copy_(tensor)
        layer.has_previous_state[int(index)] = True


def select_rows(layer: Any, rows: Any) -> None:
    """Keep these batch rows (indices, or a bool mask) of the states of linear attention."""
    for name, tensor in linear_state(layer).items():
        which, _, index = name.partition(".")
        getattr(layer, which)[int(index)] = tensor[torch.as_tensor(rows, device=tensor.device)]


def wrong_with_linear(layer: Any, state: dict[str, Tensor], rows: int, said: list[str]) -> str | None:
    """Describe what is wrong with a file's tensors for the states of linear attention, whose names are ``said``; None
    if they are valid."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return f"has {', '.join(sorted(state))}, but no linear attention"
    if sorted(state) != sorted(said):
        return f"has {len(state)} states of linear attention, not {len(said)}"
    known = {f"{name}.{i}" for name in STATES for i in getattr(layer, name)}
    if not set(state) <= known:
        return f"has {', '.join(sorted(set(state) - known))}"
    for name, x in state.items():
        if not x.is_floating_point() or x.ndim < 2 or x.shape[0] != rows:
            return f"has {name} of {x.dtype} {list(x.shape)}, not of {rows} rows"
    return None


def nbytes(layer: Any) -> int:
    """Bytes of a layer's full-precision tensors."""
    own = [getattr(layer, name, None) for name in ("keys", "values")]
    plain = [t for t in own if isinstance(t, Tensor) and not isinstance(t, GSRQTensor)]
    return sum(t.untyped_storage().nbytes() for t in [*linear_state(layer).values(), *plain])
