# %% [markdown]
# # A library of documents
#
# Many prompts contain the same documents: manuals, contracts, source files. Each time, reading a document costs a
# forward over all of its tokens. In this tutorial, each document is read **once**, alone, and its codes are kept. Later
# they are **spliced** behind the beginning of any prompt, without reading or decoding the document again.
#
# Run it with `python tutorials/7_library.py`. It takes about half a minute on two cores, and longer without codebooks
# from another tutorial. The output and the picture shown here are from a 2-core Intel Xeon (Sapphire Rapids), torch
# 2.13.0, 2026-11-30.

# %%
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from torchgsrq import GSRQCache, GSRQConfig, calibrate, new_cache, quantize_kv_
from torchgsrq.measure.embedded import document, load_model

here = Path(__file__).parent
torch.set_grad_enabled(False)
model, tokenizer = load_model()
ids = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
file = here / "smollm2.safetensors"
if not file.exists():
    with torch.enable_grad():
        calibrate(model, GSRQConfig(bits=1), data=[ids[0, -1024:]], tokens=1024).save(file)

# %% [markdown]
# ## The full-precision baseline
#
# A prompt consists of a head, a document of 700 tokens, and 96 tokens that follow it. As a baseline, we keep the
# model's predictions for the last 96 tokens when it reads everything at once in full precision.

# %%
head, documents = ids[:, 20000:20060], [ids[:, 5000 * i : 5000 * i + 700] for i in range(3)]
following = [ids[:, 5000 * i + 700 : 5000 * i + 796] for i in range(3)]


def log_probs(tokens: Tensor, cache: GSRQCache | None = None) -> Tensor:
    """Log-probabilities of the next token after each of the last 96."""
    return model(tokens, cache=cache, use_cache=cache is not None).logits[0, -96:].log_softmax(-1)


full = [log_probs(torch.cat((head, *pair), 1)) for pair in zip(documents, following, strict=True)]
without = [log_probs(torch.cat((head, tail), 1)) for tail in following]

# %% [markdown]
# ## Read each document once
#
# Each document gets its own cache, which could be written to disk with `save`. Models treat the first tokens of any
# text specially: other tokens attend to these **sinks** when nothing else is relevant. We therefore read every document
# behind the first 4 tokens of the head, and leave these out later: then the document has no sinks of its own.

# %%
quantize_kv_(model, GSRQConfig(bits=1), codebooks=file)


def read(*texts: Tensor) -> GSRQCache:
    cache = new_cache(model)
    for text in texts:
        model(text, cache=cache, logits_to_keep=1)
    return cache


library = [read(torch.cat((head[:, :4], text), 1)) for text in documents]
print(f"{len(library)} documents, {sum(len(piece.dumps()) for piece in library) / 2**20:.1f} MiB")

# %% [markdown]
# ```text
# 3 documents, 24.1 MiB
# ```
#
# ## Put one behind a prompt
#
# Keys are stored relative to the frame of 1024 positions in which they were read, so codes can be moved by whole
# frames: only their positions change. The newest 128 tokens of the document are in full precision, and are rotated to
# the positions that follow the head. The full-precision tokens of the head become codes.

# %%
took, kl = {"read": [], "spliced": []}, {"read": [], "spliced": [], "no document": []}
for text, piece, tail, want, nothing in zip(documents, library, following, full, without, strict=True):
    begin = time.perf_counter()
    whole = read(head, text)
    took["read"].append(time.perf_counter() - begin)
    begin = time.perf_counter()
    spliced = read(head)
    spliced.splice(piece, skip=4)
    took["spliced"].append(time.perf_counter() - begin)
    for name, got in {
        "read": log_probs(tail, whole),
        "spliced": log_probs(tail, spliced),
        "no document": nothing,
    }.items():
        kl[name].append((want.exp() * (want - got)).sum(-1))

for name in took:
    print(f"{name}: {sorted(took[name])[1]:.2f} s")
for name in kl:
    print(f"{name}: KL divergence {torch.stack(kl[name]).mean():.3f} nats")

# %% [markdown]
# ```text
# read: 19.80 s
# spliced: 2.45 s
# read: KL divergence 0.014 nats
# spliced: KL divergence 0.018 nats
# no document: KL divergence 0.882 nats
# ```
#
# The machine was busy with other work: only the ratio of the two times counts.
#
# The document did not attend to the head when it was read, and the positions of its codes overlap with the head's.
# Still, the model continues nearly as if it had read everything, in an eighth of the time (most of it for the head). 96
# tokens of three documents are few: measure with your own texts before you rely on it.

# %%
blue, orange, green = "#0072B2", "#E69F00", "#009E73"
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(2, 5))
left.bar(list(took), [sorted(times)[1] for times in took.values()], color=[blue, orange])
left.set(ylabel="seconds", title="60 + 700 tokens")
places = torch.arange(4, 96, 8)
for name, color, marker in (("no document", green, "^"), ("spliced", orange, "s"), ("read", blue, "o")):
    mean = torch.stack(kl[name]).mean(0).view(-1, 8).mean(1)
    right.plot(places, mean, color=color, marker=marker, label=name)
right.set(xlabel="token after the document", ylabel="KL divergence, nats", yscale="log", title="1 bit, three documents")
right.legend()
figure.savefig(here / "7_library.png", dpi=110)

# %% [markdown]
# ![seconds to read and to splice a document, and KL divergence of the tokens after it](7_library.png)
#
# `generate` continues from a spliced cache as from any other: pass all tokens, those of head, document and question.
