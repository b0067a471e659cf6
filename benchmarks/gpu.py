"""Correctness, then speed, of everything that runs on a CUDA GPU; one command, under 8 minutes.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --model path/to/a/llama     (its shapes instead of Llama-3-8B's; weights are random)

Sections, in this order; one that fails says so, and the others go on:

- check: the kernels against the reference on this device, CUDA-graph replay at changing lengths, compiled models.
- attention: a decode step of one layer, heads alike and with rates as far apart as a model's, against SDPA,
  FlexAttention and a split-KV kernel in Triton, all bfloat16. Several layers take turns, so that no cache
  finds its tokens in the L2.
- encode: microseconds per token of all layers, against the prefill of the same tokens.
- model: tokens per second of a random-weight model, compiled with CUDA graphs, against its bfloat16 static cache.
- capacity: how many tokens fit beside the weights, and tokens per second when they do.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import MODELS, fill, random_cache, random_codebooks, random_codecs
from split_kv import decode as split_kv
from tables import markdown
from torch import Tensor
from torchgsrq.kernels import attention as kernel
from torchgsrq.kernels import encode as encoder

from torchgsrq import GSRQConfig, models, new_cache, quantize_kv_, reference
from torchgsrq.codec import Codecs
from torchgsrq.codec.packed import LAST_ALIGNED, Options
from torchgsrq.measure import evaluate

SECTIONS = ("check", "attention", "encode", "model", "capacity")
BUDGET = 450.0  # seconds; rows that would begin later are left out, with a note


class Bench:
    """What the sections share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.begin = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.small = args.smoke

    def record(self, section: str, **facts: Any) -> None:
        """Print a row and keep it."""
        self.rows.append({"section": section, **facts})
        print(f"{section}:", shown(facts), flush=True)

    def late(self, section: str, what: str) -> bool:
        """Whether the time is up; says what is left out."""
        if time.monotonic() - self.begin < BUDGET:
            return False
        self.record(section, what=what, skipped="time is up")
        return True

    def seconds(self, step: Callable[[], Any], rounds: int = 5) -> float:
        """Median seconds of a step, replayed as a CUDA graph where it can be captured."""
        if self.device.type != "cuda":
            step()
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        taken = []
        for _ in range(rounds):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            first.record()
            for _ in range(3):
                graph.replay()
            last.record()
            torch.cuda.synchronize()
            taken.append(first.elapsed_time(last) / 3e3)
        return statistics.median(taken)

    # -- check

    def check(self) -> None:
        """The kernels against the reference."""
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float16
        sizes = [(64, 3, 3), (128, 4, 2 if self.small else 8)]  # head_dim, query heads per KV head, KV heads
        cases = [(*size, group_size, half) for size in sizes for group_size in (8, 64)]
        cases += [(64, 3, 3, 64, torch.float32)]
        if not self.small:
            cases += [(64, 3, 3, 8, torch.float16), (80, 1, 4, 64, half), (96, 5, 2, 8, half)]
            cases += [(256, 16, 2, 64, half)]
        worst: dict[str, float] = {}
        for dim, group, heads, size, dtype in cases:
            for name, error in self.check_codec(dim, group, heads, GSRQConfig(group_size=size), dtype):
                before = worst.get(name, 0.0)
                worst[name] = before if error <= before else error  # a NaN stays
        for name, error in worst.items():
            limit = 1e-4 if "float32" in name else 2e-2 if "bfloat16" in name else 3e-3 if "float16" in name else 0.03
            self.record("check", what=name, worst=error, passed=error <= limit)
        if self.device.type == "cuda":
            self.check_graph()
            self.check_compiled()

    def check_codec(
        self, dim: int, group: int, heads: int, config: GSRQConfig, dtype: torch.dtype
    ) -> Iterator[tuple[str, float]]:
        """Relative errors of attention, and the share of vectors with other codes than the reference's."""
        codecs = random_codecs(heads, dim, config, self.device)
        length = 300 if self.small else 5000
        key, value = random_cache(2, heads, dim, length, config, dtype, self.device, codecs)
        for kv in (key, value):
            kv.start.copy_(torch.tensor([[0, 0], [37, 37]]))
        options = Options(scale=dim**-0.5, causal=LAST_ALIGNED)
        half, count = dtype != torch.float32, kernel.processors(self.device)
        for queries in (1, 5):
            q = torch.randn(2, heads * group, queries, dim, device=self.device, dtype=dtype)
            want = reference.attention(q, key.packed, value.packed, options).double()
            rows = group * queries
            p = kernel.plan(codecs[0], rows, length, 2 * heads, count, half)
            got = kernel.attention(q, key.packed, value.packed, options, plan_=p)
            yield f"attention {dtype}".replace("torch.", ""), float((got.double() - want).norm() / want.norm())
        x = torch.randn(2, heads, 40, dim, device=self.device, dtype=dtype)
        position = torch.arange(40, device=self.device).expand(2, -1)
        same = encoder.encode(x, position, codecs[0]) == reference.encode(x, position, codecs[0])
        yield "encode, share of other codes", 1 - float(same.all(-1).float().mean())

    def check_graph(self) -> None:
        """A captured step appends and attends at every length that it is replayed at."""
        config = GSRQConfig(sink_tokens=4, recent_tokens=16, block_tokens=8)
        pair = random_cache(2, 4, 64, 200, config, torch.float16, self.device, capacity=512)
        twins = [kv.clone() for kv in pair]
        x, q = torch.randn(2, 4, 1, 64, device=self.device).half(), torch.randn(2, 8, 1, 64, device=self.device).half()
        slot = torch.tensor([200], device=self.device)

        def step(caches: Any) -> Tensor:
            for kv in caches:
                kv.index_copy_(2, slot, x)
            return F.scaled_dot_product_attention(q, *caches, enable_gqa=True)

        step([kv.clone() for kv in pair])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(pair)
        worst = 0.0
        for i in range(60):
            slot.fill_(200 + i)
            x.normal_()
            q.normal_()
            graph.replay()
            want = step(twins)
            error = float((out - want).abs().max() / want.abs().max())
            worst = error if not error <= worst else worst
        same = all(torch.equal(a.codes_0, b.codes_0) and int(a.length) == 260 for a, b in zip(pair, twins, strict=True))
        self.record("check", what="CUDA graph, 60 lengths", worst=worst, passed=worst < 1e-2 and same)

    def check_compiled(self) -> None:
        """Compiled decode steps of a small model say what eager ones do."""
        for mode in ("default", "reduce-overhead"):
            model = self.llama(2, 128, 256).float()
            config = GSRQConfig(sink_tokens=2, recent_tokens=8, block_tokens=4)
            self.quantize(model, config)
            step = torch.compile(model.forward, fullgraph=True, mode=mode)
            caches = [new_cache(model, max_cache_len=128) for _ in range(2)]
            ids = torch.randint(0, 1000, (2, 40), device=self.device)
            worst, tokens = 0.0, ids[:, :1].contiguous()
            with torch.no_grad():
                for cache in caches:
                    model(ids, **models.with_cache(model, cache), use_cache=True)
                for i in range(30):
                    at = torch.full((2, 1), 40 + i, device=self.device)
                    want = model(tokens, position_ids=at, **models.with_cache(model, caches[0]), use_cache=True).logits
                    got = step(
                        tokens, position_ids=at, **models.with_cache(model, caches[1]), use_cache=True
                    ).logits.clone()
                    error = float((got - want).abs().max() / want.abs().max())
                    worst = error if not error <= worst else worst
            self.record("check", what=f"compiled model, {mode}", worst=worst, passed=worst < 1e-2)

    # -- attention

    def attention(self) -> None:
        """Decode attention of one layer."""
        models = ("Llama-3-8B",) if self.small else ("Llama-3-8B", "Llama-3-70B")
        sizes = [(1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768), (64, 4096), (64, 32768)]
        some = [(1, 32768), (8, 32768)]
        for model in models:
            for batch, length in [(1, 512)] if self.small else sizes if model == "Llama-3-8B" else some:
                if not self.late("attention", f"{model}, batch {batch}, {length}"):
                    self.attention_at(model, batch, length)
                    self.free()

    def attention_at(self, model: str, batch: int, length: int) -> None:
        """Rows of one size."""
        torch._dynamo.reset()  # each size is a graph of FlexAttention's, and their number is limited
        q_heads, heads, dim = self.shape(model)
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float16
        q = torch.randn(batch, q_heads, 1, dim, device=self.device, dtype=half)
        facts = {"model": model, "batch": batch, "context": length}
        full = 2 * batch * heads * length * dim * 2
        times: dict[str, float] = {}
        size = (2, batch, heads, length, dim)
        plain = [torch.randn(size, device=self.device, dtype=half).unbind() for _ in range(self.layers_for(full))]
        rows = q.view(batch, heads, -1, dim)
        count = kernel.processors(self.device)
        steps = {
            "SDPA, enable_gqa": lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            "SDPA, queries as rows": lambda k, v: F.scaled_dot_product_attention(rows, k, v),
            "split-KV in Triton": lambda k, v: split_kv(q, k, v, count),
        }
        if self.device.type == "cuda":
            from torch.nn.attention.flex_attention import flex_attention

            flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)
            steps["FlexAttention"] = lambda k, v: flex(q, k, v, enable_gqa=True)
        for name, step in steps.items():
            try:
                times[name] = self.seconds(lambda f=step, kv=plain: [f(k, v) for k, v in kv]) / len(plain)
            except Exception as error:  # a baseline that a version lacks is no reason to stop
                self.record("attention", **facts, what=name, failed=repr(error)[:200])
        del plain
        self.free()
        best = min(times.values())
        for name, taken in times.items():
            self.record("attention", **facts, what=name, us=taken * 1e6, gb_per_s=full / taken / 1e9)
        sizes, offered = ((8,), (1.0,)) if self.small else ((8, 64), (2.0, 1.0, 0.5))
        for name, config, by_head in (
            ("bits by head, 1", GSRQConfig(), True),
            *((f"groups of {g}, {b:g}", GSRQConfig(bits=b, group_size=g), False) for g in sizes for b in offered),
        ):
            tables = sum(Codecs.of(c).nbytes() for c in random_codecs(heads, dim, config))
            layers = self.layers_for(int(full * config.bits / 16) + tables)
            # Every layer has codebooks of its own, as in a model.
            books = random_codebooks(layers, heads, dim, config) if by_head else dict.fromkeys(range(layers))
            caches = [
                random_cache(batch, heads, dim, length, config, half, self.device, books[i]) for i in range(layers)
            ]
            taken = self.seconds(functools.partial(self.attend_all, q, caches)) / layers
            self.record("attention", **facts, what=f"gsrq {name}", us=taken * 1e6, over_best=best / taken)
            del caches
            self.free()

    def attend_all(self, q: Tensor, caches: Any) -> None:
        """A decode step of every layer."""
        for key, value in caches:
            kernel.attention(q, key.packed, value.packed, Options(scale=q.shape[-1] ** -0.5))

    def layers_for(self, size: int) -> int:
        """Layers that take turns, so that the L2 holds none of them."""
        return 1 if self.small else max(1, min(64, -(-250_000_000 // size)))

    # -- encode, model, capacity

    def encode(self) -> None:
        """Encoding a prompt, all layers, against reading it."""
        tokens = 64 if self.small else 4096
        for size in (8, 64):
            config = GSRQConfig(group_size=size, recent_tokens=0)
            _, heads, dim = self.shape("Llama-3-8B")
            half = torch.float16 if self.small else torch.bfloat16
            codecs = random_codecs(heads, dim, config, self.device)
            x = torch.randn(1, heads, tokens, dim, device=self.device, dtype=half)
            position = torch.arange(tokens, device=self.device)[None]
            taken = 32 * sum(self.seconds(functools.partial(encoder.encode, x, position, c)) for c in codecs)
            # The matrix products of Llama-3-8B, at two thirds of the device's measured bfloat16 rate.
            prefill = 2 * 7.5e9 * tokens / (self.flops() * 2 / 3)
            facts = {"group_size": size, "us_per_token": taken / tokens * 1e6}
            self.record("encode", **facts, share_of_prefill=taken / prefill)

    def flops(self) -> float:
        """Measured rate of a large matrix product."""
        size = 512 if self.small else 8192
        a = torch.randn(size, size, device=self.device).to(torch.bfloat16)
        return 2 * size**3 / self.seconds(lambda: a @ a)

    def shape(self, model: str) -> tuple[int, int, int]:
        """Query heads, KV heads and head_dim."""
        if self.small:
            return 4, 2, 64
        if self.args.model and model == "Llama-3-8B":
            facts = json.loads((self.args.model / "config.json").read_text())
            heads = facts["num_attention_heads"]
            dim = facts.get("head_dim") or facts["hidden_size"] // heads
            return heads, facts.get("num_key_value_heads", heads), dim
        return MODELS[model]

    def llama(self, layers: int, vocabulary: int, hidden: int) -> Any:
        """A random-weight Llama made on the device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        q_heads, heads, dim = (4, 2, 64) if hidden < 1024 else self.shape("Llama-3-8B")
        config = LlamaConfig(
            vocab_size=max(vocabulary, 1024),
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 2,
            num_hidden_layers=layers,
            num_attention_heads=q_heads,
            num_key_value_heads=heads,
            head_dim=dim,
            max_position_embeddings=262144,
            rope_theta=500000.0,
        )
        with torch.device(self.device):
            torch.manual_seed(0)
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                return LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(before)

    def quantize(self, model: Any, config: GSRQConfig) -> None:
        """Quantize with random codebooks."""
        c = model.config
        books = random_codebooks(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, config)
        quantize_kv_(model, config, codebooks=books)

    def caches(self, model: Any, batch: int, context: int, config: GSRQConfig | None) -> Any:
        """A static cache, as if ``context`` tokens had been read."""
        from transformers import StaticCache

        c = model.config
        one = torch.zeros(batch, c.num_key_value_heads, 1, c.head_dim, device=self.device, dtype=torch.bfloat16)
        cache = StaticCache(c, context + 64) if config is None else new_cache(model, max_cache_len=context + 64)
        for i, layer in enumerate(cache.layers):
            cache.update(one, one, i)
            layer.cumulative_length.fill_(context)
            if config is not None:
                for kv in (layer.keys, layer.values):
                    fill(kv, context, config)
        if config is not None:
            cache.rows_are_placed = True
        return cache

    @torch.no_grad()
    def tokens_per_second(self, model: Any, batch: int, context: int, config: GSRQConfig | None) -> float:
        """Decode with the forward compiled into CUDA graphs."""
        torch._dynamo.reset()
        cache = self.caches(model, batch, context, config)
        step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead", dynamic=False)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)

        def run(i: int) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            at = torch.full((batch, 1), context + i, device=self.device)
            step(ids, position_ids=at, **models.with_cache(model, cache), use_cache=True)

        counters = torch._dynamo.utils.counters["inductor"]
        skipped = counters["cudagraph_skips"]
        try:
            for i in range(4):
                run(i)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for i in range(4, 36):
                run(i)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            if counters["cudagraph_skips"] > skipped:
                raise RuntimeError("the step was not captured in a CUDA graph")
            return 32 * batch / seconds
        finally:
            torch._dynamo.reset()
            self.free()

    def without_mask(self, model: Any) -> None:
        """SDPA on grouped queries: with a static cache transformers would pass a mask, and repeat keys and values."""
        from transformers import AttentionInterface, AttentionMaskInterface

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
            return out.transpose(1, 2).contiguous(), None

        AttentionInterface.register("whole_cache", attend)
        AttentionMaskInterface.register("whole_cache", lambda *args, **facts: None)
        model.set_attn_implementation("whole_cache")

    def variants(self) -> Iterator[tuple[str, GSRQConfig | None]]:
        """What is compared. The first attends to the whole buffer, 64 empty slots included."""
        yield "bfloat16, SDPA without a mask", None
        yield "gsrq 1", GSRQConfig()

    def model(self) -> None:
        """Tokens per second, end to end."""
        if self.device.type != "cuda":
            return
        for batch, context in ((8, 32768), (1, 32768)):
            for name, config in self.variants():
                if self.late("model", f"{name}, batch {batch}, {context}"):
                    continue
                model = self.llama(self.args.layers, 32000, 4096)
                if config is None:
                    self.without_mask(model)
                else:
                    self.quantize(model, config)
                speed = self.tokens_per_second(model, batch, context, config)
                facts = {"what": name, "layers": self.args.layers, "batch": batch, "context": context}
                self.record("model", **facts, tokens_per_s=speed)
                del model
                self.free()

    def capacity(self) -> None:
        """Tokens that fit beside the weights; a batch that fills the memory."""
        if self.device.type != "cuda":
            return
        _, heads, dim = self.shape("Llama-3-8B")
        context = 32768
        for name, config in self.variants():
            if self.late("capacity", name):
                continue
            model = self.llama(self.args.layers, 32000, 4096)
            full = 2 * self.args.layers * heads * dim * 2.0
            each = full
            if config is None:
                self.without_mask(model)
            else:
                self.quantize(model, config)
                small = random_cache(1, heads, dim, context, config, torch.bfloat16, self.device)
                each = sum(sum(kv.nbytes_by_part().values()) for kv in small) * self.args.layers / context
            free = torch.cuda.mem_get_info()[0] * 0.85
            batch = min(int(free / (each * context)), 512)
            facts = {"what": name, "bytes_per_token": each, "tokens_that_fit": int(free / each), "batch": batch}
            speed = self.tokens_per_second(model, batch, context, config) if batch else 0.0
            self.record("capacity", **facts, context=context, tokens_per_s=speed)
            del model
            self.free()

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def shown(facts: dict[str, Any]) -> str:
    """Names and figures in one line."""
    return ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in facts.items())


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as one Markdown table: where, what, and the figures."""
    sizes = ("model", "layers", "batch", "context", "group_size")
    lines = []
    for row in rows:
        size = {name: row[name] for name in sizes if name in row}
        rest = {name: x for name, x in row.items() if name not in (*sizes, "section", "what")}
        figures = "failed" if "failed" in rest else shown(rest)
        lines.append((row["section"], shown(size), row.get("what", ""), figures))
    return markdown(("section", "size", "what", "figures"), lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated; all by default")
    parser.add_argument("--model", type=Path, help="folder with a config.json whose shapes are used")
    parser.add_argument("--layers", type=int, default=32, help="layers of the random-weight model")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU in Triton's interpreter")
    args = parser.parse_args()
    args.device = "cpu" if args.smoke else "cuda"
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --smoke runs tiny sizes on the CPU, with TRITON_INTERPRET=1")
    print(f"$ {shlex.join(['python', *sys.argv])}\n{evaluate.environment()}", flush=True)
    bench = Bench(args)
    failed = []
    for section in args.section or SECTIONS:
        try:
            getattr(bench, section)()
        except Exception:  # one section's failure must not cost the others
            traceback.print_exc()
            failed.append(section)
            bench.record(section, failed=traceback.format_exc(limit=-1))
            bench.free()
        if args.json:
            args.json.write_text(json.dumps({"environment": evaluate.environment(), "rows": bench.rows}, indent=1))
    print(f"\n{table(bench.rows)}", end="", flush=True)
    wrong = [row["what"] for row in bench.rows if row.get("passed") is False]
    if wrong or failed:
        print(f"FAILED: {', '.join(wrong + failed)}")
    return int(bool(wrong or failed))


if __name__ == "__main__":
    sys.exit(main())
