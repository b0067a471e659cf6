"""The user API: quantize_kv_, dequantize_kv_ and new_cache."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from torchgsrq import models
from torchgsrq.attention import NAME
from torchgsrq.cache import GSRQCache
from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.calibrate import WINDOW, quantizes
from torchgsrq.learning.disk import cached_codebooks
from torchgsrq.models import LayerInfo
from torchgsrq.probe import check_attention, check_entry
from torchgsrq.state import UNSUPPORTED, GiveCache, State, prepare_cache_for_generation, refuse, state_of

log = logging.getLogger("torchgsrq")


def quantize_kv_(
    model: PreTrainedModel,
    config: GSRQConfig | dict[str, Any] | None = None,
    *,
    codebooks: Codebooks | str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """Quantize a model's KV cache, in place. Weights are not touched; `dequantize_kv_` undoes it.

    Afterwards, ``generate`` (in every mode), pipelines and plain forwards with ``use_cache`` store their
    cache as codes. Without codebooks, those of the disk cache are used. If there are none, the model is
    calibrated first, on text that it writes itself.

    Args:
        model: any transformers decoder that uses the attention interface, also wrapped by `torch.compile` or PEFT.
        config: a `GSRQConfig`, or its fields as a dict; by default the config that the codebooks were made for, or
            ``GSRQConfig()`` without codebooks.
        codebooks: from `calibrate`, or the path of their file or folder.
        progress: show progress bars while calibrating.

    Raises:
        TypeError: the model is not a transformers model, or the config or codebooks have a wrong type.
        ValueError: an unsupported architecture, a model with no layer to quantize, a rate not offered for the
            head_dim, codebooks of another model or for another config, or a model that is already quantized.
    """
    if isinstance(codebooks, (str, os.PathLike)):
        codebooks = Codebooks.load(codebooks)
    if codebooks is not None and not isinstance(codebooks, Codebooks):
        raise TypeError(f"codebooks is a {type(codebooks).__name__}; expected Codebooks or the path of their file")
    if config is None:
        config = codebooks.metadata["config"] if codebooks and "config" in codebooks.metadata else GSRQConfig()
    config = GSRQConfig(**config) if isinstance(config, dict) else config
    if not isinstance(config, GSRQConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a GSRQConfig or a dict of its fields")
    model = models.check_supported(model)
    name = type(model).__name__
    if state_of(model):
        raise ValueError(f"{name} is quantized already; call dequantize_kv_ first")
    layers = models.inspect_layers(model)
    if max(config.skip_layers, default=0) > max(info.index for info in layers):
        raise ValueError(f"skip_layers={config.skip_layers} names a layer that the model's {len(layers)} do not have")
    own = models.foreign_attention(model)
    if own and not models.are_decoded(layers):
        raise ValueError(
            f"{name} runs an attention function of your own, {own!r}, which quantize_kv_ would replace: call "
            "model.set_attn_implementation('sdpa') first if it may, or keep keys and values in a GSRQTensor and let "
            "your function call F.scaled_dot_product_attention on it"
        )
    wanted = [info for info in layers if quantizes(info, config)]
    if not wanted:
        raise ValueError(
            f"{name} has no layer to quantize, so use it as it is:\n"
            + _table(name, layers, Codebooks({}, {}), config.skip_layers)
        )
    sliding = [info.index for info in layers if info.kind.endswith("sliding_attention") and info not in wanted]
    if config.sliding == "quantize" and sliding:
        raise ValueError(
            f"sliding='quantize' with skip_layers={config.skip_layers}: transformers makes one mask for all sliding "
            f"windows, so layers {', '.join(map(str, sliding))} cannot be kept while others are quantized"
        )
    beside = [info.index for info in layers if info.kind == "hybrid_sliding"]
    if config.sliding == "quantize" and beside:
        raise ValueError(
            f"sliding='quantize': layers {', '.join(map(str, beside))} of {name} have linear attention beside a "
            "sliding window, and stay in full precision; use sliding='keep'"
        )
    decodes = models.are_decoded(layers)
    if decodes and config.prefill == "quantized":
        raise ValueError(
            f"prefill='quantized': attention of {name} does not receive what it caches, so no prompt can be read "
            "through its quantized cache in one forward; read it token by token, with prefill='exact'"
        )
    if codebooks is None:
        codebooks = cached_codebooks(model, layers, [config], progress)[0]
    books = _fitting(codebooks, layers, wanted, model, config)
    if all(p.device.type != "meta" for p in model.parameters()):  # else each cache layer moves its own to its device
        books = books.to(model.device)

    before = [(c, c._attn_implementation) for c in models.attention_configs(model)]
    for part, _ in before:
        part._attn_implementation = part._attn_implementation if decodes else NAME
    state = State(config, books, layers, before, [], [])
    module: Any
    for module in models.path_to_decoder(model):
        if models.takes_cache(module):
            hook = GiveCache(module, state, module is models.decoder(model))
            state.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if hasattr(module, "_prepare_cache_for_generation"):  # no bound method: those do not survive pickling
            module._prepare_cache_for_generation = functools.partial(prepare_cache_for_generation, module, state)
            state.generating.append(module)
    model._gsrq = state
    for what in UNSUPPORTED:
        if hasattr(model, what):
            setattr(model, what, functools.partial(refuse, what, model, state))
    state.checking = True
    try:
        check_attention(model, config, lambda small: state.new_cache(model, config=small))
        check_entry(model, books)
    except BaseException:
        dequantize_kv_(model)
        raise
    state.checking = False
    log.info("%s", _table(name, layers, books, config.skip_layers))
    unknown = [x.index for x in wanted if models.UNKNOWN_ROPE in (x.rope, x.value.rope if x.value else "")]
    if unknown:
        log.warning(
            "%s: no known rotation fits the keys of layers %s, so they are coded without frames, and errors grow at "
            "positions beyond the %d tokens of a calibration window; compare with evaluate before you rely on it",
            name,
            ", ".join(map(str, unknown)),
            WINDOW,
        )
    followed = [info.index for info in wanted if info.rotary]
    if followed:
        log.warning(
            "%s: RoPE frequencies depend on the length of the input; a cache takes those of its first forward, and "
            "refuses to go on when they change",
            name,
        )


def dequantize_kv_(model: PreTrainedModel) -> None:
    """Undo `quantize_kv_` exactly.

    Raises:
        ValueError: the model is not quantized.
    """
    model = models.unwrap(model)
    state = state_of(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not quantized")
    for part, attention in state.attention:
        part._attn_implementation = attention
    for hook in state.hooks:
        hook.remove()
    state.active = False
    for what in UNSUPPORTED:
        model.__dict__.pop(what, None)
    for module in state.generating:
        module.__dict__.pop("_prepare_cache_for_generation", None)
    del model._gsrq


def new_cache(model: PreTrainedModel, max_cache_len: int | None = None) -> GSRQCache:
    """Create an empty cache for a quantized model.

    Args:
        model: a model that `quantize_kv_` prepared.
        max_cache_len: a fixed capacity in tokens, for `torch.compile`; without it, the cache grows.

    Raises:
        ValueError: the model is not quantized.
    """
    model = models.unwrap(model)
    state = state_of(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not quantized; call quantize_kv_ first")
    cache = state.new_cache(model, max_cache_len)
    cache.model_dtype, cache.model_device = model.dtype, models.input_device(model)
    return cache


def _table(name: str, layers: list[LayerInfo], books: Codebooks, skipped: tuple[int, ...] = ()) -> str:
    """A report of every layer's cache; consecutive layers that differ only in their bits share a line."""
    rows: list[tuple[list[int], str]] = []
    for info in layers:
        if info.index in books:
            key = books[info.index].key
            what = f"quantized, {info.kv_heads} heads of {info.head_dim}, RoPE {info.rope}"
            what += ", changing with the length" if info.rotary else ""
            if info.value:
                width = info.value.head_dim
                what += f", and values of {width}, RoPE {info.value.rope}" if width != info.head_dim else ""
                what += ", decoded for the model's own attention: less memory, not less time"
            what += f", frames of {key.frame}" if key.frame > 1 else ""
        elif info.index in skipped:
            what = "kept in full precision: in skip_layers"
        elif info.kind == "sliding_attention":
            what = "kept in full precision: a sliding window bounds it already (sliding='quantize' quantizes it)"
        else:
            what = f"kept in full precision: of kind {info.kind}"
        if rows and rows[-1][1] == what:
            rows[-1][0].append(info.index)
        else:
            rows.append(([info.index], what))
    lines = []
    for which, what in rows:
        line = f"  layers {which[0]}-{which[-1]}: {what}" if len(which) > 1 else f"  layer {which[0]}: {what}"
        if which[0] in books:
            line += "; keys {}, values {}".format(
                *(_span([bits for i in which for bits in books[i][kind].head_bits]) for kind in (0, 1)),
            )
        lines.append(line)
    mean = f", {books.bits:.3g} bits per element of quantized layers" if len(books) else ""
    return "\n".join([f"KV cache of {name}{mean}", *lines])


def _span(bits: list[float]) -> str:
    low, high = min(bits), max(bits)
    return f"{low:g} bits" if low == high else f"{low:g} to {high:g} bits"


def _fitting(
    books: Codebooks, layers: list[LayerInfo], wanted: list[LayerInfo], model: PreTrainedModel, config: GSRQConfig
) -> Codebooks:
    """The given codebooks, checked against the model and the config, reduced to the layers to quantize."""
    has = books.metadata.get("config", {})
    for name in ("bits", "group_size", "recipe"):
        want = getattr(config, name)
        if has.get(name, want) != want:
            raise ValueError(
                f"the codebooks were made for {name}={has[name]!r}, the config asks for {want!r}: calibrate for it "
                "(one reading makes codebooks for several configs), or leave the config to the codebooks"
            )
    owner, mine = books.metadata.get("model"), models.fingerprint(model, layers)
    ranks, share = getattr(model, "tp_size", None) or 1, 1
    if ranks > 1 and owner is not None and owner["shape"] != mine["shape"]:  # made by one process, for all heads
        whole = [dataclasses.replace(x, q_heads=ranks * x.q_heads, kv_heads=ranks * x.kv_heads) for x in layers]
        if owner["shape"] == models.fingerprint(model, whole)["shape"]:
            owner, share = None, ranks
    if owner is not None and not models.same_model(owner, mine):
        raise ValueError(
            f"the codebooks belong to another model (a {owner['class']} with other keys and values than this "
            f"{type(model).__name__}): calibrate this one"
        )
    for info in wanted:
        if info.index not in books:
            raise ValueError(
                f"the codebooks have none for layer {info.index}; add it to skip_layers, or calibrate again"
            )
        for codec, one in zip(books[info.index], (info, info.value or info), strict=True):
            if (codec.heads, codec.head_dim) != (share * one.kv_heads, one.head_dim):
                raise ValueError(
                    f"the codebooks of layer {info.index} are for {codec.heads} heads of {codec.head_dim}; "
                    f"the model has {share * one.kv_heads} of {one.head_dim}"
                )
    cut = Codebooks({info.index: books[info.index] for info in wanted}, books.metadata)
    asked = config.bits
    if not 0.9 <= cut.bits / asked <= 1.1:
        log.warning(
            "%s: the codebooks spread %g bits over heads of layers of which some are skipped; those left have %.3g. "
            "Calibrate with skip_layers to allocate them again",
            type(model).__name__,
            asked,
            cut.bits,
        )
    if share > 1:
        mesh = getattr(model, "_device_mesh", None)
        if mesh is None:
            rank = torch.distributed.get_rank() % ranks
        else:  # from transformers 5.24 on, of several dimensions
            rank = mesh.get_local_rank("tp" if mesh.ndim > 1 else 0)
        cut = cut.shard(rank, ranks)
    return cut
