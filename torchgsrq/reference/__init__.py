"""Encode, decode, append and attention in plain PyTorch: what they mean. Every fast path is tested against this."""

from torchgsrq.reference.attention import attention, histogram_values, limited, probabilities, table_scores
from torchgsrq.reference.coding import codeword_sum, decode, encode, mean_at, search, search_group, to_metric
from torchgsrq.reference.storage import append_, check_append, coded_slots, decoded, dequantize, tail

__all__ = [
    "append_",
    "attention",
    "check_append",
    "coded_slots",
    "codeword_sum",
    "decode",
    "decoded",
    "dequantize",
    "encode",
    "histogram_values",
    "limited",
    "mean_at",
    "probabilities",
    "search",
    "search_group",
    "table_scores",
    "tail",
    "to_metric",
]
