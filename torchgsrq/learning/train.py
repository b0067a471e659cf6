"""The codecs of a layer, trained on its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchgsrq.codec import Codec, LayerCodec
from torchgsrq.codec.kmeans import fit_to_loss, train_codebook
from torchgsrq.codec.layout import Layout, grouped, key_layout, num_codes, value_layout
from torchgsrq.codec.rope import rotate
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.statistics import KEY_POWER, VALUE_POWER, Statistics, Vectors
from torchgsrq.models import LayerInfo

KEY_ETA, VALUE_ETA = 8, 4  # by KL on held-out text: docs/quality.md
_ROTATIONS = 256  # relative offsets that the query metric is averaged over


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


def _weights(vectors: Vectors, form: Callable[[Tensor], Tensor]) -> Tensor:
    """What kept vectors count in training, ``[heads, n]``: a form of what their errors cost, in units of the mean over
    all tokens, for each token that they stand for."""
    cost, count = torch.cat(vectors.weight, 1), torch.cat(vectors.count, 1)
    mean = (cost * count).sum(1, keepdim=True) / count.sum(1, keepdim=True)
    return form(cost / mean.clamp_min(1e-30)) * count


def train_key(stats: Statistics, config: GSRQConfig, bits: float, span: int, method: str = "kmeans") -> Codec:
    """Keys, by the default recipe: anchored frames, the mean removed, errors weighed by what attention does.

    Args:
        stats: what was collected of the layer.
        config: layout, frame, beam and seed are used. bits: per element.
        span: how far apart a query and a key can be (`models.rope_span`).
        method: how to cluster (`kmeans.METHODS`).
    """
    info = stats.info
    frame = config.key_frame if info.inv_freq.numel() else 1
    k, places = torch.cat(stats.keys.x, 1), torch.cat(stats.keys.places, 1) % frame
    weight = _weights(stats.keys, lambda cost: cost.pow(KEY_POWER))
    mean = (k * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    generator = torch.Generator().manual_seed(config.seed)
    offsets = torch.randint(max(span, 1), (_ROTATIONS,), generator=generator).to(k.device)
    root = _root(_averaged(torch.as_tensor(stats.query_metric).double(), offsets, info)).float()
    y = rotate(k - mean.unsqueeze(1), places, info.inv_freq, info.interleaved) @ root.transpose(1, 2)
    layout = key_layout(info.head_dim, bits, config.layout)
    deal = _deal(y, weight, layout)
    y = y @ deal.transpose(1, 2)
    scale = _scale(y)
    y = y / scale
    fit = _fit(y, weight, layout, KEY_ETA, config)
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
        beam=config.beam_width,
        eta=KEY_ETA,
    )


def _fit(
    y: Tensor, weight: Tensor, layout: Layout, eta: int, config: GSRQConfig
) -> Callable[[Layout, Tensor], Tensor] | None:
    """Fits each stage to the encoder's loss on vectors ``y [heads, n, dims]`` in their metric (`fit_to_loss`); none for
    wide codewords, which would overfit the tokens of a calibration, nor for many stages, which would take minutes."""
    if config.layout != "fast" or layout.stages > 2:
        return None

    def fit(layout: Layout, codebook: Tensor) -> Tensor:
        heads = y.shape[0]
        mean, into = y.new_zeros(heads, layout.head_dim), y.new_zeros(heads, layout.dims, layout.head_dim)

        def encode(words: Tensor) -> Tensor:
            codec = Codec.build(layout, mean, into, words, inverse=into.mT, beam=config.beam_width, eta=eta)
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


def train_value(stats: Statistics, config: GSRQConfig, bits: float, method: str = "kmeans") -> Codec:
    """Values, by the default recipe: the mean removed, weighed by squared probabilities.

    Args:
        stats: what was collected of the layer.
        config: layout, beam and seed are used. bits: per element.
        method: how to cluster (`kmeans.METHODS`).
    """
    v = torch.cat(stats.values.x, 1)
    weight = _weights(stats.values, lambda cost: cost.pow(VALUE_POWER))
    mean = (v * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    v = v - mean.unsqueeze(1)
    layout = value_layout(stats.info.head_dim, bits, config.layout)
    deal = _deal(v, weight, layout)
    v = v @ deal.transpose(1, 2)
    scale = _scale(v)
    v = v / scale
    fit = _fit(v, weight, layout, VALUE_ETA, config)
    codebook = train_codebook(v, weight, layout, method=method, seed=config.seed + 1, fit=fit)
    return Codec.build(
        layout,
        mean,
        deal / scale,
        codebook,
        inverse=deal.transpose(1, 2) * scale,
        beam=config.beam_width,
        eta=VALUE_ETA,
    )


def _train_paper(stats: Statistics, config: GSRQConfig, rates: tuple[float, float], method: str) -> LayerCodec:
    """GSRQ as the paper has it, in our reading, or the same with plain k-means.

    Un-rotated keys, 32-element groups, logarithmic weights, greedy encoding. The paper weighs by
    gradients; the attention weights of `Statistics` stand in for them.
    """
    info = stats.info
    codecs = []
    for vectors, bits in zip((stats.keys, stats.values), rates, strict=True):
        x, weight = torch.cat(vectors.x, 1), _weights(vectors, torch.log1p)
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


def train_cached(stats: tuple[Statistics, Statistics], config: GSRQConfig, bits: tuple[float, float]) -> LayerCodec:
    """The codecs of a layer of which only what it caches is known (`collect_cached`)."""
    return LayerCodec(*(train_key(s, config, b, 0) for s, b in zip(stats, bits, strict=True)))


def train(
    stats: Statistics, config: GSRQConfig, bits: Sequence[tuple[float, float]], span: int, method: str = "kmeans"
) -> LayerCodec:
    """The codecs of one layer, by the config's recipe.

    Args:
        stats: what was collected of the layer.
        config: recipe, layout, frame, beam and seed are used.
        bits: per element, of the keys and of the values of each head; heads with the same are learned together.
            Recipes other than ``"gsrq"`` take those of the first for all.
        span: how far apart a query and a key can be (`models.rope_span`).
        method: how to cluster (`kmeans.METHODS`), for ``"gsrq"``.
    """
    if config.recipe != "gsrq":
        return _train_paper(stats, config, bits[0], "gskm" if config.recipe == "gsrq-paper" else "kmeans")
    runs: dict[tuple[float, float], list[int]] = {}
    for head, pair in enumerate(bits):
        runs.setdefault(pair, []).append(head)
    keys, values = [], []
    for pair, heads in runs.items():
        some = stats.of_heads(heads)
        keys.append((heads, train_key(some, config, pair[0], span, method)))
        values.append((heads, train_value(some, config, pair[1], method)))
    return LayerCodec(Codec.of_runs(keys), Codec.of_runs(values))
