"""Model fingerprints: samples of the keys and values of a fixed input."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchgsrq.models.parts import LayerInfo, text_config

_SAMPLE = 8  # sampled elements of a layer's keys, and of its values
_SAME_MODEL = 0.5  # samples with a smaller relative difference are of one model: 4-bit weights stay below


def sample_of(*vectors: Tensor) -> tuple[float, ...]:
    """A few elements of each tensor, rounded to four digits."""
    flat = [x.float().flatten() for x in vectors]
    some = [x[:: max(1, x.numel() // _SAMPLE)][:_SAMPLE].tolist() for x in flat]
    return tuple(float(f"{e:.4g}") for elements in some for e in elements)


def fingerprint(model: PreTrainedModel, layers: list[LayerInfo]) -> dict[str, Any]:
    """A fingerprint of a model: its class, a hash of its shape, and samples of the keys and values of a fixed input.

    Only what affects keys and values counts: another dtype, resized token embeddings, offloaded weights, or untrained
    adapters leave the fingerprint the same.
    """
    shape = [(x.index, x.q_heads, x.kv_heads, x.head_dim) for x in layers]
    about = f"{text_config(model).model_type}{text_config(model).hidden_size}{shape}"
    return {
        "class": type(model).__name__,
        "shape": hashlib.sha256(about.encode()).hexdigest()[:12],
        "samples": [list(x.sample) for x in layers],
    }


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one model: equal shapes, and similar samples in most layers."""
    if a["shape"] != b["shape"] or len(a["samples"]) != len(b["samples"]):
        return False
    x, y = (torch.tensor(f["samples"], dtype=torch.float64) for f in (a, b))
    apart = (x - y).norm(dim=1) / torch.minimum(x.norm(dim=1), y.norm(dim=1)).clamp_min(1e-30)
    return bool(apart.median() <= _SAME_MODEL)
