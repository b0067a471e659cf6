# %% [markdown]
# # Two processes, one model
#
# Reading a prompt (**prefill**) and writing an answer (**decode**) are different workloads, and large services run them
# on different machines. The KV cache is sent from one to the other. Codes are small, so this is fast.
#
# Run it with `python tutorials/6_two_processes.py`. It takes about half a minute on two cores, and longer without
# codebooks from another tutorial. The output and the picture shown here are from a 2-core AMD EPYC (Zen 4,
# AVX-512), torch 2.13.0, 2026-11-27.

# %%
from multiprocessing.connection import Connection
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from torchgsrq import GSRQConfig, calibrate, new_cache, quantize_kv_
from torchgsrq.measure.embedded import document, load_model

here = Path(__file__).parent
file = here / "smollm2.safetensors"
MiB = 2**20
lengths = (256, 512, 1024, 1536)

# %% [markdown]
# ## The writer
#
# This function runs in its own process, with its own copy of the model and the **same codebooks**. Codes are valid only
# with the codebooks that made them, and a cache made with others is refused. The writer gets the tokens and the bytes
# of the cache, and writes the answer without reading the prompt again.


# %%
def go_on(model: torch.nn.Module, ids: torch.Tensor, cache: object) -> list[int]:
    """The next 16 tokens by greedy decoding; tokens that the cache holds are not read again."""
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=16, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def writer(line: Connection) -> None:
    model, _ = load_model()
    quantize_kv_(model, GSRQConfig(bits=1), codebooks=file)
    ids = torch.tensor(line.recv())
    cache = new_cache(model)
    cache.loads(line.recv_bytes())
    line.send(go_on(model, ids, cache))


# %% [markdown]
# ## The reader
#
# The reader reads the prompt in pieces, and after each piece measures the size of `cache.dumps()`. At the end it sends
# the cache. Here it uses a pipe; any other connection works, since `dumps` returns plain `bytes`.


# %%
def reader(line: Connection, model: torch.nn.Module, tokenizer: object) -> tuple[list[int], list[int]]:
    """Bytes of the cache at each of the lengths, as codes and in full precision."""
    ids = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    quantize_kv_(model, GSRQConfig(bits=1), codebooks=file)
    cache, coded, full, past = new_cache(model), [], [], 0
    for length in lengths:
        with torch.no_grad():
            model(ids[:, past:length], cache=cache, logits_to_keep=1)
        coded.append(len(cache.dumps()))
        full.append(cache.memory().full_precision_bytes)
        past = length

    prompt = ids[:, : lengths[-1] + 1]  # the last token is the first that the writer reads
    line.send(prompt.tolist())
    line.send_bytes(cache.dumps())
    here_said, there_said = go_on(model, prompt, cache), line.recv()
    print("written there:", repr(tokenizer.decode(there_said, clean_up_tokenization_spaces=False)))
    print("written here, the same:", here_said == there_said)
    return coded, full


# %% [markdown]
# ## Both at once
#
# The writer is started first, so that it loads its model while the reader reads. `spawn` starts a fresh interpreter
# that imports this script, so everything except definitions is under `if __name__ == "__main__"`. If there are no
# codebooks yet, they are learned first.

# %%
if __name__ == "__main__":
    model, tokenizer = load_model()
    if not file.exists():
        text = tokenizer(document(), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
        calibrate(model, GSRQConfig(bits=1), data=[text[0, -1024:]], tokens=1024).save(file)
    spawn = torch.multiprocessing.get_context("spawn")
    mine, other = spawn.Pipe()
    process = spawn.Process(target=writer, args=(other,))
    process.start()
    other.close()  # so that the reader notices if the writer dies
    coded, full = reader(mine, model, tokenizer)
    process.join()
    for length, few, many in zip(lengths, coded, full, strict=True):
        sizes = f"{few / MiB:5.2f} MiB at 1 bit, {many / MiB:5.2f} MiB in float32"
        print(f"{length:5} tokens: {sizes}: {many / few:.1f} times")

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(lengths, [x / MiB for x in full], "k--", marker="o", label="full precision, float32")
    axes.plot(
        lengths, [x / 2 / MiB for x in full], color="#E69F00", ls=":", marker="^", label="full precision, bfloat16"
    )
    axes.plot(lengths, [x / MiB for x in coded], color="#0072B2", marker="s", label="1 bit, window in float32")
    axes.set(xlabel="tokens of the prompt", ylabel="sent, MiB", title="From the reader to the writer", ylim=(0, None))
    axes.legend()
    figure.savefig(here / "6_two_processes.png", dpi=110)

# %% [markdown]
# ```text
# written there: ' The target is evaluated as a list.  The\n  target is evaluated as a'
# written here, the same: True
#   256 tokens:  7.41 MiB at 1 bit, 11.25 MiB in float32: 1.5 times
#   512 tokens:  7.76 MiB at 1 bit, 22.50 MiB in float32: 2.9 times
#  1024 tokens:  8.46 MiB at 1 bit, 45.00 MiB in float32: 5.3 times
#  1536 tokens:  9.17 MiB at 1 bit, 67.50 MiB in float32: 7.4 times
# ```
#
# ![bytes sent for a prompt at 1 bit, in float32 and in bfloat16, by its length](6_two_processes.png)
#
# The size is what `cache.memory()` counts. Most of it is the window: 7.2 MiB with the sinks in float32, for any length.
# In bfloat16 it would be half of that, and `GSRQConfig(recent_tokens=32)` makes it still smaller.
#
# ## Over torch.distributed
#
# Between two machines, send the size, then the bytes. Rank 0 reads, rank 1 writes:
#
# ```python
# size = torch.zeros(1, dtype=torch.long)
# if dist.get_rank() == 0:
#     data = torch.frombuffer(bytearray(cache.dumps()), dtype=torch.uint8)
#     dist.send(size + len(data), 1)
#     dist.send(data, 1)
# else:
#     dist.recv(size, 0)
#     data = torch.empty(int(size), dtype=torch.uint8)
#     dist.recv(data, 0)
#     cache.loads(data.numpy().tobytes())
# ```
#
# Over a shared disk, `cache.save(path)` and `new_cache(model).load(path)` do the same.
#
# ## One model on several devices
#
# In tensor parallelism, each process has a part of every layer's heads. transformers does this under `torchrun`, and
# each process quantizes its own heads. One file of codebooks, learned by one process, works for all:
#
# ```python
# # run.py
# model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
# quantize_kv_(model, GSRQConfig(bits=1), codebooks="books.safetensors")
# model.generate(...)
# ```
#
# ```sh
# torchrun --nproc-per-node 2 run.py
# ```
#
# The number of processes must divide the number of KV heads. [Serving](../docs/serving.md) has more.
