"""The least time that decode attention and encoding can take on a GPU, from what the kernels move and multiply.

    python benchmarks/roofline.py --gpu H100 --json roofline.json

Counts bytes from memory, bytes gathered from the first-level cache (codewords), instructions of the compiled loop over
coded tokens (cross_compile.py) and multiply-adds on tensor cores of one layer, as `torchgsrq.kernels` would launch it,
padding included; the floor is the largest of the four times, as if all else were hidden behind it. bfloat16 attention
is taken at the speed of memory. These are bounds, not predictions: nothing here was measured. All layers have the
same bits; needs Triton's compiler, and no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import MODELS, random_codecs
from cross_compile import attend, compile_call, recorded
from torchgsrq.kernels import attention
from torchgsrq.kernels.common import Shape

from torchgsrq import Codec, GSRQConfig, GSRQTensor
from torchgsrq.codec import Codecs
from torchgsrq.codec.layout import search_steps


@dataclass(frozen=True)
class Gpu:
    """Public figures of a GPU: compute capability, processors, clock in GHz, memory in TB/s, dense bfloat16 TFLOP/s."""

    capability: int
    processors: int
    clock: float
    memory: float
    tensor: float

    @property
    def gathered(self) -> float:
        """Bytes per second from the first-level caches: 128 per clock and processor, and half of it at random rows."""
        return 64 * self.processors * self.clock * 1e9

    @property
    def issued(self) -> float:
        """Instructions of a warp per second: four schedulers a processor, each one per clock."""
        return 4 * self.processors * self.clock * 1e9


GPUS = {
    "A100": Gpu(80, 108, 1.41, 2.0, 312),
    "H100": Gpu(90, 132, 1.76, 3.35, 989),
    "H200": Gpu(90, 132, 1.76, 4.8, 989),
}


@dataclass
class Work:
    """What one layer's step takes."""

    memory: float = 0.0  # bytes
    gathered: float = 0.0  # bytes
    issued: float = 0.0  # instructions of a warp
    multiplied: float = 0.0  # multiply-adds on tensor cores, in bfloat16 ones

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """Seconds by bottleneck."""
        return {
            "memory": self.memory / (gpu.memory * 1e12),
            "gathers": self.gathered / gpu.gathered,
            "instructions": self.issued / gpu.issued,
            "tensor cores": 2 * self.multiplied / (gpu.tensor * 1e12),
        }


@functools.cache
def instructions(config: GSRQConfig, model: str, capability: int) -> float:
    """Of a warp, for each coded token of a KV head, with the queries that share it in one tile."""
    q_heads, heads, dim = MODELS[model]
    pair = random_codecs(heads, dim, config)
    cache = [GSRQTensor.empty(1, heads, 1024, dim, codec=c, dtype=torch.bfloat16, config=config).packed for c in pair]
    q = torch.zeros(1, q_heads, 1, dim, dtype=torch.bfloat16)
    plan = attention.plan(pair[0], q_heads // heads, 1024, heads, 132, True)
    split, _ = recorded(functools.partial(attend, q, cache, plan))
    return compile_call(split, capability)["per token"]


def decode_step(key: Codec, value: Codec, q_heads: int, batch: int, context: int, gpu: Gpu, per_token: float) -> Work:
    """Attention of one query token per row."""
    k, v = Shape.of(key), Shape.of(value)
    heads = key.heads
    rows = q_heads // heads
    p = attention.plan(key, rows, context, batch * heads, gpu.processors, True)
    each = batch * heads  # KV heads of all rows
    tokens = each * context
    spans = max(context // p.splits, 1)
    frames = each * p.splits * max(1, -(-spans // (key.frame if k.pairs else 1 << 20)))
    work = Work()
    work.memory = tokens * (k.n + v.n) + Codecs.of(key).nbytes() + Codecs.of(value).nbytes()
    work.memory += each * p.splits * p.rows * (value.head_dim + 2) * 4 * 2  # partial results, written and read
    config = GSRQConfig()
    window = config.sink_tokens + config.recent_tokens + config.block_tokens // 2
    work.memory += each * 2 * window * k.d * 2
    work.issued = tokens * per_token
    work.gathered = tokens * (value.layout.stages * v.g * v.w + key.layout.stages * k.g * k.w) * 2
    mean = p.rows * 2 * k.rotary["BP"] if k.pairs else 0
    work.multiplied = tokens * (p.rows * (v.gp * v.wp + k.gp * k.wp) + mean)
    query = 2 * p.rows * k.d * k.gp * k.wp  # in tf32, at half the rate, once per frame
    work.multiplied += frames * query
    return work


def encode_tokens(codec: Codec, tokens: int) -> Work:
    """Encoding ``tokens`` per head of keys or values."""
    s = Shape.of(codec)
    vectors = codec.heads * tokens
    work = Work(memory=vectors * (2 * s.d + s.n) + Codecs.of(codec).nbytes())
    # A step multiplies what is left of a vector and the vector at length 1, in two float16 parts each.
    steps = search_steps(codec.layout.stages, codec.eta) / codec.layout.stages
    per_stage = 2 * 2 * steps * 256 * max(16, s.wp)
    work.multiplied = vectors * (s.n * per_stage + 6 * s.d * s.gp * max(16, s.wp))
    work.gathered = vectors / 32 * s.n * steps * 256 * s.w * 2  # a program's 32 vectors share what it loads
    return work


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="append", choices=list(GPUS), help="may be repeated; all by default")
    parser.add_argument("--context", action="append", type=int, help="4k to 1M by default")
    parser.add_argument("--batch", action="append", type=int, help="1, 8 and 64 by default")
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    rows: list[dict[str, Any]] = []
    for name in args.gpu or GPUS:
        gpu = GPUS[name]
        for model in ("Llama-3-8B", "Llama-3-70B"):
            q_heads, heads, dim = MODELS[model]
            for size in (8, 64):
                config = GSRQConfig(bits=args.bits, group_size=size)
                key, value = random_codecs(heads, dim, config)
                per_token = instructions(config, model, gpu.capability)
                for batch in args.batch or (1, 8, 64):
                    for context in args.context or (4096, 32768, 131072, 1048576):
                        full = batch * heads * context * dim * 4 / (gpu.memory * 1e12)
                        parts = decode_step(key, value, q_heads, batch, context, gpu, per_token).seconds(gpu)
                        bound = max(parts, key=parts.__getitem__)
                        facts = {"gpu": name, "model": model, "group_size": size, "what": "decode step"}
                        facts |= {"batch": batch, "context": context, "instructions": per_token}
                        facts |= {"bf16_us": full * 1e6, "us": parts[bound] * 1e6, "bound": bound}
                        rows.append({**facts, "over_bf16": full / parts[bound]})
                tokens = 4096
                taken = 32 * sum(max(encode_tokens(c, tokens).seconds(gpu).values()) for c in (key, value))
                prefill = 2 * 7.5e9 * tokens / (gpu.tensor * 1e12)
                facts = {"gpu": name, "model": model, "group_size": size, "what": "encode, all layers", "batch": 1}
                rows.append({**facts, "context": tokens, "us": taken * 1e6, "share_of_prefill": taken / prefill})
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
