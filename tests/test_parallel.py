"""Two processes: each with half of the heads, and one that reads a prompt for the other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import SMALL
from torchgsrq import Codebooks
from torchgsrq.measure.evaluate import quantized

SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from tests.conftest import SMALL, cached
from torchgsrq import new_cache, quantize_kv_

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
quantize_kv_(model, SMALL, codebooks=sys.argv[1] + "/books.safetensors")
ids = torch.arange(3, 43)[None].repeat(2, 1)
cache = new_cache(model)
out = model.generate(ids, max_new_tokens=24, do_sample=False, **cached(cache))
print("heads", cache.layers[0].keys.shape[1], "tokens", out[:, 40:].tolist())
"""


def torchrun(script, folder):
    """What each of two processes that run a script prints (each to its own file: one pipe mixes their lines)."""
    (folder / "run.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--redirects", "1", "--log-dir", str(folder / "logs")]
    done = subprocess.run(
        [*command, str(folder / "run.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [log.read_text().strip() for log in sorted(folder.glob("logs/**/stdout.log"))]


@pytest.mark.slow
@torch.no_grad()
def test_two_ranks_say_what_one_says(llama, tmp_path):
    """With codebooks that one process made, of which each rank takes its heads."""
    model, books = llama
    model.save_pretrained(tmp_path)
    books.save(tmp_path / "books.safetensors")
    ids = torch.arange(3, 43)[None].repeat(2, 1)
    with quantized(model, SMALL, books):
        want = model.generate(ids, max_new_tokens=24, do_sample=False)[:, 40:].tolist()
    assert torchrun(SCRIPT, tmp_path) == [f"heads 1 tokens {want}"] * 2


def test_shards_are_parts_of_the_heads(llama, tmp_path):
    _, books = llama
    parts = [books.shard(rank, 2) for rank in (0, 1)]
    for i, layer in books.layers.items():
        for kind, codec in enumerate(layer):
            heads = [head for part in parts for head in part[i][kind].by_head()]
            for one, other in zip(heads, codec.by_head(), strict=True):
                assert one.layout == other.layout and all(map(torch.equal, one.tensors, other.tensors))
            assert [bits for part in parts for bits in part[i][kind].head_bits] == codec.head_bits
    parts[1].save(tmp_path / "part.safetensors")
    again = Codebooks.load(tmp_path / "part.safetensors")
    assert again.digest == parts[1].digest
    costs = [part.metadata["sensitivity"]["1"] for part in parts]
    assert costs[0] + costs[1] == books.metadata["sensitivity"]["1"]
    with pytest.raises(ValueError, match="2 KV heads cannot be split between ranks=3"):
        books.shard(0, 3)


HANDOVER = """
import sys
import torch
import torch.distributed as dist
from tests.conftest import SMALL, cached, tiny_llama
from torchgsrq import new_cache, quantize_kv_

dist.init_process_group("gloo")
model = tiny_llama()
quantize_kv_(model, SMALL, codebooks=sys.argv[1] + "/books.safetensors")
ids = torch.arange(3, 63)[None]
cache = new_cache(model)
size = torch.zeros(1, dtype=torch.long)
with torch.no_grad():
    if dist.get_rank() == 0:  # reads the prompt
        model(ids[:, :-1], **cached(cache))
        data = torch.frombuffer(bytearray(cache.dumps()), dtype=torch.uint8)
        dist.send(size + len(data), 1)
        dist.send(data, 1)
    else:  # writes the answer
        dist.recv(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, 0)
        cache.loads(data.numpy().tobytes())
    print("tokens", model.generate(ids, max_new_tokens=16, do_sample=False, **cached(cache))[:, 60:].tolist())
"""


@pytest.mark.slow
def test_a_prompt_read_here_goes_on_there(llama, tmp_path):
    _, books = llama
    books.save(tmp_path / "books.safetensors")
    here, there = torchrun(HANDOVER, tmp_path)
    assert here == there and here.startswith("tokens")
