"""NSNQuant-1b (arXiv 2505.18231): normalize, shift, normalize, rotate; then codewords of a Gaussian, without data.

In blocks of 64 tokens: each token is divided by its norm, the block's mean is taken off, each is divided by its norm
again and rotated by a Hadamard matrix; 8 elements share one of 256 codewords trained on a Gaussian. The two norms are
stored in 8 bits each (16 steps to the octave), the block's mean in 16. From the paper's description; the authors
fine-tune the codebook. Keys before RoPE.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from peers.base import Method, after_rope, before_rope
from torch import Tensor

from torchgsrq.codec.kmeans import cluster
from torchgsrq.models import LayerInfo

BLOCK, WIDTH = 64, 8


@functools.cache
def _gaussian_words() -> Tensor:
    x = torch.randn(1, 65536, WIDTH, generator=torch.Generator().manual_seed(0))
    return cluster(x, torch.ones(1, 65536), codewords=256, method="kmeans", iterations=20, seed=0)


@functools.cache
def _hadamard(dim: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix[:dim, :dim] / dim**0.5


def _rounded(size: Tensor) -> Tensor:
    return (size.clamp_min(1e-8).log2() * 16).round().div(16).exp2()


class NSNQuant(Method):
    """Needs no data; whole blocks leave the window."""

    name, block = "NSNQuant 1 bit", BLOCK

    def keys(self, index: int, k: Tensor) -> Tensor:
        info = self.layers[index]
        return after_rope(self.values(index, before_rope(k, info)), info)

    def values(self, index: int, v: Tensor) -> Tensor:
        tokens, dim = v.shape[2], v.shape[3]
        x = F.pad(v.float(), (0, 0, 0, -tokens % BLOCK), mode="replicate").unflatten(2, (-1, BLOCK))
        first = _rounded(x.norm(dim=-1, keepdim=True))
        x = x / first
        mean = x.mean(-2, keepdim=True).half().float()
        x = x - mean
        second = _rounded(x.norm(dim=-1, keepdim=True))
        y = (x / second * dim**0.5) @ _hadamard(dim).T
        rows = y.reshape(1, -1, WIDTH)
        code, _ = torch.ops.torchgsrq.nearest(rows, _gaussian_words())
        y = _gaussian_words()[0][code[0]].view_as(y) @ _hadamard(dim)
        return ((y / dim**0.5 * second + mean) * first).flatten(2, 3)[:, :, :tokens]

    def bits(self, info: LayerInfo) -> float:
        return 8 / WIDTH + 2 * 8 / info.head_dim + 16 / BLOCK
