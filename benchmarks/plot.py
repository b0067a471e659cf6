"""Pictures of what was measured (`tables.py` makes the tables).

    python benchmarks/plot.py benchmarks/results/compare.json docs/compare.png
    python benchmarks/plot.py benchmarks/results/speed.json docs/speed.png

The first: bits against KL divergence and against retrieval, a line for each method. The second: speed against context,
from what ``cpu.py --section attention --json`` and ``cpu.py --section generate --json`` wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, which the colour-blind tell apart; and a marker each.
STYLES = {
    "gsrq": ("GSRQ", "#D55E00", "o"),
    "uniform": ("GSRQ, same bits everywhere", "#D55E00", "+"),
    "gsrq-paper": ("GSRQ, the paper's", "#0072B2", "v"),
    "vqllm": ("VQLLM", "#009E73", "D"),
    "cq": ("CQ", "#CC79A7", "P"),
    "tasq": ("TaSQ-like", "#000000", "*"),
    "nsnquant": ("NSNQuant", "#7F7F7F", "X"),
    "kvquant": ("KVQuant", "#B59F3B", "<"),
    "turboquant": ("TurboQuant", "#8C6BB1", ">"),
    "kivi": ("KIVI", "#A6761D", "p"),
    "quanto": ("QuantizedCache, quanto", "#666666", "1"),
    "hqq": ("QuantizedCache, hqq", "#999999", "2"),
    "streaming": ("StreamingLLM", "#BBBBBB", "h"),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what compare.py wrote, or cpu.py, one or both sections")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args()
    read = [json.loads(path.read_text()) for path in args.results]
    if "methods" in read[0]:
        quality(read[0]["methods"], args.picture)
    else:
        speed([row for results in read for row in results["rows"]], args.picture)


SPEED = {
    "gsrq groups of 8, 0.5": ("0.5 bit", "#009E73", "D"),
    "gsrq groups of 8, 1": ("1 bit", "#E69F00", "s"),
    "gsrq groups of 64, 1": ("1 bit, groups of 64", "#D55E00", "o"),
    "gsrq groups of 8": ("1 bit", "#E69F00", "s"),
    "gsrq groups of 64": ("1 bit, groups of 64", "#D55E00", "o"),
    "flex_attention, compiled": ("FlexAttention", "#0072B2", "v"),
    "QuantizedCache quanto int4": ("QuantizedCache, quanto int4", "#666666", "1"),
}


def speed(rows: list[dict[str, Any]], picture: Path) -> None:
    """Attention of one layer, and ``generate`` of a whole model, as times the speed of full precision."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, (label, colour, marker) in SPEED.items():
        for axis, section, field in ((axes[0], "attention", "over_sdpa"), (axes[1], "generate", "over_full")):
            own = [r for r in rows if r["section"] == section and r["what"] == name]
            own = [r for r in own if r.get("model", "SmolLM2-135M") == "SmolLM2-135M"]
            if own:
                xy = [r["context"] for r in own], [r[field] for r in own]
                axis.plot(*xy, label=label, color=colour, marker=marker, linewidth=2 if "gsrq" in name else 1.2)
    axes[0].set(title="attention of one layer, heads of 64, 1 thread", ylabel="times the fastest SDPA")
    axes[1].set(title="generate, SmolLM2-135M, 2 threads", ylabel="times DynamicCache")
    for axis in axes:
        axis.axhline(1, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log", xlabel="tokens held", ylim=(0, None))
        ticks = sorted({x for line in axis.get_lines()[:-1] for x in line.get_xdata()})
        axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else f"{x}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def quality(results: dict[str, dict[str, Any]], picture: Path) -> None:
    """Bits against KL divergence and against retrieval."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    for family, (label, colour, marker) in STYLES.items():
        rows: list[dict[str, Any]] = sorted(
            (r for r in results.values() if r["family"] == family), key=lambda r: r["bits_without_codebooks"]
        )
        if not rows:
            continue
        bits = [r["bits_without_codebooks"] for r in rows]
        for axis, what in zip(axes, ("kl", "found"), strict=True):
            style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 2 if "gsrq" in family else 1.2}
            axis.plot(bits, [r[what] * (100 if what == "found" else 1) for r in rows], label=label, **style)
    full = next((r for r in results.values() if r["family"] == "full"), None)
    if full:
        axes[1].axhline(100 * full["found"], color="black", linestyle=":", linewidth=1)
        axes[1].text(0.3, 100 * full["found"] + 1, "full precision", fontsize=8)
    axes[0].set(yscale="log", ylabel="KL divergence, nats (lower is better)")
    axes[1].set(ylabel="answers found, % (higher is better)")
    for axis in axes:
        axis.set(xlabel="bits per element of a 128k cache, codebooks apart", xlim=(0.15, 4.8))
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
