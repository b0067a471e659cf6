"""Pictures of what was measured (`tables.py` makes the tables), and of memory by context.

    python benchmarks/plot.py benchmarks/results/compare.json docs/results/compare.png
    python benchmarks/plot.py benchmarks/results/speed.json docs/results/speed.png
    python benchmarks/plot.py docs/memory.png

The first: bits against KL divergence, a line for each of a few methods. The second: speed against context, from what
``cpu.py --section attention --json`` and ``cpu.py --section generate --json`` wrote. The third is computed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from transformers import LlamaConfig

from torchgsrq.measure.recommend import SHAPES, full_precision, settings

# Okabe and Ito's colors, distinct for the color-blind; and a marker each.
STYLES = {
    "gsrq": ("GSRQ", "#D55E00", "o"),
    "gsrq-paper": ("GSRQ, the paper's recipe", "#0072B2", "v"),
    "quanto": ("QuantizedCache, quanto", "#666666", "s"),
    "kivi": ("KIVI", "#A6761D", "p"),
    "kvquant": ("KVQuant", "#009E73", "D"),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="what compare.py wrote, or cpu.py, one or both sections")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    args = parser.parse_args()
    read = [json.loads(path.read_text()) for path in args.results]
    if not read:
        memory(args.picture)
    elif "methods" in read[0]:
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
    for name, (label, color, marker) in SPEED.items():
        for axis, section, field in ((axes[0], "attention", "over_sdpa"), (axes[1], "generate", "over_full")):
            own = [r for r in rows if r["section"] == section and r["what"] == name]
            own = [r for r in own if r.get("model", "SmolLM2-135M") == "SmolLM2-135M"]
            if own:
                xy = [r["context"] for r in own], [r[field] for r in own]
                axis.plot(*xy, label=label, color=color, marker=marker, linewidth=2 if "gsrq" in name else 1.2)
    figure.suptitle("decode speed on a CPU, higher is faster")
    axes[0].set(title="attention of one layer, heads of 64, 1 thread", ylabel="times the fastest SDPA")
    axes[1].set(title="generate, SmolLM2-135M, 2 threads", ylabel="times DynamicCache")
    for axis in axes:
        axis.axhline(1, color="black", linestyle=":", linewidth=1, label="full precision")
        axis.set(xscale="log", xlabel="tokens held", ylim=(0, None))
        ticks = sorted({x for line in axis.get_lines()[:-1] for x in line.get_xdata()})
        axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else f"{x}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def quality(results: dict[str, dict[str, Any]], picture: Path) -> None:
    """Bits against KL divergence, with 95% intervals."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for family, (label, color, marker) in STYLES.items():
        rows: list[dict[str, Any]] = sorted(
            (r for name, r in results.items() if r["family"] == family and "groups" not in name),
            key=lambda r: r["bits_without_codebooks"],
        )
        if not rows:
            continue
        bits, kl = ([r[what] for r in rows] for what in ("bits", "kl"))
        around = [[abs(r["kl"] - r[end]) for r in rows] for end in ("kl_low", "kl_high")]
        style = {"color": color, "marker": marker, "markersize": 7, "linewidth": 2 if family == "gsrq" else 1.2}
        axis.errorbar(bits, kl, around, label=label, capsize=3, **style)
    axis.set(yscale="log", ylabel="KL divergence, nats (lower is better)", xlim=(0, 4.8))
    axis.set(xlabel="bits per element, all counted, of a cache of 128k tokens", title="SmolLM2-135M, WikiText-2")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=9)
    figure.savefig(picture, dpi=110)


def memory(picture: Path) -> None:
    """The KV cache of one sequence of an 8B model by context, with its codebooks."""
    layers, heads, dim = SHAPES["8B"]
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, hidden_size=heads * dim, num_key_value_heads=heads
    )
    contexts = [2**i for i in range(10, 18)]
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    full = [full_precision(config, n) / 2**20 for n in contexts]
    axis.plot(contexts, full, label="bfloat16", color="black", marker="s", linewidth=1.2)
    for bits, color, marker in ((2.0, "#0072B2", "v"), (1.0, "#E69F00", "o"), (0.5, "#009E73", "D")):
        found = [next(s for s in settings(config, n) if s.bits == bits and s.group_size == 8) for n in contexts]
        sizes = [(s.cache + s.codebooks) / 2**20 for s in found]
        label = f"{bits:g} bit{'s' if bits > 1 else ''}, with codebooks"
        axis.plot(contexts, sizes, label=label, color=color, marker=marker, linewidth=2)
    axis.set(xscale="log", yscale="log", xlabel="tokens held", ylabel="MiB")
    axis.set(title="KV cache of one sequence, 8B model (32 layers, 8 KV heads of 128)")
    axis.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
    ticks = [100, 1000, 10000]
    axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
