"""What calibration keeps of a model's keys, values and queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from torchgsrq import models
from torchgsrq.codec.rope import rotate
from torchgsrq.models import LayerInfo

FAR = 32  # a query's nearer neighbours are in the recent window and do not count
_QUERY_STRIDE = 4  # every 4th query is enough


@dataclass
class Statistics:
    """What calibration keeps of one layer. N counts tokens over all windows.

    Attributes:
        keys: un-rotated, ``[heads, N, head_dim]``. values: ``[heads, N, head_dim]``.
        places: ``[N]``, position in the window. window: ``[N]``, which window.
        key_weight: ``[heads, N]``, ``sum_t p_ts^2 |v_s - o_t|^2`` over far queries: what a key error costs.
        value_weight: ``[heads, N]``, ``sum_t p_ts^2``: what a value error costs.
        query_metric: ``[heads, head_dim, head_dim]``, ``sum_t sqrt(b_t) q q^T`` of un-rotated queries, with
            ``b_t = sum_s p_ts^2 |v_s - o_t|^2``.
    """

    info: LayerInfo
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    key_weight: list[Tensor] = field(default_factory=list)
    value_weight: list[Tensor] = field(default_factory=list)
    query_metric: Tensor | float = 0.0

    def of_heads(self, heads: Sequence[int]) -> Statistics:
        """The same of some of the heads alone."""
        if len(heads) == self.info.kv_heads:
            return self
        group, which = self.info.q_heads // self.info.kv_heads, list(heads)
        info = replace(self.info, q_heads=group * len(which), kv_heads=len(which))
        some = {x: [t[which] for t in getattr(self, x)] for x in ("keys", "values", "key_weight", "value_weight")}
        metric = self.query_metric[which] if isinstance(self.query_metric, Tensor) else self.query_metric
        return Statistics(info, **some, places=self.places, query_metric=metric)

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
        """Add a batch of windows: q ``[b, q_heads, t, d]``, k and v ``[b, heads, t, d]``, turned by the layer's RoPE
        frequencies or, where these depend on the length, by ``inv_freq``; each query sees ``reach`` tokens, or all."""
        q, k, v = q.float(), k.float(), v.float()
        info = self.info
        inv_freq = info.inv_freq if inv_freq is None else inv_freq.to(k.device)
        tokens = torch.arange(k.shape[2], device=k.device)
        asking = tokens[_QUERY_STRIDE - 1 :: _QUERY_STRIDE]
        some_q = q[:, :, asking].unflatten(1, (info.kv_heads, -1))  # [b, h, g, t/4, d]
        scores = some_q @ k[:, :, None].transpose(-1, -2) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(unseen(asking, tokens, reach), -torch.inf)
        if sink_logits is None:
            p = scores.softmax(-1)
        else:
            logits = sink_logits.float().view(1, info.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            p = torch.cat((scores, logits), -1).softmax(-1)[..., :-1]
        del scores
        out = p @ v[:, :, None]
        far = (asking[:, None] - tokens >= FAR) & (tokens >= 1)
        p2 = p.square_().mul_(far)
        spread = v.square().sum(-1)[:, :, None, None] + out.square().sum(-1, keepdim=True)
        spread = spread.sub_(out @ v[:, :, None].transpose(-1, -2), alpha=2).clamp_min_(0).mul_(p2)
        self.key_weight.append(spread.sum((2, 3)).transpose(0, 1).flatten(1))
        self.value_weight.append(p2.sum((2, 3)).transpose(0, 1).flatten(1))
        flat_q = rotate(some_q, -asking, inv_freq, info.interleaved)
        weighted = flat_q * spread.sum(-1, keepdim=True).sqrt()
        self.query_metric = self.query_metric + torch.einsum("bhgtd,bhgte->hde", weighted, flat_q)
        self.keys.append(rotate(k, -tokens, inv_freq, info.interleaved).transpose(0, 1).flatten(1, 2))
        self.values.append(v.transpose(0, 1).flatten(1, 2))
        self.places.append(tokens.repeat(k.shape[0]))

    def add_vectors(self, x: Tensor) -> None:
        """Add cached vectors ``[b, heads, t, d]`` of which nothing else is known, as keys."""
        tokens = torch.arange(x.shape[2], device=x.device)
        x = rotate(x.float(), -tokens, self.info.inv_freq, self.info.interleaved).transpose(0, 1).flatten(1, 2)
        self.keys.append(x)
        self.key_weight.append(torch.ones_like(x[..., 0]))
        self.places.append(tokens.repeat(x.shape[1] // len(tokens)))
        eye = torch.eye(x.shape[-1], device=x.device).expand(x.shape[0], -1, -1)
        self.query_metric = self.query_metric + eye


def collect_cached(
    model: PreTrainedModel, layers: Iterable[LayerInfo], windows: Tensor, progress: bool = True
) -> dict[int, tuple[Statistics, Statistics]]:
    """The same of layers of which only what they cache is known (`LayerInfo.value`): of keys and of values, both as
    ``keys``; all tokens and directions count alike."""
    stats = {info.index: (Statistics(info), Statistics(info.value or info)) for info in layers}
    inner, device = models.decoder(model), models.input_device(model)
    with torch.no_grad(), models.refusing(_what(model, windows)):
        for window in tqdm(windows, desc="reading", disable=not progress):
            cache = models.Recorder(models.text_config(model))
            inner(input_ids=window[None].to(device), use_cache=True, past_key_values=cache)
            for index, *given in cache.given:
                for x, s in zip(given, stats.get(index, ()), strict=False):
                    s.add_vectors(x)
    return stats


def _what(model: PreTrainedModel, windows: Tensor) -> str:
    tokens = windows.shape[1]
    return f"{type(model).__name__} cannot be calibrated: a forward of {tokens} tokens, as its config allows, failed"


def unseen(queries: Tensor, keys: Tensor, reach: int | None) -> Tensor:
    """Which tokens ``keys [n]`` each of ``queries [m]`` does not see, bool ``[m, n]``: later ones, and those beyond the
    ``reach`` of a sliding window."""
    later = keys > queries[:, None]
    return later if reach is None else later | (keys <= queries[:, None] - reach)


def collect_statistics(
    model: PreTrainedModel, layers: Iterable[LayerInfo], windows: Tensor, progress: bool = True
) -> dict[int, Statistics]:
    """Read token windows ``[n, window]`` and keep what calibration needs of these layers."""
    layers = list(layers)
    stats = {info.index: Statistics(info) for info in layers}

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
    with torch.no_grad(), models.observed(model, observer), models.refusing(_what(model, windows)):
        for window in tqdm(windows, desc="reading", disable=not progress):
            inner(input_ids=window[None].to(device), use_cache=False)
    return stats


def chunks(layers: list[LayerInfo], tokens: int, max_memory: int) -> Iterable[list[LayerInfo]]:
    """Layers whose vectors fit in memory together."""
    chunk: list[LayerInfo] = []
    used = 0
    for info in layers:
        need = 4 * tokens * info.kv_heads * (2 * info.head_dim + 2)
        if chunk and used + need > max_memory:
            yield chunk
            chunk, used = [], 0
        chunk.append(info)
        used += need
    if chunk:
        yield chunk
