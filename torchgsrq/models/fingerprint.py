"""Which model it is: samples of the keys and values of a fixed input."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchgsrq.models.parts import LayerInfo, text_config

_SAMPLE = 8  # elements of a layer's keys, and of its values, that tell models apart
_SAME_MODEL = 0.5  # relative difference of samples below which they are of one model: 4-bit weights stay below


def sample_of(*vectors: Tensor) -> tuple[float, ...]:
    """A few elements of each, to four digits."""
    flat = [x.float().flatten() for x in vectors]
    some = [x[:: max(1, x.numel() // _SAMPLE)][:_SAMPLE].tolist() for x in flat]
    return tuple(float(f"{e:.4g}") for elements in some for e in elements)


def fingerprint(model: PreTrainedModel, layers: list[LayerInfo]) -> dict[str, Any]:
    """Which model codebooks belong to: its shape, and samples of the keys and values of a fixed input.

    The same for a model in another dtype, with resized token embeddings, offloaded weights, or adapters that do
    nothing yet: just what shapes keys and values counts.
    """
    shape = [(x.index, x.q_heads, x.kv_heads, x.head_dim) for x in layers]
    about = f"{text_config(model).model_type}{text_config(model).hidden_size}{shape}"
    return {
        "class": type(model).__name__,
        "shape": hashlib.sha256(about.encode()).hexdigest()[:12],
        "samples": [list(x.sample) for x in layers],
    }


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one model: most of their layers' samples are alike."""
    if a["shape"] != b["shape"] or len(a["samples"]) != len(b["samples"]):
        return False
    x, y = (torch.tensor(f["samples"], dtype=torch.float64) for f in (a, b))
    apart = (x - y).norm(dim=1) / torch.minimum(x.norm(dim=1), y.norm(dim=1)).clamp_min(1e-30)
    return bool(apart.median() <= _SAME_MODEL)
