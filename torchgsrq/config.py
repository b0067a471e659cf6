"""GSRQConfig: the settings of a quantized cache. Layouts are in codec/layout.py, training in learning/."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("torchgsrq")
BITS = (2, 1.5, 1, 0.75, 0.5, 0.375, 0.25)  # rates where all heads have the same
RATES = (4, 3, *BITS)  # rates of a single head, under a mean of any number
SLIDINGS = ("keep", "quantize")
PREFILLS = ("exact", "quantized")
ALLOCATIONS = ("sensitivity", "uniform")
RECIPES = ("gsrq", "gsrq-paper")


@dataclass(frozen=True)
class GSRQConfig:
    """How a model's KV cache is quantized.

    Args:
        bits: mean bits per element of keys and values, from 0.25 to 2: any number if each head has its own rate,
            else one of 2, 1.5, 1, 0.75, 0.5, 0.375, 0.25.
        group_size: elements of a vector that share a code, a multiple of 8. Groups are larger if the rate has too few
            codes for that, and smaller if it has more than 8 codes per group. Larger groups need larger codebooks
            and more time for encoding and attention (docs/choosing.md).
        allocation: how calibration allocates bits to the keys and the values of all KV heads. ``"sensitivity"`` gives
            more bits to heads whose errors change the model's output more: at most 4, at least half of the mean.
            ``"uniform"`` gives all heads the same, as does ``recipe="gsrq-paper"``. The default is ``"sensitivity"``,
            or, with a warning, ``"uniform"`` for a model without gradients.
        sink_tokens: number of first real tokens of each row kept in full precision.
        recent_tokens: minimum number of newest tokens kept in full precision.
        block_tokens: number of tokens that leave the recent window and are encoded together.
        prefill: what a prompt attends to: ``"exact"``, its own full-precision keys and values, or
            ``"quantized"``, what a token-by-token decode would have seen. Use ``"quantized"`` to measure quality: it
            also applies to forwards with ``use_cache=False``, which otherwise run the full-precision model.
        sliding: layers with a sliding window: ``"keep"`` their full-precision cache, which the window bounds, or
            ``"quantize"`` them too. They then hold codes of all tokens, which take less memory than the
            full-precision window up to contexts of 16 / bits times the window.
        skip_layers: indices of layers that keep their full-precision cache.
        recipe: ``"gsrq"``, or ``"gsrq-paper"``, our reading of the paper, with ``group_size=32``.

    Raises:
        ValueError: a field has an invalid value; the message lists the valid ones.
    """

    bits: float = 1
    group_size: int = 8
    allocation: str | None = None
    sink_tokens: int = 4
    recent_tokens: int = 128
    block_tokens: int = 32
    prefill: str = "exact"
    sliding: str = "keep"
    skip_layers: tuple[int, ...] = ()
    recipe: str = "gsrq"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("allocation", ALLOCATIONS),
            ("prefill", PREFILLS),
            ("sliding", SLIDINGS),
            ("recipe", RECIPES),
        ):
            if getattr(self, name) not in allowed and not (name == "allocation" and self.allocation is None):
                raise ValueError(f"{name}={getattr(self, name)!r} is not offered; choose one of {', '.join(allowed)}")
        if self.allocation == "sensitivity" and self.recipe != "gsrq":
            raise ValueError(f"allocation='sensitivity' is for recipe='gsrq'; {self.recipe!r} gives all heads the same")
        self._check_bits()
        for name, least in (("group_size", 8), ("sink_tokens", 0), ("recent_tokens", 0), ("block_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if self.group_size % 8:
            raise ValueError(f"group_size={self.group_size} must be a multiple of 8")
        if self.recipe == "gsrq-paper" and self.group_size != 32:
            raise ValueError(f"group_size={self.group_size}: the groups of recipe='gsrq-paper' are of 32 elements")
        skipped = self.skip_layers
        layers = tuple(skipped) if isinstance(skipped, (tuple, list, set, frozenset, range)) else (None,)
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
            raise ValueError(f"skip_layers={self.skip_layers!r} must hold layer indices, integers of at least 0")
        object.__setattr__(self, "skip_layers", tuple(sorted(set(layers))))

    def _check_bits(self) -> None:
        number = isinstance(self.bits, (int, float)) and not isinstance(self.bits, bool)
        if number and self.bits > max(BITS):
            raise ValueError(
                f"bits={self.bits!r}: this library is for 2 bits and fewer; for 4 or 8, transformers has QuantizedCache"
            )
        if not number or not self.bits >= min(BITS):
            raise ValueError(f"bits={self.bits!r} must be a number from {min(BITS)} to {max(BITS)}")
        if not self.spreads_bits:
            check_uniform(self.bits)

    @property
    def spreads_bits(self) -> bool:
        """Whether each head gets its own rate."""
        return self.recipe == "gsrq" and self.allocation != "uniform"

    def codec_fields(self) -> dict[str, Any]:
        """The fields that the codebooks depend on."""
        return {
            "bits": float(self.bits),
            "group_size": self.group_size,
            "allocation": "sensitivity" if self.spreads_bits else "uniform",
            "sliding": self.sliding,
            "skip_layers": list(self.skip_layers),
            "recipe": self.recipe,
        }

    def codec_key(self) -> str:
        """A short hash of `codec_fields`, for the disk cache."""
        return hashlib.sha256(json.dumps(self.codec_fields(), sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def check_uniform(bits: float) -> None:
    """Check a rate that all heads share.

    Raises:
        ValueError: it is not one of ``BITS``.
    """
    if bits not in BITS:
        offered = ", ".join(map(str, BITS))
        raise ValueError(f"bits={bits!r} is not offered where all heads have the same; choose one of {offered}")


def encoded_tokens(length: int, recent_tokens: int, block_tokens: int) -> int:
    """The number of a row's ``length`` appended tokens that are encoded.

    It depends on the length alone, so appending in any chunking gives the same codes. Tokens leave the window in whole
    blocks, so the window holds ``recent_tokens`` to ``recent_tokens + block_tokens - 1`` tokens.
    """
    return max(0, math.floor((length - recent_tokens) / block_tokens) * block_tokens)


def cache_folder() -> Path:
    """The folder for codebooks, kernels and the embedded model: ``$TORCHGSRQ_CACHE``, or a folder in the user's cache
    folder. It may not exist yet.

    Raises:
        OSError: the user has no home folder (containers).
    """
    own, shared = os.environ.get("TORCHGSRQ_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own or Path(shared or "~/.cache") / "torchgsrq").expanduser()
    except RuntimeError as error:
        raise OSError(f"there is no cache folder ({error}): set TORCHGSRQ_CACHE to one") from error


def temporary_folder(what: str, error: Exception) -> Path:
    """A temporary folder of this process, with a warning, for when the cache folder cannot be written to."""
    log.warning("%s cannot be kept: %s. Set TORCHGSRQ_CACHE to a folder that can be written to", what, error)
    folder = tempfile.mkdtemp(prefix="torchgsrq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
