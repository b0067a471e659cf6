"""Calibration: from a model to its codebooks."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchgsrq import models
from torchgsrq.codec import Codebooks, LayerCodec
from torchgsrq.codec.allocation import head_rates
from torchgsrq.codec.layout import Layout, rates
from torchgsrq.config import GSRQConfig, check_uniform
from torchgsrq.kernels import compiler, cpu_library
from torchgsrq.learning import text
from torchgsrq.learning.progress import bar, showing
from torchgsrq.learning.sensitivity import by_head, sensitivity
from torchgsrq.learning.statistics import Statistics, chunks, collect_cached, collect_statistics, share
from torchgsrq.learning.text import OWN_TOKENS, TOKENS
from torchgsrq.learning.train import train, train_cached
from torchgsrq.models import LayerInfo
from torchgsrq.ops import use_kernels

log = logging.getLogger("torchgsrq")

WINDOW = 1024  # tokens of a calibration sequence
MEMORY = 2 << 30  # bytes of vectors held at a time
RECIPE = 7  # increased when calibration changes, so that codebooks in the disk cache are learned again


@overload
def calibrate(
    model: PreTrainedModel,
    config: GSRQConfig | None = None,
    data: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    tokens: int | None = None,
    seed: int = 0,
    max_memory: int = MEMORY,
    progress: bool = True,
) -> Codebooks: ...
@overload
def calibrate(
    model: PreTrainedModel,
    config: Sequence[GSRQConfig],
    data: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    tokens: int | None = None,
    seed: int = 0,
    max_memory: int = MEMORY,
    progress: bool = True,
) -> list[Codebooks]: ...
def calibrate(
    model: PreTrainedModel,
    config: GSRQConfig | Sequence[GSRQConfig] | None = None,
    data: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    tokens: int | None = None,
    seed: int = 0,
    max_memory: int = MEMORY,
    progress: bool = True,
) -> Codebooks | list[Codebooks]:
    """Learn a model's codebooks.

    Args:
        model: a transformers decoder that is not quantized.
        config: sets bits, group size, allocation, recipe, and the layers to quantize. Pass a list to get codebooks for
            several configs from one reading: ``calibrate(model, [GSRQConfig(bits=1), GSRQConfig(bits=0.5)])``.
        data: text of the kind that the model will read: strings, token tensors, or batches. If it has fewer than 16384
            tokens, or than ``tokens``, the model writes the rest itself, which costs quality
            (docs/research/quality.md).
        tokenizer: for strings in ``data``, and for the lists of `text.recall_windows`; by default the one of
            ``model.name_or_path``.
        tokens: number of tokens to read, first from the data, then text of the model's own; by default up to 32768 of
            the data. Half as much again is made from them, in whole windows of 1024 tokens: none from fewer than 2048.
            More tokens take longer to read, but not to cluster.
        seed: seed of all random draws.
        max_memory: bytes of vectors held at a time; if not all layers fit, they are calibrated in several passes.
        progress: show progress bars.

    Returns:
        Codebooks for every full-attention layer not in ``config.skip_layers``; a list of them for a list of configs.

    Raises:
        TypeError: the model, the config or an item of the data has a wrong type.
        ValueError: the model is quantized already or not supported, the rate is not offered for its head_dim, or the
            data is too short or does not fit the model.
    """
    several = isinstance(config, (list, tuple))
    configs: list[Any] = list(config) if isinstance(config, (list, tuple)) else [config or GSRQConfig()]
    model = models.check_supported(model)
    for one in configs:
        if not isinstance(one, GSRQConfig):
            raise TypeError(f"config is a {type(one).__name__}; expected a GSRQConfig or a list of them")
    if tokens is not None and tokens < text.FEWEST:
        raise ValueError(f"tokens={tokens}; calibration needs at least {text.FEWEST}, better {TOKENS}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed={seed!r} must be an integer")
    if getattr(getattr(model, "_gsrq", None), "active", False):
        raise ValueError(f"{type(model).__name__} is quantized; call dequantize_kv_ first, then calibrate")
    with showing(progress):
        found = calibrate_layers(
            model, models.inspect_layers(model), configs, data, tokenizer, tokens, seed, max_memory
        )
    return found if several else found[0]


@torch.no_grad()
def calibrate_layers(
    model: PreTrainedModel,
    found: list[LayerInfo],
    configs: Sequence[GSRQConfig],
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
    tokens: int | None = None,
    seed: int = 0,
    max_memory: int = MEMORY,
) -> list[Codebooks]:
    """`calibrate` for a model whose layers have been inspected."""
    by_cache = models.are_decoded(found)
    about: dict[str, Any] = {"model": models.fingerprint(model, found)}
    if model.name_or_path and not os.path.exists(model.name_or_path):
        about["name"] = model.name_or_path  # a hub ID
    for config in configs:
        _check(model, config, found, by_cache)
    layers = {info.index: info for info in found if any(quantizes(info, config) for config in configs)}
    facts = [{**about, "config": config.codec_fields(), "seed": seed} for config in configs]
    if not layers:
        return [Codebooks({}, {**some, "source": "none", "tokens": 0}) for some in facts]
    with models.plain_precision(model), models.evaluating(model):
        with _compiling():
            windows, source = calibration_windows(model, data, tokenizer, tokens, seed)
        costs = None
        if not by_cache and any(config.spreads_bits for config in configs):
            costs = _costs(model, configs, layers, windows, max_memory)
        each = []
        for config, some in zip(configs, facts, strict=True):
            mine = {i: info for i, info in layers.items() if quantizes(info, config)}
            spread = {i: costs[i] for i in mine} if costs and config.spreads_bits else None
            if spread:
                some["sensitivity"] = {str(index): x for index, x in spread.items()}
            each.append(rates_of_heads(config, mine, spread))
        trained = _train_layers(model, configs, each, layers, windows, seed, max_memory)
    text = {"source": source, "tokens": windows.numel()}
    return [Codebooks(books, {**some, **text}) for books, some in zip(trained, facts, strict=True)]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Compile the CPU kernels, if necessary, while the model writes; neither uses all cores."""
    thread = threading.Thread(target=cpu_library)
    wanted = not use_kernels.cache_info().currsize and bool(compiler())
    if wanted:
        thread.start()
    try:
        yield
    finally:
        if wanted:
            thread.join()


def _check(model: PreTrainedModel, config: GSRQConfig, found: list[LayerInfo], by_cache: bool) -> None:
    """Refuse a config that does not fit this model."""
    if by_cache and (config.recipe != "gsrq" or config.allocation == "sensitivity"):
        raise ValueError(
            f"attention of {type(model).__name__} does not receive what it caches; that takes recipe='gsrq' with the "
            f"same bits in all heads, not recipe={config.recipe!r} with allocation={config.allocation!r}"
        )
    dims = {x.head_dim for info in found if quantizes(info, config) for x in (info, info.value) if x}
    if by_cache or not config.spreads_bits:
        check_uniform(config.bits)
        for dim in dims:
            Layout.of(dim, config.bits, config.group_size)
    for dim in dims:
        if not rates(dim) or min(rates(dim)) > config.bits:
            allowed = ", ".join(map(str, rates(dim))) or "none"
            raise ValueError(f"bits={config.bits} is not offered for head_dim={dim}; its heads can have {allowed}")


@torch.no_grad()
def calibrate_qkv(
    layers: Iterable[tuple[Tensor, Tensor, Tensor]],
    config: GSRQConfig | None = None,
    *,
    inv_freq: Tensor | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    span: int = 8192,
    seed: int = 0,
) -> Codebooks:
    """Learn the codebooks of a decoder of your own from the inputs of its attention.

    All heads get the same bits. Create buffers with `GSRQTensor.empty`.

    Args:
        layers: for each layer, queries ``[windows, q_heads, tokens, head_dim]``, and keys and values ``[windows,
            kv_heads, tokens, head_dim]``, floating-point, after RoPE, from windows of text that begin at position 0.
            16k tokens or more in total are recommended. Layers are read one after the other, so a generator works.
        config: sets bits, group size and recipe.
        inv_freq: RoPE frequencies ``[pairs]`` of all layers, in radians per token; None without RoPE.
        interleaved: RoPE rotates elements ``2i`` and ``2i + 1`` together, instead of ``i`` and ``i + pairs``.
        scale: multiplier of the scores, ``head_dim ** -0.5`` by default.
        span: maximum distance between a query and a key, in tokens.
        seed: seed of all random draws.

    Returns:
        Codebooks with one entry per layer.

    Raises:
        ValueError: no layers, shapes that do not fit together, too few tokens, NaN or inf, a rate that is not offered
            for the head_dim, or ``allocation="sensitivity"``, which requires a model.
    """
    config = config or GSRQConfig()
    if config.allocation == "sensitivity":
        raise ValueError('allocation="sensitivity" takes gradients of a model; here all heads get the same bits')
    check_uniform(config.bits)
    freq = torch.zeros(0) if inv_freq is None else inv_freq.detach().float()
    rope = models.NO_ROPE if inv_freq is None else "interleaved" if interleaved else "half-split"
    trained, tokens = {}, 0
    for i, given in enumerate(layers):
        q, k, v = _checked_qkv(i, tuple(given), freq)
        info = LayerInfo(i, "full_attention", q.shape[1], k.shape[1], k.shape[3], freq.to(k.device), interleaved, rope)
        stats = Statistics(info, share(k.shape[0], k.shape[2]))
        factor = k.shape[3] ** -0.5 if scale is None else scale
        for window in zip(q.split(1), k.split(1), v.split(1), strict=True):  # to hold the scores of only one
            stats.add(*window, factor, softcap=0.0, sink_logits=None)
        trained[i] = train(stats, [(config, [(config.bits, config.bits)] * k.shape[1])], span, seed)[0]
        tokens = k.shape[0] * k.shape[2]
    if not trained:
        raise ValueError("layers is empty (an iterator gives its items once); expected (q, k, v) for each layer")
    fields = {**config.codec_fields(), "allocation": "uniform"}
    return Codebooks(trained, {"config": fields, "model": None, "seed": seed, "source": "data", "tokens": tokens})


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
    configs: Sequence[GSRQConfig],
    layers: dict[int, LayerInfo],
    windows: Tensor,
    max_memory: int,
) -> dict[int, list[tuple[float, float]]] | None:
    """The cost of every head's errors; without gradients None, with a warning, or an error if a config requires
    them."""
    try:
        return by_head(sensitivity(model, layers.values(), windows, max_memory))
    except (ValueError, torch.OutOfMemoryError) as error:
        if any(config.allocation == "sensitivity" for config in configs):
            raise
        for config in configs:
            check_uniform(config.bits)
        log.warning("all heads get the same bits: %s", error)
        return None


def rates_of_heads(
    config: GSRQConfig, layers: dict[int, LayerInfo], costs: dict[int, list[tuple[float, float]]] | None
) -> dict[int, list[tuple[float, float]]]:
    """Bits per element of the keys and values of every layer's heads, by their ``costs`` (`sensitivity.by_head`); equal
    for all heads if that is None."""
    if costs is None:
        return {i: [(config.bits, config.bits)] * info.kv_heads for i, info in layers.items()}
    dims = {i: info.head_dim for i, info in layers.items()}
    return head_rates(costs, dims, {i: rates(dim) for i, dim in dims.items()}, config.bits)


def calibration_windows(
    model: PreTrainedModel, data: Iterable[Any] | None, tokenizer: Any, tokens: int | None, seed: int
) -> tuple[Tensor, str]:
    """The calibration text of a model, and a description of its source.

    Returns:
        Token IDs ``[n, window]``: data, or text that the model writes itself, and half as much again in which it has to
        look things up (`text.recall_windows`).
    """
    window = min(WINDOW, getattr(models.text_config(model), "max_position_embeddings", None) or WINDOW)
    own = "text the model wrote itself"
    most, least = (TOKENS, OWN_TOKENS) if tokens is None else (tokens, tokens)
    if data is None:
        stream, source = _own_text(model, least, window, seed), own
        log.info("calibrating on text that the model wrote itself; real text of your own kind (data=) is better")
    else:
        stream, source = text.token_stream(model, data, most, tokenizer), "data"
        if (missing := least - stream.numel()) > 0:
            log.info("data holds %d of %d tokens; the model writes the other %d itself", len(stream), least, missing)
            try:
                written = _own_text(model, missing, window, seed).to(stream.device)
                stream, source = torch.cat((stream, written)), f"{len(stream)} tokens of data, and {own}"
            except ValueError as error:  # a decoder without a head, say
                log.warning("calibrating on %d tokens, where %d are better: %s", len(stream), least, error)
    windows = text.cut(stream, window)
    tokenizer = text.known_tokenizer(model) if tokenizer is None else tokenizer
    return torch.cat((windows, text.recall_windows(windows, tokenizer, seed))), source


def _own_text(model: PreTrainedModel, tokens: int, window: int, seed: int) -> Tensor:
    """Tokens ``[tokens]`` that the model writes, in short rows, which is faster, joined into one text."""
    return text.own_text(model, tokens, window // 4, seed).flatten()[:tokens]


def quantizes(info: LayerInfo, config: GSRQConfig) -> bool:
    """Whether a layer's cache is quantized: full attention, not skipped. A sliding window bounds its cache already, and
    is quantized only if the config says so."""
    kinds = (*models.UNBOUNDED, "sliding_attention") if config.sliding == "quantize" else models.UNBOUNDED
    return info.kind in kinds and info.index not in config.skip_layers


def _train_layers(
    model: PreTrainedModel,
    configs: Sequence[GSRQConfig],
    each: list[dict[int, list[tuple[float, float]]]],
    layers: dict[int, LayerInfo],
    windows: Tensor,
    seed: int,
    max_memory: int,
) -> list[dict[int, LayerCodec]]:
    """Train the codecs of all layers for each config; ``each`` has the bits of every layer's heads, by config."""
    trained: list[dict[int, LayerCodec]] = [{} for _ in configs]
    by_cache = models.are_decoded(layers.values())
    for chunk in chunks(list(layers.values()), windows, max_memory):
        stats: dict[int, Any] = (collect_cached if by_cache else collect_statistics)(model, chunk, windows)
        for index in bar(list(stats), "training codebooks"):
            held, which = stats.pop(index), [i for i, bits in enumerate(each) if index in bits]
            if by_cache:
                found = [train_cached(held, configs[i], seed) for i in which]
            else:
                found = train(held, [(configs[i], each[i][index]) for i in which], models.rope_span(model), seed)
            for i, codec in zip(which, found, strict=True):
                trained[i][index] = codec
    return trained
