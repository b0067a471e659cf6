"""GSRQConfig: what a user chooses. Not how it is laid out (layout.py) or learned (learning/)."""

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
BITS = (2, 1.5, 1, 0.75, 0.5, 0.375, 0.25)  # that all heads can be given alike
RATES = (4, 3, *BITS)  # what a head may be given, under a mean of any number
SLIDINGS = ("keep", "quantize")
PREFILLS = ("exact", "quantized")
ALLOCATIONS = ("sensitivity", "uniform")
RECIPES = ("gsrq", "gsrq-paper")


@dataclass(frozen=True)
class GSRQConfig:
    """How a model's KV cache is quantized.

    Args:
        bits: mean bits per element of keys and values, from 0.25 to 2: any number where heads are given bits of their
            own, else one of 2, 1.5, 1, 0.75, 0.5, 0.375, 0.25.
        group_size: elements of a vector that share a code, a multiple of 8; more where a rate has fewer codes than
            that takes, fewer where it has more than 8 for each group. Larger groups cost more: tables, time to encode
            and to attend (docs/choosing.md).
        allocation: how calibration spreads bits over the keys and the values of all KV heads. ``"sensitivity"`` gives
            more to those whose errors change more of what the model says, none more than 4 and none less than half of
            the mean. ``"uniform"`` gives all the same, as does ``recipe="gsrq-paper"``. By default ``"sensitivity"``,
            or, with a warning, ``"uniform"`` for a model without gradients.
        sink_tokens: first real tokens of each row, kept in full precision.
        recent_tokens: newest tokens, kept in full precision.
        block_tokens: tokens that leave the recent window and are encoded together.
        prefill: what a prompt attends to: ``"exact"``, its own full-precision keys and values, or
            ``"quantized"``, what a token-by-token decode would have seen. Use that to measure quality: it holds for
            forwards with ``use_cache=False`` too, which else are those of the full-precision model.
        sliding: layers with a sliding window: ``"keep"`` their full-precision cache, which the window bounds, or
            ``"quantize"`` them too. Codes of all tokens are then held: less than the window in full precision up to
            contexts of 16 / bits times the window.
        skip_layers: indices of the layers that keep their full-precision cache.
        recipe: ``"gsrq"``, or ``"gsrq-paper"``, the paper's, with ``group_size=32``.

    Raises:
        ValueError: a field has a value that is not offered; the message says what is.
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
        """Whether heads get rates of their own."""
        return self.recipe == "gsrq" and self.allocation != "uniform"

    def codec_fields(self) -> dict[str, Any]:
        """The fields that decide what the codebooks are; the others only say how they are used."""
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
    """Refuse a rate that cannot be that of every head.

    Raises:
        ValueError: it is none of ``BITS``.
    """
    if bits not in BITS:
        offered = ", ".join(map(str, BITS))
        raise ValueError(f"bits={bits!r} is not offered where all heads have the same; choose one of {offered}")


def encoded_tokens(length: int, recent_tokens: int, block_tokens: int) -> int:
    """How many of a row's ``length`` appended tokens have been turned into codes.

    A pure function of the length, so that appending in any chunking gives the same codes: whole
    blocks leave the window, which so holds ``recent_tokens`` to ``recent_tokens + block_tokens - 1``.
    """
    return max(0, math.floor((length - recent_tokens) / block_tokens) * block_tokens)


def cache_folder() -> Path:
    """Where codebooks, kernels and the embedded model are kept: ``$TORCHGSRQ_CACHE``, or a folder in the user's cache
    folder. It may not be there yet.

    Raises:
        OSError: the user has no home folder (containers).
    """
    own, shared = os.environ.get("TORCHGSRQ_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own or Path(shared or "~/.cache") / "torchgsrq").expanduser()
    except RuntimeError as error:
        raise OSError(f"there is no cache folder ({error}): set TORCHGSRQ_CACHE to one") from error


def temporary_folder(what: str, error: Exception) -> Path:
    """A folder of this process alone, with a warning, for what the cache folder could not keep."""
    log.warning("%s cannot be kept: %s. Set TORCHGSRQ_CACHE to a folder that can be written to", what, error)
    folder = tempfile.mkdtemp(prefix="torchgsrq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
