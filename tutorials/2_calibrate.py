# %% [markdown]
# # Calibrate for your model and your text
#
# Codebooks are learned from keys and values of one model. The calibration text and the number of bits decide how well
# the cache works later. In this tutorial, you learn codebooks, see how bits are allocated to the heads, and measure
# the cost of a lower rate and of another text.
#
# Run it with `python tutorials/2_calibrate.py`. It takes about two minutes on two cores, most of it to learn
# codebooks. The output and the picture shown here are from a 2-core Intel Xeon (Sapphire Rapids), torch 2.13.0,
# 2026-11-30.

# %%
from pathlib import Path

import matplotlib.pyplot as plt

from torchgsrq import Codebooks, GSRQConfig, calibrate
from torchgsrq.measure.embedded import document, load_model
from torchgsrq.measure.evaluate import quality

here = Path(__file__).parent
model, tokenizer = load_model()
ids = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]

# %% [markdown]
# ## Your text
#
# `calibrate` takes strings (and a tokenizer), tensors of token IDs, or batches. It reads up to 32768 tokens, which
# takes minutes, and adds half as much again: text that repeats itself, and lists to look things up in. If your text
# has fewer than 16384 tokens, the model writes the rest. To be quick, we set `tokens=1024`, so that it reads only 1024
# tokens: far too few for real work. The model must not be quantized yet.
#
# ```python
# books = calibrate(model, GSRQConfig(bits=1), data=texts, tokenizer=tokenizer)
# ```
#
# Several configs can share one reading, which costs little more than a single config. Here we use 1 bit and half a
# bit. `bits` is the mean over all heads and can be any number from 0.25 to 2. Codebooks are saved to a file that has a
# checksum and names the model that they belong to. [Another tutorial](5_measure.py) loads them from there.

# %%
rates = (1, 0.5)
files = [here / "smollm2.safetensors", here / "smollm2-half.safetensors"]
learned = calibrate(model, [GSRQConfig(bits=rate) for rate in rates], data=[ids[-1024:]], tokens=1024)
for some, file in zip(learned, files, strict=True):
    some.save(file)
books = Codebooks.load(files[0])

# %% [markdown]
# ## Which head gets how many bits
#
# KV heads differ: an error in one changes the model's output, an error in another hardly does. Calibration measures
# this with backward passes, and allocates the bits so that their mean is the requested rate. `describe` prints a line
# per layer, with the bits of each head where they differ.

# %%
print("\n".join(books.describe().splitlines()[:8]), "\n...")

# %% [markdown]
# ```text
# Codebooks(30 layers, 1 bits, source='data')
# layer 0: keys 0.5 bits, values 0.5 bits, 0.2% of the cost
# layer 1: keys 1, 1, 0.5 bits, values 0.5 bits, 0.8% of the cost
# layer 2: keys 1, 2, 1.5 bits, values 0.5 bits, 2.6% of the cost
# layer 3: keys 1, 2, 2 bits, values 0.5 bits, 3.9% of the cost
# layer 4: keys 1, 1.5, 2 bits, values 0.5 bits, 1.7% of the cost
# layer 5: keys 2, 1.5, 4 bits, values 0.5 bits, 14.2% of the cost
# layer 6: keys 1.5, 2, 1.5 bits, values 0.5 bits, 2.5% of the cost
# ...
# ```
#
# With `GSRQConfig(allocation="uniform")`, all heads get the same bits. This is faster to learn. Models without
# gradients, for example with quantized weights, always get the same bits.
#
# Calibration also fixes how many elements share a code: `group_size=8` by default. Larger groups lose less, but
# encoding and attention take longer. [Which setting?](../docs/choosing.md) helps to choose.
#
# ## What a lower rate costs
#
# `quality` reads a text through the quantized cache and compares it with full precision. We read 384 held-out tokens,
# and keep only 32 recent tokens in full precision, so that most of even this short text is read from codes.

# %%
candidates = {
    f"{rate:g} bit": (GSRQConfig(bits=rate, recent_tokens=32), some) for rate, some in zip(rates, learned, strict=True)
}

# %% [markdown]
# ## The model's own text or your text
#
# Without `data`, the model writes the calibration text itself. `quantize_kv_` does the same when it finds no
# codebooks. This needs no data, and costs quality. Two sets of codebooks show the difference. To be quick, each is
# learned from 512 tokens, with the same bits in all heads.

# %%
quick = GSRQConfig(bits=1, allocation="uniform", recent_tokens=32)
candidates["own text"] = quick, calibrate(model, quick, tokens=512)
candidates["your text"] = quick, calibrate(model, quick, data=[ids[-512:]], tokens=512)

found = quality(model, [ids[:384]], candidates)
for name, q in found.items():
    print(
        f"{name:10} KL {q.kl:.3f} ({q.kl_low:.3f} to {q.kl_high:.3f}) nats, perplexity {q.ppl:.2f} of {q.ppl_full:.2f}"
    )

# %% [markdown]
# ```text
# 1 bit      KL 0.024 (0.013 to 0.033) nats, perplexity 18.07 of 18.27
# 0.5 bit    KL 0.052 (0.029 to 0.072) nats, perplexity 18.20 of 18.27
# own text   KL 0.090 (0.038 to 0.141) nats, perplexity 19.94 of 18.27
# your text  KL 0.050 (0.024 to 0.078) nats, perplexity 19.18 of 18.27
# ```
#
# A KL divergence of 0 means the same output as in full precision. 384 tokens are few, so these figures are noisy: the
# intervals overlap, and perplexity is even better than in full precision at 1 and 0.5 bit, by chance. They agree with
# [measurements on more tokens](../docs/results/quality.md): your kind of text is better than the model's own, and
# bits by head are better than the same bits for all.

# %%
blue, orange, green = "#0072B2", "#E69F00", "#009E73"
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained", width_ratios=(6, 5))
layers = list(books)
for kind, shift, color, label in ((0, -0.2, blue, "keys"), (1, 0.2, orange, "values")):
    left.bar([i + shift for i in layers], [books[i][kind].bits for i in layers], 0.4, color=color, label=label)
    for i in layers:  # a dot for each head
        left.plot([i + shift] * books[i][kind].heads, books[i][kind].head_bits, ".", color="black", ms=3)
left.axhline(books.bits, color="black", ls="--", lw=1, label="mean")
left.set(xlabel="layer", ylabel="bits per element", title="Who gets the bits", ylim=(0, 4.8))
left.legend(ncols=3, loc="upper left")
kl = [found[name] for name in candidates]
for i, (q, color) in enumerate(zip(kl, (blue,) * 2 + (orange, green), strict=True)):
    right.bar(i, q.kl, color=color)
    right.errorbar(i, q.kl, [[q.kl - q.kl_low], [q.kl_high - q.kl]], color="black", capsize=3)
right.set_xticks(range(len(kl)), ["1 bit", "0.5", "own text\n1 bit", "your text\n1 bit"])
right.axvspan(1.5, 3.5, color="#EEEEEE", zorder=0)
right.text(
    2.5, 0.005 + max(q.kl_high for q in kl), "quick codebooks,\nthe same bits everywhere", ha="center", fontsize=8
)
right.set(xlim=(-0.5, 3.5), ylim=(0, 1.25 * max(q.kl_high for q in kl)))
right.set(ylabel="KL divergence, nats", title="What it costs (384 tokens)")
figure.savefig(here / "2_calibrate.png", dpi=110)

# %% [markdown]
# ![bits of keys and values by layer and head, and KL divergence by rate and by calibration text](2_calibrate.png)
#
# ## Next
#
# Pass the codebooks, or the path of their file, to `quantize_kv_`:
#
# ```python
# quantize_kv_(model, codebooks="smollm2.safetensors")
# ```
