"""Nothing is lost: random operations, damaged files, threads, processes, interruptions, and many calls."""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, cached, tiny_books, tiny_llama
from tests.oracle import Oracle, watch
from tests.test_oracle import assert_alike, by_mask
from torchgsrq import Codebooks, new_cache, quantize_kv_
from torchgsrq.cache import GSRQCache

# ---------------------------------------------------------------------------------------------------------------------
# Operations


class Story:
    """A cache and its oracle, to which the same things happen."""

    def __init__(self, model, twin, books, seed, folder):
        self.model, self.twin, self.books, self.folder = model, twin, books, folder
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.begin()

    def begin(self):
        self.cache, self.oracle = self.empty(), Oracle(self.books, SMALL, self.model.config)
        self.mask = torch.zeros(self.random.choice([1, 2, 3]), 0, dtype=torch.long)
        self.append(self.random.randint(20, 40), padded=True)

    def append(self, n, padded=False):
        rows = self.mask.shape[0]
        ids = torch.randint(3, 100, (rows, n), generator=self.generator)
        new = torch.ones(rows, n, dtype=torch.long)
        if padded:
            for row in new:
                row[: self.random.randint(0, 10)] = 0
        self.mask = torch.cat((self.mask, new), 1)
        arguments = {"attention_mask": self.mask, "position_ids": by_mask(self.mask)[:, -n:], "use_cache": True}
        got = self.twin(ids, **cached(self.cache), **arguments).logits
        handle = watch(self.model, self.oracle)
        want = self.model(ids, **cached(self.oracle), **arguments).logits
        handle.remove()
        real = new.bool()
        assert_alike(got[real][None], want[real][None])

    def crop(self):
        n = self.random.randint(1, min(6, self.mask.shape[1] - 12))
        self.cache.crop(-n)
        self.oracle.crop(-n)
        self.mask = self.mask[:, :-n]

    def splice(self):
        ids = torch.randint(3, 100, (1, self.random.randint(4, 40)), generator=self.generator)
        piece, said = self.empty(), Oracle(self.books, SMALL, self.model.config)
        self.twin(ids, **cached(piece), use_cache=True)
        handle = watch(self.model, said)
        self.model(ids, **cached(said), use_cache=True)
        handle.remove()
        skip = self.random.choice([0, 2, 3])
        self.cache.splice(piece, skip=skip)
        self.oracle.splice(said, skip)
        new = torch.ones(self.mask.shape[0], ids.shape[1] - skip, dtype=torch.long)
        self.mask = torch.cat((self.mask, new), 1)

    def rows(self, how, what, index):
        getattr(self.cache, how)(what)
        getattr(self.oracle, how)(what)
        self.mask = self.mask[index]

    def step(self):
        rows = self.mask.shape[0]
        choice = self.random.choice(
            ["append"] * 4 + ["crop", "reorder", "repeat", "select", "reset", "file", "offload", "splice"]
        )
        if choice == "append":
            self.append(self.random.choice([1, 1, 1, 2, 5, 17]))
        elif choice == "crop" and self.mask.shape[1] > 14:
            self.crop()
        elif choice == "reorder":
            index = torch.randint(rows, (rows,), generator=self.generator)
            self.rows("reorder_cache", index, index)
        elif choice == "repeat" and rows < 4:
            self.rows("batch_repeat_interleave", 2, torch.arange(rows).repeat_interleave(2))
        elif choice == "select":
            index = torch.randperm(rows, generator=self.generator)[: max(1, rows - 1)]
            self.rows("batch_select_indices", index, index)
        elif choice == "reset" and self.random.random() < 0.3:
            self.begin()
        elif choice == "file":
            self.cache.save(self.folder / "cache")
            self.cache = self.empty()
            self.cache.load(self.folder / "cache")
        elif choice == "splice" and self.mask.shape[1] < 150:
            self.splice()
        elif choice == "offload":
            for layer in self.cache.layers:
                layer.offload()
                layer.prefetch()

    def empty(self):
        return GSRQCache(self.books, SMALL, self.model.config)

    def check(self):
        assert self.cache.get_seq_length() == self.oracle.get_seq_length() == self.mask.shape[1]
        for got, want in zip(self.cache.layers, self.oracle.layers, strict=True):
            for buffer, shown in zip((got.keys, got.values), want.shown, strict=True):
                real = self.mask.bool()[:, None, :, None].expand(shown.shape)
                apart = (buffer.dequantize()[:, :, : shown.shape[2]] - shown)[real].abs() > 1e-3
                assert apart.float().mean() < 0.03


@pytest.fixture(scope="module")
def twin(llama):
    """The tiny Llama, quantized."""
    model, books = llama
    model = copy.deepcopy(model)
    quantize_kv_(model, SMALL, codebooks=books)
    return model


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_random_operations(llama, twin, tmp_path, seed):
    """Twenty at a time, against the unquantized model on what should be there."""
    story = Story(llama[0], twin, llama[1], seed, tmp_path)
    for _ in range(20):
        story.step()
        story.check()


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", ["codebooks", "prompt"])
@torch.no_grad()
def test_damaged_files_are_refused_by_name(llama, twin, tmp_path, kind):
    """Whichever bit flips and wherever a file ends, it says what it said, or that it is damaged."""
    books, path = llama[1], tmp_path / "whole"
    if kind == "codebooks":
        books.save(path)
    else:
        cache = new_cache(twin)
        twin(torch.arange(3, 43)[None], **cached(cache), use_cache=True)
        cache.save(path)
    whole = path.read_bytes()
    choose = random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    places = [choose.randrange(8) for _ in range(8)] + [choose.randrange(8 + header) for _ in range(60)]
    places += [choose.randrange(len(whole)) for _ in range(60)]
    damaged = [whole[:at] + bytes([whole[at] ^ (1 << choose.randrange(8))]) + whole[at + 1 :] for at in places]
    damaged += [whole[: choose.randrange(len(whole))] for _ in range(30)]
    damaged += [b"", whole[:7], b"\xff" * 8 + whole[8:], whole + whole]  # a header of 2^64 bytes, and twice the file
    refused = 0
    for content in damaged:
        (tmp_path / "damaged").write_bytes(content)
        try:
            if kind == "codebooks":
                assert Codebooks.load(tmp_path / "damaged").digest == books.digest
            else:
                loaded = new_cache(twin)
                loaded.load(tmp_path / "damaged")
                assert all(
                    torch.equal(a.keys.dequantize(), b.keys.dequantize())
                    for a, b in zip(loaded.layers, cache.layers, strict=True)
                )
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
    assert refused >= len(damaged) - 3  # a flip in the word "checksum" goes unnoticed, and harms nothing


# ---------------------------------------------------------------------------------------------------------------------
# Threads, processes, interruptions, many calls


@torch.no_grad()
def test_two_threads_generate_at_once(twin):
    prompts = [torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run(ids):
        return twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)

    want = [run(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, prompts))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


CALIBRATE = """
from tests.conftest import SMALL, cached, tiny_llama
from torchgsrq import quantize_kv_
model = tiny_llama()
quantize_kv_(model, SMALL, progress=False)
print(model._gsrq.codebooks.digest)
"""


@pytest.mark.slow
def test_two_processes_calibrate_one_model(tmp_path):
    """The first file that is whole is used; nothing half-written is left, and a third process finds what they made."""
    env = {**os.environ, "TORCHGSRQ_CACHE": str(tmp_path)}
    run = functools.partial(subprocess.Popen, [sys.executable, "-c", CALIBRATE], env=env, stdout=subprocess.PIPE)
    digests = [process.communicate()[0] for process in [run(), run()]]
    digests.append(run().communicate()[0])
    assert len(set(digests)) == 1 and digests[0].strip()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("where", ["torchgsrq.learning.calibrate.train", "torchgsrq.learning.sensitivity._backward"])
def test_an_interrupted_calibration_leaves_the_model_as_it_was(monkeypatch, where):
    model = tiny_llama()
    ids = torch.arange(3, 43)[None]
    before = model(ids).logits
    want = tiny_books(model)
    module, _, name = where.rpartition(".")
    module = sys.modules[module]
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        raise KeyboardInterrupt

    original = getattr(module, name)
    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_books(model)
    monkeypatch.undo()
    assert calls and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, before)
    assert tiny_books(model).digest == want.digest


@pytest.mark.slow
@torch.no_grad()
def test_many_calls_take_no_more_memory(twin):
    """500 generations; the first hundred may fill pools."""
    ids = torch.arange(3, 63)[None]
    resident = []
    for call in range(500):
        twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        if call >= 100 and call % 50 == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert resident[-1] - min(resident) < 16, resident  # MiB
