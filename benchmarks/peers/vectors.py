"""Vector quantizers of others, on this project's k-means: VQLLM, CQ, and a TaSQ-like one. Keys before RoPE.

VQLLM (arXiv 2410.15704): channels divided by their standard deviation, residual stages in groups of 32 channels. Stages
of 256 codewords where the paper has 2048, at the same bits; no exponential moving averages.

CQ (arXiv 2405.03917), 8c8b: one of 256 codewords for 8 neighboring channels, clustered with attention weights where
the paper has squared gradients.

TaSQ-like (arXiv 2610.03027, from its published description, not its code): channels of keys weighed by the queries
that read them, a scale per token that all heads share (8 bits), then one of 256 codewords for 8 channels.
"""

from __future__ import annotations

import torch
from peers.base import Method, after_rope, all_of, as_decoded, before_rope
from torch import Tensor

from torchgsrq import Codec
from torchgsrq.codec.kmeans import train_codebook
from torchgsrq.codec.layout import Layout
from torchgsrq.learning.statistics import Statistics
from torchgsrq.models import LayerInfo


class Vectors(Method):
    """Residual codes in groups of channels; a subclass says how vectors are scaled and weighed."""

    def __init__(self, name: str, width: int, bits: float) -> None:
        super().__init__()
        self.name, self.width, self.rate = f"{name} {bits:g} bit", width, bits
        self.codecs: dict[int, tuple[Codec, Codec]] = {}

    def channel_scale(self, x: Tensor, stats: Statistics, is_key: bool) -> Tensor:
        """What channels are divided by, ``[heads, d]``."""
        return x.square().mean((1, 2), keepdim=True).sqrt()[..., 0].expand(-1, x.shape[-1])

    def weight(self, cost: Tensor) -> Tensor:
        """Of every vector in the clustering, ``[heads, n]``."""
        return torch.ones_like(cost)

    def token_scale(self, x: Tensor) -> Tensor:
        """Of every token, as it is stored: ``x [b, heads, n, d]`` to ``[b, 1, n, 1]``."""
        return torch.ones_like(x[:, :1, :, :1])

    def mean(self, x: Tensor) -> Tensor:
        """What is taken off first, ``[heads, d]``."""
        return torch.zeros_like(x[:, 0])

    def fit_layer(self, index: int, stats: Statistics) -> None:
        made = []
        for is_key, vectors in ((True, stats.keys), (False, stats.values)):
            x, cost = all_of(vectors)
            dim = x.shape[-1]
            layout = Layout(dim, dim // self.width, round(self.rate * dim / 8))
            weight = self.weight(cost)
            mean = self.mean(x)
            x = x - mean[:, None]
            x = x / self.token_scale(x[None])[0]
            scale = self.channel_scale(x, stats, is_key).clamp_min(1e-6)
            book = train_codebook(x / scale[:, None], weight / weight.mean(), layout)
            made.append(Codec.build(mean, torch.diag_embed(1 / scale), book))
        self.codecs[index] = made[0], made[1]

    def stored(self, x: Tensor, codec: Codec) -> Tensor:
        """Vectors ``[b, heads, n, d]`` as they would be decoded."""
        x, mean = x.float(), codec.mean[:, None]
        scale = self.token_scale(x - mean)
        return (as_decoded((x - mean) / scale + mean, codec) - mean) * scale + mean

    def keys(self, index: int, k: Tensor) -> Tensor:
        info = self.layers[index]
        return after_rope(self.stored(before_rope(k, info), self.codecs[index][0]), info)

    def values(self, index: int, v: Tensor) -> Tensor:
        return self.stored(v, self.codecs[index][1])

    def bits(self, info: LayerInfo) -> float:
        return self.rate

    def codebook_bytes(self) -> int:
        return sum(2 * codec.codebook.numel() for pair in self.codecs.values() for codec in pair)


class VQLLM(Vectors):
    """Residual stages, channels scaled."""

    def __init__(self, bits: float = 1) -> None:
        super().__init__("VQLLM", 32, bits)

    def channel_scale(self, x: Tensor, stats: Statistics, is_key: bool) -> Tensor:
        return x.std(1)


class CQ(Vectors):
    """Coupled channels."""

    def __init__(self, bits: float = 1) -> None:
        super().__init__("CQ 8c8b", 8, bits)

    def weight(self, cost: Tensor) -> Tensor:
        return cost + 1e-12


class TaSQ(Vectors):
    """Query-weighed channels and token scales."""

    def __init__(self, bits: float = 1) -> None:
        super().__init__("TaSQ-like", 8, bits)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(1)

    def channel_scale(self, x: Tensor, stats: Statistics, is_key: bool) -> Tensor:
        if not is_key:
            return super().channel_scale(x, stats, is_key)
        metric = torch.as_tensor(stats.query_metric).diagonal(dim1=-2, dim2=-1)
        return (metric / metric.mean(-1, keepdim=True)).clamp_min(1e-4).rsqrt()

    def weight(self, cost: Tensor) -> Tensor:
        return cost.sqrt() + 1e-12

    def token_scale(self, x: Tensor) -> Tensor:
        size = x.square().mean((1, 3), keepdim=True).sqrt().clamp_min(1e-8)
        return (size.log2() * 16).round().div(16).exp2()

    def bits(self, info: LayerInfo) -> float:
        return self.rate + 8 / (info.kv_heads * info.head_dim)
