# %% [markdown]
# # Codes in pictures
#
# What is a code, and why are a few bits per element enough? This tutorial shows the four ideas of this library with
# its own functions, in two dimensions, where they can be drawn.
#
# Run it with `python tutorials/4_codes_in_pictures.py`. It takes a few seconds. The output and the pictures shown here
# are from a 2-core Intel Xeon (Sapphire Rapids), torch 2.13.0, 2026-11-30.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from torchgsrq.codec import Codec
from torchgsrq.codec.kmeans import METHODS, cluster, nearest
from torchgsrq.codec.rope import rotate
from torchgsrq.reference import decode, encode, search_group

here = Path(__file__).parent
torch.manual_seed(0)
blue, orange, green, pink, gray = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"

# %% [markdown]
# ## 1. Residual stages
#
# A **codebook** is a small table of vectors, its **codewords**. A vector is replaced by the index of the nearest
# codeword: this index is its code. `cluster` finds good codewords.
#
# One large table would be best, but a table for 64 bits would have 2^64 rows. Vectors are therefore coded in
# **stages**: the second codebook codes the residual of the first, and the third the residual of the second. The vector
# is the sum of its codewords. Here, 3 stages have 8 codewords each: 9 bits, with 24 rows instead of 512. (In the
# library, a codebook has 256 codewords, so that a code is one byte.)

# %%
points = torch.randn(2000, 2) @ torch.tensor([[1.6, 0.9], [0.0, 0.6]])
left_over, sums, figure_parts = points, torch.zeros_like(points), []
for stage in range(3):
    codewords = cluster(left_over[None], codewords=8)
    codes, _ = nearest(left_over[None], codewords)
    figure_parts.append((left_over, codewords[0], codes[0]))
    chosen = codewords[0][codes[0]]
    left_over, sums = left_over - chosen, sums + chosen
    share = left_over.square().sum() / points.square().sum()
    print(f"{3 * (stage + 1)} bits per vector: {share:.1%} of the energy is left")

figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
for stage, (given, codewords, codes) in enumerate(figure_parts):
    axes[stage].scatter(*given.T, s=3, c=codes, cmap="cividis", alpha=0.6)
    axes[stage].scatter(*codewords.T, s=60, c=orange, marker="X", edgecolors="black")
    axes[stage].set_title("the vectors, 8 codewords" if stage == 0 else f"what stage {stage} left over")
axes[3].scatter(*points.T, s=3, c=gray, alpha=0.4)
axes[3].scatter(*sums.unique(dim=0).T, s=6, c=blue)
axes[3].set_title("all sums of 3 codewords")
for ax in axes:
    ax.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", xlabel="first element")
axes[0].set_ylabel("second element")
figure.savefig(here / "4_stages.png", dpi=110)

# %% [markdown]
# ```text
# 3 bits per vector: 10.8% of the energy is left
# 6 bits per vector: 2.5% of the energy is left
# 9 bits per vector: 0.7% of the energy is left
# ```
#
# ![three residual stages of 8 codewords each, and all their sums](4_stages.png)
#
# The sums are dense where the vectors are dense. Each additional stage refines the one before it.
#
# ## 2. Gain and shape
#
# A codeword is a **gain** (its length) times a **shape** (its direction). Attention depends on directions: a query
# looks for keys that point in its direction. Gain-shape k-means, `method="gskm"`, learns the two separately. The shape
# is the mean direction of the vectors, in which short ones count as much as long ones. The gain is their mean length
# along it. In plain k-means, long vectors pull a codeword towards themselves.

# %%
direction = torch.randn(4000, 2)
lengths = (0.5 * torch.randn(4000, 1)).exp()  # some are several times as long as others
points = lengths * direction / direction.norm(dim=1, keepdim=True)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
errors = {}
for method in METHODS:
    codewords = cluster(points[None], codewords=16, method=method, iterations=20)
    codes, error = nearest(points[None], codewords)
    cosine = torch.cosine_similarity(points, codewords[0][codes[0]]).mean()
    errors[method] = float(error.mean() / points.square().sum(1).mean()), float(1 - cosine)
    print(f"{method:7} squared error {errors[method][0]:.4f}, cosine error {errors[method][1]:.4f}")
    if method == "gskm":
        left.scatter(*points.T, s=3, c=gray, alpha=0.4)
        left.quiver(
            *torch.zeros(2, 16), *codewords[0].T, color=blue, angles="xy", scale_units="xy", scale=1, width=0.008
        )
left.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="first element", ylabel="second element")
left.set_title("gskm: 16 gains and shapes")
place = range(len(METHODS))
right.bar([i - 0.2 for i in place], [e[0] for e in errors.values()], 0.4, color=blue, label="squared error")
right.bar([i + 0.2 for i in place], [e[1] for e in errors.values()], 0.4, color=orange, label="1 - cosine")
right.set_xticks(place, METHODS)
right.set(
    title="16 codewords, two ways to learn them", ylabel="mean error", ylim=(0, 1.3 * max(map(max, errors.values())))
)
right.legend()
figure.savefig(here / "4_gain_shape.png", dpi=110)

# %% [markdown]
# ![gain-shape codewords as arrows, and the errors of two clusterings](4_gain_shape.png)
#
# ```text
# kmeans  squared error 0.1279, cosine error 0.0464
# gskm    squared error 0.1265, cosine error 0.0412
# ```
#
# Directions are better, and squared errors about the same. On keys and values of a real model the difference is
# [smaller](../docs/research/quality.md#what-gain-shape-k-means-gives), and with several stages plain k-means was ahead.
# The library therefore learns its codebooks by plain k-means; this section only illustrates the idea.
#
# ## 3. Anchored frames
#
# RoPE rotates a key by an angle that grows with its position. A key at position 30000 is therefore far from all keys of
# a calibration text, and its codebook has no codeword near it. To avoid this, positions are split into **frames**, and
# a key is stored as if its frame began at 0. It is rotated back by the start of its frame before it is encoded, and
# forward again when it is read. A key that moves by whole frames keeps its code.
#
# Here, keys have four pairs of elements, which rotate at different speeds, and frames have 64 tokens. Two codebooks,
# one with frames and one without, learn from positions 0 to 255.

# %%
DIM, FRAME = 8, 64
inv_freq = torch.tensor([0.5, 0.1, 0.02, 0.004])  # radians per token
content = torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]) + 0.4 * torch.randn(2048, DIM)


def keys_at(positions: Tensor) -> Tensor:
    """The same keys, rotated to these positions: [1, 1, n, DIM]."""
    return rotate(content[: len(positions)], positions, inv_freq)[None, None]


def learn(frame: int) -> Codec:
    """Two stages of 256 codewords, learned from positions 0 to 255; without frames if ``frame`` is 0."""
    positions = torch.arange(2048) % 256
    start = positions // frame * frame if frame else 0 * positions
    x = rotate(keys_at(positions)[0], -start, inv_freq)
    first = cluster(x)
    second = cluster(x - first[0][nearest(x, first)[0]])
    return Codec.build(
        mean=torch.zeros(1, DIM),
        transform=torch.eye(DIM)[None],
        codebook=torch.stack((first, second), 1),
        inv_freq=inv_freq if frame else None,
        frame=frame or 1,
    )


framed, unframed = learn(FRAME), learn(0)
places = torch.tensor([5, 5 + FRAME, 5 + 10 * FRAME, 5 + 500 * FRAME])
one_key = rotate(content[:1], places, inv_freq)[None, None]
print("positions:", places.tolist())
print("codes with frames:   ", encode(one_key, places[None], framed)[0, 0].tolist())
print("codes without frames:", encode(one_key, places[None], unframed)[0, 0].tolist())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
x = keys_at(torch.arange(256))[0, 0]
left.scatter(x[:, 3], x[:, 7], s=8, c=gray, alpha=0.6, label="positions 0 to 255")
for first, color, marker in ((512, orange, "^"), (832, pink, "s")):
    positions = first + torch.arange(64)
    x = keys_at(positions)[0, 0]
    turned_back = rotate(x, -(positions // FRAME * FRAME), inv_freq)
    left.scatter(x[:, 3], x[:, 7], s=12, c=color, marker=marker, label=f"{first} to {first + 63}")
left.scatter(turned_back[:, 3], turned_back[:, 7], s=12, c=blue, marker="x", label="both, turned back")
left.set(aspect="equal", xlabel="element 3", ylabel="element 7", title="The slowest pair of keys", ylim=(-3.6, 3))
left.legend(fontsize=8, loc="lower right")
starts = torch.arange(0, 2048, FRAME)
for codec, color, label in ((unframed, orange, "without frames"), (framed, blue, "frames of 64 tokens")):
    curve = []
    for first in starts:
        positions = first + torch.arange(FRAME)
        x = keys_at(positions)
        found = decode(encode(x, positions[None], codec), positions[None], codec)
        curve.append(float((found - x).square().sum() / x.square().sum()))
    right.plot(starts, curve, color=color, label=label)
right.axvspan(0, 256, color=gray, alpha=0.25, label="positions learned from")
right.set(
    xlabel="position, tokens", ylabel="relative squared error of keys", title="Errors by position", ylim=(0, None)
)
right.legend(fontsize=8)
figure.savefig(here / "4_frames.png", dpi=110)

# %% [markdown]
# ```text
# positions: [5, 69, 645, 32005]
# codes with frames:    [[135, 151], [135, 151], [135, 151], [135, 151]]
# codes without frames: [[139, 2], [22, 4], [85, 253], [11, 132]]
# ```
#
# ![keys at positions that were not learned from, and the error of keys by position](4_frames.png)
#
# Left: the same 64 keys at two ranges of positions that were not learned from. Rotated back by the start of their
# frames, both fall on the same points, among those that were learned from.
#
# Without frames, the error is small again where the slowest pair has completed a full rotation, near position 1571. In
# real models, the slowest pairs take many thousands of tokens for a rotation.
#
# ## 4. Score-aware codes
#
# Attention uses a key only in the score `q . k`. The queries that matter are aligned with the key, so an error
# **along** the key changes the score, and an error **across** it hardly does. The encoder minimizes
# `|e|^2 + (eta - 1) (e . y/|y|)^2`: with `eta=8`, an error along the vector counts 8 times as much. The number of bytes
# is the same; only the choice of codes is better.
#
# Left: one vector and the codewords near it, among them the nearest one and the one of least loss, which lies on the
# ellipse. Right: 4096 vectors of 16 elements with 4 stages of 256 codewords.

# %%
vector = torch.tensor([2.0, 1.2])
along = vector / vector.norm()
across = torch.tensor([-along[1], along[0]])
words = vector + 5 * torch.randn(256, 2, generator=torch.Generator().manual_seed(148))
pick = {eta: int(search_group(vector[None, None], words[None, None], eta)) for eta in (1, 8)}

y = torch.randn(4096, 16)
tables, rest = [], y
for _ in range(4):
    tables.append(cluster(rest[None]))
    rest = rest - tables[-1][0][nearest(rest[None], tables[-1])[0][0]]
tables = torch.stack(tables, 1)
unit = y / y.norm(dim=1, keepdim=True)
queries = 3 * unit + torch.randn(4096, 16)  # they point along their key, and a bit elsewhere
error = {}
for eta in (1, 8):
    codes = search_group(y[None], tables, eta)[0].long()
    e = y - sum(tables[0, stage][codes[:, stage]] for stage in range(4))
    size, component = e.square().sum(1), (e * unit).sum(1).square()
    error[eta] = [float(x.mean()) for x in (component, (size - component) / 15, (e * queries).sum(1).square())]
    print(f"eta={eta}: along {error[eta][0]:.4f}, across {error[eta][1]:.4f} per direction, score {error[eta][2]:.4f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.scatter(*words.T, s=14, c=gray)
turn = torch.linspace(0, 6.3, 200)[:, None]
for eta, color, label in ((1, orange, "nearest (eta 1)"), (8, blue, "least loss (eta 8)")):
    e = words[pick[eta]] - vector
    loss = e @ e + (eta - 1) * (e @ along) ** 2
    left.plot(*(vector + loss.sqrt() * (turn.cos() * along / eta**0.5 + turn.sin() * across)).T, color=color)
    left.scatter(*words[pick[eta]], s=60, c=color, edgecolors="black", label=label, zorder=3)
left.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "->", "lw": 2})
left.set(xlabel="first element", ylabel="second element", title="One vector, and codewords", aspect="equal")
left.set(xlim=(-0.3, 3.7), ylim=(-0.3, 2.7))
left.legend(fontsize=8, loc="lower right")
for i, (eta, color) in enumerate(((1, orange), (8, blue))):
    sizes = [mine / plain for mine, plain in zip(error[eta], error[1], strict=True)]
    right.bar([x + 0.4 * i - 0.2 for x in range(3)], sizes, 0.4, color=color, label=f"eta {eta}")
right.set_xticks(range(3), ["along\nthe vector", "across,\nper direction", "score of an\naligned query"])
right.set(ylabel="mean squared error (eta 1: 1)", title="Errors of 4096 vectors")
right.legend()
figure.savefig(here / "4_score_aware.png", dpi=110)

# %% [markdown]
# ![the nearest codeword and the one of least loss, and the errors of both encoders](4_score_aware.png)
#
# ```text
# eta=1: along 0.1269, across 0.0526 per direction, score 2.0636
# eta=8: along 0.0431, across 0.0746 per direction, score 1.5166
# ```
#
# The error across the vector grows, and the error of the score, which matters, falls.
# [How it works](../docs/design/how-it-works.md) describes the whole method.
