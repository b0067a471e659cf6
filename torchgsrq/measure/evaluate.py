"""The cost of quantization and what it saves: perplexity, KL divergence, agreement, error of attention, bits, speed."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from torchgsrq import models, ops
from torchgsrq.api import dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.attention import dense_attention, gsrq_attention
from torchgsrq.cache import GSRQCache
from torchgsrq.cache.layer import GSRQLayer
from torchgsrq.codec import Codebooks
from torchgsrq.codec.rope import rotate
from torchgsrq.config import GSRQConfig, encoded_tokens
from torchgsrq.learning.statistics import seen

Candidate = tuple[GSRQConfig, Codebooks]
_ROWS = 512  # rows of logits at a time


@dataclass(frozen=True)
class Quality:
    """Quality relative to the full-precision model on the same text.

    Attributes:
        ppl, ppl_full: perplexity per token, quantized and in full precision.
        kl, kl_median, kl_p99: KL divergence of the next-token distributions from those of full precision, in nats:
            mean, median and 99th percentile.
        kl_low, kl_high: 95% confidence interval of the mean, by bootstrap over stretches of 64 tokens.
        agreement: fraction of positions whose most likely next token is the same.
    """

    ppl_full: float
    ppl: float
    kl: float
    kl_median: float
    kl_p99: float
    kl_low: float
    kl_high: float
    agreement: float


def divergence(full: Tensor, got: Tensor) -> Tensor:
    """KL divergence from full precision, in nats, ``[n]``. Both arguments are log-probabilities ``[n, vocabulary]``."""
    return (full.exp() * (full - got)).sum(-1)


class Comparison:
    """Compares next-token distributions of a quantized run with full precision, window by window."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.nll: list[Tensor] = []
        self.nll_full: list[Tensor] = []
        self.same: list[Tensor] = []

    def add(self, ids: Tensor, full: Tensor, got: Tensor) -> None:
        """Add a window: token IDs ``[n]``, and logits ``[n, vocabulary]`` after each of them."""
        found: list[list[Tensor]] = [[], [], [], []]
        for rows in torch.arange(len(ids) - 1, device=ids.device).split(_ROWS):  # all at once could take gigabytes
            one, other = (x[rows].float().log_softmax(-1) for x in (full, got))
            targets = ids[rows + 1, None]
            facts = divergence(one, other), (one.argmax(-1) == other.argmax(-1)).float()
            likely = (-x.gather(1, targets)[:, 0] for x in (other, one))
            for kept, fact in zip(found, (*facts, *likely), strict=True):
                kept.append(fact.cpu())
        for whole, parts in zip((self.kl, self.same, self.nll, self.nll_full), found, strict=True):
            whole.append(torch.cat(parts))

    def result(self) -> Quality:
        """The quality over all windows."""
        kl, nll, nll_full, same = (torch.cat(x).double() for x in (self.kl, self.nll, self.nll_full, self.same))
        means = torch.stack([stretch.mean() for window in self.kl for stretch in window.double().split(64)])
        drawn = torch.randint(len(means), (2000, len(means)), generator=torch.Generator().manual_seed(0))
        low, high = means[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Quality(
            math.exp(nll_full.mean()),
            math.exp(nll.mean()),
            float(kl.mean()),
            float(kl.median()),
            float(kl.quantile(0.99)),
            low,
            high,
            float(same.mean()),
        )


@contextmanager
def quantized(model: PreTrainedModel, config: GSRQConfig, codebooks: Codebooks) -> Iterator[None]:
    """Quantize the model's KV cache within this context."""
    quantize_kv_(model, config, codebooks=codebooks)
    try:
        yield
    finally:
        dequantize_kv_(model)


def for_measuring(config: GSRQConfig) -> GSRQConfig:
    """The same config with ``prefill="quantized"``, so that prompts read what is stored, as in a long generation."""
    return dataclasses.replace(config, prefill="quantized")


@torch.no_grad()
def quality(
    model: PreTrainedModel, windows: Iterable[Tensor], candidates: dict[str, Candidate], shift: int = 0
) -> dict[str, Quality]:
    """Compare quantized caches with full precision. Every query reads what a token-by-token decode would.

    Args:
        model: a model that is not quantized.
        windows: windows of token IDs, each ``[n]``.
        candidates: name to config and codebooks; ``prefill="quantized"`` is set automatically.
        shift: added to all positions of the quantized run.

    Returns:
        The quality of each candidate.

    Raises:
        ValueError: no token of a window was encoded, so that the results would be those of full precision.
    """
    comparisons = {name: Comparison() for name in candidates}
    for window in windows:
        ids = window.view(1, -1).to(model.device)
        full = model(ids, use_cache=False).logits[0]
        positions = torch.arange(ids.shape[1], device=ids.device)[None] + shift
        for name, (config, codebooks) in candidates.items():
            with quantized(model, for_measuring(config), codebooks):
                out = model(ids, use_cache=True, position_ids=positions)
                check_read_codes(models.returned_cache(out))
                got = out.logits[0]
            comparisons[name].add(ids[0], full, got)
    return {name: comparison.result() for name, comparison in comparisons.items()}


def check_read_codes(cache: Any) -> None:
    """Check that a run read tokens from codes, so that it measures quantization.

    Raises:
        ValueError: the cache is not a `GSRQCache`, or all of its tokens fit its sinks and window.
    """
    if not isinstance(cache, GSRQCache):
        raise ValueError(f"the run returned a {type(cache).__name__}: nothing was quantized, nothing to measure")
    layers = [layer for layer in cache.quantized_layers if layer.is_initialized]
    if not any(int(layer.keys.encoded.max()) > cache.config.sink_tokens for layer in layers):
        c, held = cache.config, int(cache.get_seq_length())
        raise ValueError(
            f"all of the {held} tokens fit the sinks and the window of full precision, so nothing was read from codes: "
            f"take a longer text, or a smaller window than recent_tokens={c.recent_tokens} with "
            f"block_tokens={c.block_tokens}"
        )


def true_bits(config: GSRQConfig, codebooks: Codebooks, tokens: int) -> float:
    """Bits per element of a cache of ``tokens`` tokens, with everything counted: codes, codebooks, and sinks and window
    in 16 bits."""
    coded = encoded_tokens(tokens, config.recent_tokens, config.block_tokens)
    window = config.sink_tokens + config.recent_tokens + config.block_tokens
    size, elements = 0.0, 0
    for layer in codebooks.layers.values():
        for codec in layer:
            held = codec.heads * codec.head_dim
            size += coded * held * codec.bits / 8 + 2 * window * held + codec.nbytes()
            elements += codec.heads * tokens * codec.head_dim
    return 8 * size / max(elements, 1)


@torch.no_grad()
def key_error(model: PreTrainedModel, window: Tensor, codebooks: Codebooks, shift: int = 0) -> float:
    """Mean relative error of decoded keys in the codec's metric over all layers, with positions moved by ``shift``.

    The keys are those of a full-precision forward over ``window``, token IDs ``[n]``, so the error comes from coding
    alone.
    """
    errors: list[Tensor] = []
    ids = window.view(1, -1).to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + shift

    def observer(module: Any, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> None:
        if module.layer_idx not in codebooks:
            return
        codecs = codebooks[module.layer_idx].key
        decoded = ops.round_trip(k, positions, codecs)
        back = (positions.remainder(codecs.frame) - positions)[:, None]
        found = []
        for heads, codec in codecs.parts:
            turned = [
                rotate(x[:, list(heads)].float(), back, codec.inv_freq, codec.interleaved) @ codec.transform.mT
                for x in (k - decoded, k)
            ]
            # Sinks are kept in full precision, so the first token does not count.
            error, size = (t[:, :, 1:].square().sum((0, 2, 3)) for t in turned)
            found.append(error / size)
        errors.append(torch.cat(found).mean())

    with models.observed(model, observer):
        model.base_model(ids, position_ids=positions, use_cache=False)
    return float(torch.stack(errors).mean())


@torch.no_grad()
def output_error(model: PreTrainedModel, window: Tensor, config: GSRQConfig, codebooks: Codebooks) -> dict[int, float]:
    """Relative squared error of the attention output of each quantized layer, on real queries.

    Queries, keys and values are those of a full-precision forward, and every query reads what a token-by-token decode
    would. This is the effect of quantizing a layer's cache on that layer. It is a better measure than the error of
    keys, which does not show which part of a key the queries use.

    Args:
        model: a model that is not quantized.
        window: token IDs ``[n]``.
        config: the config of the cache.
        codebooks: codebooks of the layers to measure.

    Returns:
        Layer to ``sum |o' - o|^2 / sum |o|^2``, over all heads and tokens.
    """
    small = for_measuring(config)
    errors = {}

    def observer(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, softcap: float, s_aux: Any, reach: int | None
    ) -> None:
        index: int = getattr(module, "layer_idx", -1)
        if index not in codebooks:
            return
        slots = torch.arange(k.shape[2], device=k.device)
        mask = None if reach is None else seen(slots, slots, reach)[None, None]
        keys, values = GSRQLayer(codebooks[index], small, index=index).update(k, v)
        given = {"scaling": scaling, "softcap": softcap or None, "s_aux": s_aux}
        exact = dense_attention(module, q, k, v, mask, **given)[0].float()
        got = gsrq_attention(module, q, keys, values, mask, **given)[0].float()
        errors[index] = float((got - exact).square().sum() / exact.square().sum())

    with models.observed(model, observer):
        models.decoder(model)(input_ids=window.view(1, -1).to(model.device), use_cache=False)
    return errors


class Reading(NamedTuple):
    """The result of `read_and_write`: logits ``[n, vocabulary]`` after each token of the text except the last, tokens
    per second of greedy decoding, the tokens written, and the cache."""

    logits: Tensor
    tokens_per_second: float
    written: Tensor
    cache: Any


@torch.no_grad()
def read_and_write(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Reading:
    """Read ``ids [1, n]`` and generate ``new_tokens`` more, with the model's current kind of cache."""
    cache = new_cache(model) if hasattr(model, "_gsrq") else transformers.DynamicCache(config=model.config)
    logits = model(ids[:, :-1], **models.with_cache(model, cache), use_cache=True).logits[0]
    begin = time.perf_counter()
    out = model.generate(
        ids,
        **models.with_cache(model, cache),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    return Reading(logits, new_tokens / (time.perf_counter() - begin), out[0, ids.shape[1] :], cache)


def environment() -> str:
    """Machine and versions, for above a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return (
        f"{device}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
