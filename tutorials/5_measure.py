# %% [markdown]
# # Measure it yourself
#
# Does a model with a quantized cache still give the same output? This tutorial shows the measures that answer this,
# each in a few lines: KL divergence, perplexity, answers found in a text, and bits with everything counted. Measure
# with your own model and text: results of other models seldom carry over.
#
# Run it with `python tutorials/5_measure.py`. It takes about a minute on two cores, less with codebooks from
# another tutorial. The output and the picture shown here are from a 2-core Intel Xeon (Sapphire Rapids), torch
# 2.13.0, 2026-11-30.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from torchgsrq import Codebooks, GSRQConfig, calibrate
from torchgsrq.measure.embedded import document, load_model
from torchgsrq.measure.evaluate import quality, quantized, true_bits
from torchgsrq.measure.retrieval import retrieval, trials

here = Path(__file__).parent
torch.set_grad_enabled(False)
model, tokenizer = load_model()
ids = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
rates = (1, 0.5)
files = [here / "smollm2.safetensors", here / "smollm2-half.safetensors"]
if not all(file.exists() for file in files):
    learned = calibrate(model, [GSRQConfig(bits=rate) for rate in rates], data=[ids[-1024:]], tokens=1024)
    for some, file in zip(learned, files, strict=True):
        some.save(file)
books, half = (Codebooks.load(file) for file in files)

# %% [markdown]
# ## A pitfall: what a prompt attends to
#
# By default, a prompt attends to its own keys and values in full precision (`prefill="exact"`), as in serving
# systems; only tokens generated later read codes. Likelihoods are measured by one forward over a whole text, and such a
# forward would measure the model without any quantization. With `prefill="quantized"`, each token sees what it would
# have seen if the text had been generated token by token.

# %%
window = ids[None, :512]


def log_probs() -> Tensor:
    """Log-probabilities of the next token, after each of the window."""
    return model(window).logits[0].log_softmax(-1)


full = log_probs()
for prefill in ("exact", "quantized"):
    with quantized(model, GSRQConfig(bits=1, prefill=prefill), books):  # quantize_kv_, and undone at the end
        got = log_probs()
    kl = (full.exp() * (full - got)).sum(-1)
    print(f'prefill="{prefill}": KL divergence {kl.mean():.4f} nats')

# %% [markdown]
# ```text
# prefill="exact": KL divergence 0.0000 nats
# prefill="quantized": KL divergence 0.0104 nats
# ```
#
# The KL divergence measures how far the distribution of the next token is from that of full precision: 0 means equal.
# It needs no right answers, and a few hundred tokens are informative. By position, it shows the effect of the window:
# as long as the text fits into the full-precision window, there is no error; later, more and more is read from codes.

# %%
short = GSRQConfig(bits=1, prefill="quantized", recent_tokens=32)
with quantized(model, short, books):
    kl_short = (full.exp() * (full - log_probs())).sum(-1)


def smooth(x: Tensor) -> Tensor:
    """The mean of 16 tokens each."""
    return x.view(-1, 16).mean(1)


blue, orange, green = "#0072B2", "#E69F00", "#009E73"
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
places = torch.arange(8, 512, 16)
left.plot(places, smooth(kl), color=blue, marker="o", ms=3, label="128 recent tokens exact")
left.plot(places, smooth(kl_short), color=orange, marker="s", ms=3, label="32 recent tokens exact")
left.set(xlabel="token of the text", ylabel="KL divergence, nats", title="1 bit, mean of 16 tokens each")
left.legend()

# %% [markdown]
# ## Perplexity, agreement, and an interval
#
# `quality` measures several settings at once, and sets `prefill="quantized"` itself. The interval is a bootstrap over
# stretches of 64 tokens. With 512 tokens it is wide: use many windows for real work.

# %%
candidates = {
    f"{rate:g} bit": (GSRQConfig(bits=rate, recent_tokens=32), some)
    for rate, some in zip(rates, (books, half), strict=True)
}
for name, q in quality(model, [window[0]], candidates).items():
    print(
        f"{name}: perplexity {q.ppl:.2f} of {q.ppl_full:.2f}, KL {q.kl:.3f} ({q.kl_low:.3f} to {q.kl_high:.3f}) nats, "
        f"same next token {q.agreement:.0%}"
    )

# %% [markdown]
# ```text
# 1 bit: perplexity 17.52 of 17.47, KL 0.027 (0.018 to 0.036) nats, same next token 92%
# 0.5 bit: perplexity 18.08 of 17.47, KL 0.065 (0.040 to 0.093) nats, same next token 89%
# ```
#
# ## Answers found in a text
#
# A cache can have a small KL divergence and still lose the one token that a question asks for. `trials` hides facts
# in a text and asks for them; `retrieval` lets the model answer. An answer counts as found if greedy decoding would
# write all of it. `nll`, the negative log-likelihood of the right answer, is more reliable when there are few answers,
# as here.

# %%
asked = trials(tokenizer, document(), tokens=512, tasks=("keys",), count=2)
settings = {
    "full precision": None,
    "1 bit": (GSRQConfig(bits=1), books),
    "0.5 bit": (GSRQConfig(bits=0.5), half),
}
for name, candidate in settings.items():
    score = retrieval(model, asked, candidate)["keys"]
    print(f"{name:15} found {score.found:.0%} of {score.answers}, {score.nll:.2f} nats per token of the answer")

# %% [markdown]
# ```text
# full precision  found 81% of 16, 0.30 nats per token of the answer
# 1 bit           found 69% of 16, 0.63 nats per token of the answer
# 0.5 bit         found 25% of 16, 1.15 nats per token of the answer
# ```
#
# A small KL divergence can come with a loss of answers. Our codebooks were learned from 1024 tokens of plain text.
# From 16k tokens, with the lists that calibration then adds, [more is found](../docs/results/quality.md). Sixteen
# answers are few: one more or less is 6%.
#
# ## True bits
#
# "1 bit" is the rate of the codes. `true_bits` counts everything: sinks and window (in 16 bits), and codebooks as
# if this were their only cache. In practice, all caches of a model share them.

# %%
contexts = [2**n for n in range(9, 18)]
for rate, some, color, marker in ((1, books, blue, "o"), (0.5, half, green, "s")):
    bits = [true_bits(GSRQConfig(bits=rate), some, n) for n in contexts]
    print(
        f"{rate:g} bit: "
        + ", ".join(f"{b:.2f} at {n // 1024}k" for b, n in zip(bits, contexts, strict=True) if n > 8000)
    )
    right.plot(contexts, bits, color=color, marker=marker, label=f"{rate:g} bit, all counted")
right.axhline(16, color="black", ls="--", lw=1, label="bfloat16")
right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="bits per element", title="True bits of one cache")
right.set_xticks(contexts[::2], ["512", "2k", "8k", "32k", "128k"])
right.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
right.minorticks_off()
right.legend()
figure.savefig(here / "5_measure.png", dpi=110)

# %% [markdown]
# ```text
# 1 bit: 2.46 at 8k, 1.73 at 16k, 1.37 at 32k, 1.18 at 64k, 1.09 at 128k
# 0.5 bit: 1.89 at 8k, 1.19 at 16k, 0.85 at 32k, 0.67 at 64k, 0.59 at 128k
# ```
#
# ![KL divergence by token, and true bits by length](5_measure.png)
#
# ## With lm-evaluation-harness
#
# Its tasks score likelihoods in one forward over prompt and answer, so use `prefill="quantized"` here too. This code is
# not run by the tutorial; it needs `pip install lm-eval`.
#
# ```python
# import lm_eval
# from lm_eval.models.huggingface import HFLM
#
# quantize_kv_(model, GSRQConfig(bits=1, prefill="quantized"), codebooks=books)
# lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=["hellaswag"])
# ```
