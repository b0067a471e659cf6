"""How fast the CPU kernels are: attention on codes against full-precision attention, encoding, whole models.

    python benchmarks/cpu.py --section attention --threads 1 --json cpu.json

Every ratio compares runs of one process that took turns; each number is a median. Sections:

- attention: one decode step of one layer, by context, group size and rate, against every arrangement of SDPA, and where
  the time goes.
- queries: several query tokens (speculative decoding, chunked prefill) and batches, against SDPA on the dequantized
  cache.
- generate: tokens per second of the embedded model against transformers' own caches.
- prefill: what encoding adds to reading a prompt, and appending to a decode step.
- memory: peak resident memory of decode steps on a long cache.
- compile: the compiled decode step against eager.
- calibrate: seconds from model to codebooks.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import MODELS, fill, random_cache, random_codebooks, random_codecs
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.benchmark import Timer

from torchgsrq import GSRQConfig, GSRQTensor, calibrate, dequantize_kv_, models, new_cache, quantize_kv_
from torchgsrq.codec import Codebooks
from torchgsrq.measure import evaluate
from torchgsrq.ops import use_kernels

SHAPES = {name: MODELS[name] for name in ("SmolLM2-135M", "Llama-3-8B")}
PHASES = ("tables", "mean", "scores", "softmax", "values", "window", "merge")
GROUPS = (8, 16, 32, 64)  # elements of a group
SECTIONS = ("attention", "queries", "generate", "prefill", "memory", "compile", "calibrate")


def in_turns(candidates: dict[str, Callable[[], Any]], seconds: float = 1.0, rounds: int = 7) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a busy machine slows them alike."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in candidates.items()
    }
    each = {name: max(1, int(seconds / rounds / max(t.timeit(2).mean, 1e-9))) for name, t in timers.items()}
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            taken[name].append(timer.timeit(each[name]).mean)
    return {name: statistics.median(times) for name, times in taken.items()}


def gsrq_step(q: Tensor, key: GSRQTensor, value: GSRQTensor) -> Callable[[], Tensor]:
    """A decode step on codes, as models call it."""
    parts = (key.parts, list(key.integers), value.parts, list(value.integers))
    scale = q.shape[-1] ** -0.5
    causal = 2 if q.shape[2] > 1 else 0
    return lambda: torch.ops.torchgsrq.attention(q, *parts, None, scale, causal, 0.0, None, None, None, None, 0)


def sdpa_steps(q: Tensor, heads: int, length: int) -> dict[str, Callable[[], Tensor]]:
    """A decode step in full precision, in every arrangement that PyTorch offers."""
    batch, dim = q.shape[0], q.shape[3]
    k, v = (torch.randn(batch, heads, length, dim) for _ in range(2))
    rows = q.reshape(batch, heads, -1, dim)
    half = [x.bfloat16() for x in (q, rows, k, v)]
    flex = torch.compile(flex_attention, fullgraph=True)
    return {
        "sdpa fp32, queries as rows": lambda: F.scaled_dot_product_attention(rows, k, v),
        "sdpa bf16, queries as rows": lambda: F.scaled_dot_product_attention(*half[1:]),
        "sdpa fp32, enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "matmuls bf16": lambda: (half[1] @ half[2].transpose(-1, -2)).softmax(-1) @ half[3],
        "flex_attention, compiled": lambda: flex(q, k, v, enable_gqa=True),
    }


class Bench:
    """What the sections share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: list[dict[str, Any]] = []

    def record(self, **facts: Any) -> None:
        """Print a row and keep it."""
        self.results.append(facts)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()), flush=True)

    def attention(self) -> None:
        """Decode attention of one layer."""
        torch.ops.torchgsrq.cpu_profile(False)
        for model, (q_heads, heads, dim) in SHAPES.items():
            for length in self.args.context or (4096, 8192, 32768, 131072):
                q = torch.randn(1, q_heads, 1, dim)
                steps: dict[str, Callable[[], Any]] = dict(sdpa_steps(q, heads, length))
                for group_size in GROUPS:
                    for bits in (2.0, 1.0, 0.5):
                        config = GSRQConfig(bits=bits, group_size=group_size)
                        steps[f"gsrq groups of {group_size}, {bits:g}"] = gsrq_step(
                            q, *random_cache(1, heads, dim, length, config)
                        )
                took = in_turns(steps)
                best = min(t for name, t in took.items() if name.startswith("sdpa"))
                for name, seconds in took.items():
                    facts: dict[str, Any] = {"section": "attention", "model": model, "context": length, "what": name}
                    facts |= {"us": seconds * 1e6, "over_sdpa": best / seconds}
                    if name.startswith("gsrq"):
                        facts |= self.breakdown(steps[name], length * heads)
                    self.record(**facts)

    def breakdown(self, step: Callable[[], Any], tokens: int, repeats: int = 10) -> dict[str, float]:
        """Nanoseconds per token and KV head, by phase, all threads together."""
        torch.ops.torchgsrq.cpu_profile(True)
        for _ in range(repeats):
            step()
        spent = torch.ops.torchgsrq.cpu_profile(False)
        return {f"ns_{phase}": ns / repeats / tokens for phase, ns in zip(PHASES, spent, strict=True)}

    def queries(self) -> None:
        """Several queries, and batches."""
        kinds = ((4, 1), (1, 4), (1, 8), (1, 16), (1, 64))
        for dtype, (model, (q_heads, heads, dim)) in itertools.product((torch.float32, torch.bfloat16), SHAPES.items()):
            for batch, queries in kinds:
                key, value = random_cache(batch, heads, dim, 8192, GSRQConfig(), dtype)
                q = torch.randn(batch, q_heads, queries, dim, dtype=dtype)
                k, v = key.dequantize().to(dtype), value.dequantize().to(dtype)
                mask = None if queries == 1 else torch.ones(queries, 8192, dtype=torch.bool).tril(8192 - queries)
                rows = q.reshape(batch, heads, -1, dim)
                tall = None if mask is None else mask.repeat(q_heads // heads, 1)
                dense = F.scaled_dot_product_attention
                took = in_turns(
                    {
                        "gsrq": gsrq_step(q, key, value),
                        "rows": functools.partial(dense, rows, k, v, attn_mask=tall),
                        "gqa": functools.partial(dense, q, k, v, attn_mask=mask, enable_gqa=True),
                    }
                )
                best = min(took["rows"], took["gqa"])
                self.record(
                    section="queries",
                    model=model,
                    what=str(dtype).removeprefix("torch."),
                    context=8192,
                    batch=batch,
                    queries=queries,
                    us=took["gsrq"] * 1e6,
                    over_sdpa=best / took["gsrq"],
                )

    # -- with the embedded model

    def model(self) -> Any:
        """The embedded model, or another."""
        from torchgsrq.measure.embedded import load_model

        if not hasattr(self, "_model"):
            self._model, self._tokenizer = load_model(self.args.model)
        return self._model

    def shape(self) -> tuple[int, int]:
        """KV heads and head_dim."""
        text = self.model().config
        return text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def codebooks(self, config: GSRQConfig) -> Codebooks:
        """Random ones for the embedded model."""
        return random_codebooks(self.model().config.num_hidden_layers, *self.shape(), config)

    def gsrq_cache(self, config: GSRQConfig, length: int) -> Any:
        """A cache of the quantized model, holding random tokens."""
        model = self.model()
        cache = new_cache(model)
        heads, dim = self.shape()
        for layer in cache.quantized_layers:
            x = torch.zeros(1, heads, 1, dim)
            layer.lazy_initialization(x, x)
            layer.reserve(length + 64)
            for buffer in (layer.keys, layer.values):
                fill(buffer, length, config)
            layer.cumulative_length, layer.is_empty = length, False
        cache.rows_are_placed = True
        return cache

    def full_cache(self, length: int) -> Any:
        """transformers' default cache, holding random tokens."""
        from transformers import DynamicCache

        return self.filled(DynamicCache(config=self.model().config), length)

    def filled(self, cache: Any, length: int) -> Any:
        """A cache of transformers with random tokens in it."""
        heads, dim = self.shape()
        for i in range(self.model().config.num_hidden_layers):
            cache.update(*torch.randn(2, 1, heads, length, dim), i)
        return cache

    @torch.no_grad()
    def decode(self, cache: Any, length: int, tokens: int) -> float:
        """Seconds per token of ``model.generate`` on a cache that holds ``length`` tokens."""
        model = self.model()
        ids = torch.full((1, length + 1), 5)
        arguments = {
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        model.generate(ids, **models.with_cache(model, cache), max_new_tokens=2, **arguments)
        held = cache.get_seq_length()
        ids = torch.full((1, held + 1), 5)
        arguments["attention_mask"] = torch.ones_like(ids)
        begin = time.perf_counter()
        model.generate(ids, **models.with_cache(model, cache), max_new_tokens=tokens, **arguments)
        return (time.perf_counter() - begin) / tokens

    def generate(self) -> None:
        """Tokens per second."""
        for length in self.args.context or (256, 512, 2048, 8192, 32768):
            tokens = 16 if length < 10000 else 6
            books = {size: self.codebooks(GSRQConfig(group_size=size)) for size in (GROUPS[0], GROUPS[-1])}
            times: dict[str, list[float]] = {}
            for _ in range(self.args.rounds):
                times.setdefault("DynamicCache", []).append(self.decode(self.full_cache(length), length, tokens))
                for size in books:
                    config = GSRQConfig(group_size=size)
                    quantize_kv_(self.model(), config, codebooks=books[size])
                    cache = self.gsrq_cache(config, length)
                    times.setdefault(f"gsrq groups of {size}", []).append(self.decode(cache, length, tokens))
                    dequantize_kv_(self.model())
                    del cache
                gc.collect()
            if length <= 8192:
                times |= self.quantized_caches(length, tokens)
            full = statistics.median(times["DynamicCache"])
            for name, taken in times.items():
                ms = statistics.median(taken) * 1e3
                self.record(section="generate", context=length, what=name, ms_per_token=ms, over_full=full * 1e3 / ms)

    def quantized_caches(self, length: int, tokens: int) -> dict[str, list[float]]:
        """transformers' own quantized caches, where their packages are installed."""
        from transformers import QuantizedCache

        found = {}
        for backend, nbits in (("quanto", 2), ("quanto", 4), ("hqq", 2), ("hqq", 4)):
            try:
                times = []
                for _ in range(self.args.rounds):
                    cache = self.filled(QuantizedCache(backend, self.model().config, nbits=nbits), length)
                    times.append(self.decode(cache, length, tokens))
                found[f"QuantizedCache {backend} int{nbits}"] = times
            except ImportError as error:
                print(f"QuantizedCache {backend}: not measured ({str(error).splitlines()[0]})")
        return found

    @torch.no_grad()
    def prefill(self) -> None:
        """What encoding adds to a prefill, and appending to a decode step."""
        model = self.model()
        ids = torch.randint(100, 20000, (1, 2048))
        for size in GROUPS:
            config = GSRQConfig(group_size=size)
            books = self.codebooks(config)
            times: dict[str, list[float]] = {"full": [], "gsrq": [], "encode": [], "append": []}
            for _ in range(self.args.rounds):
                begin = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
                times["full"].append(time.perf_counter() - begin)
                quantize_kv_(model, config, codebooks=books)
                begin = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
                times["gsrq"].append(time.perf_counter() - begin)
                dequantize_kv_(model)
                spent = 0.0
                for layer in books.layers.values():
                    for codec in (codec for side in layer for _, codec in side.parts):
                        x = torch.randn(1, codec.heads, 2048, codec.head_dim)
                        begin = time.perf_counter()
                        torch.ops.torchgsrq.encode(x, torch.arange(2048)[None], codec.tensors, codec.integers)
                        spent += time.perf_counter() - begin
                times["encode"].append(spent)
                quantize_kv_(model, config, codebooks=books)
                cache = self.gsrq_cache(config, 2048)
                spent = 0.0
                for layer in cache.quantized_layers:
                    x = torch.randn(64, 1, layer.codec.key.heads, 1, layer.codec.key.head_dim)
                    begin = time.perf_counter()
                    for one in x:
                        layer.update(one, one)
                    spent += (time.perf_counter() - begin) / 64
                times["append"].append(spent)
                dequantize_kv_(model)
            found = {name: statistics.median(taken) for name, taken in times.items()}
            self.record(
                section="prefill",
                group_size=size,
                full_s=found["full"],
                gsrq_s=found["gsrq"],
                encode_s=found["encode"],
                encode_share=found["encode"] / found["full"],
                append_ms_per_token=found["append"] * 1e3,
            )

    def memory(self) -> None:
        """Peak memory of decode steps on 32k tokens: SmolLM2's 30 layers of caches, codebooks apart."""
        q_heads, heads, dim = SHAPES["SmolLM2-135M"]
        config, length, layers = GSRQConfig(), 32768, 30
        tables = random_codecs(heads, dim, config)
        q, x = torch.randn(1, q_heads, 1, dim), torch.randn(1, heads, 1, dim)

        def made(capacity: int) -> list[GSRQTensor]:
            return [
                GSRQTensor.empty(1, heads, capacity, dim, codec=codec, dtype=torch.bfloat16, config=config)
                for codec in tables
            ]

        def step(pair: list[GSRQTensor], length: int) -> None:
            gsrq_step(q.bfloat16(), *pair)()
            for buffer in pair:
                buffer.index_copy_(2, torch.tensor([length]), x.bfloat16())

        small = made(512)
        for buffer in small:
            fill(buffer, 256, config)
        step(small, 256)  # kernels are loaded and their tables made
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        caches = [made(length + 64) for _ in range(layers)]
        for pair in caches:
            for buffer in pair:
                fill(buffer, length, config)
        for i in range(40):
            for pair in caches:
                step(pair, length + i)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        owned = sum(sum(b.nbytes_by_part().values()) for pair in caches for b in pair)
        bf16 = 2 * layers * 2 * heads * dim * length
        facts = {"section": "memory", "context": length, "bf16_mib": bf16 / 2**20, "owned_mib": owned / 2**20}
        self.record(**facts, peak_mib=peak / 2**20, bf16_over_peak=bf16 / peak)

    @torch.no_grad()
    def compile(self) -> None:
        """The decode step, compiled and eager."""
        model, config = self.model(), GSRQConfig()
        quantize_kv_(model, config, codebooks=self.codebooks(config))
        ids = torch.randint(100, 20000, (1, 1))
        cache = new_cache(model, max_cache_len=4096)
        model(torch.randint(100, 20000, (1, 2048)), **models.with_cache(model, cache), logits_to_keep=1)
        compiled = torch.compile(model, fullgraph=True)
        took = in_turns(
            {
                "eager": lambda: model(ids, **models.with_cache(model, cache)),
                "compiled": lambda: compiled(ids, **models.with_cache(model, cache)),
            },
            seconds=4,
        )
        self.record(section="compile", what="step", **{f"{name}_ms": t * 1e3 for name, t in took.items()})
        dequantize_kv_(model)
        self.fusion()

    def fusion(self) -> None:
        """What Inductor makes of `decode` and its consumer, and of RoPE and `encode`: 2048 tokens, 3 heads of 64."""
        codec, _ = random_codecs(3, 64, GSRQConfig())
        flat = (codec.tensors, codec.integers)
        x, position = torch.randn(1, 3, 2048, 64), torch.arange(2048)[None]
        angle = torch.cat([position[..., None] * codec.inv_freq] * 2, -1)[:, None]
        cos, sin = angle.cos(), angle.sin()

        def encode() -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.ops.torchgsrq.encode(x * cos + torch.cat((-b, a), -1) * sin, position, *flat)

        codes = encode()

        def decode() -> Tensor:
            return torch.ops.torchgsrq.decode(codes, position, *flat, torch.float32).relu().sum(-1)

        for name, function in (("encode after RoPE", encode), ("decode and a sum", decode)):
            took = in_turns({"eager": function, "compiled": torch.compile(function, fullgraph=True)})
            self.record(section="compile", what=name, **{f"{k}_ms": t * 1e3 for k, t in took.items()})

    def calibrate(self) -> None:
        """From model to codebooks, on 16k tokens that the model writes itself and on as many given ones."""
        model = self.model()
        begin = time.perf_counter()
        calibrate(model, GSRQConfig())
        own = time.perf_counter() - begin
        ids = torch.randint(100, 20000, (16, 1024), generator=torch.Generator().manual_seed(0))
        begin = time.perf_counter()
        calibrate(model, GSRQConfig(), ids)
        self.record(section="calibrate", own_text_s=own, given_tokens_s=time.perf_counter() - begin)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated; all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context", action="append", type=int, help="tokens held; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of whole-model runs")
    parser.add_argument("--model", help="hub ID or folder; the embedded model by default")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"$ {shlex.join(['python', *sys.argv])}\n{evaluate.environment()}", flush=True)
    if not use_kernels():
        parser.error("the CPU kernels are not available; the log says why")
    bench = Bench(args)
    for section in args.section or SECTIONS:
        getattr(bench, section)()
        if args.json:
            args.json.write_text(json.dumps({"environment": evaluate.environment(), "rows": bench.results}, indent=1))


if __name__ == "__main__":
    main()
