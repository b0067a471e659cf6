"""What a user asks of the plugin: ``additional_config={"gsrq": {...}}``."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig

KEY = "gsrq"
FIELDS = ("sink_tokens", "recent_tokens", "block_tokens", "prefill", "skip_layers")


@dataclass(frozen=True, eq=False)
class Settings:
    """Codebooks, and how they are used.

    Attributes:
        path: where the codebooks were read from.
        books: of the whole model; `Codebooks.shard` gives those of a rank.
        config: the fields of `GSRQConfig` that say how codes are used.
    """

    path: str
    books: Codebooks
    config: GSRQConfig

    @property
    def held_tokens(self) -> int:
        """Most tokens before the newest one that a query reads exactly, sinks aside."""
        return self.config.recent_tokens + self.config.block_tokens - 1


def settings_of(vllm_config: Any) -> Settings | None:
    """The settings of an engine's config, or None if it does not ask for codes.

    Raises:
        ValueError: an unknown key, no codebooks, a file that holds none, or a value that `GSRQConfig` refuses.
        FileNotFoundError: no such file.
    """
    asked = getattr(vllm_config, "additional_config", None)
    if not isinstance(asked, dict) or KEY not in asked:
        return None
    if not isinstance(asked[KEY], dict):
        raise ValueError(f'additional_config["{KEY}"] is {asked[KEY]!r}; expected an object with the key "codebooks"')
    return _settings(json.dumps(asked[KEY], sort_keys=True))


@functools.cache
def _settings(text: str) -> Settings:
    asked = json.loads(text)
    unknown = sorted(set(asked) - {"codebooks", *FIELDS})
    if unknown:
        offered = ", ".join(("codebooks", *FIELDS))
        raise ValueError(f'additional_config["{KEY}"] has unknown keys: {", ".join(unknown)}; choose from {offered}')
    path = asked.pop("codebooks", None)
    if not isinstance(path, str) or not path:
        raise ValueError(
            f'additional_config["{KEY}"] names no codebooks: {{"codebooks": "books.safetensors"}}, a file of '
            "torchgsrq calibrate"
        )
    config = GSRQConfig(**asked)
    if config.sink_tokens and config.recent_tokens + config.block_tokens <= 1:
        raise ValueError("sink_tokens without a window: choose recent_tokens of at least 1, or sink_tokens=0")
    if not Path(path).exists():
        raise FileNotFoundError(f"there are no codebooks at {path}: make them with torchgsrq calibrate")
    return Settings(path, Codebooks.load(path), config)
