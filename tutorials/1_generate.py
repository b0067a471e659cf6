# %% [markdown]
# # Generate on a 1-bit cache
#
# A language model keeps the keys and values of all tokens that it has read: its KV cache. The cache grows with the
# text, and for long texts it can take more memory than the model itself. In this tutorial, a real model generates
# text with a cache of 1 bit per element, and you see where every byte is.
#
# Run it with `python tutorials/1_generate.py`. It takes about a minute on two cores, most of it for codebooks, and
# less the next time. The picture is saved next to the script. The output and the picture shown here are from a
# 2-core Intel Xeon (Sapphire Rapids), torch 2.13.0, 2026-11-30.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch

from torchgsrq import GSRQConfig, calibrate, dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.measure.embedded import document, load_model

here = Path(__file__).parent
MiB = 2**20

# %% [markdown]
# ## A model and a text
#
# `load_model` returns SmolLM2-135M, which comes as a Python package, and `document` returns the Python language
# reference. Nothing is downloaded. For your own model, use `AutoModelForCausalLM.from_pretrained` as usual.

# %%
model, tokenizer = load_model()
ids = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]

# %% [markdown]
# ## Codebooks, once
#
# A code is one byte. It selects an entry of a **codebook**, which is learned from text that the model reads. To be
# quick, we learn from the last 1024 tokens of the document. We save the file next to this script, where the other
# tutorials find it. The [next tutorial](2_calibrate.py) shows how to do it well: with more text.

# %%
file = here / "smollm2.safetensors"
if not file.exists():
    calibrate(model, GSRQConfig(bits=1), data=[ids[-1024:]], tokens=1024).save(file)

# %% [markdown]
# ## Quantize, then generate as before
#
# `quantize_kv_` changes the model in place, but not its weights. From now on, its caches hold codes.

# %%
prompt = ids[None, :400]


def go_on(prompt: torch.Tensor, **options: object) -> str:
    """The next 24 tokens, greedily."""
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False, **options)
    return tokenizer.decode(out[0, prompt.shape[1] :], clean_up_tokenization_spaces=False)


quantize_kv_(model, GSRQConfig(bits=1), codebooks=file)
print("1 bit:", go_on(prompt))

# %% [markdown]
# ```text
# 1 bit: slicing*, and *slicing*.)
#
# The syntax for assignment statements is:
#
#    assignment_stmt ::
# ```

# %% [markdown]
# ## Where every byte is
#
# `new_cache` creates a cache that you can inspect. The first 4 tokens (**sinks**) and at least the newest 128 (the
# **window**) stay in full precision; all others are stored as codes. We read 2048 tokens in pieces, and call
# `cache.memory()` after each.

# %%
cache = new_cache(model)
lengths, reports = range(256, 2049, 256), []
with torch.no_grad():
    for last in lengths:
        model(ids[None, last - 256 : last], cache=cache, logits_to_keep=1)
        reports.append(cache.memory())

report = reports[-1]
for part in ("codes", "sinks", "window", "counters", "total", "full_precision_bytes", "codebooks"):
    print(f"{part:22}{getattr(report, part) / MiB:8.2f} MiB")
print(f"bits per element: {report.bits_per_element_codes:.2f} of codes, {report.bits_per_element:.2f} in all")

# %% [markdown]
# ```text
# codes                     2.81 MiB
# sinks                     0.18 MiB
# window                    7.03 MiB
# counters                  0.00 MiB
# total                    10.02 MiB
# full_precision_bytes     90.00 MiB
# codebooks                12.92 MiB
# bits per element: 0.94 of codes, 3.56 in all
# ```
#
# `total` is what this cache owns. Codebooks are shared by all caches of a model.
#
# The codes grow with the text; sinks and window do not. A short text therefore saves little, and a long one a lot.
# (The model is in float32 here. In bfloat16, the window and the dashed line are half as large; the codes are the
# same.)

# %%
blue, orange, green = "#0072B2", "#E69F00", "#009E73"
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(lengths, [r.full_precision_bytes / MiB for r in reports], "k--", label="full precision (float32)")
left.plot(lengths, [r.total / MiB for r in reports], color=blue, marker="o", label="1 bit, codebooks apart")
left.set(xlabel="tokens held", ylabel="KV cache, MiB", title="What it saves", ylim=(0, None))
left.legend()
bottom = [0.0] * len(reports)
for part, color in (("window", orange), ("sinks", green), ("codes", blue)):
    sizes = [getattr(r, part) / MiB for r in reports]
    right.bar([str(n) for n in lengths], sizes, bottom=bottom, color=color, label=part)
    bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
right.set(xlabel="tokens held", ylabel="KV cache at 1 bit, MiB", title="Where the bytes are", ylim=(0, 14))
right.tick_params(axis="x", labelrotation=30)
right.legend(ncols=3, loc="upper left")
figure.savefig(here / "1_generate.png", dpi=110)

# %% [markdown]
# ![bytes of a cache at 1 bit and in full precision, and its parts, by the tokens that it holds](1_generate.png)
#
# ## Save a prompt
#
# `save` writes the whole cache, and `load` fills an empty one, also in another process. The prompt is not read
# again, and the answer is the same.

# %%
longer = ids[None, :2049]
with TemporaryDirectory() as folder:
    path = Path(folder) / "prompt.safetensors"
    cache.save(path)
    print(f"saved {path.stat().st_size / MiB:.1f} MiB")
    loaded = new_cache(model)
    loaded.load(path)
now, later = go_on(longer, cache=cache), go_on(longer, cache=loaded)
print("the same answer:", now == later)

# %% [markdown]
# ```text
# saved 9.9 MiB
# the same answer: True
# ```
#
# ## Restore the model
#
# `dequantize_kv_` undoes `quantize_kv_`: the model is as before.

# %%
dequantize_kv_(model)
print("full precision:", go_on(prompt))

# %% [markdown]
# ```text
# full precision: slicing*, and the rest of the list.)
#
# The syntax for assignment statements is:
#
#    assignment_stmt
# ```
#
# On this short text, the two differ by a few words: of 400 tokens, 132 to 163 are in full precision anyway.
# [Measure it yourself](5_measure.py) shows how to measure the loss on longer texts.
