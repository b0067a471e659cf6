"""What gain-shape k-means gives on real keys and values, beside plain k-means: one codebook of 256 words, in sample and
held out.

    python benchmarks/gskm.py --text wikitext2-valid.txt --held-out wikitext2-test.txt --picture docs/research/gskm.png

The paper (arXiv 2607.01065) claims a lower cosine error and distortion for GSKM. Measured for each head, and for the
heads of a layer joined to one vector; un-rotated keys and values of every sixth layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from torchgsrq.codec.kmeans import cluster, nearest, rounds, samples, spherical
from torchgsrq.learning.statistics import collect_statistics
from torchgsrq.learning.text import cut, token_ids
from torchgsrq.measure.embedded import NAME, load_model
from torchgsrq.measure.evaluate import environment
from torchgsrq.models import inspect_layers

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {
    "kmeans": "k-means",
    "kmeans-spherical": "k-means, spherical start",
    "gskm": "GSKM",
    "gskm-public": "GSKM, public variant",
}
COLORS = ("#56B4E9", "#0072B2", "#D55E00", "#E69F00")  # Okabe and Ito's


def learn(x: Tensor, method: str) -> Tensor:
    """256 codewords of ``x [heads, n, width]``: the methods of `cluster`, plain updates from GSKM's start, and GSKM as
    in the authors' published code, whose gains are rounded to bfloat16 and at least 1e-4, and whose shape is the
    normalized sum of the inputs and gain their mean projection on the previous shape."""
    if method in ("kmeans", "gskm"):
        return cluster(x, method=method)
    x, generator = x.float(), torch.Generator().manual_seed(0)
    weight, norms = torch.ones(x.shape[:2]), x.norm(dim=-1, keepdim=True)
    unit = x / norms.clamp_min(1e-12)
    start = spherical(unit, norms, weight, samples(x, weight, 256, generator), generator)

    def gained(gain: Tensor, shape: Tensor) -> Tensor:
        return gain.bfloat16().float().clamp_min(1e-4) * shape

    def public(x: Tensor, weight: Tensor, code: Tensor, mean: Tensor, centers: Tensor) -> Tensor:
        before, shape = (torch.nn.functional.normalize(x, dim=-1) for x in (centers, mean))
        return gained((mean * before).sum(-1, keepdim=True), shape)

    if method == "kmeans-spherical":
        return rounds(x, weight, start, lambda x, weight, code, mean, _: mean, 10, generator)
    start = gained(start.norm(dim=-1, keepdim=True), torch.nn.functional.normalize(start, dim=-1))
    return rounds(x, weight, start, public, 10, generator)


def errors(x: Tensor, words: Tensor) -> tuple[float, float]:
    """Mean cosine error, and squared error relative to the squared norms, of ``x [heads, n, width]``."""
    code, distance = nearest(x, words)
    found = words.gather(1, code.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    cosine = torch.nn.functional.cosine_similarity(x, found, dim=-1)
    return float(1 - cosine.mean()), float(distance.sum() / x.square().sum())


def measure(model: Any, tokenizer: Any, texts: tuple[str, str], tokens: int) -> list[dict[str, Any]]:
    """A row for each kind of vector and method, the mean over layers."""
    layers = inspect_layers(model)[::6]
    vectors = []
    for text in texts:
        windows = cut(token_ids(tokenizer, text)[:tokens], 1024)
        stats = collect_statistics(model, layers, windows)
        vectors.append([(torch.cat(s.keys.x, 1), torch.cat(s.values.x, 1)) for s in stats.values()])
    rows = []
    for kind, what in enumerate(("keys", "values")):
        for joined in (False, True):
            for method in LABELS:
                found = []
                for given, other in zip(*vectors, strict=True):
                    train, held = (x[kind].transpose(0, 1).reshape(1, -1, x[kind].shape[0] * x[kind].shape[2])
                                   if joined else x[kind] for x in (given, other))  # fmt: skip
                    words = learn(train, method)
                    found.append((*errors(train, words), *errors(held, words)))
                mean = torch.tensor(found).mean(0).tolist()
                names = ("cosine", "distortion", "cosine, held out", "distortion, held out")
                row = {"vectors": what, "joined": joined, "method": method, **dict(zip(names, mean, strict=True))}
                print(
                    "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
                rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Bars for every kind of vector, full in sample and hatched held out."""
    kinds = [(w, j) for w in ("keys", "values") for j in (False, True)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, metric in zip(axes, ("cosine", "distortion"), strict=True):
        for i, method in enumerate(LABELS):
            mine = [next(r for r in rows if (r["vectors"], r["joined"], r["method"]) == (*k, method)) for k in kinds]
            at = [k + (i - 1.5) * 0.2 for k in range(len(kinds))]
            axis.bar(
                at, [r[f"{metric}, held out"] for r in mine], 0.18, color="white", edgecolor=COLORS[i], hatch="///"
            )
            axis.bar(at, [r[metric] for r in mine], 0.18, color=COLORS[i], label=LABELS[method])
        names = [f"{what}, {'heads joined' if joined else 'each head'}" for what, joined in kinds]
        axis.set_xticks(range(len(kinds)), names, fontsize=8)
        axis.set(ylabel=f"{metric} error" if metric == "cosine" else "squared error, relative")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8, title="full: in sample, hatched: held out", title_fontsize=8)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"hub ID or folder; {NAME} by default")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    print(environment(), flush=True)
    rows = measure(*load_model(args.model), (args.text.read_text(), args.held_out.read_text()), args.tokens)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
