"""What quantization costs and saves: perplexity, KL, agreement, passkey retrieval, memory, speed."""

from __future__ import annotations

import dataclasses
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from torchgsrq import models, reference
from torchgsrq.api import dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.attention import dense_attention, gsrq_attention
from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.layer import GSRQLayer

Candidate = tuple[GSRQConfig, Codebooks]


@dataclass(frozen=True)
class Quality:
    """Against the full-precision model, on the same text.

    Attributes:
        ppl, ppl_full: perplexity per token. kl: mean KL divergence of the next-token distributions, nats.
        agreement: fraction of positions whose most likely next token is the same.
    """

    ppl_full: float
    ppl: float
    kl: float
    agreement: float


@contextmanager
def quantized(model: PreTrainedModel, config: GSRQConfig, codebooks: Codebooks) -> Iterator[None]:
    """Run with a quantized KV cache, and undo it."""
    quantize_kv_(model, config, codebooks=codebooks)
    try:
        yield
    finally:
        dequantize_kv_(model)


@torch.no_grad()
def quality(
    model: PreTrainedModel, windows: Sequence[Tensor], candidates: dict[str, Candidate], shift: int = 0
) -> dict[str, Quality]:
    """Compare quantized caches with full precision, every query seeing what a token-by-token decode would.

    Args:
        windows: token windows, each ``[n]``.
        candidates: name to config and codebooks; ``prefill="quantized"`` is set here.
        shift: added to all positions of the quantized run.
    """
    sums = {name: [0.0, 0.0, 0.0] for name in candidates}
    full_nll, count = 0.0, 0
    for window in windows:
        ids = window.view(1, -1).to(model.device)
        targets = ids[0, 1:, None]
        full = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        full_nll -= float(full[:-1].gather(1, targets).sum())
        count += ids.shape[1] - 1
        positions = torch.arange(ids.shape[1], device=ids.device)[None] + shift
        for name, (config, codebooks) in candidates.items():
            with quantized(model, dataclasses.replace(config, prefill="quantized"), codebooks):
                got = model(ids, use_cache=True, position_ids=positions).logits[0].float().log_softmax(-1)
            sums[name][0] -= float(got[:-1].gather(1, targets).sum())
            sums[name][1] += float((full[:-1].exp() * (full[:-1] - got[:-1])).sum())
            sums[name][2] += float((full[:-1].argmax(-1) == got[:-1].argmax(-1)).sum())
    perplexity = math.exp(full_nll / count)
    return {
        name: Quality(perplexity, math.exp(nll / count), kl / count, same / count)
        for name, (nll, kl, same) in sums.items()
    }


@torch.no_grad()
def key_error(model: PreTrainedModel, window: Tensor, codebooks: Codebooks, shift: int = 0) -> float:
    """Mean relative error of decoded keys in the codec's metric, all layers, with positions moved by ``shift``.

    The keys are those of a full-precision forward, so that the error is of coding alone.
    """
    errors: list[Tensor] = []
    ids = window.view(1, -1).to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + shift

    def observer(module: Any, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> None:
        if module.layer_idx not in codebooks:
            return
        codec = codebooks[module.layer_idx].key
        decoded = reference.decode(reference.encode(k, positions, codec), positions, codec)
        back = (positions.remainder(codec.frame) - positions)[:, None]
        turned = [
            reference.rotate(x.float(), back, codec.inv_freq, codec.interleaved) @ codec.transform.transpose(1, 2)
            for x in (k - decoded, k)
        ]
        # Sinks are kept in full precision, so the first token does not count.
        error, size = (t[:, :, 1:].square().sum((0, 2, 3)) for t in turned)
        errors.append((error / size).mean())

    with models.observed(model, observer):
        model.base_model(ids, position_ids=positions, use_cache=False)
    return float(torch.stack(errors).mean())


@torch.no_grad()
def output_error(model: PreTrainedModel, window: Tensor, config: GSRQConfig, codebooks: Codebooks) -> dict[int, float]:
    """Relative squared error of the attention output of each quantized layer, on real queries.

    Every query sees what a token-by-token decode would, and the queries, keys and values are those of a full-precision
    forward: so this is what quantizing a layer's cache does to that layer. Keys and values are judged by it: the error
    of a key alone does not tell which part of it queries look at.

    Args:
        window: ``[n]`` tokens.

    Returns:
        layer to ``sum |o' - o|^2 / sum |o|^2``, over all heads and tokens.
    """
    small = dataclasses.replace(config, prefill="quantized")
    errors = {}

    def observer(module: Any, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, softcap: float, s_aux: Any) -> None:
        index: int = getattr(module, "layer_idx", -1)
        if index not in codebooks:
            return
        keys, values = GSRQLayer(codebooks[index], small, index=index).update(k, v)
        given = {"scaling": scaling, "softcap": softcap or None, "s_aux": s_aux}
        exact = dense_attention(module, q, k, v, None, **given)[0].float()
        got = gsrq_attention(module, q, keys, values, None, **given)[0].float()
        errors[index] = float((got - exact).square().sum() / exact.square().sum())

    with models.observed(model, observer):
        models.decoder(model)(input_ids=window.view(1, -1).to(model.device), use_cache=False)
    return errors


def passkey_prompt(text_ids: Tensor, tokenizer: Any, tokens: int, seed: int) -> tuple[Tensor, str]:
    """A passkey hidden in real text, at random depth: prompt ids ``[1, about tokens]`` and the digits."""
    rng = random.Random(seed)
    key = f"{rng.randrange(100000):05d}"

    def ids(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]

    head = ids("There is an important pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n")
    needle = ids(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    question = ids("\nWhat is the pass key? The pass key is")
    start = rng.randrange(text_ids.numel() - tokens)
    filler = text_ids[start : start + tokens - head.numel() - needle.numel() - question.numel()]
    depth = rng.randrange(filler.numel())
    return torch.cat((head, filler[:depth], needle, filler[depth:], question))[None], key


@torch.no_grad()
def passkey(
    model: PreTrainedModel, tokenizer: Any, text: str, tokens: int, trials: int, candidate: Candidate | None = None
) -> float:
    """Fraction of passkeys retrieved, greedily, with the prompt read through the quantized cache.

    Args:
        tokens: length of the prompts. candidate: config and codebooks, or None for full precision.
    """
    text_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    found = 0
    for trial in range(trials):
        prompt, key = passkey_prompt(text_ids, tokenizer, tokens, seed=trial)
        prompt = prompt.to(model.device)
        arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 7, "do_sample": False}
        if candidate is None:
            out = model.generate(prompt, **arguments)
        else:
            with quantized(model, dataclasses.replace(candidate[0], prefill="quantized"), candidate[1]):
                out = model.generate(prompt, **arguments)
        found += key in tokenizer.decode(out[0, prompt.shape[1] :])
    return found / trials


@torch.no_grad()
def decode_speed(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, Tensor, Any]:
    """Tokens per second of greedy decoding after ``ids [1, n]`` were read, the continuation, and the cache."""
    cache = new_cache(model) if hasattr(model, "_gsrq") else transformers.DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    begin = time.perf_counter()
    out = model.generate(
        ids,
        past_key_values=cache,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    return new_tokens / (time.perf_counter() - begin), out[0, ids.shape[1] :], cache


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
