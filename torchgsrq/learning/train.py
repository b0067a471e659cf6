"""Training of a layer's codecs on its statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchgsrq.codec import Codec, Codecs, LayerCodec
from torchgsrq.codec.kmeans import fit_to_loss, train_codebook
from torchgsrq.codec.layout import Layout
from torchgsrq.codec.rope import rotate
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.statistics import KEY_POWER, VALUE_POWER, Statistics, Vectors
from torchgsrq.models import LayerInfo

KEY_ETA, VALUE_ETA = 8, 4  # chosen by KL divergence on held-out text: docs/research/quality.md
FRAME = 1024  # tokens per anchored frame
_ROTATIONS = 256  # relative offsets that the query metric is averaged over


def _root(metric: Tensor) -> Tensor:
    """Symmetric square root of ``[heads, d, d]``, regularized against singularity."""
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    scaled = metric / mean + 1e-3 * torch.eye(metric.shape[-1], device=metric.device, dtype=metric.dtype)
    values, vectors = torch.linalg.eigh(scaled)
    return vectors * values.clamp_min(1e-6).sqrt().unsqueeze(-2) @ vectors.transpose(-1, -2)


def _balanced(y: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Orthonormal rows ``[heads, d, d]``: the principal directions of ``y [heads, n, d]``, distributed over the groups
    in snake order, the strongest first, so that each group has a similar share of the variance."""
    heads, _, dim = y.shape
    if layout.groups == 1:
        return torch.eye(dim, dtype=torch.float32, device=y.device).repeat(heads, 1, 1)
    covariance = (y * weight.unsqueeze(-1)).transpose(1, 2).double() @ y.double()
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    groups: list[list[int]] = [[] for _ in range(layout.groups)]
    for i in range(dim):
        lap, seat = divmod(i, layout.groups)
        groups[seat if lap % 2 == 0 else layout.groups - 1 - seat].append(i)
    order = torch.tensor([i for group in groups for i in group], device=y.device)
    return vectors[..., order].transpose(1, 2).float()


def _scale(y: Tensor) -> Tensor:
    """A power of two per head, ``[heads, 1, 1]``, near the root mean square of ``y [heads, n, d]``, so that codewords
    fit float16 for values of any size."""
    size = y.double().square().mean((1, 2), keepdim=True).sqrt()
    return torch.where(size > 0, size.clamp_min(1e-300).log2().floor().exp2(), 1.0).float()


def _weights(vectors: Vectors, form: Callable[[Tensor], Tensor]) -> Tensor:
    """Training weights of the kept vectors, ``[heads, n]``: ``form`` of the cost of their errors relative to the mean
    over all tokens, times the number of tokens that they represent."""
    cost, count = torch.cat(vectors.weight, 1), torch.cat(vectors.count, 1)
    mean = (cost * count).sum(1, keepdim=True) / count.sum(1, keepdim=True)
    return form(cost / mean.clamp_min(1e-30)) * count


def train_key(stats: Statistics, layout: Layout, span: int, seed: int = 0, method: str = "kmeans") -> Codec:
    """Train the codec of keys with the default recipe: anchored frames, the mean removed, errors weighted by attention.

    Args:
        stats: the statistics of the layer.
        layout: the layout of the codes.
        span: maximum distance between a query and a key, in tokens (`models.rope_span`).
        seed: seed of all random draws.
        method: clustering method (`kmeans.METHODS`).
    """
    info = stats.info
    frame = FRAME if info.inv_freq.numel() else 1
    k, places = torch.cat(stats.keys.x, 1), torch.cat(stats.keys.places, 1) % frame
    weight = _weights(stats.keys, lambda cost: cost.pow(KEY_POWER))
    mean = (k * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(max(span, 1), (_ROTATIONS,), generator=generator).to(k.device)
    root = _root(_averaged(torch.as_tensor(stats.query_metric).double(), offsets, info)).float()
    y = rotate(k - mean.unsqueeze(1), places, info.inv_freq, info.interleaved) @ root.transpose(1, 2)
    directions, scale, codebook = _learn(y, weight, layout, KEY_ETA, seed, method)
    return Codec.build(
        mean,
        directions @ root / scale,
        codebook,
        inverse=torch.linalg.inv(root.double()) @ directions.transpose(1, 2).double() * scale,
        inv_freq=info.inv_freq,
        frame=frame,
        interleaved=info.interleaved,
        eta=KEY_ETA,
    )


def _learn(
    y: Tensor, weight: Tensor, layout: Layout, eta: int, seed: int, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of groups, the scale and the codebook for ``y [heads, n, head_dim]``; codewords are learned on
    ``y @ directions^T / scale``."""
    directions = _balanced(y, weight, layout)
    y = y @ directions.transpose(1, 2)
    scale = _scale(y)
    y = y / scale
    fit = _fit(y, weight, layout, eta)
    return directions, scale, train_codebook(y, weight, layout, method=method, seed=seed, fit=fit)


def _fit(y: Tensor, weight: Tensor, layout: Layout, eta: int) -> Callable[[Layout, Tensor], Tensor] | None:
    """A function that fits each stage to the encoder's loss on vectors ``y [heads, n, head_dim]`` in their metric
    (`fit_to_loss`). None for wide codewords, which would overfit the calibration text, and for many stages, which would
    take minutes."""
    if layout.width > 32 or layout.stages > 2:
        return None

    def fit(layout: Layout, codebook: Tensor) -> Tensor:
        heads, dim = y.shape[0], layout.head_dim
        mean, into = y.new_zeros(heads, dim), y.new_zeros(heads, dim, dim)

        def encode(y: Tensor, words: Tensor) -> Tensor:
            codec = Codec.build(mean, into, words, inverse=into, eta=eta)
            return torch.ops.torchgsrq.search(y, codec.tensors, codec.integers)

        return fit_to_loss(y, weight, layout, codebook, encode, eta)

    return fit


def _averaged(metric: Tensor, offsets: Tensor, info: LayerInfo) -> Tensor:
    """The metric ``[heads, d, d]`` of un-rotated queries, averaged over queries at these offsets."""
    total = torch.zeros_like(metric)
    for some in offsets.split(32):
        once = rotate(metric.unsqueeze(1), some[:, None], info.inv_freq, info.interleaved)
        once = once.expand(-1, some.numel(), -1, -1)
        total += rotate(once.transpose(-1, -2), some[:, None], info.inv_freq, info.interleaved).sum(1)
    return total / offsets.numel()


def train_value(stats: Statistics, layout: Layout, seed: int = 0, method: str = "kmeans") -> Codec:
    """Train the codec of values with the default recipe: the mean removed, errors weighted by squared probabilities.

    Args:
        stats: the statistics of the layer.
        layout: the layout of the codes.
        seed: seed of all random draws.
        method: clustering method (`kmeans.METHODS`).
    """
    v = torch.cat(stats.values.x, 1)
    weight = _weights(stats.values, lambda cost: cost.pow(VALUE_POWER))
    mean = (v * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-30)
    directions, scale, codebook = _learn(v - mean.unsqueeze(1), weight, layout, VALUE_ETA, seed + 1, method)
    return Codec.build(mean, directions / scale, codebook, inverse=directions.transpose(1, 2) * scale, eta=VALUE_ETA)


def _train_paper(stats: Statistics, config: GSRQConfig, bits: float, seed: int) -> LayerCodec:
    """Train a layer with our reading of the paper's GSRQ.

    Un-rotated keys, groups of ``config.group_size`` (32 elements in the paper), logarithmic weights, plain squared
    errors. The paper's weights come from gradients; the attention weights of `Statistics` replace them.
    """
    info = stats.info
    codecs = []
    for vectors in (stats.keys, stats.values):
        x, weight = torch.cat(vectors.x, 1), _weights(vectors, torch.log1p)
        scale = _scale(x)
        layout = Layout.of(info.head_dim, bits, config.group_size)
        codebook = train_codebook(x / scale, weight, layout, method="gskm", seed=seed)
        eye = torch.eye(info.head_dim, dtype=torch.float32, device=x.device).expand(info.kv_heads, -1, -1)
        is_key = vectors is stats.keys
        codec = Codec.build(
            x.new_zeros(info.kv_heads, info.head_dim),
            eye / scale,
            codebook,
            inverse=eye * scale,
            inv_freq=info.inv_freq if is_key else None,
            interleaved=info.interleaved if is_key else False,
        )
        codecs.append(Codecs.of(codec))
    return LayerCodec(*codecs)


def train_cached(stats: tuple[Statistics, Statistics], config: GSRQConfig, seed: int = 0) -> LayerCodec:
    """Train the codecs of a layer of which only the cached tensors are known (`collect_cached`)."""
    layouts = (Layout.of(s.info.head_dim, config.bits, config.group_size) for s in stats)
    return LayerCodec(*(Codecs.of(train_key(s, x, 0, seed)) for s, x in zip(stats, layouts, strict=True)))


Rates = Sequence[tuple[float, float]]  # of the keys and of the values of each head


def train(
    stats: Statistics, wanted: Sequence[tuple[GSRQConfig, Rates]], span: int, seed: int = 0, method: str = "kmeans"
) -> list[LayerCodec]:
    """Train the codecs of one layer, for each of several configs.

    Args:
        stats: the statistics of the layer.
        wanted: configs, which set recipe and group size, each with the bits per element of every head's keys and
            values. Heads with the same layout, in any config, are learned together. ``"gsrq-paper"`` uses the rate of
            the first head for all.
        span: maximum distance between a query and a key, in tokens (`models.rope_span`).
        seed: seed of all random draws.
        method: clustering method (`kmeans.METHODS`) for ``"gsrq"``.

    Returns:
        One `LayerCodec` per config.
    """
    dim = stats.info.head_dim
    laid_out = [[[Layout.of(dim, x, config.group_size) for x in pair] for pair in bits] for config, bits in wanted]
    own = [layouts for (config, _), layouts in zip(wanted, laid_out, strict=True) if config.recipe == "gsrq"]
    together: dict[tuple[int, Layout], set[int]] = {}
    for layouts in own:
        for head, pair in enumerate(layouts):
            for kind, layout in enumerate(pair):
                together.setdefault((kind, layout), set()).add(head)
    learned: dict[tuple[int, Layout, int], Codec] = {}
    for (kind, layout), several in together.items():
        heads = sorted(several)
        some = stats.of_heads(heads)
        codec = train_value(some, layout, seed, method) if kind else train_key(some, layout, span, seed, method)
        learned |= {(kind, layout, head): codec.of_heads(slice(i, i + 1)) for i, head in enumerate(heads)}
    found = []
    for (config, bits), layouts in zip(wanted, laid_out, strict=True):
        if config.recipe == "gsrq":
            sides = ([learned[kind, pair[kind], head] for head, pair in enumerate(layouts)] for kind in (0, 1))
            found.append(LayerCodec.of_heads(*sides))
        else:
            found.append(_train_paper(stats, config, bits[0][0], seed))
    return found
