"""Rotary position embedding: rotate vectors by a position. models/rotary.py finds which rotation a model uses."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the leading dimensions of vectors as RoPE does at ``position``.

    Args:
        x: ``[..., head_dim]``.
        position: any integer dtype, broadcastable to ``x.shape[:-1]``; negative undoes a rotation.
        inv_freq: ``[pairs]`` radians per token; empty means no rotation. Dimensions past
            ``2 * pairs`` pass through (partial rotary).
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + pairs)``.

    Returns:
        float32 (float64 for float64 input), the shape of ``x`` and ``position`` broadcast.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = inv_freq.numel()
    if pairs == 0:
        return x
    angle = position.unsqueeze(-1).double() * inv_freq.double()
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    if rest.shape[-1] == 0:
        return out
    return torch.cat((out, rest.expand(*out.shape[:-1], -1)), -1)
