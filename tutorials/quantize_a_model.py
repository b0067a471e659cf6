# %% [markdown]
# # Quantize the KV cache of a model
#
# What a cache at 1 bit per element costs and saves, on a real model and real text, in a few minutes on two cores. Run
# it with `python tutorials/quantize_a_model.py`; the picture is written beside it.

# %%
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from torchgsrq import GSRQConfig, GSRQTensor, calibrate, dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.embedded import document, load_model
from torchgsrq.evaluate import quality

here = Path(__file__).parent
model, tokenizer = load_model()
text = document()
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]

# %% [markdown]
# ## Calibrate once
#
# Codebooks are learned from a few thousand tokens; more and more varied text is better. Bits go to the layers whose
# errors change most of what the model says; `bits` is their mean. Residual stages are nested, so codebooks of 1 bit
# serve 0.75 and 0.5 too. We learn from the end of the document, from few tokens to be quick, and
# measure at its start.

# %%
books = calibrate(model, GSRQConfig(bits=1), ids[-2048:])
print(books.describe())

# %% [markdown]
# ## What it costs: KL divergence by rate
#
# Every token outside the recent window is quantized, as a long generation would have it.

# %%
rates = (1, 0.75, 0.5)
candidates = {str(b): (GSRQConfig(bits=b), books.at(b)) for b in rates}
found = quality(model, [ids[:512]], candidates)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
axes[0].plot(rates, [found[str(b)].kl for b in rates], marker="o")
axes[0].set(xscale="log", xlabel="bits per element", ylabel="KL to full precision, nats", title="Quality, 512 tokens")
axes[0].set_xticks(rates, [f"{b:g}" for b in rates])
axes[0].minorticks_off()

# %% [markdown]
# ## What it saves: bytes by part
#
# Sinks and the recent window stay in full precision; their share shrinks as the text grows.

# %%
quantize_kv_(model, GSRQConfig(bits=1), codebooks=books)
contexts, codes, window, full = (256, 512, 1024, 2048), [], [], []
for context in contexts:
    cache = new_cache(model)
    for layer in cache.quantized_layers:
        x = torch.zeros(1, 3, context, 64)
        layer.update(x, x)
    report = cache.memory()
    codes.append(report.codes / 2**20)
    window.append((report.sinks + report.window) / 2**20)
    full.append(report.full_precision_bytes / 2**20)
axes[1].bar([str(c) for c in contexts], codes, label="codes")
axes[1].bar([str(c) for c in contexts], window, bottom=codes, label="sinks and window")
axes[1].plot([str(c) for c in contexts], full, "k--", label="full precision (float32)")
axes[1].set(xlabel="tokens held", ylabel="MiB", title="KV cache at 1 bit", yscale="log")
axes[1].legend(fontsize=8)
figure.tight_layout()
figure.savefig(here / "quantize_a_model.png", dpi=110)

# %% [markdown]
# ## Generate, and put the model back

# %%
prompt = ids[None, :400]
said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
print("1 bit:", tokenizer.decode(said[0, 400:]))
dequantize_kv_(model)
said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
print("full precision:", tokenizer.decode(said[0, 400:]))

# %% [markdown]
# ## A model of your own
#
# `GSRQTensor` stands in for a plain KV buffer: written with `index_copy_`, read with SDPA, under `torch.compile` too.

# %%
codec = books[0]
k = GSRQTensor.empty(1, 3, 1024, 64, codec=codec.key)
v = GSRQTensor.empty(1, 3, 1024, 64, codec=codec.value)
k.index_copy_(2, torch.arange(600), torch.randn(1, 3, 600, 64))
v.index_copy_(2, torch.arange(600), torch.randn(1, 3, 600, 64))
out = torch.nn.functional.scaled_dot_product_attention(torch.randn(1, 9, 1, 64), k, v, enable_gqa=True)
print(k, tuple(out.shape))
