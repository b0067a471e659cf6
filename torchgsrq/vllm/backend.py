"""The attention backends: which layer takes which, and what its pages are."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from torchgsrq.vllm.engine import Engine, engine_of
from torchgsrq.vllm.settings import settings_of
from torchgsrq.vllm.specs import RingSpec, SharedWindowSpec, SinkSpec

logger = init_logger("vllm.torchgsrq")


class ChosenBackend(CPUAttentionBackend):
    """vLLM's own backend, but that layers of a model which asks for codes get `GSRQImpl`; `Companion` then gives each
    of them the backend of its pages."""

    @staticmethod
    def get_impl_cls() -> Any:
        """By what the model under construction asks for."""
        config = get_current_vllm_config_or_none()
        if config is None or settings_of(config) is None:
            return CPUAttentionBackend.get_impl_cls()
        from torchgsrq.vllm.layer import GSRQImpl

        return GSRQImpl


class PagesBackend(AttentionBackend):
    """The backend of a layer's codes, window or sinks; `codes_backend` makes that of codes for a size."""

    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012 (vLLM's own declaration)
    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012
    changes: dict[str, Any] = {}  # noqa: RUF012 (of the spec; none for window and sinks)
    layouts: tuple[KVCacheLayout, ...] = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @staticmethod
    def get_name() -> str:
        """The name that it is registered by."""
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> Any:
        """What attends."""
        from torchgsrq.vllm.layer import GSRQImpl

        return GSRQImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """What prepares a step."""
        from torchgsrq.vllm.layer import StepBuilder

        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages are never split."""
        return [MultipleOf(kv_cache_spec.block_size)] if kv_cache_spec is not None else [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of layers side by side where their sizes differ."""
        return cls.layouts

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The spec of the layer's pages."""
        return replace(spec, **cls.changes) if cls.changes else spec


@functools.cache
def codes_backend(block: int, token_bytes: int, page: int, alike: bool) -> type[PagesBackend]:
    """The backend of layers whose pages hold ``block`` tokens of so many bytes. vLLM lets a backend change the spec of
    a layer but does not pass the layer, so each size has a class of its own."""
    changes = {
        "block_size": block,
        "dtype": torch.uint8,
        "num_head_slots": 1,
        "state_content_bytes": token_bytes,
        "page_size_padded": page if page != block * token_bytes else None,
    }
    layout = KVCacheLayout.LBHNC if alike else KVCacheLayout.BLHNC
    name = f"CodesBackend_{block}_{token_bytes}_{page}_{layout.name}"
    return type(name, (PagesBackend,), {"changes": changes, "layouts": (layout,), "__module__": __name__})


class Companion(nn.Module, AttentionLayerBase):
    """The window of a layer, or its sinks: a cache that vLLM plans and allocates beside that of the layer itself.

    The one of the window is asked for its spec before the layer is, and gives the layer its backend: `settle`.
    """

    def __init__(self, name: str, impl: Any, sinks: bool) -> None:
        super().__init__()
        self.name, self.sinks = name, sinks
        self.owner = [impl]  # in a list: a module would register it
        self.kv_cache = torch.tensor([])
        self.pages: torch.Tensor | None = None  # once they are there

    def get_attn_backend(self) -> type[AttentionBackend]:
        """That of pages as they are."""
        return PagesBackend

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the pages; the first window logs what is served."""
        self.kv_cache = self.pages = kv_cache
        impl = self.owner[0]
        if not self.sinks and not impl.engine.described:
            impl.engine.described = True
            logger.info(impl.engine.describe(kv_cache.shape[0]))

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """The spec of the pages, or None where the layer has no such ones.

        Raises:
            ValueError: the layer cannot be served on codes; says why.
        """
        engine, impl = engine_of(vllm_config), self.owner[0]
        if not self.sinks:
            settle(engine, impl, vllm_config)
        if not impl.quantized or (self.sinks and not engine.config.sink_tokens) or not engine.held_tokens:
            return None
        sizes = engine.sizes
        exact = sizes.window_block * engine.exact_bytes
        shape = {
            "block_size": sizes.window_block,
            "num_kv_heads": impl.num_kv_heads,
            "head_size": impl.head_size,
            "dtype": engine.dtype,
            "page_size_padded": sizes.window_page if sizes.window_page != exact else None,
        }
        if self.sinks:
            return SinkSpec(**shape)
        if engine.shares_window:
            spec: Any = SharedWindowSpec(**shape, sliding_window=engine.held_tokens + 1)
        else:
            spec = RingSpec(**shape, held_tokens=engine.held_tokens)
        engine.window_blocks = spec.max_admission_blocks_per_request(vllm_config.max_in_flight_tokens, engine.longest)
        return spec


class KeptBackend(CPUAttentionBackend):
    """vLLM's own, for layers beside such with codes, whose pages have another size."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of layers side by side."""
        return (KVCacheLayout.BLHNC,)


def settle(engine: Engine, impl: Any, vllm_config: Any) -> None:
    """Find the layer of an impl, now that layers have names, and give it the backend of its codes, or vLLM's own."""
    from torchgsrq.vllm.layer import GSRQImpl

    context = vllm_config.compilation_config.static_forward_context
    owners = {n: x for n, x in context.items() if not isinstance(x, Companion) and hasattr(x, "impl")}
    engine.place({n: x.impl.sliding for n, x in owners.items() if isinstance(x.impl, GSRQImpl)})
    name, layer = next((n, x) for n, x in owners.items() if x.impl is impl)
    if name in engine.kept:
        with set_current_vllm_config(vllm_config):
            layer.impl, layer.attn_backend = CPUAttentionBackend.get_impl_cls()(*impl.given), KeptBackend
        return
    index, sizes = engine.layer_of(name), engine.sizes
    impl.take(engine, index)
    layer.attn_backend = codes_backend(sizes.block, sizes.token_bytes[index], sizes.pages[index], engine.alike)
