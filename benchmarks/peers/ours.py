"""This project's codecs through the comparison's harness."""

from __future__ import annotations

import copy

import torch
from peers.base import Method, as_decoded
from torch import Tensor

from torchgsrq.codec import LayerCodec
from torchgsrq.codec.allocation import head_rates
from torchgsrq.codec.layout import rates
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.calibrate import rates_of_heads
from torchgsrq.learning.sensitivity import by_head
from torchgsrq.learning.statistics import Statistics
from torchgsrq.learning.train import train
from torchgsrq.models import LayerInfo

PARTS = ("keys", "values")


class GSRQ(Method):
    """A config's codecs; ``parts`` may leave keys or values exact, to see what the others cost."""

    def __init__(self, config: GSRQConfig, parts: tuple[str, ...] = PARTS, span: int = 8192) -> None:
        super().__init__()
        self.parts = parts
        self.config, self.span = config, span
        self.name = f"GSRQ {config.bits:g} bit" if config.recipe == "gsrq" else f"GSRQ, the paper's {config.bits:g} bit"
        if config.recipe == "gsrq":
            self.name += "" if config.group_size == GSRQConfig.group_size else f", groups of {config.group_size}"
            self.name += "" if config.spreads_bits else ", same bits everywhere"
        self.name += "" if parts == PARTS else f", {parts[0]} alone"
        self.costs: dict[int, Tensor] | None = None  # `sensitivity`, if the config spreads bits
        self.codecs: dict[int, LayerCodec] = {}

    def fit(self, stats: dict[int, Statistics]) -> None:
        self.layers = {index: s.info for index, s in stats.items()}
        if not self.codecs:  # else learned already, for another window
            each = rates_of_heads(self.config, self.layers, None) if self.costs is None else self.rates(self.costs)
            self.codecs.update((i, train(s, [(self.config, each[i])], self.span)[0]) for i, s in stats.items())

    def with_window(self, sinks: int, recent: int) -> GSRQ:
        """The same codecs, learned once for all, with other numbers of exact tokens."""
        other = copy.copy(self)  # which shares `codecs`
        other.sinks, other.recent, other.errors = sinks, recent, {}
        other.name += f", {sinks} + {recent} exact"
        return other

    def rates(self, costs: dict[int, Tensor]) -> dict[int, list[tuple[float, float]]]:
        """Bits of the keys and of the values of every layer's heads, by what their errors cost."""
        return rates_of_heads(self.config, self.layers, by_head(costs))

    def keys(self, index: int, k: Tensor) -> Tensor:
        return k if "keys" not in self.parts else as_decoded(k, self.codecs[index].key, torch.arange(k.shape[2]))

    def values(self, index: int, v: Tensor) -> Tensor:
        return v if "values" not in self.parts else as_decoded(v, self.codecs[index].value)

    def bits(self, info: LayerInfo) -> float:
        stored = zip(PARTS, self.codecs[info.index], strict=True)
        return sum(codec.bits if part in self.parts else 32 for part, codec in stored) / 2

    def codebook_bytes(self) -> int:
        return sum(codec.nbytes() for layer in self.codecs.values() for codec in layer)


class GSRQByLayer(GSRQ):
    """What bits by layer instead of by KV head would be worth: the heads of a layer get the same."""

    def __init__(self, config: GSRQConfig) -> None:
        super().__init__(config)
        self.name += " by layer"

    def rates(self, costs: dict[int, Tensor]) -> dict[int, list[tuple[float, float]]]:
        whole = {i: [tuple(cost.sum((1, 2)).tolist())] for i, cost in costs.items()}
        offered = {i: rates(info.head_dim) for i, info in self.layers.items()}
        sizes = {i: info.kv_heads * info.head_dim for i, info in self.layers.items()}
        each = head_rates(whole, sizes, offered, self.config.bits)
        return {i: each[i] * info.kv_heads for i, info in self.layers.items()}
