"""Observation of a running model: the inputs of its attention, and what it caches. All changes are undone."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from torchgsrq.models.parts import attention_configs, input_device


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run with another attention implementation, then restore the old ones."""
    before = [(config, config._attn_implementation) for config in attention_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


@contextmanager
def plain_precision(model: PreTrainedModel) -> Iterator[None]:
    """Run in the model's own dtypes, outside of autocast and inference mode."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(input_device(model).type, enabled=False):
        yield


@contextmanager
def quick_products(model: PreTrainedModel) -> Iterator[None]:
    """Run the matrix products of a float32 model in bfloat16 on CPUs with tiles for it (AMX), for readings that average
    over many tokens. Observers run outside of it (`notify`)."""
    device, tiles = input_device(model).type, getattr(torch.cpu, "_is_amx_tile_supported", bool)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cpu" and model.dtype == torch.float32 and tiles()):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, then restore every module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def own_generation(model: Any, **settings: Any) -> Any:
    """A shallow copy of the model whose `generate` uses only these settings. The user's ``generation_config`` is
    ignored and not changed, so other threads are not affected."""
    twin = copy.copy(model)
    twin.generation_config = GenerationConfig(**settings)
    return twin


@contextmanager
def refusing(what: str, instead: str = "") -> Iterator[None]:
    """Convert any exception of an unsupported architecture to a ValueError that says ``what`` failed, and what to do
    ``instead``.

    Out-of-memory errors are not converted.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error}){instead}") from error


OBSERVED = "gsrq_observed"  # the attention implementation (attention.py) that calls `notify`
Observer = Callable[..., Callable[[Tensor], None] | None]
_here = threading.local()  # the observers of this thread's forwards
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locking = threading.Lock()


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call ``observer(module, q, k, v, **kwargs)`` in every attention of the model's forwards in this thread.

    If the observer returns a function, that is called with the gradient of the attention's output,
    ``[batch, tokens, q_heads, head_dim]``. A second thread that observes the same model waits.
    """
    with _locking:
        lock = _locks.setdefault(model, threading.RLock())
    observers = _here.__dict__.setdefault("observers", [])
    with lock, attention_implementation(model, OBSERVED):
        observers.append(observer)
        try:
            yield
        finally:
            observers.pop()


def notify(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Callable[[Tensor], None] | None:
    """Report an attention call to this thread's newest observer; returns the observer's gradient hook, if any."""
    observers = _here.__dict__.get("observers")
    if not observers:
        return None
    with torch.autocast(q.device.type, enabled=False):
        return observers[-1](module, q, k, v, **kwargs)


def layer_index(module: nn.Module) -> int | None:
    """The layer whose self-attention an observed module is; None for cross-attention, and without a ``layer_idx``."""
    return None if getattr(module, "is_cross_attention", False) else getattr(module, "layer_idx", None)


class Recorder(DynamicCache):
    """A cache that records the keys and values of each ``update``."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.given: list[tuple[int, Tensor, Tensor]] = []
        self.rotary: dict[str, Tensor] = {}  # the model's frequencies in the forward that filled it

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Record the keys and values, then update the cache."""
        self.given.append((layer_idx, key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@dataclass
class Seen:
    """The inputs of one layer's attention at one position, and the RoPE frequencies of that forward."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    rotary: dict[str, Tensor]
