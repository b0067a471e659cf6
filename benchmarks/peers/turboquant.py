"""TurboQuant (arXiv 2504.19874): a random rotation, then the Lloyd-Max levels of a Gaussian for every coordinate.

Its quantizer for the mean squared error; the residual's sign bits, which make products unbiased, are left out: they are
reported to hurt at these rates. A norm per vector in 16 bits. Keys after RoPE.
"""

from __future__ import annotations

import torch
from peers.base import Method
from torch import Tensor

from torchgsrq.models import LayerInfo


def gaussian_levels(bits: int) -> Tensor:
    """The levels that Lloyd's iteration finds for a standard Gaussian, float32 ``[2^bits]``."""
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2)
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(300):
        nearest = (grid[:, None] - levels).abs().argmin(1)
        mass = torch.zeros_like(levels).index_add_(0, nearest, density)
        levels = torch.zeros_like(levels).index_add_(0, nearest, density * grid) / mass
    return levels.float()


class TurboQuant(Method):
    """Needs no data."""

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.name, self.count = f"TurboQuant {levels} bit", levels
        self.table = gaussian_levels(levels)
        self.edges = (self.table[1:] + self.table[:-1]) / 2
        self.rotations: dict[int, Tensor] = {}

    def rotation(self, dim: int) -> Tensor:
        """The same for all layers."""
        if dim not in self.rotations:
            matrix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
            self.rotations[dim] = torch.linalg.qr(matrix).Q
        return self.rotations[dim]

    def keys(self, index: int, k: Tensor) -> Tensor:
        rotation, k = self.rotation(k.shape[-1]), k.float()
        size = (k.norm(dim=-1, keepdim=True) / k.shape[-1] ** 0.5).half().float().clamp_min(1e-8)
        return self.table[torch.bucketize(k @ rotation / size, self.edges)] * size @ rotation.T

    def values(self, index: int, v: Tensor) -> Tensor:
        return self.keys(index, v)

    def bits(self, info: LayerInfo) -> float:
        return self.count + 16 / info.head_dim
