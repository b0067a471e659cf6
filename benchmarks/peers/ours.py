"""This project's codecs through the comparison's harness."""

from __future__ import annotations

import torch
from peers.base import Method
from torch import Tensor

from torchgsrq import Codec
from torchgsrq.calibrate import Statistics, train
from torchgsrq.codec import LayerCodec
from torchgsrq.config import GSRQConfig
from torchgsrq.models import LayerInfo


class GSRQ(Method):
    """``recipe`` and ``layout`` as in `GSRQConfig`."""

    def __init__(self, config: GSRQConfig, span: int = 8192) -> None:
        super().__init__()
        label = {"gsrq": f"GSRQ {config.layout}", "gsrq-paper": "GSRQ, the paper's", "kmeans": "k-means"}
        split = "" if config.key_bits is None else f" (keys {config.key_rate:g}, values {config.value_rate:g})"
        self.name, self.config, self.span = f"{label[config.recipe]} {config.bits:g} bit{split}", config, span
        self.codecs: dict[int, LayerCodec] = {}

    def fit_layer(self, index: int, stats: Statistics) -> None:
        self.codecs[index] = train(stats, self.config, self.span)

    def stored(self, x: Tensor, codec: Codec) -> Tensor:
        """Vectors ``[b, heads, n, d]`` as they would be decoded."""
        at = torch.arange(x.shape[2]).expand(x.shape[0], -1)
        flat = (codec.tensors, codec.integers)
        return torch.ops.torchgsrq.decode(torch.ops.torchgsrq.encode(x, at, *flat), at, *flat, torch.float32)

    def keys(self, index: int, k: Tensor) -> Tensor:
        return self.stored(k, self.codecs[index].key)

    def values(self, index: int, v: Tensor) -> Tensor:
        return self.stored(v, self.codecs[index].value)

    def bits(self, info: LayerInfo) -> float:
        return self.config.bits

    def codebook_bytes(self) -> int:
        return sum(codec.nbytes() for layer in self.codecs.values() for codec in layer)
