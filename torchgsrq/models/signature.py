"""The arguments of forwards. The name of the cache differs between versions of transformers: `cache` from 5.24 on,
`past_key_values` before, and in models with custom code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

CACHE_NAMES = ("cache", "past_key_values")


def parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's forward; those of its class if a wrapper hides them (profilers)."""
    classes = [vars(c)["forward"] for c in type(module).__mro__ if "forward" in vars(c)]
    found: list[str] = []
    for forward in (module.forward, *classes):
        named = [p for p in inspect.signature(forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        found = [p.name for p in named if p.name != "self"]
        if found:
            break
    return found


def cache_name(module: nn.Module) -> str:
    """The name of the cache argument of a module's forward; "" if it takes none."""
    names = parameters(module)
    return next((name for name in CACHE_NAMES if name in names), "")


def takes_cache(module: Any) -> bool:
    """Whether a module's forward takes a cache."""
    return isinstance(module, nn.Module) and bool(cache_name(module))


def with_cache(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The keyword argument that passes a cache to a forward or `generate`."""
    return {cache_name(module): cache}


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among a forward's arguments, under either name; else None."""
    for name in CACHE_NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def returned_cache(output: Any) -> Any:
    """The cache in the output of a forward, or of `generate` with a dict output; else None."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((x for x in parts if isinstance(x, Cache)), None)
