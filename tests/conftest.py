"""Small models, codecs and buffers that the tests share."""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of programs that tests start, too: other processes test beside this one

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from hypothesis import HealthCheck, settings

from torchgsrq import Codebooks, Codec, GSRQConfig, GSRQTensor, calibrate, dequantize_kv_
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.kmeans import train_codebook
from torchgsrq.codec.layout import Layout
from torchgsrq.learning import train
from torchgsrq.models import CACHE_NAMES
from torchgsrq.state import state_of

torch.set_num_threads(1)  # the tensors are tiny, and threads of parallel test processes would fight

settings.register_profile(
    "default", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("few", settings.get_profile("default"), max_examples=4)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def make_codec(
    heads: int = 2,
    head_dim: int = 16,
    *,
    layout: Layout | None = None,
    frame: int = 16,
    pairs: int | None = None,
    interleaved: bool = False,
    eta: int = 1,
    seed: int = 0,
) -> Codec:
    """A codec with trained codewords and a random, well-conditioned metric."""
    g = torch.Generator().manual_seed(seed)
    layout = layout or Layout(head_dim, 2, 4)
    pairs = layout.head_dim // 2 if pairs is None else pairs
    x = torch.randn(heads, 512, layout.head_dim, generator=g)
    codebook = train_codebook(x, torch.ones(heads, 512), layout, iterations=2, seed=seed)
    transform = torch.eye(layout.head_dim) + 0.1 * torch.randn(heads, layout.head_dim, layout.head_dim, generator=g)
    return Codec.build(
        torch.randn(heads, layout.head_dim, generator=g),
        transform,
        codebook,
        inv_freq=1.0 / 1000 ** (torch.arange(pairs) / max(pairs, 1)),
        frame=frame,
        interleaved=interleaved,
        eta=eta,
    )


def close(got: torch.Tensor, want: torch.Tensor, rel: float) -> None:
    """A relative error of at most ``rel`` in all, and in no element more than ten times that, of the largest element of
    its vector (the last dimension)."""
    assert got.shape == want.shape
    want = want.double()
    error = got.double() - want
    whole = error.norm() / want.norm().clamp_min(1e-30)
    assert whole <= rel, f"relative error {whole:.2e}"
    worst = (error.abs() / want.abs().amax(-1, keepdim=True).clamp_min(1e-30)).max() if want.numel() else 0
    assert worst <= 10 * rel, f"relative error of an element {worst:.2e}"


def by_turns(one: Codec, two: Codec) -> Codecs:
    """Heads by turns those of one codec and of another; the other's are kept first."""
    parts = []
    for i, codec in ((1, two), (0, one)):
        heads = range(i, one.heads, 2)
        some = [codec.of_heads(slice(head, head + 1)) for head in heads]
        parts.append((tuple(heads), LayerCodec.of_heads(some, some).key.first))
    return Codecs(tuple(parts))


def make_pair(
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    capacity: int = 96,
    *,
    length: int = 0,
    start: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: GSRQConfig | None = None,
    key: Codec | Codecs | None = None,
    value: Codec | Codecs | None = None,
    seed: int = 0,
) -> tuple[GSRQTensor, GSRQTensor, torch.Tensor, torch.Tensor]:
    """Key and value buffers holding ``length`` random tokens, and those tokens."""
    config = config or GSRQConfig(sink_tokens=2, recent_tokens=8, block_tokens=4)
    key = key or make_codec(heads, head_dim, seed=seed)
    value = value or make_codec(heads, head_dim, pairs=0, layout=Layout(head_dim, 4, 4), seed=seed + 1)
    g = torch.Generator().manual_seed(seed + 2)
    k, v = (torch.randn(batch, heads, length, head_dim, generator=g).to(dtype) for _ in range(2))
    buffers = []
    for codec, x in ((key, k), (value, v)):
        buffer = GSRQTensor.empty(
            batch, heads, capacity, head_dim, codec=codec, dtype=dtype, config=config, start=start
        )
        if length:
            buffer.index_copy_(2, torch.arange(length), x)
        buffers.append(buffer)
    return buffers[0], buffers[1], k, v


def cached(cache: object) -> dict[str, object]:
    """The argument that gives a forward or `generate` a cache; its name is another one before transformers 5.24."""
    from transformers import GenerationMixin

    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return {next(name for name in CACHE_NAMES if name in names): cache}


TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}  # of the config of a model of two layers


def tiny_llama(**changes: object) -> torch.nn.Module:
    """A random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()
    model.generation_config.pad_token_id = 0
    return model


SMALL = GSRQConfig(bits=1, sink_tokens=2, recent_tokens=8, block_tokens=4)


def tiny_books(model: torch.nn.Module, config: GSRQConfig = SMALL, seed: int = 0) -> Codebooks:
    """Codebooks from random tokens: enough for correctness, useless for quality."""
    tokens = torch.randint(3, 100, (512,), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(train, "FRAME", 32):  # so that short texts have several
        return calibrate(model, config, tokens, tokens=512, seed=seed, progress=False)


@pytest.fixture(scope="session")
def llama() -> tuple[torch.nn.Module, Codebooks]:
    """A tiny Llama and its codebooks; a test may quantize it and take gradients, and changes nothing else."""
    return _llama()


@functools.cache
def _llama() -> tuple[torch.nn.Module, Codebooks]:
    model = tiny_llama()
    return model, tiny_books(model)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A test, also one that fails, leaves no compiled graphs to the next, and `llama` as it was: plain, with gradients
    to be had and none taken."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if _llama.cache_info().currsize:
        model, _ = _llama()
        if state_of(model):
            dequantize_kv_(model)
        model.requires_grad_(True).zero_grad(set_to_none=True)


class Words:
    """A tokenizer: words, spaces before them, and other characters one by one."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self("amber birch cedar dune ember fjord grove heron iris jade kelp lark moss nectar opal pine quartz reed")
        self.size = len(self.known)  # other words get ids as they come

    def __call__(self, text, return_tensors=None, **_):
        ids = [self.known.setdefault(p, len(self.known)) for p in re.findall(r" ?[A-Za-z]+|\s|.", text)]
        return SimpleNamespace(input_ids=ids if return_tensors is None else torch.tensor([ids]))

    def decode(self, ids):
        names = {i: piece for piece, i in self.known.items()}
        return "".join(names[int(i)] for i in ids)

    def __len__(self) -> int:
        return self.size


__all__ = [
    "SMALL",
    "TINY",
    "Words",
    "by_turns",
    "cached",
    "make_codec",
    "make_pair",
    "tiny_books",
    "tiny_llama",
]
