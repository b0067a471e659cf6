"""What Inductor makes of the ops: `decode` and the first half of `encode` become plain aten and fuse with their
neighbors; the others stay calls of kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchgsrq import reference
from torchgsrq.codec import Codec


def decode(codes: Tensor, position: Tensor, codec: list[Tensor], integers: list[int], dtype: torch.dtype) -> Tensor:
    """`torchgsrq::decode` as a gather of codewords, a product and a rotation."""
    return reference.decode(codes, position, Codec.from_flat(codec, integers), dtype)


def encode(x: Tensor, position: Tensor, codec: list[Tensor], integers: list[int]) -> Tensor:
    """`torchgsrq::encode` as a change to the codes' metric, which fuses with RoPE before it, and a search.

    GPUs keep the op, whose kernel does both.
    """
    if x.device.type != "cpu":
        return NotImplemented
    batch, heads, n, _ = x.shape
    y = reference.to_metric(x, position, Codec.from_flat(codec, integers))[:, : batch * n]
    codes = torch.ops.torchgsrq.search(y, codec, integers)
    return codes.view(heads, batch, n, codes.shape[-1]).transpose(0, 1).contiguous()


@functools.cache
def register() -> bool:
    """Register the lowerings with Inductor, the first time that one of the ops is traced.

    Returns:
        Whether this torch has the API, which is internal; without it the plain ops are called.
    """
    try:
        from torch._inductor import decomposition

        for op, function in (
            (torch.ops.torchgsrq.decode.default, decode),
            (torch.ops.torchgsrq.encode.default, encode),
        ):
            decomposition.register_decomposition([op])(function)
        decomposition.fast_random_decomps.cache_clear()  # a copy of the table that earlier compilations made
    except (ImportError, AttributeError):
        return False
    return True
