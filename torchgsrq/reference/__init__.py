"""Encode, decode, append and attention in plain PyTorch: what they mean. Every fast path is tested against this."""

from torchgsrq.reference.attention import (
    EXACT_TAIL,
    LAST_ALIGNED,
    NOT_CAUSAL,
    STREAMING,
    UPPER_LEFT,
    WINDOW,
    attention,
    histogram_values,
    table_scores,
)
from torchgsrq.reference.coding import codeword_sum, decode, encode, mean_at, search, search_group, to_metric
from torchgsrq.reference.storage import Packed, append_, check_append, coded_slots, dequantize, fitted, positions, tail

__all__ = [
    "EXACT_TAIL",
    "LAST_ALIGNED",
    "NOT_CAUSAL",
    "STREAMING",
    "UPPER_LEFT",
    "WINDOW",
    "Packed",
    "append_",
    "attention",
    "check_append",
    "coded_slots",
    "codeword_sum",
    "decode",
    "dequantize",
    "encode",
    "fitted",
    "histogram_values",
    "mean_at",
    "positions",
    "search",
    "search_group",
    "table_scores",
    "tail",
    "to_metric",
]
