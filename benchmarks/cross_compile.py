"""Compile every Triton kernel for NVIDIA GPUs, without one, and print the resources that each takes.

    python benchmarks/cross_compile.py --capability 80 --capability 90 --json kernels.json

One row per kernel and configuration: registers per thread, bytes spilled, shared memory per program, tensor-core
instructions, how wide the loads of codewords are, and how many instructions of a warp the loop over coded tokens takes
for each (of bfloat16 attention).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import random_codecs

from torchgsrq import Codec, GSRQConfig, GSRQTensor
from torchgsrq.codec import Codecs, packed
from torchgsrq.reference.paged import DECODE, Pages, Requests

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32"}
DTYPES |= {torch.int64: "i64"}
GROUPS = (8, 64)
COUNTED = ("split_kernel", "pages_kernel")  # attention: those with a loop over coded tokens
SHAPES = {64: (9, 3), 80: (32, 32), 96: (24, 8), 128: (32, 8), 192: (16, 8), 256: (32, 2)}  # query and KV heads


def configurations() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(kernel, configuration, a call that launches it): what models and configs ask for."""
    from torchgsrq.kernels import attention, encode

    for dim, (q_heads, heads) in SHAPES.items():
        for size, bits in (*itertools.product(GROUPS, (2.0, 1.0, 0.5)), (8, 4.0)):
            if bits != 1 and dim != 128:
                continue
            config = GSRQConfig(group_size=size)
            k, v = random_codecs(heads, dim, config, each=(bits, bits))
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                if dtype != torch.bfloat16 and (bits != 1 or dim not in (64, 128)):
                    continue
                half = dtype != torch.float32
                pair = [GSRQTensor.empty(2, heads, 1024, dim, codec=c, dtype=dtype, config=config) for c in (k, v)]
                cache = [t.packed for t in pair]
                for queries in (1, 64) if bits == 1 else (1,):
                    rows = q_heads // heads * queries
                    q = torch.zeros(2, q_heads, queries, dim, dtype=dtype)
                    p = attention.plan(k, rows, 1024, 2 * heads, 132, half)
                    name = f"{dim} groups of {size} {bits:g} {DTYPES[dtype]} q{queries}"
                    yield "attention", name, functools.partial(attend, q, cache, p)
                if dtype == torch.bfloat16:
                    x, slots = torch.zeros(2, heads, 64, dim, dtype=dtype), torch.arange(64)
                    for which, kv in zip(("keys", "values"), cache, strict=True):
                        yield (
                            "encode",
                            f"{dim} groups of {size} {bits:g} {which}",
                            functools.partial(encode.append_, kv, x, slots),
                        )
                if (size, bits) == (8, 1) and dim in (64, 128) and dtype != torch.float16:
                    for queries in (1, 64) if half else (1,):
                        name = f"{dim} groups of {size} {bits:g} {DTYPES[dtype]} q{queries}"
                        yield "paged", name, functools.partial(on_pages, q_heads, k, v, queries, dtype, config)


def variants() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """What calls may ask for beyond a plain decode step, at one size."""
    from torchgsrq.kernels import encode

    config, dim, heads, queries = GSRQConfig(), 64, 3, 5
    k, v = random_codecs(heads, dim, config)
    codecs = {
        "plain": k,
        "interleaved": k.replaced(interleaved=True),
        "partial rotary": k.replaced(inv_freq=torch.ones(12)),
        "no RoPE": k.replaced(inv_freq=torch.ones(0), frame=1),
        "no frames": k.replaced(frame=16),
    }
    q = torch.zeros(2, 9, queries, dim, dtype=torch.bfloat16)
    additive = {"mask": torch.zeros(1, 1, queries, 1024, dtype=torch.bfloat16), "sink_logits": torch.zeros(9)}
    tail = torch.zeros(2, heads, config.recent_tokens + config.block_tokens + queries, dim, dtype=torch.bfloat16)
    tails = {"key_tail": tail, "value_tail": tail, "tail_start": torch.zeros((), dtype=torch.int32)}
    tails |= {"causal": packed.LAST_ALIGNED}
    calls = {
        "bool mask": {"mask": torch.zeros(2, 1, queries, 1024, dtype=torch.bool)},
        "additive mask, soft cap, sink logits": {**additive, "softcap": 3.0, "causal": packed.UPPER_LEFT},
        "exact tail": {**tails, "view": packed.EXACT_TAIL},
        "streaming": {**tails, "view": packed.STREAMING},
    }
    for name, codec in codecs.items():
        pair = [GSRQTensor.empty(2, heads, 1024, dim, codec=c, dtype=q.dtype, config=config).packed for c in (codec, v)]
        x, position = torch.zeros(2, heads, 40, dim, dtype=q.dtype), torch.arange(40).expand(2, -1)
        for what, facts in calls.items() if name == "plain" else [("several queries", {})]:
            yield "attention", f"64 {name} {what}", functools.partial(attend, q, pair, None, **facts)
        yield "encode", f"64 {name} encode", functools.partial(encode.encode, x, position, codec)


def attend(q: torch.Tensor, cache: list[packed.Packed], p: Any, **facts: Any) -> None:
    """Attention of queries on a cache of keys and values, with a plan."""
    from torchgsrq.kernels import attention

    attention.attention(q, *cache, packed.Options(**{"scale": 0.1, **facts}), plan_=p)


def on_pages(q_heads: int, key: Codec, value: Codec, queries: int, dtype: torch.dtype, config: GSRQConfig) -> None:
    """A step of two requests on the pages of an engine: attention, and writing codes and exact tokens."""
    from torchgsrq.kernels import paged

    tokens, dim, block, size = 2 * queries, key.head_dim, 128, key.heads * (key.layout.codes + value.layout.codes)
    q, k, v = (torch.zeros(tokens, heads, dim, dtype=dtype) for heads in (q_heads, key.heads, key.heads))
    held = torch.zeros(4, key.heads, 16, 2 * dim, dtype=dtype)
    numbers, table = torch.zeros(3, dtype=torch.int32), torch.zeros(2, 64, dtype=torch.int32)
    sides, sizes = [Codecs.of(codec) for codec in (key, value)], (config.recent_tokens, config.block_tokens, block)
    pages = Pages(torch.zeros(4, block * size, dtype=torch.uint8), held, held, *sides, config.sink_tokens, *sizes)
    requests = Requests(numbers, numbers[1:], numbers[1:], table, table, numbers[1:])
    paged.paged_attention(q, k, v, pages, requests, scale=0.1, view=DECODE)
    paged.paged_append_(pages, requests, k, v)
    paged.paged_hold_(held, k, v, torch.zeros(tokens, dtype=torch.int64))


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **constants: self.calls.append((grid, args, constants))


def recorded(launch: Callable[[], None]) -> list[Recorder]:
    """The launches of a call."""
    from torchgsrq.kernels import attention, encode, paged

    homes = {"split_kernel": attention, "merge_kernel": attention, "encode_kernel": encode, "write_kernel": encode}
    homes |= {"pages_kernel": paged, "append_pages_kernel": paged, "hold_kernel": paged}
    found = []
    with contextlib.ExitStack() as stack:
        for name, home in homes.items():
            found.append(stack.enter_context(mock.patch.object(home, name, Recorder(getattr(home, name)))))
        launch()
    return [r for r in found if r.calls]


def compile_call(recorder: Recorder, capability: int) -> dict[str, Any]:
    """Compile one launch and read its resources off the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, args, options = recorder.calls[0]
    kernel = recorder.kernel
    constants = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if name in constants:
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in constants}
    source = ASTSource(kernel, signature, constants, attributes)
    warps = {k: options[k] for k in ("num_warps", "num_stages")}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=warps)
    ptx = built.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, machine = (
            subprocess.run([tools / "cuobjdump", what, file.name], capture_output=True, text=True).stdout
            for what in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {
        "kernel": kernel.__name__,
        "sm": capability,
        "registers": registers,
        "spilled": stack,
        "shared": built.metadata.shared,
        "warps": options["num_warps"],
        "mma": len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
        "wide loads": len(re.findall(r"ld\.global(?:\.\w+)*\.v4", ptx)),
        "async copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "per token": token_instructions(machine, options) if kernel.__name__ in COUNTED else 0.0,
    }


def token_instructions(machine: str, options: dict[str, Any]) -> float:
    """Instructions of a warp for each coded token and tile of query rows, off the disassembly of attention.

    The loop over tiles of coded tokens is the innermost one with tensor-core products of float16, which bfloat16
    attention has nowhere else; inside it may be loops over pairs of residual stages.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", machine)]
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    body = {x: [text for at, text in code if x[0] <= at <= x[1]] for x in loops}
    coded = [x for x in loops if any("HMMA.16816.F32 " in text for text in body[x])]
    if not coded or options["DTYPE"].name != "bf16":
        return 0.0
    tile = min(coded, key=lambda x: len(body[x]))
    inner = [x for x in loops if tile[0] <= x[0] and x[1] < tile[1]]
    pairs = max(-(-options[f"{x}N"] // options[f"{x}G"]) for x in "KV") / 2
    count = len(body[tile]) + sum(len(body[x]) for x in inner) * (pairs - 1)
    return round(count * options["num_warps"] / options["BT"], 1)


def everything() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """All that is compiled."""
    return itertools.chain(configurations(), variants())


def _one(job: tuple[int, list[int]]) -> list[dict[str, Any]]:
    index, capabilities = job
    _, name, launch = next(itertools.islice(everything(), index, None))
    rows = []
    for recorder in recorded(launch):
        rows += [{"configuration": name, **compile_call(recorder, c)} for c in capabilities]
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, action="append", help="80, 90; both by default")
    parser.add_argument("--match", default="", help="only configurations with this in their name")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    names = [f"{kernel} {name}" for kernel, name, _ in everything()]
    todo = [(i, args.capability or [80, 90]) for i, name in enumerate(names) if args.match in name]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_one, todo):
            for row in found:
                if not rows:
                    print(" | ".join(row))
                print(" | ".join(map(str, row.values())), flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
