# %% [markdown]
# # Serving on codes
#
# vLLM serves many requests at once, and the size of its KV cache limits how many. In this tutorial, we calibrate the
# embedded model, serve it with vLLM on pages of **codes**, and see how many tokens fit into a gigabyte.
#
# It needs the environment that `make vllm` sets up: run it with `.venv-vllm/bin/python tutorials/8_serve.py`. It takes
# about two minutes on two cores. The OpenAI server takes the same settings: docs/serving.md.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

from torchgsrq import GSRQConfig, calibrate
from torchgsrq.measure.embedded import document, load_model

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, to look into the engine afterwards
here = Path(__file__).parent
folder, file = here / "smollm2-for-vllm", here / "smollm2.safetensors"

# %% [markdown]
# ## Calibrate once
#
# Codebooks are learned in transformers and saved to a file. The model is saved to a folder that vLLM can read. The
# codebooks stay outside of it, since vLLM loads every safetensors file there as weights.

# %%
model, tokenizer = load_model()
if not folder.exists():
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
if not file.exists():
    ids = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    calibrate(model, GSRQConfig(bits=1), data=[ids[0, -1024:]], tokens=1024).save(file)
del model

# %% [markdown]
# ## Serve
#
# `additional_config` enables codes. The log reports what is quantized, and how many tokens fit.


# %%
def engine(length, **options):
    from vllm import LLM

    gib = {"kv_cache_memory_bytes": 2**30, "max_num_seqs": 8, "enforce_eager": True, "dtype": "float32"}
    return LLM(str(folder), max_model_len=length, **gib, **options)


if __name__ == "__main__":  # vLLM starts processes, which read this file again
    from vllm import SamplingParams

    llm = engine(8192, additional_config={"gsrq": {"codebooks": str(file)}})
    questions = ["What is the capital of France?", "Write one sentence about the sea."]
    chats = [[{"role": "user", "content": text}] for text in questions]
    for text, answer in zip(questions, llm.chat(chats, SamplingParams(temperature=0, max_tokens=40)), strict=True):
        print(f"{text}\n  {answer.outputs[0].text.strip()}")

# %% [markdown]
# ## What fits
#
# A request holds codes of all its tokens, and its sinks and newest tokens in full precision. In longer requests, the
# latter are a smaller part.

# %%
if __name__ == "__main__":
    config = llm.llm_engine.vllm_config
    fits = {"codes, 1 bit": config.cache_config.kv_cache_size_tokens}
    text = config.model_config.hf_text_config
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    fits["full precision"] = 2**30 // (text.num_hidden_layers * heads * dim * 2 * 4)
    for name, tokens in fits.items():
        print(f"{name}: {tokens:,} tokens in requests of 8,192, {tokens // 8192} requests at once")
    llm.llm_engine.engine_core.shutdown()

    fig, axes = plt.subplots(figsize=(6, 1.8))
    axes.barh(list(fits), list(fits.values()), color=["tab:green", "tab:gray"])
    axes.set(xlabel="tokens in 1 GiB, in requests of 8,192", title="SmolLM2-135M in vLLM")
    axes.bar_label(axes.containers[0], [f" {tokens:,}" for tokens in fits.values()])
    axes.margins(x=0.2)
    fig.tight_layout()
    fig.savefig(here / "8_serve.png", dpi=150)
