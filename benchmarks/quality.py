"""What every recipe costs in quality, on WikiText-2 or any text: the tables of the README.

    python benchmarks/quality.py --calibration wikitext2-valid.txt --text wikitext2-test.txt --json quality.json

Three windows of 1024 tokens; 1 sink token and 32 recent tokens are exact, every other past token is quantized, as a
token-by-token decode would have it. Statistics are collected once and shared by all recipes. Takes about an hour on
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

from torchgsrq import Codebooks, GSRQConfig, evaluate
from torchgsrq import calibrate as _  # noqa: F401  (the function; the module is taken from sys.modules below)
from torchgsrq.embedded import NAME, load_model
from torchgsrq.kmeans import METHODS
from torchgsrq.models import inspect_layers

calibration = sys.modules["torchgsrq.calibrate"]
RATES = (2, 1, 0.5, 0.25)
PROTOCOL = {"sink_tokens": 1, "recent_tokens": 32, "block_tokens": 1}
SECTIONS = ("frame512", "frame256", "fast", "kmeans", "universal", "own", "clustering", "gsrq-paper")


class Bench:
    """The model, the text, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model)
        self.layers = inspect_layers(self.model)
        ids = self.ids(args.text.read_text())
        self.windows = [ids[s : s + 1024] for s in (0, 4096, 8192)]
        self.stats: dict[tuple[str, int], Any] = {}
        self.results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}

    def ids(self, text: str) -> torch.Tensor:
        """Token ids of a text."""
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]

    def statistics(self, source: str, tokens: int) -> Any:
        """Calibration statistics of a text, or of what the model writes itself."""
        if (source, tokens) not in self.stats:
            self.stats.clear()
            if source == "own":
                windows = calibration.own_text(self.model, tokens, 512, 0, True)
            else:
                text = [self.args.calibration.read_text()]
                windows = calibration.token_windows(self.model, text, tokens, 1024, self.tokenizer)
            self.stats[source, tokens] = calibration.collect_statistics(self.model, self.layers, windows)
        return self.stats[source, tokens]

    def train(
        self, config: GSRQConfig, source: str = "text", tokens: int = 16384, method: str | None = None
    ) -> Codebooks:
        """Codebooks of a config, from shared statistics."""
        if config.recipe == "universal":
            info = self.layers[0]
            return calibration.universal(config, len(self.layers), info.kv_heads, info.head_dim)
        stats, span = self.statistics(source, tokens), calibration.rope_span(self.model)
        begin = time.perf_counter()
        books = {i: calibration.train(s, config, span, method) for i, s in stats.items()}
        print(f"  trained in {time.perf_counter() - begin:.0f} s", flush=True)
        return Codebooks(books, {"config": config.codec_fields(), "source": source, "tokens": tokens})

    def score(self, section: str, row: str, config: GSRQConfig, books: Codebooks, shift: int = 0) -> None:
        """Measure one row of a table and write it down."""
        config = dataclasses.replace(config, **PROTOCOL)
        found = evaluate.quality(self.model, self.windows, {"": (config, books)}, shift)[""]
        facts = dataclasses.asdict(found)
        facts["key_error"] = evaluate.key_error(self.model, self.windows[1], books, shift)
        self.results.setdefault(section, {})[row] = facts
        print(f"{section:12s} {row:24s} " + "  ".join(f"{k} {v:.4f}" for k, v in facts.items()), flush=True)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.results, indent=1))

    def rates(self, section: str, config: GSRQConfig, books: Codebooks) -> None:
        """A row for every rate, from one nested set of codebooks."""
        for bits in RATES:
            self.score(section, f"{bits:g}", dataclasses.replace(config, bits=bits), books.at(bits))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub ID or folder; {NAME} by default")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--section", action="append", choices=SECTIONS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"$ {shlex.join(['python', *sys.argv])}\n{evaluate.environment()}", flush=True)
    bench = Bench(args)
    for section in args.section or SECTIONS:
        if section in ("frame512", "frame256"):
            config = GSRQConfig(bits=2, frame=int(section[5:]))
            books = bench.train(config)
            bench.rates(section, config, books)
            if section == "frame512":
                one = dataclasses.replace(config, bits=1)
                for shift in (4000, 30000):
                    bench.score(section, f"1, positions + {shift}", one, books.at(1), shift)
        elif section == "own":
            config = GSRQConfig(bits=2)
            bench.rates(section, config, bench.train(config, "own"))
        elif section == "fast":  # groups follow the rate here, so each has its own codebooks
            for bits in RATES:
                config = GSRQConfig(bits=bits, layout="fast")
                bench.score(section, f"{bits:g}", config, bench.train(config))
        elif section == "clustering":
            for method in METHODS:
                config = GSRQConfig(bits=1)
                bench.score(section, method, config, bench.train(config, tokens=8192, method=method))
        else:
            config = GSRQConfig(bits=2, recipe=section)
            bench.rates(section, config, bench.train(config))


if __name__ == "__main__":
    main()
