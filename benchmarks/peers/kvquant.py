"""KVQuant (arXiv 2401.18079): every channel of keys before RoPE has its levels; one element in a hundred is exact.

Levels are learned by weighted k-means in one dimension; attention weights stand in for the authors' Fisher information.
Values have levels per layer, for each token's vector scaled to its range. Outliers are the 1% of largest elements by
the layer's scale, 16 bits and a 16-bit index each. The first token is exact through the comparison's sinks.
"""

from __future__ import annotations

import torch
from peers.base import Method, after_rope, all_of, before_rope
from torch import Tensor

from torchgsrq.learning.statistics import Statistics
from torchgsrq.models import LayerInfo

OUTLIERS = 0.01


def levels_of(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """Weighted k-means in one dimension: ``x, weight [rows, n]`` to sorted levels ``[rows, count]``."""
    at = (torch.arange(count, device=x.device) + 0.5) / count
    levels = torch.quantile(x[:, :: max(1, x.shape[1] // 4096)], at.to(x), dim=1).T.contiguous()
    for _ in range(15):
        code = torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), x)
        mass = torch.zeros_like(levels).scatter_add_(1, code, weight)
        total = torch.zeros_like(levels).scatter_add_(1, code, weight * x)
        levels = torch.where(mass > 0, total / mass.clamp_min(1e-30), levels).sort(1).values
    return levels


def to_levels(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest level: ``x [rows, n]``, levels ``[rows, count]``."""
    code = torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), x.contiguous())
    return levels.gather(1, code)


class KVQuant(Method):
    """Per-channel levels for keys, per-token ranges for values."""

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        self.name, self.count = f"KVQuant {levels} bit, 1%", levels
        self.key_levels: dict[int, Tensor] = {}
        self.key_limits: dict[int, tuple[Tensor, Tensor]] = {}
        self.value_levels: dict[int, Tensor] = {}

    def fit_layer(self, index: int, stats: Statistics) -> None:
        (k, cost), (v, _) = all_of(stats.keys), all_of(stats.values)
        rows = k.transpose(1, 2).flatten(0, 1).contiguous()  # [heads * d, n]
        weight = cost.repeat_interleave(k.shape[-1], 0)
        weight = weight + 1e-3 * weight.mean()
        some = rows[:, :: max(1, rows.shape[1] // 4096)]
        low, high = (torch.quantile(some, q, dim=1, keepdim=True) for q in (OUTLIERS / 2, 1 - OUTLIERS / 2))
        inside = (rows >= low) & (rows <= high)
        self.key_limits[index] = low, high
        self.key_levels[index] = levels_of(rows.clamp(low, high), weight * inside, 2**self.count)
        scaled, _, exact = self.scaled(v)
        values = scaled[~exact][None, :200000]
        self.value_levels[index] = levels_of(values, torch.ones_like(values), 2**self.count)

    @staticmethod
    def scaled(v: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Vectors without their outliers, moved to -1 to 1; the range; and where the outliers are."""
        count = max(1, round(OUTLIERS * v.shape[-1]))
        middle = v.median(-1, keepdim=True).values
        exact = torch.zeros_like(v, dtype=torch.bool)
        exact.scatter_(-1, (v - middle).abs().topk(count, -1).indices, True)
        low = v.masked_fill(exact, torch.inf).amin(-1, keepdim=True)
        high = v.masked_fill(exact, -torch.inf).amax(-1, keepdim=True)
        shift, size = (low + high) / 2, ((high - low) / 2).clamp_min(1e-8)
        return (v - shift) / size, (shift, size), exact

    def keys(self, index: int, k: Tensor) -> Tensor:
        x = before_rope(k, self.layers[index])
        low, high = self.key_limits[index]
        out = []
        for row in x:
            flat = row.transpose(1, 2).flatten(0, 1)
            exact = (flat < low) | (flat > high)
            flat = torch.where(exact, flat.half().float(), to_levels(flat, self.key_levels[index]))
            out.append(flat.unflatten(0, row.shape[::2]).transpose(1, 2))
        return after_rope(torch.stack(out), self.layers[index])

    def values(self, index: int, v: Tensor) -> Tensor:
        v = v.float()
        scaled, (shift, size), exact = self.scaled(v)
        levels = self.value_levels[index]
        found = to_levels(scaled.reshape(1, -1), levels).view_as(v) * size + shift
        return torch.where(exact, v.half().float(), found)

    def bits(self, info: LayerInfo) -> float:
        ranges = 2 * 16 / info.head_dim / 2  # of values alone
        return self.count + OUTLIERS * 32 + ranges

    def codebook_bytes(self) -> int:
        return sum(2 * t.numel() for group in (self.key_levels, self.value_levels) for t in group.values())
