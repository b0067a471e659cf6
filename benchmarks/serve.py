"""Serving through vLLM: codes beside vLLM's own cache, engines taking turns on the same machine.

    python -m benchmarks.serve --codebooks books.safetensors --json benchmarks/results/serve.json

needs vLLM (docs/serving.md). Each engine is a process of its own, alone on the machine while it runs: an idle one would
take time from the others. They take turns, as often as there are repeats. Prompts are cuts of the Python language
reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 2**30
ENGINES = {"codes": "float32", "float32": "float32", "codes-bf16": "bfloat16", "bfloat16": "bfloat16"}
FIELDS = ("engine", "requests", "prompt", "new", "seconds", "tokens_s", "decode_s", "first_token_s", "preemptions")


def perplexity(llm: Any, text: str, tokens: int) -> float:
    """Of the first tokens of a text."""
    from vllm import SamplingParams

    ids = llm.get_tokenizer()(text).input_ids[:tokens]
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (found,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    each = [x[t].logprob for x, t in zip(found.prompt_logprobs[1:], ids[1:], strict=True)]
    return math.exp(-sum(each) / len(each))


def child(engine: str, codebooks: str, length: int, space: float, batch: int, text: Path | None, shared: bool) -> None:
    """One engine: reads scenarios from stdin as JSON lines, answers in JSON lines behind a mark."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM, SamplingParams

    from torchgsrq.measure.embedded import _embedded_folder, document

    gsrq = {"codebooks": codebooks, "prefill": "quantized" if text else "exact"}  # else a prompt measures nothing
    extra = {"additional_config": {"gsrq": gsrq}} if engine.startswith("codes") else {}
    llm = LLM(
        str(_embedded_folder()),
        dtype=ENGINES[engine],
        max_model_len=length,
        max_num_seqs=32,
        max_num_batched_tokens=batch,
        kv_cache_memory_bytes=int(space * GIB),
        enable_prefix_caching=shared,
        enforce_eager=True,
        disable_log_stats=False,
        seed=0,
        **extra,
    )
    ids = llm.get_tokenizer()(document()).input_ids
    cache = llm.llm_engine.vllm_config.cache_config
    if text:
        found = perplexity(llm, text.read_text(encoding="utf-8"), length - 1)
        reply({"engine": engine, "tokens": length - 1, "perplexity": round(found, 4)})
        return
    reply({"engine": engine, "tokens_per_gib": round(cache.kv_cache_size_tokens / space), "longest": length})
    before = 0
    for line in sys.stdin:
        asked = json.loads(line)
        n, prompt, new = asked["requests"], asked["prompt"], asked["new"]
        starts = [0 if shared else 1000 * i for i in range(n)]
        texts = [{"prompt_token_ids": ids[start : start + prompt]} for start in starts]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        if shared:
            llm.generate(texts[:1], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        begin = time.perf_counter()
        outputs = llm.generate(texts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        firsts = [x.metrics.first_token_latency for x in outputs]
        decode = max(x.metrics.last_token_ts for x in outputs) - max(x.metrics.first_token_ts for x in outputs)
        counted = {x.name: getattr(x, "value", 0) for x in llm.get_metrics()}["vllm:num_preemptions"]
        reply(
            {
                "engine": engine,
                **asked,
                "seconds": round(seconds, 3),
                "tokens_s": round(n * new / seconds, 2),
                "decode_s": round(n * (new - 1) / decode, 2) if decode > 0 else None,
                "first_token_s": round(sorted(firsts)[len(firsts) // 2], 3),
                "preemptions": counted - before,
            }
        )
        before = counted


def reply(fact: dict) -> None:
    """A line to the parent."""
    print("@", json.dumps(fact), flush=True)


class Engine:
    """A child, as its parent sees it."""

    def __init__(
        self,
        name: str,
        codebooks: str,
        length: int,
        space: float,
        batch: int,
        text: Path | None = None,
        shared: bool = False,
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.serve", "--child", name, "--codebooks", codebooks]
        command += ["--length", str(length), "--space", str(space), "--batch", str(batch)]
        command += ["--text", str(text)] if text else []
        command += ["--shared"] if shared else []
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process writes it)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        self.facts = self.answer()

    def answer(self) -> dict:
        """The next fact that the child prints."""
        for line in self.process.stdout:
            if line.startswith("@ "):
                return json.loads(line[2:])
        status = self.process.wait()
        self.said.seek(0)
        raise RuntimeError(f"an engine ended with status {status}:\n{self.said.read()[-2000:]}")

    def ask(self, **scenario: int) -> dict:
        """Run a scenario."""
        self.process.stdin.write(json.dumps(scenario) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Let the child end, and wait for it."""
        self.process.stdin.close()
        self.process.wait()


def measure(
    names: list[str],
    codebooks: str,
    length: int,
    space: float,
    batch: int,
    scenarios: list[dict],
    repeats: int,
    shared: bool,
) -> tuple[list[dict], list[dict]]:
    """All scenarios with all engines, in turns: the best of the repeats."""
    best: dict[tuple[int, str], dict] = {}
    facts = {}
    for _ in range(repeats):
        for name in names:
            engine = Engine(name, codebooks, length, space, batch, shared=shared)
            facts[name] = engine.facts
            for i, scenario in enumerate(scenarios):
                run = engine.ask(**scenario) | {"space_gib": space, "shared": shared}
                print(row(run), flush=True)
                best[i, name] = min(run, best.get((i, name), run), key=lambda x: x["seconds"])
            engine.end()
    return [best[key] for key in sorted(best, key=lambda key: (key[0], names.index(key[1])))], list(facts.values())


def row(fact: dict) -> str:
    """A line of the printed table."""
    return "".join(f"{fact.get(name)!s:>14}" for name in FIELDS)


def main() -> None:
    """Parse the command line, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child")
    parser.add_argument("--codebooks", required=True, help="of the embedded model")
    parser.add_argument("--engines", nargs="+", default=["codes", "float32"], choices=ENGINES)
    parser.add_argument("--length", type=int, default=8192, help="max_model_len")
    parser.add_argument("--space", type=float, default=1.0, help="GiB for the cache")
    parser.add_argument("--batch", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 2048, 8000])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shared", action="store_true", help="one prompt for all, read before (prefix caching)")
    parser.add_argument("--text", type=Path, help="measure its perplexity, and no speed")
    parser.add_argument("--json", type=Path, help="facts of earlier runs in this file are kept")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.codebooks, args.length, args.space, args.batch, args.text, args.shared)
        return
    import torch
    import vllm

    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; vllm {vllm.__version__}, torch {torch.__version__}; cache of {args.space} GiB")
    old: dict[str, list] = {"runs": [], "capacity": [], "quality": []}
    if args.json and args.json.exists():
        old |= json.loads(args.json.read_text())
    command = " ".join(["python -m benchmarks.serve", *sys.argv[1:]])
    about = {"command": command, "machine": machine, "vllm": vllm.__version__, "torch": torch.__version__}
    if args.text:
        for name in args.engines:
            fact = Engine(name, args.codebooks, args.length, args.space, args.batch, args.text).facts
            print(f"{name}: perplexity {fact['perplexity']} of {fact['tokens']} tokens")
            old["quality"].append(about | fact)
    else:
        speed(args, old, about)
    if args.json:
        args.json.write_text(json.dumps(old, indent=1) + "\n")


def speed(args: argparse.Namespace, old: dict[str, list], about: dict[str, str]) -> None:
    """Measure speed and capacity, and add them to what a file has."""
    print("".join(f"{name:>14}" for name in FIELDS))
    new = args.new
    scenarios = [{"requests": n, "prompt": p, "new": new} for p in args.prompts for n in args.requests]
    how = (args.codebooks, args.length, args.space, args.batch, scenarios, args.repeats, args.shared)
    found, facts = measure(args.engines, *how)
    for fact in facts:
        print(f"{fact['engine']}: {fact['tokens_per_gib']:,} tokens a GiB at max_model_len {fact['longest']}")
    old["runs"] += [about | run for run in found]
    old["capacity"] = [x for x in old["capacity"] if x not in facts] + facts


if __name__ == "__main__":
    main()
