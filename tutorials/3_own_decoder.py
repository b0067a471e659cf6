# %% [markdown]
# # Your own decoder
#
# `quantize_kv_` is for transformers models. A decoder of your own keeps its keys and values in its own buffers. There,
# a `GSRQTensor` replaces a plain tensor, and the decoder's code stays the same, also under `torch.compile`.
#
# Run it with `python tutorials/3_own_decoder.py`. It takes about half a minute on two cores. The output and the
# picture shown here are from a 2-core Intel Xeon (Sapphire Rapids), torch 2.13.0, 2026-11-30.

# %%
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgsrq import Codebooks, GSRQConfig, GSRQTensor, calibrate_qkv
from torchgsrq.measure.embedded import document

here = Path(__file__).parent
torch.manual_seed(0)
torch.set_grad_enabled(False)

# %% [markdown]
# ## A small decoder
#
# It has two layers, RoPE, and 4 query heads that share 2 KV heads (GQA). It reads bytes, and its weights are random.
# This is enough to show how the parts fit together, but says nothing about the quality of a real model.

# %%
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2, 4, 2, 64, 256
INV_FREQ = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def rope(x: Tensor, positions: Tensor) -> Tensor:
    angle = positions[:, None] * INV_FREQ
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(Q_HEADS * HEAD_DIM, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))
        nn.init.normal_(self.qkv.weight, std=1.5 * WIDTH**-0.5)  # so that attention looks at some tokens more

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split((Q_HEADS, KV_HEADS, KV_HEADS), 1)
        return rope(q, positions), rope(k, positions), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = self.project(x, positions)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        seen = torch.arange(keys.shape[2]) <= positions[:, None]
        return self.finish(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        x = self.embed(tokens)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = layer(x, positions, keys, values)
        return self.head(x)


model = Decoder().eval()
text = torch.tensor(list(document().encode("ascii", "ignore")))[None]

# %% [markdown]
# The decoder does not create the buffers: `forward` gets pairs of them, writes with `index_copy_` and reads with
# `scaled_dot_product_attention`. A `GSRQTensor` implements these two calls.
#
# ## Codebooks
#
# `calibrate` takes transformers models. For a decoder of your own, `calibrate_qkv` takes the queries, keys and values
# of each layer, one layer after the other. It uses the same recipe, with the same bits for all heads.


# %%
def attention_inputs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    positions = torch.arange(4096)
    x = model.embed(text[:, -4096:])
    for layer in model.layers:
        q, k, v = layer.project(x, positions)
        yield q, k, v
        x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


books = calibrate_qkv(attention_inputs(), GSRQConfig(bits=1), inv_freq=INV_FREQ)
print(books.describe())

# %% [markdown]
# ```text
# Codebooks(2 layers, 1 bits, source='data')
# layer 0: keys 1 bits, values 1 bits
# layer 1: keys 1 bits, values 1 bits
# ```
#
# ## Buffers of codes
#
# They have the same shape as plain buffers, and far fewer bytes.

# %%
CAPACITY = 4096


def plain_cache() -> list[tuple[Tensor, Tensor]]:
    shape = 1, KV_HEADS, CAPACITY, HEAD_DIM
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]


def coded_cache(books: Codebooks) -> list[tuple[Tensor, Tensor]]:
    shape = 1, KV_HEADS, CAPACITY, HEAD_DIM
    return [tuple(GSRQTensor.empty(*shape, codec=codec) for codec in books[i]) for i in range(LAYERS)]


plain, coded = plain_cache(), coded_cache(books)
print(coded[0][0])
print(f"plain: {sum(x.nbytes for pair in plain for x in pair) / 1024:.0f} KiB")
print(f"coded: {sum(x.nbytes for pair in coded for x in pair) / 1024:.0f} KiB")

# %% [markdown]
# ```text
# GSRQTensor(shape=(1, 2, 4096, 64), bits=1, dtype=torch.float32, device=cpu)
# plain: 8192 KiB
# coded: 584 KiB
# ```
#
# ## Read a prompt, then decode with torch.compile
#
# The prompt is read in full precision, as in serving systems. Its keys and values are then written to the buffers of
# codes in one call. (You can also read a prompt directly through a buffer of codes. Its queries then read codes even
# where a token-by-token decode would still have read the full-precision window.)
#
# For both kinds of buffers, each step is compiled into one graph with `fullgraph=True`. For comparison, we decode with
# a clone of the buffers without the compiler.

# %%
PROMPT, STEPS = 3000, 32
model(text[:, :PROMPT], torch.arange(PROMPT), plain)
for old, new in zip(plain, coded, strict=True):
    for source, target in zip(old, new, strict=True):
        target.index_copy_(2, torch.arange(PROMPT), source[:, :, :PROMPT])


def decode(step: nn.Module, cache: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Logits of the next bytes of the text, and milliseconds of a step (the median)."""
    logits, times = [], []
    for position in range(PROMPT, PROMPT + STEPS):
        begin = time.perf_counter()
        logits.append(step(text[:, position : position + 1], torch.tensor([position]), cache)[0, -1])
        times.append(1000 * (time.perf_counter() - begin))
    return torch.stack(logits), sorted(times)[STEPS // 2]


spare = [(keys.clone(), values.clone()) for keys, values in coded]
step = torch.compile(model, fullgraph=True)
exact, plain_ms = decode(step, plain)
got, coded_ms = decode(step, coded)
eager, _ = decode(model, spare)
kl = F.kl_div(got.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
print(f"compiled and eager differ by at most {(got - eager).abs().max():.1e} in a logit")
print(f"KL divergence of 1 bit to full precision: {kl:.4f} nats")
print(f"one step at {PROMPT} tokens: {plain_ms:.2f} ms in full precision, {coded_ms:.2f} ms on codes")

# %% [markdown]
# ```text
# compiled and eager differ by at most 7.0e-07 in a logit
# KL divergence of 1 bit to full precision: 0.0057 nats
# one step at 3000 tokens: 7.84 ms in full precision, 7.35 ms on codes
# ```
#
# These times are for a tiny model, in which attention is a small part. [Speed](../docs/results/speed.md) has real ones.
#
# ## The error of attention, by rate
#
# How far is the output of attention from full precision? We read 3000 bytes that were not used for calibration, and
# compare the output of the last 1024 queries in both layers.

# %%
rates = (2, 1.5, 1, 0.75, 0.5)


def attention_error(books: Codebooks) -> list[float]:
    """Relative squared error of each layer's attention output."""
    x, positions, errors = model.embed(text[:, :PROMPT]), torch.arange(PROMPT), []
    for i, layer in enumerate(model.layers):
        q, k, v = layer.project(x, positions)
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        keys, values = (GSRQTensor.empty(*k.shape, codec=codec) for codec in books[i])
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        seen = positions <= positions[-1024:, None]
        got = F.scaled_dot_product_attention(q[:, :, -1024:], keys, values, attn_mask=seen, enable_gqa=True)
        errors.append(float((got - exact[:, :, -1024:]).square().sum() / exact[:, :, -1024:].square().sum()))
        x = layer.finish(x, exact)
    return errors


by_rate = [calibrate_qkv(attention_inputs(), GSRQConfig(bits=rate), inv_freq=INV_FREQ) for rate in rates]
learned = torch.tensor([attention_error(some) for some in by_rate])

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for i, color, marker in ((0, "#0072B2", "o"), (1, "#E69F00", "s")):
    axes.plot(rates, learned[:, i], color=color, marker=marker, label=f"layer {i}")
axes.set(xscale="log", yscale="log", xlabel="bits per element", ylabel="relative squared error")
axes.set(title="Output of attention on codes, 3000 tokens")
axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
axes.minorticks_off()
axes.legend()
figure.savefig(here / "3_own_decoder.png", dpi=110)
for rate, errors in zip(rates, learned.tolist(), strict=True):
    print(f"{rate:g} bits: " + ", ".join(f"{error:.4f}" for error in errors))

# %% [markdown]
# ![error of the output of attention by bits per element](3_own_decoder.png)
#
# ```text
# 2 bits: 0.0483, 0.0469
# 1.5 bits: 0.0978, 0.0991
# 1 bits: 0.1462, 0.1476
# 0.75 bits: 0.2109, 0.2056
# 0.5 bits: 0.2469, 0.2584
# ```
#
# Keys and values of random weights have little structure to learn, so these errors say little about real models. From
# 1 to 2 bits, the error falls to a third.
