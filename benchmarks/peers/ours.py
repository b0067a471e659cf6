"""This project's codecs through the comparison's harness."""

from __future__ import annotations

import torch
from peers.base import Method, as_decoded
from torch import Tensor

from torchgsrq.codec import LayerCodec
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.calibrate import rates_of_layers
from torchgsrq.learning.statistics import Statistics
from torchgsrq.learning.train import train
from torchgsrq.models import LayerInfo


class GSRQ(Method):
    """``recipe`` and ``layout`` as in `GSRQConfig`."""

    def __init__(self, config: GSRQConfig, span: int = 8192) -> None:
        super().__init__()
        label = {"gsrq": f"GSRQ {config.layout}", "gsrq-paper": "GSRQ, the paper's", "kmeans": "k-means"}
        split = "" if config.key_bits is None else f" (keys {config.key_rate:g}, values {config.value_rate:g})"
        self.name, self.config, self.span = f"{label[config.recipe]} {config.bits:g} bit{split}", config, span
        self.name += ", same bits everywhere" if config.recipe == "gsrq" and not config.spreads_bits else ""
        self.costs: dict[int, tuple[float, float]] | None = None  # `sensitivity`, if the config spreads bits
        self.codecs: dict[int, LayerCodec] = {}

    def fit(self, stats: dict[int, Statistics]) -> None:
        self.layers = {index: s.info for index, s in stats.items()}
        each = rates_of_layers(self.config, self.layers, self.costs)
        self.codecs = {index: train(s, self.config, each[index], self.span) for index, s in stats.items()}

    def keys(self, index: int, k: Tensor) -> Tensor:
        return as_decoded(k, self.codecs[index].key, torch.arange(k.shape[2]))

    def values(self, index: int, v: Tensor) -> Tensor:
        return as_decoded(v, self.codecs[index].value)

    def bits(self, info: LayerInfo) -> float:
        return sum(codec.bits for codec in self.codecs[info.index]) / 2

    def codebook_bytes(self) -> int:
        return sum(codec.nbytes() for layer in self.codecs.values() for codec in layer)
