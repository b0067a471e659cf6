"""What every recipe costs in quality, on WikiText-2 or any text: tables of docs/research/quality.md.

    python benchmarks/quality.py --calibration wikitext2-valid.txt --text wikitext2-test.txt --json quality.json

Three windows of 1024 tokens; 1 sink token and 32 recent tokens are exact, every other past token is quantized, as a
token-by-token decode would have it. Statistics are collected once and shared by all recipes. Takes about two hours on
two cores; ``--section`` picks a part, and results are added to the JSON file as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from torchgsrq import Codebooks, GSRQConfig, calibrate
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.kmeans import METHODS
from torchgsrq.learning.calibrate import rates_of_heads
from torchgsrq.learning.sensitivity import by_head, sensitivity
from torchgsrq.learning.statistics import collect_statistics
from torchgsrq.learning.text import cut, recall_windows, token_ids
from torchgsrq.learning.train import train
from torchgsrq.measure import evaluate, retrieval
from torchgsrq.measure.embedded import NAME, document, load_model
from torchgsrq.models import inspect_layers, rope_span

calibration = sys.modules[calibrate.__module__]
RATES = [2.0, 1.0, 0.5, 0.25]
FACTS = {"": "found", " nll": "nll"}  # of a retrieval score
TOKENS = 16384
PROTOCOL = {"sink_tokens": 1, "recent_tokens": 32, "block_tokens": 1}
SECTIONS = ("groups", "uniform", "own", "text", "eta", "clustering", "retrieval", "gsrq-paper")


def with_eta(books: Codebooks, key: int, value: int) -> Codebooks:
    """The same codebooks, encoding for another loss."""
    layers = {
        i: LayerCodec(
            *(
                Codecs(tuple((heads, codec.replaced(eta=eta)) for heads, codec in side.parts))
                for side, eta in zip(layer, (key, value), strict=True)
            )
        )
        for i, layer in books.layers.items()
    }
    return Codebooks(layers, books.metadata)


class Bench:
    """The model, the text, and what is shared between sections."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model)
        self.layers = inspect_layers(self.model)
        text = args.text.read_text()
        ids = token_ids(self.tokenizer, text)
        self.windows = [ids[s : s + 1024] for s in (0, 4096, 8192)]
        self.bits = sorted(args.bits or RATES, reverse=True)
        self.stats: dict[tuple[str, int], Any] = {}
        self.learned = self.costs = None

    def statistics(self, source: str, tokens: int) -> Any:
        """Calibration statistics of the text, or of what the model writes itself (``"own"``)."""
        if (source, tokens) not in self.stats:
            self.stats.clear()
            text = None if source == "own" else [self.args.calibration.read_text()]
            windows, _ = calibration.calibration_windows(self.model, text, self.tokenizer, tokens, 0)
            self.learned, self.costs = windows, None
            self.stats[source, tokens] = collect_statistics(self.model, self.layers, windows, False)
        return self.stats[source, tokens]

    def train(
        self, config: GSRQConfig, source: str = "text", tokens: int = TOKENS, method: str = "kmeans"
    ) -> Codebooks:
        """Codebooks of a config; statistics that other sections made are reused."""
        stats, span = self.statistics(source, tokens), rope_span(self.model)
        begin = time.perf_counter()
        if config.spreads_bits and self.costs is None:
            self.costs = by_head(sensitivity(self.model, self.layers, self.learned))
        costs = self.costs if config.spreads_bits else None
        each = rates_of_heads(config, {i: s.info for i, s in stats.items()}, costs)
        layers = {i: train(s, [(config, each[i])], span, method=method)[0] for i, s in stats.items()}
        facts: dict[str, Any] = {"config": config.codec_fields(), "source": source, "tokens": tokens}
        if costs:
            facts["sensitivity"] = {str(i): cost for i, cost in costs.items()}
        print(f"  trained in {time.perf_counter() - begin:.0f} s", flush=True)
        return Codebooks(layers, facts)

    def score(self, section: str, row: str, config: GSRQConfig, books: Codebooks, shift: int = 0) -> None:
        """Measure one row of a table."""
        config = dataclasses.replace(config, **PROTOCOL)
        found = evaluate.quality(self.model, self.windows, {"": (config, books)}, shift)[""]
        error = evaluate.key_error(self.model, self.windows[1], books, shift)
        outputs = evaluate.output_error(self.model, self.windows[1], config, books)
        facts = {"key_error": error, "output_error": sum(outputs.values()) / len(outputs)}
        self.record(section, row, {**dataclasses.asdict(found), **facts})

    def each_rate(self, section: str, source: str = "text", **fields: Any) -> dict[float, Codebooks]:
        """A row for every rate, each with codebooks of its own."""
        trained = {}
        for bits in self.bits:
            config = GSRQConfig(bits=bits, **fields)
            trained[bits] = self.train(config, source)
            self.score(section, f"{bits:g}", config, trained[bits])
        return trained

    def retrieval(self) -> None:
        """What the model finds again, with codebooks of its own text."""
        rates = self.args.bits or [1.0, 0.5]
        books = {bits: self.train(GSRQConfig(bits=bits), "own") for bits in rates}
        for tokens in self.args.retrieval_tokens or (1024, 2048):
            tasks = self.args.task or tuple(retrieval.TASKS)
            trials = retrieval.trials(self.tokenizer, document(), tokens, tasks=tasks, count=self.args.trials)
            rows: dict[str, Any] = {"full precision": (trials, None)}
            rows["sinks and window alone"] = (retrieval.cut_short(trials, 4, 128), None)
            rows |= {f"{bits:g}": (trials, (GSRQConfig(bits=bits), books[bits])) for bits in rates}
            for name, (asked, candidate) in rows.items():
                self.answers("retrieval", f"{tokens} tokens, {name}", asked, candidate)

    def text(self) -> None:
        """What calibration reads, one thing after the other: the same text in short and in long windows, text that is
        repeated, and lists."""
        text, config = self.args.calibration.read_text(), GSRQConfig(bits=1, allocation="uniform")
        span = rope_span(self.model)
        trials = retrieval.trials(self.tokenizer, document(), 1024, tasks=("keys", "lookup"), count=4)
        long = cut(token_ids(self.tokenizer, text)[:TOKENS], 1024)
        recall = [recall_windows(long, tokenizer, 0) for tokenizer in (None, self.tokenizer)]
        for row, windows in {
            "windows of 512": long.view(-1, 512),
            "windows of 1024": long,
            "and text twice": torch.cat((long, recall[0])),
            "and lists": torch.cat((long, recall[1])),
        }.items():
            stats = collect_statistics(self.model, self.layers, windows, False)
            layers = {i: train(s, [(config, [(1, 1)] * s.info.kv_heads)], span)[0] for i, s in stats.items()}
            books = Codebooks(layers, {"config": config.codec_fields(), "source": row, "tokens": windows.numel()})
            self.score("text", row, config, books)
            self.answers("text", f"{row}, answers", trials, (dataclasses.replace(config, **PROTOCOL), books))

    def answers(self, section: str, row: str, trials: Any, candidate: evaluate.Candidate | None) -> None:
        """Measure what is found, as a row of a table."""
        scores = retrieval.retrieval(self.model, trials, candidate)
        facts = {f"{task}{x}": getattr(s, y) for task, s in scores.items() for x, y in FACTS.items()}
        self.record(section, row, facts)

    def record(self, section: str, row: str, facts: dict[str, float]) -> None:
        """Print a row, and add it to the file, to which others may be adding theirs."""
        print(f"{section:12s} {row:24s} " + "  ".join(f"{k} {v:.4f}" for k, v in facts.items()), flush=True)
        if self.args.json:
            path: Path = self.args.json
            results = json.loads(path.read_text()) if path.exists() else {}
            results.setdefault(section, {})[row] = facts
            path.write_text(json.dumps(results, indent=1))

    def run(self, section: str) -> None:
        """Measure one section."""
        if section == "groups":
            for size in (8, 16, 32, 64):
                for bits in self.bits:
                    config = GSRQConfig(bits=bits, group_size=size)
                    books = self.train(config)
                    self.score(section, f"{size}, {bits:g}", config, books)
                    if (size, bits) == (8, 1):
                        for shift in (4000, 30000):
                            self.score(section, f"{size}, 1, positions + {shift}", config, books, shift)
        elif section == "own":
            self.each_rate(section, "own")
        elif section == "uniform":
            self.each_rate(section, allocation=section)
        elif section == "eta":  # what the encoder minimizes, keys and values each alone
            for bits in self.bits:
                config = GSRQConfig(bits=bits)
                books = self.train(config)
                for key, value in ((1, 1), (4, 1), (8, 1), (16, 1), (1, 2), (1, 4), (1, 8)):
                    self.score(section, f"{bits:g}, keys {key}, values {value}", config, with_eta(books, key, value))
        elif section == "clustering":
            for method in METHODS:
                config = GSRQConfig(bits=0.5)
                self.score(section, method, config, self.train(config, tokens=4096, method=method))
        elif section in ("retrieval", "text"):
            getattr(self, section)()
        else:
            self.each_rate(section, recipe=section, group_size=32)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub ID or folder; {NAME} by default")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated; all by default")
    parser.add_argument(
        "--bits", action="append", type=float, help="rates; may be repeated; 2, 1, 0.5, 0.25 by default"
    )
    parser.add_argument(
        "--retrieval-tokens", action="append", type=int, help="prompt lengths; 1024 and 2048 by default"
    )
    parser.add_argument("--task", action="append", choices=retrieval.TASKS, help="of retrieval; all by default")
    parser.add_argument("--trials", type=int, default=8, help="texts of each retrieval task")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    args = parser.parse_args()
    print(f"$ {shlex.join(['python', *sys.argv])}\n{evaluate.environment()}", flush=True)
    bench = Bench(args)
    for section in args.section or SECTIONS:
        bench.run(section)


if __name__ == "__main__":
    main()
