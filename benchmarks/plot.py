"""The picture of a comparison, bits against KL divergence and against retrieval, a line for each method; and its table.

python benchmarks/plot.py compare.json docs/compare.png
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
    "gsrq": ("GSRQ, quality", "#D55E00", "o"),
    "fast": ("GSRQ, fast", "#E69F00", "s"),
    "uniform": ("GSRQ, same bits everywhere", "#D55E00", "+"),
    "gsrq-paper": ("GSRQ, the paper's", "#0072B2", "v"),
    "kmeans": ("the same with k-means", "#56B4E9", "^"),
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


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows by bits, in Markdown."""
    tasks = next(iter(results.values()))["tasks"]
    asked = ", ".join(f"{task} {score['answers']}" for task, score in tasks.items())
    lines = [
        f"| method | bits | with codebooks | perplexity | KL (95%) | KL p99 | same token | found: {asked} | nats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in sorted(results.items(), key=lambda item: -item[1]["bits_without_codebooks"]):
        interval = f"{abs(r['kl_low']):.3f}-{abs(r['kl_high']):.3f}"  # of full precision, rounding about zero
        found = " / ".join(f"{score['found']:.0%}" for score in r["tasks"].values())
        lines.append(
            f"| {name} | {r['bits_without_codebooks']:.2f} | {r['bits']:.2f} | {r['ppl']:.2f} | {r['kl']:.3f} "
            f"({interval}) | {r['kl_p99']:.2f} | {r['agreement']:.0%} | {found} "
            f"| {r['answer_nll']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what compare.py wrote")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())["methods"]
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
    figure.savefig(args.picture, dpi=110)
    print(table(results))


if __name__ == "__main__":
    main()
