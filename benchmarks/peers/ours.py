"""This project's codecs through the comparison's harness."""

from __future__ import annotations

import dataclasses

import torch
from peers.base import Method, as_decoded
from torch import Tensor

from torchgsrq.codec import Codec, LayerCodec
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.calibrate import rates_of_layers
from torchgsrq.learning.sensitivity import by_layer
from torchgsrq.learning.statistics import Statistics
from torchgsrq.learning.train import train, train_key, train_value
from torchgsrq.models import LayerInfo

PARTS = ("keys", "values")


class GSRQ(Method):
    """``recipe`` and ``layout`` as in `GSRQConfig`; ``parts`` may leave keys or values exact, to see what the others
    cost."""

    def __init__(self, config: GSRQConfig, parts: tuple[str, ...] = PARTS, span: int = 8192) -> None:
        super().__init__()
        label = {"gsrq": f"GSRQ {config.layout}", "gsrq-paper": "GSRQ, the paper's", "kmeans": "k-means"}
        split = "" if config.key_bits is None else f" (keys {config.key_rate:g}, values {config.value_rate:g})"
        self.parts = parts
        self.name, self.config, self.span = f"{label[config.recipe]} {config.bits:g} bit{split}", config, span
        self.name += ", same bits everywhere" if config.recipe == "gsrq" and not config.spreads_bits else ""
        self.name += "" if parts == PARTS else f", {parts[0]} alone"
        self.costs: dict[int, Tensor] | None = None  # `sensitivity`, if the config spreads bits
        self.codecs: dict[int, LayerCodec] = {}

    def fit(self, stats: dict[int, Statistics]) -> None:
        self.layers = {index: s.info for index, s in stats.items()}
        each = rates_of_layers(self.config, self.layers, None if self.costs is None else by_layer(self.costs))
        self.codecs = {index: train(s, self.config, each[index], self.span) for index, s in stats.items()}

    def keys(self, index: int, k: Tensor) -> Tensor:
        return k if "keys" not in self.parts else as_decoded(k, self.codecs[index].key, torch.arange(k.shape[2]))

    def values(self, index: int, v: Tensor) -> Tensor:
        return v if "values" not in self.parts else as_decoded(v, self.codecs[index].value)

    def bits(self, info: LayerInfo) -> float:
        stored = zip(PARTS, self.codecs[info.index], strict=True)
        return sum(codec.bits if part in self.parts else 32 for part, codec in stored) / 2

    def codebook_bytes(self) -> int:
        return sum(codec.nbytes() for layer in self.codecs.values() for codec in layer)


class GSRQByHead(GSRQ):
    """What bits by KV head instead of by layer would bring: caches have the same number of codes in all heads."""

    def __init__(self, config: GSRQConfig) -> None:
        super().__init__(config)
        self.name += " by head"
        self.rates: dict[tuple[int, int], tuple[float, float]] = {}  # layer and head: of its keys, of its values
        self.trained: dict[tuple[int, int, float], Codec] = {}  # layer, 0 for keys and 1 for values, rate

    def fit(self, stats: dict[int, Statistics]) -> None:
        assert self.costs is not None
        self.layers = {index: s.info for index, s in stats.items()}
        alone = {(i, h): dataclasses.replace(x, kv_heads=1) for i, x in self.layers.items() for h in range(x.kv_heads)}
        costs = {(i, h): (float(self.costs[i][0, h, h]), float(self.costs[i][1, h, h])) for i, h in alone}
        self.rates = rates_of_layers(self.config, alone, costs)
        for (index, _), (key_bits, value_bits) in self.rates.items():
            if (index, 0, key_bits) not in self.trained:
                self.trained[index, 0, key_bits] = train_key(stats[index], self.config, key_bits, self.span)
            if (index, 1, value_bits) not in self.trained:
                self.trained[index, 1, value_bits] = train_value(stats[index], self.config, value_bits)

    def decoded(self, index: int, part: int, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Vectors ``[b, heads, n, d]``, each head by its own rate."""
        each = [self.rates[index, head][part] for head in range(x.shape[1])]
        found = {rate: as_decoded(x, self.trained[index, part, rate], position) for rate in set(each)}
        return torch.stack([found[rate][:, head] for head, rate in enumerate(each)], 1)

    def keys(self, index: int, k: Tensor) -> Tensor:
        return self.decoded(index, 0, k, torch.arange(k.shape[2]))

    def values(self, index: int, v: Tensor) -> Tensor:
        return self.decoded(index, 1, v)

    def bits(self, info: LayerInfo) -> float:
        each = [sum(pair) / 2 for (index, _), pair in self.rates.items() if index == info.index]
        return sum(each) / len(each)

    def codebook_bytes(self) -> int:
        used = (self.trained[i, part, rate] for (i, _), pair in self.rates.items() for part, rate in enumerate(pair))
        return sum(codec.nbytes() // codec.heads for codec in used)
