"""The disk cache of codebooks, keyed by the model and the config."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from torchgsrq import models
from torchgsrq.codec import Codebooks
from torchgsrq.codec.files import CODEBOOKS
from torchgsrq.config import GSRQConfig, cache_folder
from torchgsrq.learning.calibrate import RECIPE, calibrate_layers
from torchgsrq.learning.progress import showing
from torchgsrq.models import LayerInfo

log = logging.getLogger("torchgsrq")


def cached_codebooks(
    model: PreTrainedModel, layers: list[LayerInfo], configs: Sequence[GSRQConfig], progress: bool = True
) -> list[Codebooks]:
    """The codebooks of the disk cache for this model and each config. Missing ones are calibrated together.

    A file that cannot be read is replaced, with a warning. A file that cannot be written only causes a warning.
    """
    owner = models.fingerprint(model, layers)
    found = {config: books for config in configs if (books := _kept(config, owner)) is not None}
    missing = [config for config in dict.fromkeys(configs) if config not in found]
    if missing:
        with showing(progress):
            made = calibrate_layers(model, layers, missing)
        for config, books in zip(missing, made, strict=True):
            found[config] = books
            _keep(books, config, owner)
    return [found[config] for config in configs]


def _stem(config: GSRQConfig, owner: dict[str, Any]) -> str:
    return f"{owner['shape']}-{config.codec_key()}-v{CODEBOOKS.version}.{RECIPE}"


def _kept(config: GSRQConfig, owner: dict[str, Any]) -> Codebooks | None:
    """The codebooks of the disk cache for a model's fingerprint, or None."""
    with contextlib.suppress(OSError):  # without a cache folder there are none
        for path in sorted(cache_folder().glob(f"{_stem(config, owner)}-*.safetensors")):
            try:
                books = Codebooks.load(path)
                if models.same_model(books.metadata["model"], owner):
                    log.info("using the codebooks cached at %s", path)
                    return books
            except (ValueError, KeyError, TypeError, OSError) as error:
                log.warning("the codebooks cached at %s cannot be used and are learned again: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
    return None


def _keep(books: Codebooks, config: GSRQConfig, owner: dict[str, Any]) -> None:
    """Write codebooks to the disk cache, or warn."""
    which = hashlib.sha256(repr(owner["samples"]).encode()).hexdigest()[:12]
    try:
        path = cache_folder() / f"{_stem(config, owner)}-{which}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        books.save(path)
        log.info("codebooks cached at %s", path)
    except OSError as error:
        log.warning(
            "the codebooks could not be kept, and will be learned again at the next start: %s. Set TORCHGSRQ_CACHE "
            "to a folder that can be written to, or calibrate once, save them, and pass codebooks=",
            error,
        )
