"""Models and engines for the tests of the vLLM plugin; without vLLM they are not collected."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from unittest import mock

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: errors come as they are, and end with it

import pytest
import torch

from tests.conftest import tiny_llama
from torchgsrq import Codebooks, GSRQConfig, calibrate
from torchgsrq.learning import train

FRAME = 128  # of the tests' codebooks, so that short texts have several
SIZES = {"max_position_embeddings": 1024, "num_hidden_layers": 3}


def books_of(model: torch.nn.Module, config: GSRQConfig, seed: int = 0) -> Codebooks:
    """Codebooks from random tokens."""
    tokens = torch.randint(3, 100, (1024,), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(train, "FRAME", FRAME):
        return calibrate(model, config, tokens, tokens=1024, seed=seed, progress=False)


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    """A random Llama of three layers."""
    return tiny_llama(**SIZES)


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory) -> Path:
    """Where it is saved, with codebooks in ``books``: ``uniform`` and ``by-head``."""
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    books = path / "books"  # beside the model's own files vLLM would take them for weights
    books.mkdir()
    books_of(model, GSRQConfig(bits=1, allocation="uniform")).save(books / "uniform.safetensors")
    books_of(model, GSRQConfig(bits=1)).save(books / "by-head.safetensors")
    return path


def engine(folder: Path, codebooks: str | None = "uniform", *, gsrq: dict | None = None, **options):
    """An engine of the model in a folder, on codes unless ``codebooks`` is None."""
    from vllm import LLM

    asked = {"codebooks": str(folder / "books" / f"{codebooks}.safetensors"), **(gsrq or {})}
    defaults = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    extra = {} if codebooks is None else {"additional_config": {"gsrq": asked}}
    return LLM(str(folder), **{**defaults, **extra, **options})


def end(llm) -> None:
    """Free an engine's memory."""
    llm.llm_engine.engine_core.shutdown()


_TIES: list[float] = []  # of all tests


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Log-probabilities of a text are alike within rounding. Where rounding differs, a code may fall to the other side
    of a tie, and what follows it with it: in few texts of all tests."""
    off = float((ours - theirs).abs().max())
    if off > 2e-4:
        _TIES.append(off)
        assert off < 0.3 and len(_TIES) <= 3, _TIES
