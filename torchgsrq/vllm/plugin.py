"""What vLLM calls in each of its processes, before it knows of a model (entry point ``vllm.general_plugins``)."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Offer pages of codes to models that ask with ``additional_config={"gsrq": {...}}``; others do not change."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from torchgsrq.vllm.specs import register_specs

    # The CPU platform takes its own backend whatever it is asked for: in its place, one that is it for other models.
    register_backend(AttentionBackendEnum.CPU_ATTN, "torchgsrq.vllm.backend.ChosenBackend")
    register_specs()
    _check_each_config()


def _check_each_config() -> None:
    """Let a platform refuse what cannot be served as soon as a config is made: in the process of the user, and on
    platforms where no layer would ever ask for codes."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    own = platform.check_and_update_config
    if getattr(own, "checks_codes", False):
        return

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        own(vllm_config)
        check(vllm_config)

    check_and_update_config.checks_codes = True  # type: ignore[attr-defined]
    platform.check_and_update_config = classmethod(check_and_update_config)


def check(vllm_config: Any) -> None:
    """Refuse an engine that asks for codes and cannot be served on them.

    Raises:
        ValueError: see `settings_of` and `Engine`.
        FileNotFoundError: there are no codebooks.
    """
    from torchgsrq.vllm.engine import Engine
    from torchgsrq.vllm.settings import settings_of

    settings = settings_of(vllm_config)
    if settings is not None and vllm_config.model_config is not None:
        Engine(settings, vllm_config)  # each worker makes its own, of its rank
