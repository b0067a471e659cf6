"""Calibration: from a model to its codebooks."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from torchgsrq import models
from torchgsrq.codec import Codebooks, LayerCodec
from torchgsrq.codec.allocation import head_rates
from torchgsrq.codec.files import VERSION
from torchgsrq.codec.layout import key_layout, rates, value_layout
from torchgsrq.config import GSRQConfig, cache_folder
from torchgsrq.learning import text
from torchgsrq.learning.sensitivity import by_head, sensitivity
from torchgsrq.learning.statistics import Statistics, chunks, collect_cached, collect_statistics, share
from torchgsrq.learning.text import OWN_TOKENS, TOKENS
from torchgsrq.learning.train import train, train_cached
from torchgsrq.models import LayerInfo

log = logging.getLogger("torchgsrq")

WINDOW = 1024  # tokens of a calibration sequence
_RECIPE = 5  # goes up with what calibration reads and how it learns: codebooks in the disk cache are learned anew


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    config: GSRQConfig | None = None,
    data: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    tokens: int | None = None,
    max_memory: int = 2 << 30,
    progress: bool = True,
) -> Codebooks:
    """Learn a model's codebooks.

    Args:
        model: a transformers decoder, not quantized.
        config: rates, layout, frame, recipe and seed are used.
        data: text of the kind that the model will read: strings, token tensors, or batches. What it lacks of 16384
            tokens, or of ``tokens``, the model writes itself, which costs quality (docs/quality.md).
        tokenizer: for strings, and for lists that the model looks things up in (`text.recall_windows`); the one of
            ``model.name_or_path`` by default.
        tokens: how many to read, the first of the data, then the model's own; by default up to 32768 of the data. Half
            as much again is made of them, in whole windows of 1024: nothing of fewer than 2048. More take longer to
            read, not to cluster.
        max_memory: bytes of vectors held at a time; more layers than fit are calibrated in several passes.
        progress: show bars.

    Returns:
        Codebooks for every full-attention layer not in ``config.skip_layers``.

    Raises:
        TypeError, ValueError: the model, the rate for its head_dim, or the data do not fit; says why.
    """
    config = config or GSRQConfig()
    model = models.check_supported(model)
    if not isinstance(config, GSRQConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a GSRQConfig")
    if tokens is not None and tokens < text.FEWEST:
        raise ValueError(f"tokens={tokens}; calibration needs at least {text.FEWEST}, better {TOKENS}")
    if getattr(getattr(model, "_gsrq", None), "active", False):
        raise ValueError(f"{type(model).__name__} is quantized; call dequantize_kv_ first, then calibrate")
    with models.plain_precision(model), models.evaluating(model):
        return _calibrate(model, config, data, tokenizer, tokens, max_memory, progress)


def _calibrate(
    model: PreTrainedModel,
    config: GSRQConfig,
    data: Iterable[Any] | None,
    tokenizer: Any,
    tokens: int | None,
    max_memory: int,
    progress: bool,
) -> Codebooks:
    found = models.inspect_layers(model)
    layers = {info.index: info for info in found if quantizes(info, config)}
    facts: dict[str, Any] = {"config": config.codec_fields(), "model": models.fingerprint(model, found)}
    if model.name_or_path and not os.path.exists(model.name_or_path):
        facts["name"] = model.name_or_path  # of a hub
    if not layers:
        return Codebooks({}, {**facts, "source": "none", "tokens": 0})
    for info in layers.values():
        key_layout(info.head_dim, config.key_rate, config.layout)
        of_values = key_layout if info.value else value_layout
        of_values((info.value or info).head_dim, config.value_rate, config.layout)
    by_cache = models.are_decoded(found)
    if by_cache and (config.recipe != "gsrq" or config.allocation == "sensitivity"):
        raise ValueError(
            f"attention of {type(model).__name__} is not handed what it caches; that takes recipe='gsrq' with the same "
            f"bits in all heads, not recipe={config.recipe!r} with allocation={config.allocation!r}"
        )
    if config.recipe == "universal":
        shapes = {(info.kv_heads, info.head_dim) for info in layers.values()}
        made = {shape: Codebooks.universal(config, 1, *shape)[0] for shape in shapes}
        books = {i: made[info.kv_heads, info.head_dim] for i, info in layers.items()}
        return Codebooks(books, {**facts, "source": "none", "tokens": 0})
    windows, source = calibration_windows(model, data, tokenizer, tokens, config.seed, progress)
    spread = config.spreads_bits and not by_cache
    costs = _costs(model, config, layers, windows, max_memory, progress) if spread else None
    if costs:
        facts["sensitivity"] = {str(index): some for index, some in costs.items()}
    each = rates_of_heads(config, layers, costs)
    trained = _train_layers(model, config, each, layers, windows, max_memory, progress)
    return Codebooks(trained, {**facts, "source": source, "tokens": windows.numel()})


@torch.no_grad()
def calibrate_qkv(
    layers: Iterable[tuple[Tensor, Tensor, Tensor]],
    config: GSRQConfig | None = None,
    *,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    span: int = 8192,
) -> Codebooks:
    """Learn the codebooks of a decoder of your own from what its attention is given, layer by layer.

    All heads get the same bits; use `Codebooks.at` for lower rates and `GSRQTensor.empty` for buffers.

    Args:
        layers: for each layer queries ``[windows, q_heads, tokens, head_dim]``, keys and values ``[windows, kv_heads,
            tokens, head_dim]``, floating, after RoPE, of windows of text that begin at position 0; 16k tokens in all
            or more. Taken one after the other, so a generator may make them.
        config: rates, layout, frame, recipe and seed are used.
        inv_freq: ``[pairs]``, RoPE frequencies, of all layers; none without RoPE.
        interleaved: RoPE turns elements ``2i`` and ``2i + 1`` together, instead of ``i`` and ``i + pairs``.
        scale: of scores, ``head_dim ** -0.5`` by default.
        span: how far apart a query and a key can be.

    Raises:
        ValueError: no layers, shapes that do not fit together, NaN or inf, a rate that is not offered for the
            head_dim, or ``allocation="sensitivity"``, which takes a model.
    """
    config = config or GSRQConfig()
    if config.allocation == "sensitivity":
        raise ValueError('allocation="sensitivity" takes gradients of a model; here all heads get the same bits')
    if config.recipe == "universal":
        raise ValueError('recipe="universal" learns nothing: use Codebooks.universal')
    freq = torch.zeros(0) if inv_freq is None else inv_freq.detach().float()
    rope = models.NO_ROPE if inv_freq is None else "interleaved" if interleaved else "half-split"
    trained, tokens = {}, 0
    for i, given in enumerate(layers):
        q, k, v = _checked_qkv(i, tuple(given), freq)
        info = LayerInfo(i, "full_attention", q.shape[1], k.shape[1], k.shape[3], freq.to(k.device), interleaved, rope)
        stats = Statistics(info, share(k.shape[0], k.shape[2]))
        factor = k.shape[3] ** -0.5 if scale is None else scale
        for window in zip(q.split(1), k.split(1), v.split(1), strict=True):  # scores of one are held at a time
            stats.add(*window, factor, softcap=0.0, sink_logits=None)
        trained[i] = train(stats, config, [(config.key_rate, config.value_rate)] * k.shape[1], span)
        tokens = k.shape[0] * k.shape[2]
    if not trained:
        raise ValueError("layers is empty (an iterator gives its items once); expected (q, k, v) for each layer")
    return Codebooks(trained, {"config": config.codec_fields(), "model": None, "source": "data", "tokens": tokens})


def _checked_qkv(layer: int, given: tuple[Tensor, ...], inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if len(given) != 3 or not all(isinstance(x, Tensor) for x in given):
        raise ValueError(f"layers[{layer}] has {len(given)} items; expected three tensors: queries, keys and values")
    q, k, v = given
    shapes = f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)}"
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[1] % max(k.shape[1], 1) == 0
    if not fits or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"layers[{layer}] has {shapes}; expected [windows, heads, tokens, head_dim], as many query heads as a "
            "multiple of the KV heads, all else alike"
        )
    if k.shape[0] * k.shape[2] < text.FEWEST:
        raise ValueError(f"layers[{layer}] has {shapes}: calibration needs at least {text.FEWEST} tokens")
    if inv_freq.ndim != 1 or 2 * inv_freq.numel() > k.shape[3]:
        raise ValueError(
            f"inv_freq has shape {list(inv_freq.shape)}; expected [pairs], at most half of head_dim={k.shape[3]}"
        )
    if not all(x.is_floating_point() and bool(x.isfinite().all()) for x in (q, k, v)):
        raise ValueError(f"layers[{layer}] has {shapes} that are not floating, or hold NaN or inf")
    return q, k, v


def _costs(
    model: PreTrainedModel,
    config: GSRQConfig,
    layers: dict[int, LayerInfo],
    windows: Tensor,
    max_memory: int,
    progress: bool,
) -> dict[int, list[tuple[float, float]]] | None:
    """What errors of every head cost; None, with a warning, without gradients, unless the config asks for them."""
    try:
        return by_head(sensitivity(model, layers.values(), windows, max_memory, progress))
    except (ValueError, torch.OutOfMemoryError) as error:
        if config.allocation == "sensitivity":
            raise
        log.warning("all heads get the same bits: %s", error)
        return None


def rates_of_heads(
    config: GSRQConfig, layers: dict[int, LayerInfo], costs: dict[int, list[tuple[float, float]]] | None
) -> dict[int, list[tuple[float, float]]]:
    """Bits per element of the keys and values of every layer's heads; the same everywhere without ``costs``
    (`sensitivity.by_head`)."""
    if costs is None:
        return {i: [(config.key_rate, config.value_rate)] * info.kv_heads for i, info in layers.items()}
    dims = {i: info.head_dim for i, info in layers.items()}
    offered = {i: [(rates(info.head_dim),) * 2] * info.kv_heads for i, info in layers.items()}
    return head_rates(costs, dims, offered, config.key_rate, config.value_rate)


def calibration_windows(
    model: PreTrainedModel, data: Iterable[Any] | None, tokenizer: Any, tokens: int | None, seed: int, progress: bool
) -> tuple[Tensor, str]:
    """What a model reads in calibration, and a word on where it is from.

    Returns:
        token ids ``[n, window]``: data, or text that the model writes itself, and half as much again in which it has to
        look things up (`text.recall_windows`).
    """
    window = min(WINDOW, getattr(models.text_config(model), "max_position_embeddings", None) or WINDOW)
    own = "text the model wrote itself"
    most, least = (TOKENS, OWN_TOKENS) if tokens is None else (tokens, tokens)
    if data is None:
        stream, source = _own_text(model, least, window, seed, progress), own
        log.info("calibrating on text that the model wrote itself; real text of your own kind (data=) is better")
    else:
        stream, source = text.token_stream(model, data, most, tokenizer), "data"
        if (missing := least - stream.numel()) > 0:
            log.info("data holds %d of %d tokens; the model writes the other %d itself", len(stream), least, missing)
            try:
                written = _own_text(model, missing, window, seed, progress).to(stream.device)
                stream, source = torch.cat((stream, written)), f"{len(stream)} tokens of data, and {own}"
            except ValueError as error:  # a decoder without a head, say
                log.warning("calibrating on %d tokens, where %d are better: %s", len(stream), least, error)
    windows = text.cut(stream, window)
    tokenizer = text.known_tokenizer(model) if tokenizer is None else tokenizer
    return torch.cat((windows, text.recall_windows(windows, tokenizer, seed))), source


def _own_text(model: PreTrainedModel, tokens: int, window: int, seed: int, progress: bool) -> Tensor:
    """Tokens ``[tokens]`` that the model writes: in short rows, which is faster, and read as one text."""
    return text.own_text(model, tokens, window // 4, seed, progress).flatten()[:tokens]


def quantizes(info: LayerInfo, config: GSRQConfig) -> bool:
    """Whether a layer's cache is quantized: full attention, not skipped. A sliding window is bounded already, and
    quantized if the config says so."""
    kinds = (*models.UNBOUNDED, "sliding_attention") if config.sliding == "quantize" else models.UNBOUNDED
    return info.kind in kinds and info.index not in config.skip_layers


def _train_layers(
    model: PreTrainedModel,
    config: GSRQConfig,
    each: dict[int, list[tuple[float, float]]],
    layers: dict[int, LayerInfo],
    windows: Tensor,
    max_memory: int,
    progress: bool,
) -> dict[int, LayerCodec]:
    trained: dict[int, LayerCodec] = {}
    by_cache = models.are_decoded(layers.values())
    for chunk in chunks(list(layers.values()), windows, max_memory):
        if by_cache:
            cached = collect_cached(model, chunk, windows, progress)
            for index in tqdm(list(cached), desc="training codebooks", disable=not progress):
                trained[index] = train_cached(cached.pop(index), config, each[index][0])
            continue
        stats = collect_statistics(model, chunk, windows, progress)
        for index in tqdm(list(stats), desc="training codebooks", disable=not progress):
            trained[index] = train(stats.pop(index), config, each[index], models.rope_span(model))
    return trained


def cached_codebooks(
    model: PreTrainedModel, config: GSRQConfig, progress: bool = True, layers: list[LayerInfo] | None = None
) -> Codebooks:
    """The codebooks of the disk cache for this model and config, calibrated first if there are none.

    A file that cannot be read is replaced, and one that cannot be written costs a warning.
    """
    owner = models.fingerprint(model, layers or models.inspect_layers(model))
    skipped = "-skip" + "_".join(map(str, config.skip_layers)) if config.skip_layers else ""
    stem = f"{owner['shape']}-{config.codec_key()}{skipped}-v{VERSION}.{_RECIPE}"
    with contextlib.suppress(OSError):  # without a folder there are none
        for path in sorted(cache_folder().glob(f"{stem}-*.safetensors")):
            try:
                books = Codebooks.load(path)
                if models.same_model(books.metadata["model"], owner):
                    log.info("using the codebooks cached at %s", path)
                    return books
            except (ValueError, KeyError, TypeError, OSError) as error:
                log.warning("the codebooks cached at %s cannot be used and are learned again: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
    books = calibrate(model, config, progress=progress)
    which = hashlib.sha256(repr(owner["samples"]).encode()).hexdigest()[:12]
    try:
        path = cache_folder() / f"{stem}-{which}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        books.save(path)
        log.info("codebooks cached at %s", path)
    except OSError as error:
        log.warning(
            "the codebooks could not be kept, and will be learned again at the next start: %s. Set TORCHGSRQ_CACHE "
            "to a folder that can be written to, or calibrate once, save them, and pass codebooks=",
            error,
        )
    return books
