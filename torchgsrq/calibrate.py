"""Calibration: statistics of a model's keys, values and queries, and the codecs trained on them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from torchgsrq import models, text
from torchgsrq.codec import VERSION, Codebooks, Codec, LayerCodec
from torchgsrq.config import GSRQConfig, cache_folder
from torchgsrq.kmeans import fit_to_loss, train_codebook
from torchgsrq.layout import Layout, grouped, key_layout, num_codes, value_layout
from torchgsrq.models import LayerInfo
from torchgsrq.rope import rotate
from torchgsrq.text import TOKENS

log = logging.getLogger("torchgsrq")

WINDOW = 1024  # tokens of a calibration sequence
FAR = 32  # a query's nearer neighbours are in the recent window and do not count
KEY_ETA, VALUE_ETA = 8, 4  # by KL on held-out text: README
_RECIPE = 1  # goes up with what calibration reads and how it learns: codebooks in the disk cache are learned anew
_QUERY_STRIDE = 4  # every 4th query is enough
_ROTATIONS = 256  # relative offsets that the query metric is averaged over


@dataclass
class Statistics:
    """What calibration keeps of one layer. N counts tokens over all windows.

    Attributes:
        keys: un-rotated, ``[heads, N, head_dim]``. values: ``[heads, N, head_dim]``.
        places: ``[N]``, position in the window. window: ``[N]``, which window.
        key_weight: ``[heads, N]``, ``sum_t p_ts^2 |v_s - o_t|^2`` over far queries: what a key error costs.
        value_weight: ``[heads, N]``, ``sum_t p_ts^2``: what a value error costs.
        query_metric: ``[heads, head_dim, head_dim]``, ``sum_t sqrt(b_t) q q^T`` of un-rotated queries, with
            ``b_t = sum_s p_ts^2 |v_s - o_t|^2``.
    """

    info: LayerInfo
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    key_weight: list[Tensor] = field(default_factory=list)
    value_weight: list[Tensor] = field(default_factory=list)
    query_metric: Tensor | float = 0.0

    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        softcap: float,
        sink_logits: Tensor | None,
        inv_freq: Tensor | None = None,
    ) -> None:
        """Add a batch of windows: q ``[b, q_heads, t, d]``, k and v ``[b, heads, t, d]``, turned by the layer's RoPE
        frequencies or, where these depend on the length, by ``inv_freq``."""
        q, k, v = q.float(), k.float(), v.float()
        info = self.info
        inv_freq = info.inv_freq if inv_freq is None else inv_freq.to(k.device)
        tokens = torch.arange(k.shape[2], device=k.device)
        asking = tokens[_QUERY_STRIDE - 1 :: _QUERY_STRIDE]
        some_q = q[:, :, asking].unflatten(1, (info.kv_heads, -1))  # [b, h, g, t/4, d]
        scores = some_q @ k[:, :, None].transpose(-1, -2) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(tokens > asking[:, None], -torch.inf)
        if sink_logits is None:
            p = scores.softmax(-1)
        else:
            logits = sink_logits.float().view(1, info.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            p = torch.cat((scores, logits), -1).softmax(-1)[..., :-1]
        del scores
        out = p @ v[:, :, None]
        far = (asking[:, None] - tokens >= FAR) & (tokens >= 1)
        p2 = p.square_().mul_(far)
        spread = v.square().sum(-1)[:, :, None, None] + out.square().sum(-1, keepdim=True)
        spread = spread.sub_(out @ v[:, :, None].transpose(-1, -2), alpha=2).clamp_min_(0).mul_(p2)
        self.key_weight.append(spread.sum((2, 3)).transpose(0, 1).flatten(1))
        self.value_weight.append(p2.sum((2, 3)).transpose(0, 1).flatten(1))
        flat_q = rotate(some_q, -asking, inv_freq, info.interleaved)
        weighted = flat_q * spread.sum(-1, keepdim=True).sqrt()
        self.query_metric = self.query_metric + torch.einsum("bhgtd,bhgte->hde", weighted, flat_q)
        self.keys.append(rotate(k, -tokens, inv_freq, info.interleaved).transpose(0, 1).flatten(1, 2))
        self.values.append(v.transpose(0, 1).flatten(1, 2))
        self.places.append(tokens.repeat(k.shape[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _root(metric: Tensor) -> Tensor:
    """Symmetric square root of ``[heads, d, d]``, kept away from singular."""
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    scaled = metric / mean + 1e-3 * torch.eye(metric.shape[-1], device=metric.device, dtype=metric.dtype)
    values, vectors = torch.linalg.eigh(scaled)
    return vectors * values.clamp_min(1e-6).sqrt().unsqueeze(-2) @ vectors.transpose(-1, -2)


def _deal(y: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Orthonormal rows ``[heads, layout.dims, d]``: the principal directions of ``y [heads, n, d]``, the strongest
    first, dealt to the groups in snake order, so that the variance is spread evenly."""
    heads, _, dim = y.shape
    if layout.groups == 1 and layout.dims == dim:
        return torch.eye(dim, dtype=torch.float32, device=y.device).repeat(heads, 1, 1)
    covariance = (y * weight.unsqueeze(-1)).transpose(1, 2).double() @ y.double()
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    hands: list[list[int]] = [[] for _ in range(layout.groups)]
    for i in range(layout.dims):
        lap, seat = divmod(i, layout.groups)
        hands[seat if lap % 2 == 0 else layout.groups - 1 - seat].append(i)
    order = torch.tensor([i for hand in hands for i in hand], device=y.device)
    return vectors[..., order].transpose(1, 2).float()


def _scale(y: Tensor) -> Tensor:
    """A power of two per head near the root mean square of ``y [heads, n, d]``, so that codewords fit float16 whatever
    the size of a model's values: ``[heads, 1, 1]``."""
    size = y.double().square().mean((1, 2), keepdim=True).sqrt()
    return torch.where(size > 0, size.clamp_min(1e-300).log2().floor().exp2(), 1.0).float()


def _normalised(weight: Tensor, power: float) -> Tensor:
    weight = weight / weight.mean(1, keepdim=True).clamp_min(1e-30)
    return weight.pow(power)


def train_key(stats: Statistics, config: GSRQConfig, span: int, method: str = "kmeans") -> Codec:
    """Keys, by the default recipe: anchored frames, the mean removed, errors weighed by what attention does.

    Args:
        stats: what was collected of the layer.
        config: ``key_bits``, layout, frame, beam and seed are used.
        span: how far apart a query and a key can be (`rope_span`).
        method: how to cluster (`kmeans.METHODS`).
    """
    info = stats.info
    frame = config.key_frame if info.inv_freq.numel() else 1
    k, places = torch.cat(stats.keys, 1), torch.cat(stats.places)
    generator = torch.Generator().manual_seed(config.seed)
    # Windows start anywhere in a frame, so that every place is trained, however short the windows are.
    shift = torch.randint(frame, (int((places == 0).sum()),), generator=generator).to(places.device)
    places = (places + shift[(places == 0).cumsum(0) - 1]) % frame

    weight = _normalised(torch.cat(stats.key_weight, 1), 0.5)
    mean = (k * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    offsets = torch.randint(max(span, 1), (_ROTATIONS,), generator=generator).to(k.device)
    root = _root(_averaged(torch.as_tensor(stats.query_metric).double(), offsets, info)).float()
    y = rotate(k - mean.unsqueeze(1), places, info.inv_freq, info.interleaved) @ root.transpose(1, 2)
    layout = key_layout(info.head_dim, config.key_rate, config.layout)
    deal = _deal(y, weight, layout)
    y = y @ deal.transpose(1, 2)
    scale = _scale(y)
    y = y / scale
    fit = _fit(y, weight, KEY_ETA, config)
    codebook = train_codebook(y, weight, layout, method=method, seed=config.seed, fit=fit)
    return Codec.build(
        layout,
        mean,
        deal @ root / scale,
        codebook,
        inverse=torch.linalg.inv(root.double()) @ deal.transpose(1, 2).double() * scale,
        inv_freq=info.inv_freq,
        frame=frame,
        interleaved=info.interleaved,
        beam=config.beam,
        eta=KEY_ETA,
    )


def _fit(y: Tensor, weight: Tensor, eta: int, config: GSRQConfig) -> Callable[[Layout, Tensor], Tensor] | None:
    """Fits each stage to the encoder's loss on vectors ``y [heads, n, dims]`` in their metric (`fit_to_loss`); none for
    wide codewords, which would overfit the tokens that calibration has."""
    if config.layout != "fast":
        return None

    def fit(layout: Layout, codebook: Tensor) -> Tensor:
        heads = y.shape[0]
        mean, into = y.new_zeros(heads, layout.head_dim), y.new_zeros(heads, layout.dims, layout.head_dim)

        def encode(words: Tensor) -> Tensor:
            codec = Codec.build(layout, mean, into, words, inverse=into.mT, beam=config.beam, eta=eta)
            return torch.ops.torchgsrq.search(y, codec.tensors, codec.integers)

        return fit_to_loss(y, weight, layout, codebook, encode, eta)

    return fit


def _averaged(metric: Tensor, offsets: Tensor, info: LayerInfo) -> Tensor:
    """The metric ``[heads, d, d]`` of un-rotated queries, as queries at these offsets have it on average."""
    total = torch.zeros_like(metric)
    for some in offsets.split(32):
        once = rotate(metric.unsqueeze(1), some[:, None], info.inv_freq, info.interleaved)
        once = once.expand(-1, some.numel(), -1, -1)
        total += rotate(once.transpose(-1, -2), some[:, None], info.inv_freq, info.interleaved).sum(1)
    return total / offsets.numel()


def train_value(stats: Statistics, config: GSRQConfig, method: str = "kmeans") -> Codec:
    """Values, by the default recipe: the mean removed, weighed by squared probabilities.

    Args:
        stats: what was collected of the layer.
        config: ``value_bits``, layout, beam and seed are used.
        method: how to cluster (`kmeans.METHODS`).
    """
    v = torch.cat(stats.values, 1)
    weight = _normalised(torch.cat(stats.value_weight, 1), 0.25)
    mean = (v * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    v = v - mean.unsqueeze(1)
    layout = value_layout(stats.info.head_dim, config.value_rate, config.layout)
    deal = _deal(v, weight, layout)
    v = v @ deal.transpose(1, 2)
    scale = _scale(v)
    v = v / scale
    fit = _fit(v, weight, VALUE_ETA, config)
    codebook = train_codebook(v, weight, layout, method=method, seed=config.seed + 1, fit=fit)
    return Codec.build(
        layout,
        mean,
        deal / scale,
        codebook,
        inverse=deal.transpose(1, 2) * scale,
        beam=config.beam,
        eta=VALUE_ETA,
    )


def _train_paper(stats: Statistics, config: GSRQConfig, method: str) -> LayerCodec:
    """GSRQ as the paper has it, in our reading, or the same with plain k-means.

    Un-rotated keys, 32-element groups, logarithmic weights, greedy encoding. The paper weighs by
    gradients; the attention weights of `Statistics` stand in for them.
    """
    info = stats.info
    codecs = []
    for vectors, weights, bits in (
        (stats.keys, stats.key_weight, config.key_rate),
        (stats.values, stats.value_weight, config.value_rate),
    ):
        x, weight = torch.cat(vectors, 1), _normalised(torch.cat(weights, 1), 1).log1p()
        layout = grouped(info.head_dim, num_codes(info.head_dim, bits), 32)
        scale = _scale(x)
        codebook = train_codebook(x / scale, weight, layout, method=method, seed=config.seed)
        eye = torch.eye(info.head_dim, dtype=torch.float32, device=x.device).expand(info.kv_heads, -1, -1)
        is_key = vectors is stats.keys
        codecs.append(
            Codec.build(
                layout,
                x.new_zeros(info.kv_heads, info.head_dim),
                eye / scale,
                codebook,
                inverse=eye * scale,
                inv_freq=info.inv_freq if is_key else None,
                interleaved=info.interleaved if is_key else False,
                beam=1,
            )
        )
    return LayerCodec(*codecs)


def train(stats: Statistics, config: GSRQConfig, span: int) -> LayerCodec:
    """The codecs of one layer, by the config's recipe."""
    if config.recipe == "gsrq":
        return LayerCodec(train_key(stats, config, span), train_value(stats, config))
    return _train_paper(stats, config, "gskm" if config.recipe == "gsrq-paper" else "kmeans")


# ---------------------------------------------------------------------------------------------------------------------
# The whole


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
        data: text of the kind that the model will read: strings, token tensors, or batches. Without it
            the model writes its own, which costs quality (README).
        tokenizer: for strings, and for lists that the model looks things up in (`text.recall_windows`); the one of
            ``model.name_or_path`` by default.
        tokens: how much of the data to use, 16384 by default; half as much again is made of it.
        max_memory: bytes of vectors held at a time; more layers than fit are calibrated in several passes.
        progress: show bars.

    Returns:
        Codebooks for every full-attention layer not in ``config.skip_layers``.

    Raises:
        TypeError, ValueError: the model, the rate for its head_dim, or the data do not fit; says why.
    """
    config = config or GSRQConfig()
    tokens = TOKENS if tokens is None else tokens
    model = models.check_supported(model)
    if not isinstance(config, GSRQConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected a GSRQConfig")
    if getattr(getattr(model, "_gsrq", None), "active", False):
        raise ValueError(f"{type(model).__name__} is quantized; call dequantize_kv_ first, then calibrate")
    with models.plain_precision(model), models.evaluating(model):
        return _calibrate(model, config, data, tokenizer, tokens, max_memory, progress)


def _calibrate(
    model: PreTrainedModel,
    config: GSRQConfig,
    data: Iterable[Any] | None,
    tokenizer: Any,
    tokens: int,
    max_memory: int,
    progress: bool,
) -> Codebooks:
    found = models.inspect_layers(model)
    layers = {info.index: info for info in found if quantizes(info, config)}
    facts = {"config": config.codec_fields(), "model": models.fingerprint(model, found)}
    if not layers:
        return Codebooks({}, {**facts, "source": "none", "tokens": 0})
    for info in layers.values():
        key_layout(info.head_dim, config.key_rate, config.layout)
        value_layout(info.head_dim, config.value_rate, config.layout)
    if config.recipe == "universal":
        shapes = {(info.kv_heads, info.head_dim) for info in layers.values()}
        made = {shape: Codebooks.universal(config, 1, *shape)[0] for shape in shapes}
        books = {i: made[info.kv_heads, info.head_dim] for i, info in layers.items()}
        return Codebooks(books, {**facts, "source": "none", "tokens": 0})
    windows, source = calibration_windows(model, data, tokenizer, tokens, config.seed, progress)
    trained = _train_layers(model, config, layers, windows, max_memory, progress)
    return Codebooks(trained, {**facts, "source": source, "tokens": windows.numel()})


def calibration_windows(
    model: PreTrainedModel, data: Iterable[Any] | None, tokenizer: Any, tokens: int, seed: int, progress: bool
) -> tuple[Tensor, str]:
    """What a model reads in calibration, and a word on where it is from.

    Returns:
        token ids ``[n, window]``: data, or text that the model writes itself, and half as much again in which it has to
        look things up (`text.recall_windows`).
    """
    window = min(WINDOW, getattr(models.text_config(model), "max_position_embeddings", None) or WINDOW)
    source = "data"
    if data is None:  # written in short rows, which is faster, and read as one text
        data, source = [text.own_text(model, tokens, window // 4, seed, progress)], "text the model wrote itself"
        log.info("calibrating on text that the model wrote itself; real text of your own kind (data=) is better")
    windows = text.token_windows(model, data, tokens, window, tokenizer)
    tokenizer = text.known_tokenizer(model) if tokenizer is None else tokenizer
    return torch.cat((windows, text.recall_windows(windows, tokenizer, seed))), source


def quantizes(info: LayerInfo, config: GSRQConfig) -> bool:
    """Whether a layer's cache is quantized: full attention, not skipped. A sliding window is bounded already."""
    return info.kind == "full_attention" and info.index not in config.skip_layers


def collect_statistics(
    model: PreTrainedModel, layers: Iterable[LayerInfo], windows: Tensor, progress: bool = True
) -> dict[int, Statistics]:
    """Read token windows ``[n, window]`` and keep what calibration needs of these layers."""
    layers = list(layers)
    stats = {info.index: Statistics(info) for info in layers}

    def observer(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> None:
        index = getattr(module, "layer_idx", None)
        if index in stats and not getattr(module, "is_cross_attention", False):
            stats[index].add(q, k, v, scaling, softcap, s_aux, rotary[index]() if index in rotary else None)

    inner, device = models.decoder(model), models.input_device(model)
    rotary = models.rotaries(model, layers)
    with torch.no_grad(), models.observed(model, observer):
        for window in tqdm(windows, desc="reading", disable=not progress):
            inner(input_ids=window[None].to(device), use_cache=False)
    return stats


def _train_layers(
    model: PreTrainedModel,
    config: GSRQConfig,
    layers: dict[int, LayerInfo],
    windows: Tensor,
    max_memory: int,
    progress: bool,
) -> dict[int, LayerCodec]:
    trained: dict[int, LayerCodec] = {}
    for chunk in _chunks(list(layers.values()), windows.numel(), max_memory):
        stats = collect_statistics(model, chunk, windows, progress)
        for index in tqdm(list(stats), desc="training codebooks", disable=not progress):
            trained[index] = train(stats.pop(index), config, rope_span(model))
    return trained


def rope_span(model: PreTrainedModel) -> int:
    """How far apart a query and a key can be: the context that the model supports."""
    return getattr(models.text_config(model), "max_position_embeddings", None) or 8192


def _chunks(layers: list[LayerInfo], tokens: int, max_memory: int) -> Iterable[list[LayerInfo]]:
    """Layers whose vectors fit in memory together."""
    chunk: list[LayerInfo] = []
    used = 0
    for info in layers:
        need = 4 * tokens * info.kv_heads * (2 * info.head_dim + 2)
        if chunk and used + need > max_memory:
            yield chunk
            chunk, used = [], 0
        chunk.append(info)
        used += need
    if chunk:
        yield chunk


def cached_codebooks(
    model: PreTrainedModel, config: GSRQConfig, progress: bool = True, layers: list[LayerInfo] | None = None
) -> Codebooks:
    """The codebooks of the disk cache for this model and config, calibrated first if there are none.

    A file that cannot be read is replaced, with a warning.
    """
    owner = models.fingerprint(model, layers or models.inspect_layers(model))
    skipped = "-skip" + "_".join(map(str, config.skip_layers)) if config.skip_layers else ""
    stem = f"{owner['shape']}-{config.codec_key()}{skipped}-v{VERSION}.{_RECIPE}"
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
    path = cache_folder() / f"{stem}-{which}.safetensors"
    books.save(path)
    log.info("codebooks cached at %s", path)
    return books
