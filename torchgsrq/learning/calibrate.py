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
RECIPE = 6  # goes up with what calibration reads and how it learns: codebooks in the disk cache are learned anew


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
        model: a transformers decoder, not quantized.
        config: bits, group size, allocation and recipe are used, and which layers are quantized. Several, for
            codebooks of each from one reading: ``calibrate(model, [GSRQConfig(bits=1), GSRQConfig(bits=0.5)])``.
        data: text of the kind that the model will read: strings, token tensors, or batches. What it lacks of 16384
            tokens, or of ``tokens``, the model writes itself, which costs quality (docs/research/quality.md).
        tokenizer: for strings, and for lists that the model looks things up in (`text.recall_windows`); the one of
            ``model.name_or_path`` by default.
        tokens: how many to read, the first of the data, then the model's own; by default up to 32768 of the data. Half
            as much again is made of them, in whole windows of 1024: nothing of fewer than 2048. More take longer to
            read, not to cluster.
        seed: of all that is drawn.
        max_memory: bytes of vectors held at a time; more layers than fit are calibrated in several passes.
        progress: show bars.

    Returns:
        Codebooks for every full-attention layer not in ``config.skip_layers``; a list of them for several configs.

    Raises:
        TypeError, ValueError: the model, the rate for its head_dim, or the data do not fit; says why.
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
    """`calibrate`, of a model whose layers are known."""
    by_cache = models.are_decoded(found)
    about: dict[str, Any] = {"model": models.fingerprint(model, found)}
    if model.name_or_path and not os.path.exists(model.name_or_path):
        about["name"] = model.name_or_path  # of a hub
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
    told = {"source": source, "tokens": windows.numel()}
    return [Codebooks(books, {**some, **told}) for books, some in zip(trained, facts, strict=True)]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Compile the CPU kernels, if they are not there yet, while the model writes; neither takes all of a machine."""
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
    """Refuse a config that this model cannot have."""
    if by_cache and (config.recipe != "gsrq" or config.allocation == "sensitivity"):
        raise ValueError(
            f"attention of {type(model).__name__} is not handed what it caches; that takes recipe='gsrq' with the same "
            f"bits in all heads, not recipe={config.recipe!r} with allocation={config.allocation!r}"
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
    """Learn the codebooks of a decoder of your own from what its attention is given, layer by layer.

    All heads get the same bits; `GSRQTensor.empty` makes buffers.

    Args:
        layers: for each layer queries ``[windows, q_heads, tokens, head_dim]``, keys and values ``[windows, kv_heads,
            tokens, head_dim]``, floating, after RoPE, of windows of text that begin at position 0; 16k tokens in all
            or more. Taken one after the other, so a generator may make them.
        config: bits, group size and recipe are used.
        inv_freq: ``[pairs]``, RoPE frequencies, of all layers; none without RoPE.
        interleaved: RoPE turns elements ``2i`` and ``2i + 1`` together, instead of ``i`` and ``i + pairs``.
        scale: of scores, ``head_dim ** -0.5`` by default.
        span: how far apart a query and a key can be.
        seed: of all that is drawn.

    Raises:
        ValueError: no layers, shapes that do not fit together, NaN or inf, a rate that is not offered for the
            head_dim, or ``allocation="sensitivity"``, which takes a model.
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
        for window in zip(q.split(1), k.split(1), v.split(1), strict=True):  # scores of one are held at a time
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
    """What errors of every head cost; None, with a warning, without gradients, unless the config asks for them."""
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
    """Bits per element of the keys and values of every layer's heads; the same everywhere without ``costs``
    (`sensitivity.by_head`)."""
    if costs is None:
        return {i: [(config.bits, config.bits)] * info.kv_heads for i, info in layers.items()}
    dims = {i: info.head_dim for i, info in layers.items()}
    return head_rates(costs, dims, {i: rates(dim) for i, dim in dims.items()}, config.bits)


def calibration_windows(
    model: PreTrainedModel, data: Iterable[Any] | None, tokenizer: Any, tokens: int | None, seed: int
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
    """Tokens ``[tokens]`` that the model writes: in short rows, which is faster, and read as one text."""
    return text.own_text(model, tokens, window // 4, seed).flatten()[:tokens]


def quantizes(info: LayerInfo, config: GSRQConfig) -> bool:
    """Whether a layer's cache is quantized: full attention, not skipped. A sliding window is bounded already, and
    quantized if the config says so."""
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
    """The codecs of all layers for each config, with these bits of its heads."""
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
