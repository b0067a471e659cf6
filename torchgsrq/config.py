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
BITS = (2, 1.5, 1, 0.75, 0.5, 0.375, 0.25)
RATES = (4, 3, *BITS)  # what a head may be given, under a mean that is one of BITS
LAYOUTS = ("quality", "fast")
SLIDINGS = ("keep", "quantize")
PREFILLS = ("exact", "quantized")
ALLOCATIONS = ("sensitivity", "uniform")
RECIPES = ("gsrq", "gsrq-paper", "kmeans", "universal")


@dataclass(frozen=True)
class GSRQConfig:
    """How a model's KV cache is quantized.

    Args:
        bits: mean bits per element of keys and values, one of 2, 1.5, 1, 0.75, 0.5, 0.375, 0.25.
        key_bits: mean bits per key element; defaults to ``bits``.
        value_bits: mean bits per value element; defaults to ``bits``.
        layout: ``"quality"`` (residual codes of whole heads) or ``"fast"`` (one code for each small group of elements:
            small tables, hardly any cost to encode).
        allocation: how calibration spreads bits over the keys and the values of all KV heads. ``"sensitivity"`` gives
            more to those whose errors change more of what the model says, none more than 4 and none less than half of
            the mean; where ``key_bits`` and ``value_bits`` differ, each is a mean of its own. ``"uniform"`` gives all
            the same, as do recipes other than ``"gsrq"``. By default ``"sensitivity"``, or, with a warning,
            ``"uniform"`` for a model without gradients.
        frame: tokens per anchored frame; a key is coded in the coordinates of its frame. By default 512 with
            ``layout="quality"`` and 1024 with ``"fast"``.
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
        recipe: ``"gsrq"`` (default), ``"gsrq-paper"``, ``"kmeans"``, or ``"universal"`` (no data).
        beam: width of the encoder's beam search; by default (``None``) 4 with ``"quality"``, and 1, greedy, with
            ``"fast"``, whose sweep over the stages makes up for nearly all of it.
        seed: seed of calibration.
        codebooks: path of a file of codebooks; ``None`` looks in the disk cache, then calibrates.

    Raises:
        ValueError: a field has a value that is not offered; the message says what is.
    """

    bits: float = 1
    key_bits: float | None = None
    value_bits: float | None = None
    layout: str = "quality"
    allocation: str | None = None
    frame: int | None = None
    sink_tokens: int = 4
    recent_tokens: int = 128
    block_tokens: int = 32
    prefill: str = "exact"
    sliding: str = "keep"
    skip_layers: tuple[int, ...] = ()
    recipe: str = "gsrq"
    beam: int | None = None
    seed: int = 0
    codebooks: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "key_bits", "value_bits"):
            value = getattr(self, name)
            if value is None and name != "bits":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in BITS:
                more = isinstance(value, (int, float)) and value > max(BITS)
                raise ValueError(
                    f"{name}={value!r} is not offered; choose one of {', '.join(map(str, BITS))}"
                    + (
                        ". This library is for 2 bits and fewer; for 4 or 8, transformers has QuantizedCache"
                        if more
                        else ""
                    )
                )
        for name, allowed in (
            ("layout", LAYOUTS),
            ("allocation", ALLOCATIONS),
            ("prefill", PREFILLS),
            ("sliding", SLIDINGS),
            ("recipe", RECIPES),
        ):
            if getattr(self, name) not in allowed and not (name == "allocation" and self.allocation is None):
                raise ValueError(f"{name}={getattr(self, name)!r} is not offered; choose one of {', '.join(allowed)}")
        if self.allocation == "sensitivity" and self.recipe != "gsrq":
            raise ValueError(f"allocation='sensitivity' is for recipe='gsrq'; {self.recipe!r} gives all heads the same")
        for name, least in (("frame", 1), ("sink_tokens", 0), ("recent_tokens", 0), ("block_tokens", 1), ("beam", 1)):
            value = getattr(self, name)
            if name in ("frame", "beam") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        skipped = self.skip_layers
        layers = tuple(skipped) if isinstance(skipped, (tuple, list, set, frozenset, range)) else (None,)
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
            raise ValueError(f"skip_layers={self.skip_layers!r} must hold layer indices, integers of at least 0")
        object.__setattr__(self, "skip_layers", tuple(sorted(set(layers))))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if self.codebooks is not None and not isinstance(self.codebooks, (str, os.PathLike)):
            raise TypeError(
                f"codebooks is a {type(self.codebooks).__name__}; in a config it is the path of a file "
                "(pass Codebooks to quantize_kv_ itself)"
            )

    @property
    def key_rate(self) -> float:
        """Mean bits per key element."""
        return self.bits if self.key_bits is None else self.key_bits

    @property
    def value_rate(self) -> float:
        """Mean bits per value element."""
        return self.bits if self.value_bits is None else self.value_bits

    @property
    def spreads_bits(self) -> bool:
        """Whether heads get rates of their own."""
        return self.recipe == "gsrq" and self.allocation != "uniform"

    @property
    def key_frame(self) -> int:
        """Tokens per anchored frame."""
        return self.frame or (512 if self.layout == "quality" else 1024)

    @property
    def beam_width(self) -> int:
        """Candidates of the encoder's search."""
        return self.beam or (4 if self.layout == "quality" else 1)

    def codec_fields(self) -> dict[str, Any]:
        """The fields that decide what the codebooks are; the others only say how they are used."""
        more = {"sliding": self.sliding} if self.sliding != "keep" else {}  # older files know no other
        return more | {
            "key_bits": float(self.key_rate),
            "value_bits": float(self.value_rate),
            "layout": self.layout,
            "allocation": "sensitivity" if self.spreads_bits else "uniform",
            "frame": self.key_frame,
            "recipe": self.recipe,
            "seed": self.seed,
        }

    def codec_key(self) -> str:
        """A short hash of `codec_fields`, for the disk cache."""
        return hashlib.sha256(json.dumps(self.codec_fields(), sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "codebooks": None if self.codebooks is None else os.fspath(self.codebooks)}


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
