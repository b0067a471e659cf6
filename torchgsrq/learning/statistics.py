"""The statistics that calibration collects of a model's keys, values and queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchgsrq import models, reference
from torchgsrq.codec.rope import rotate
from torchgsrq.learning.progress import bar
from torchgsrq.models import LayerInfo

FAR = 32  # tokens nearer to a query are in the recent window and do not count
_QUERY_STRIDE = 4  # every 4th query is enough
_BLOCK = 64  # queries at a time
KEPT = 24 << 10  # maximum number of vectors per head for training; longer texts are sampled
KEY_POWER, VALUE_POWER = 0.5, 0.25  # training weights are powers of the cost of errors: docs/research/quality.md


@dataclass
class Vectors:
    """The keys or the values of one layer that codebooks are learned from: lists with one item per window, of n vectors
    per head.

    Attributes:
        x: the vectors, ``[heads, n, head_dim]``.
        weight: ``[heads, n]``, the cost of each vector's error.
        count: ``[heads, n]``, the number of tokens that each vector represents: 1 if all are kept.
        places: ``[heads, n]``, the position in the text, which starts at a random position.
    """

    x: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    count: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, weight: Tensor, odds: Tensor, places: Tensor, keep: int, draws: torch.Generator) -> None:
        """Add ``keep`` of vectors ``x [heads, t, head_dim]`` at ``places [t]``, drawn by ``odds [heads, t]``."""
        which, count = drawn(odds, keep, draws)
        self.x.append(x.gather(1, which.unsqueeze(-1).expand(-1, -1, x.shape[-1])))
        self.weight.append(weight.gather(1, which))
        self.count.append(count)
        self.places.append(places[which])

    def of_heads(self, heads: list[int]) -> Vectors:
        """The vectors of some of the heads."""
        return Vectors(*([t[heads] for t in getattr(self, f.name)] for f in fields(self)))


def drawn(odds: Tensor, keep: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``keep`` of the t tokens of every head by systematic sampling without replacement. Probabilities are
    proportional to ``odds [heads, t]``, capped at 1.

    Returns:
        Indices ``[heads, keep]``, ascending; and the number of tokens that each represents, one over its probability.
    """
    heads, t = odds.shape
    if keep >= t:
        return torch.arange(t, device=odds.device).expand(heads, -1), torch.ones_like(odds)
    odds = odds.double()
    odds = odds + 1e-9 * odds.mean(1, keepdim=True) + 1e-30  # if few have weight, others fill up
    ranked = odds.sort(1, descending=True).values
    rest = ranked.flip(1).cumsum(1).flip(1)
    factors = (keep - torch.arange(t, device=odds.device)) / rest  # if the first 0, 1, 2, ... have probability 1
    certain = (factors * ranked > 1).cumprod(1).sum(1, keepdim=True)
    chance = (factors.gather(1, certain) * odds).clamp_max(1)
    start = torch.rand(heads, 1, generator=draws, dtype=torch.float64).to(odds.device)
    marks = start + torch.arange(keep, device=odds.device)
    which = torch.searchsorted(chance.cumsum(1), marks, right=True).clamp_max(t - 1)
    return which, (1 / chance.gather(1, which)).float()


@dataclass
class Statistics:
    """The statistics of one layer.

    Attributes:
        info: the layer.
        keep: number of vectors per window and head.
        keys: un-rotated keys; their errors are weighted by ``sum_t p_ts^2 |v_s - o_t|^2`` over distant queries.
        values: values; their errors are weighted by ``sum_t p_ts^2``.
        query_metric: ``[heads, head_dim, head_dim]``, ``sum_t sqrt(b_t) q q^T`` of un-rotated queries, with
            ``b_t = sum_s p_ts^2 |v_s - o_t|^2``.
        draws: the random generator for sampling.
    """

    info: LayerInfo
    keep: int
    keys: Vectors = field(default_factory=Vectors)
    values: Vectors = field(default_factory=Vectors)
    query_metric: Tensor | float = 0.0
    draws: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    def of_heads(self, heads: Sequence[int]) -> Statistics:
        """The statistics of some of the heads."""
        if len(heads) == self.info.kv_heads:
            return self
        group, which = self.info.q_heads // self.info.kv_heads, list(heads)
        info = replace(self.info, q_heads=group * len(which), kv_heads=len(which))
        metric = self.query_metric[which] if isinstance(self.query_metric, Tensor) else self.query_metric
        return Statistics(info, self.keep, self.keys.of_heads(which), self.values.of_heads(which), metric)

    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        softcap: float,
        sink_logits: Tensor | None,
        inv_freq: Tensor | None = None,
        reach: int | None = None,
    ) -> None:
        """Add a batch of windows: q ``[b, q_heads, t, d]``, k and v ``[b, heads, t, d]``, rotated by the layer's RoPE
        frequencies or, if these depend on the length, by ``inv_freq``. Each query sees ``reach`` tokens, or all."""
        q, k, v = q.float(), k.float(), v.float()
        info = self.info
        inv_freq = info.inv_freq if inv_freq is None else inv_freq.to(k.device)
        tokens = torch.arange(k.shape[2], device=k.device)
        sinks = None if sink_logits is None else sink_logits.view(1, info.kv_heads, -1, 1, 1)
        key_costs, value_costs = k.new_zeros(2, *k.shape[:3])
        for queries, past in blocks(len(tokens), _QUERY_STRIDE):
            asking, keys, values = tokens[queries], k[:, :, None, past], v[:, :, None, past]
            some_q = q[:, :, queries].unflatten(1, (info.kv_heads, -1))  # [b, h, g, queries, d]
            scores = some_q @ keys.transpose(-1, -2) * scaling
            p = reference.probabilities(scores, softcap, seen(asking, tokens[past], reach), sinks)
            del scores
            out = p @ values
            far = (asking[:, None] - tokens[past] >= FAR) & (tokens[past] >= 1)
            p2 = p.square_().mul_(far)
            spread = values.square().sum(-1).unsqueeze(-2) + out.square().sum(-1, keepdim=True)
            spread = spread.sub_(out @ values.transpose(-1, -2), alpha=2).clamp_min_(0).mul_(p2)
            flat_q = rotate(some_q, -asking, inv_freq, info.interleaved)
            weighted = flat_q * spread.sum(-1, keepdim=True).sqrt()
            self.query_metric = self.query_metric + torch.einsum("bhgtd,bhgte->hde", weighted, flat_q)
            key_costs[:, :, past] += spread.sum((2, 3))
            value_costs[:, :, past] += p2.sum((2, 3))
        # Tokens are drawn by their training weights, so the drawn ones count about equally.
        for vectors, x, cost, power in (
            (self.keys, rotate(k, -tokens, inv_freq, info.interleaved), key_costs, KEY_POWER),
            (self.values, v, value_costs, VALUE_POWER),
        ):
            weight = cost.transpose(0, 1).flatten(1)
            self._keep(vectors, x, weight, weight.pow(power))

    def add_vectors(self, x: Tensor) -> None:
        """Add cached vectors ``[b, heads, t, d]`` as keys with equal weights, if nothing else is known about them."""
        tokens = torch.arange(x.shape[2], device=x.device)
        x = rotate(x.float(), -tokens, self.info.inv_freq, self.info.interleaved)
        alike = torch.ones_like(x[..., 0]).transpose(0, 1).flatten(1)
        self._keep(self.keys, x, alike, alike)
        eye = torch.eye(x.shape[-1], device=x.device).expand(x.shape[1], -1, -1)
        self.query_metric = self.query_metric + eye

    def _keep(self, vectors: Vectors, x: Tensor, weight: Tensor, odds: Tensor) -> None:
        # Windows start at random positions, so that every place in a frame is trained, however short the windows are.
        start = torch.randint(1 << 20, (x.shape[0], 1), generator=self.draws).to(x.device)
        places = (start + torch.arange(x.shape[2], device=x.device)).flatten()
        vectors.add(x.transpose(0, 1).flatten(1, 2), weight, odds, places, x.shape[0] * self.keep, self.draws)


def collect_cached(
    model: PreTrainedModel, layers: Iterable[LayerInfo], windows: Tensor
) -> dict[int, tuple[Statistics, Statistics]]:
    """`collect_statistics` for layers of which only the cached tensors are known (`LayerInfo.value`). Returns, by
    layer, the statistics of keys and of values, both as ``keys``; all tokens and directions have equal weight."""
    keep = share(*windows.shape)
    stats = {info.index: (Statistics(info, keep), Statistics(info.value or info, keep)) for info in layers}
    inner, device = models.decoder(model), models.input_device(model)
    with torch.no_grad(), models.refusing(_what(model, windows)):
        for window in bar(windows, "reading"):
            cache = models.Recorder(models.text_config(model))
            with models.quick_products(model):
                inner(input_ids=window[None].to(device), use_cache=True, **models.with_cache(inner, cache))
            for index, *given in cache.given:
                for x, s in zip(given, stats.get(index, ()), strict=False):
                    s.add_vectors(x)
    return stats


def _what(model: PreTrainedModel, windows: Tensor) -> str:
    tokens = windows.shape[1]
    return f"{type(model).__name__} cannot be calibrated: a forward of {tokens} tokens, as its config allows, failed"


def blocks(tokens: int, stride: int = 1) -> Iterator[tuple[slice, slice]]:
    """Every ``stride``-th token of a text as a query, a block at a time: the slice of the block's queries, and that of
    the tokens up to its last query. Probabilities of a block stay in the processor's caches."""
    for start in range(stride - 1, tokens, stride * _BLOCK):
        queries = range(start, tokens, stride)[:_BLOCK]
        yield slice(queries.start, queries.stop, stride), slice(queries[-1] + 1)


def seen(queries: Tensor, keys: Tensor, reach: int | None) -> Tensor:
    """Which tokens ``keys [n]`` each of ``queries [m]`` sees, bool ``[m, n]``: none that are later, or beyond the
    ``reach`` of a sliding window."""
    past = keys <= queries[:, None]
    return past if reach is None else past & (keys > queries[:, None] - reach)


def collect_statistics(model: PreTrainedModel, layers: Iterable[LayerInfo], windows: Tensor) -> dict[int, Statistics]:
    """Read token windows ``[n, window]``, and collect the statistics of these layers."""
    layers = list(layers)
    stats = {info.index: Statistics(info, share(*windows.shape)) for info in layers}

    def observer(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        softcap: float,
        s_aux: Tensor | None,
        reach: int | None,
    ) -> None:
        index = source.get(models.layer_index(module), -1)
        if index in stats:
            stats[index].add(q, k, v, scaling, softcap, s_aux, rotary[index]() if index in rotary else None, reach)

    inner, device = models.decoder(model), models.input_device(model)
    source = models.cached_by(layers)
    rotary = models.rotaries(model, layers)
    with (
        torch.no_grad(),
        models.quick_products(model),
        models.observed(model, observer),
        models.refusing(_what(model, windows)),
    ):
        for window in bar(windows, "reading"):
            inner(input_ids=window[None].to(device), use_cache=False)
    return stats


def share(windows: int, tokens: int) -> int:
    """The number of vectors to keep per head from each of ``windows`` windows of ``tokens`` tokens."""
    return tokens if windows * tokens <= KEPT else max(1, KEPT // windows)


def chunks(layers: list[LayerInfo], windows: Tensor, max_memory: int) -> Iterable[list[LayerInfo]]:
    """Split the layers into chunks whose vectors, from windows ``[n, window]``, fit into ``max_memory`` bytes."""
    chunk: list[LayerInfo] = []
    used, kept = 0, windows.shape[0] * share(*windows.shape)
    for info in layers:
        need = 4 * kept * info.kv_heads * (2 * info.head_dim + 8)
        if chunk and used + need > max_memory:
            yield chunk
            chunk, used = [], 0
        chunk.append(info)
        used += need
    if chunk:
        yield chunk
