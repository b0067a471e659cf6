"""Methods of quantizing a KV cache side by side: quality, retrieval and bits, on one model and one text.

    python benchmarks/compare.py --text wikitext2-test.txt --calibration wikitext2-valid.txt --json compare.json

Every method reads the same windows and answers the same questions, through what it would have stored; 1 sink token and
32 recent tokens are exact for all, more where a method stores whole groups of tokens. Methods that learn beforehand
learn from the same windows (`calibration_windows`). What differs from the others' papers is said in ``peers/``. Takes
about forty minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.base import Method, through
from peers.kivi import Kivi
from peers.kvquant import KVQuant
from peers.nsnquant import NSNQuant
from peers.ours import GSRQ, PARTS, GSRQByLayer
from peers.quantized_cache import QuantizedCache
from peers.streaming import Streaming
from peers.turboquant import TurboQuant
from peers.vectors import CQ, VQLLM, TaSQ
from torch import Tensor

from torchgsrq import GSRQConfig, calibrate
from torchgsrq.learning.sensitivity import sensitivity
from torchgsrq.learning.statistics import collect_statistics
from torchgsrq.learning.text import token_ids
from torchgsrq.measure import evaluate, retrieval
from torchgsrq.measure.embedded import NAME, document, load_model
from torchgsrq.models import inspect_layers

calibration = sys.modules[calibrate.__module__]
CONTEXT = 1024
LONG = 131072  # where codebooks and window hardly count


def gsrq(parts: tuple[str, ...] = PARTS, **fields: Any) -> Callable[[], Method]:
    """A method of this project."""
    return lambda: GSRQ(GSRQConfig(**fields), parts)


one_bit = functools.cache(gsrq(bits=1))

METHODS: dict[str, list[Callable[[], Method]]] = {
    "full": [Method],
    "gsrq": [gsrq(bits=b) for b in (2, 1, 0.75, 0.5)],
    "groups": [gsrq(bits=b, group_size=g) for b in (1, 0.5) for g in (16, 32, 64)],
    "layers": [lambda b=b: GSRQByLayer(GSRQConfig(bits=b)) for b in (2, 1, 0.5)],
    "windows": [
        lambda s=s, r=r: one_bit().with_window(s, r) for s, r in ((1, 32), (1, 128), (4, 128), (4, 256), (64, 256))
    ],
    "parts": [gsrq((part,), bits=b) for b in (2, 1) for part in PARTS],
    "uniform": [gsrq(bits=b, allocation="uniform") for b in (2, 1, 0.75, 0.5)],
    "gsrq-paper": [gsrq(bits=b, recipe="gsrq-paper", group_size=32) for b in (1, 0.5)],
    "quanto": [lambda: QuantizedCache("quanto", 4), lambda: QuantizedCache("quanto", 2)],
    "hqq": [lambda: QuantizedCache("hqq", 4), lambda: QuantizedCache("hqq", 2)],
    "kivi": [lambda: Kivi(2)],
    "kvquant": [lambda: KVQuant(2)],
    "turboquant": [lambda: TurboQuant(2), lambda: TurboQuant(1)],
    "vqllm": [lambda: VQLLM(1), lambda: VQLLM(0.5)],
    "cq": [lambda: CQ(1)],
    "nsnquant": [NSNQuant],
    "tasq": [lambda: TaSQ(1)],
    "streaming": [lambda: Streaming(1, CONTEXT)],
}
ABLATIONS = ("layers", "windows", "parts")  # of this project, measured when asked for


class Bench:
    """The model, the texts, the questions."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model)
        self.layers = inspect_layers(self.model)
        ids = token_ids(self.tokenizer, args.text.read_text())
        step = max(4096, args.length)
        self.windows = [ids[s : s + args.length] for s in range(0, step * args.windows, step)]
        self.full = [self.read(window) for window in self.windows]
        self.trials = retrieval.trials(
            self.tokenizer,
            document(),
            args.context,
            tasks=args.task or ("passkey", "keys", "lookup"),
            count=args.trials,
        )
        self.full_answers = self.answers()
        text = [args.calibration.read_text()] if args.calibration else None
        windows, _ = calibration.calibration_windows(self.model, text, self.tokenizer, args.tokens, 0)
        self.learned = windows
        self.stats = collect_statistics(self.model, self.layers, windows)

    @functools.cached_property
    def costs(self) -> dict[int, Tensor]:
        """What errors of every head cost, for the methods that ask."""
        return sensitivity(self.model, self.layers, self.learned)

    @torch.no_grad()
    def read(self, window: Tensor) -> Tensor:
        """Logits after every token of a window."""
        return self.model(window[None], use_cache=False).logits[0]

    def answers(self) -> dict[str, list[list[Tensor]]]:
        """Log-probabilities of every question's answer, by task and text."""
        return {task: [retrieval.answer_likelihoods(self.model, t) for t in some] for task, some in self.trials.items()}

    def measure(self, method: Method) -> dict[str, Any]:
        """A row of the table."""
        begin = time.perf_counter()
        if isinstance(method, GSRQ) and method.config.spreads_bits:
            method.costs = self.costs
        method.fit(self.stats)
        facts: dict[str, Any] = {
            "bits": method.true_bits(LONG),
            f"bits_{self.args.context}": method.true_bits(self.args.context),
            "bits_without_codebooks": method.true_bits(LONG, codebooks=False),
        }
        comparison = evaluate.Comparison()
        with through(self.model, method):
            for window, full in zip(self.windows, self.full, strict=True):
                comparison.add(window, full, self.read(window))
            errors = method.output_errors()
            answers = self.answers()
        facts |= dataclasses.asdict(comparison.result())
        facts["output_error"] = sum(errors.values()) / len(errors)
        facts["output_errors"] = {index: round(error, 5) for index, error in errors.items()}
        scores = {task: retrieval.score(self.trials[task], given) for task, given in answers.items()}
        facts["found"] = sum(s.found for s in scores.values()) / len(scores)
        facts["answer_nll"] = sum(s.nll for s in scores.values()) / len(scores)
        facts["tasks"] = {task: dataclasses.asdict(s) for task, s in scores.items()}
        for task, given in answers.items():
            pairs = zip(itertools.chain(*self.full_answers[task]), itertools.chain(*given), strict=True)
            facts["tasks"][task]["kl"] = float(torch.cat([evaluate.divergence(*pair) for pair in pairs]).mean())
        facts["answer_kl"] = sum(task["kl"] for task in facts["tasks"].values()) / len(answers)
        return {**facts, "seconds": time.perf_counter() - begin}


def _rows(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[tuple[str, Callable[[], Method]]]:
    """What was asked for and can be measured here: each row's family, and how to make its method, so that only the one
    being measured is in memory."""
    rows, names = [], []
    for family in args.method or (x for x in METHODS if x not in ABLATIONS):
        for make in METHODS[family]:
            try:
                names.append(make().name)
            except ImportError as error:
                print(f"{family}: not measured ({str(error).splitlines()[0]})")
                continue
            if not args.name or names[-1] in args.name:
                rows.append((family, make))
    unknown = [name for name in args.name or () if name not in names]
    if unknown:
        parser.error(f"--name {unknown[0]!r} is no row of these methods; choose from {', '.join(map(repr, names))}")
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub ID or folder; {NAME} by default")
    parser.add_argument("--text", type=Path, required=True, help="what perplexity and KL are measured on")
    parser.add_argument("--calibration", type=Path, help="what methods learn from; the model's own text by default")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--windows", type=int, default=3, help="of text that perplexity and KL are measured on")
    parser.add_argument("--length", type=int, default=CONTEXT, help="tokens of a window")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a text that hides an answer")
    parser.add_argument("--trials", type=int, default=4, help="texts of each retrieval task")
    parser.add_argument("--task", action="append", choices=retrieval.TASKS, help="may be repeated")
    omitted = f"may be repeated; all but {', '.join(ABLATIONS)} by default"
    parser.add_argument("--method", action="append", choices=METHODS, help=omitted)
    parser.add_argument("--name", action="append", help="of a row of these, as it is printed; may be repeated")
    parser.add_argument("--json", type=Path, help="write the results to this file as they come")
    args = parser.parse_args()
    rows = _rows(args, parser)
    print(f"$ {shlex.join(['python', *sys.argv])}\n{evaluate.environment()}", flush=True)
    bench = Bench(args)
    results: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": evaluate.environment()}
    results["methods"] = json.loads(args.json.read_text())["methods"] if args.json and args.json.exists() else {}
    for family, make in rows:
        method = make()
        facts = {"family": family, **bench.measure(method), "environment": evaluate.environment()}
        results["methods"][method.name] = facts
        shown = ("bits", "ppl", "kl", "kl_p99", "agreement", "output_error", "found", "answer_kl", "seconds")
        print(f"{method.name:26s} " + "  ".join(f"{x} {facts[x]:.4g}" for x in shown), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
