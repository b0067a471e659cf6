"""KIVI (arXiv 2402.02750): keys per channel in groups of 32 tokens, values per token in groups of 32 channels.

Asymmetric integers between the least and the greatest of a group, which are stored in 16 bits. Keys after RoPE, as the
authors' code has it. It differs in its window: theirs holds up to 128 recent tokens, here it is the comparison's.
"""

from __future__ import annotations

import torch.nn.functional as F
from peers.base import Method
from torch import Tensor

from torchgsrq.models import LayerInfo

GROUP = 32


def integers(x: Tensor, bits: int) -> Tensor:
    """``x [..., group]`` rounded to ``2^bits`` levels between its least and greatest."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-8)
    low = low.half().float()
    return ((x - low) / step).round_().clamp_(0, 2**bits - 1) * step + low


class Kivi(Method):
    """Whole groups of 32 tokens leave the window."""

    block = GROUP

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        self.name, self.levels = f"KIVI {levels} bit", levels

    def keys(self, index: int, k: Tensor) -> Tensor:
        tokens = k.shape[2]
        groups = F.pad(k.float(), (0, 0, 0, -tokens % GROUP), mode="replicate").unflatten(2, (-1, GROUP))
        return integers(groups.transpose(-1, -2), self.levels).transpose(-1, -2).flatten(2, 3)[:, :, :tokens]

    def values(self, index: int, v: Tensor) -> Tensor:
        return integers(v.float().unflatten(-1, (-1, GROUP)), self.levels).flatten(-2)

    def bits(self, info: LayerInfo) -> float:
        return self.levels + 2 * 16 / GROUP
