"""Vectors to codes and back, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgsrq.codec import Codec
from torchgsrq.codec.layout import CODEWORDS, search_steps
from torchgsrq.codec.rope import rotate

_TILE = 32  # products are of whole tiles of rows, so that a vector's result never depends on its batch
_ENCODE_ROWS = 128  # rows searched at a time: their distances stay in cache


def encode(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """Vectors to codes: a search over the residual stages of each group (`search_group`).

    Args:
        x: ``[batch, heads, n, head_dim]``, post-RoPE keys or values.
        position: ``[batch, n]``, integer positions of the tokens in their rows.

    Returns:
        uint8 ``[batch, heads, n, codes]``. Ties go to the lower code. Independent of batch and chunking.
    """
    batch, heads, n, _ = x.shape
    codes = search(to_metric(x, position, codec), codec)[:, : batch * n]
    return codes.reshape(heads, batch, n, codes.shape[-1]).transpose(0, 1).contiguous()


def to_metric(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """Vectors, without their mean, in the metric of the codes: ``transform (R(-frame start) x - R(place) mean)``.

    Returns:
        float32 ``[heads, batch * n, head_dim]``, padded with rows to whole tiles.
    """
    batch, heads, n, head_dim = x.shape
    place = position.remainder(codec.frame)
    y = rotate(x.float(), (place - position).unsqueeze(1), codec.inv_freq, codec.interleaved)
    y = y - mean_at(place, codec)
    return _tiled_product(y.transpose(0, 1).reshape(heads, batch * n, head_dim), codec.transform)


def search(y: Tensor, codec: Codec) -> Tensor:
    """Codes of vectors in their metric: float32 ``[heads, n, head_dim]`` to uint8 ``[heads, n, codes]``."""
    n, layout = y.shape[1], codec.layout
    y = F.pad(y, (0, 0, 0, -n % _TILE))
    codes = y.new_empty((*y.shape[:2], layout.codes), dtype=torch.uint8)
    for group in range(layout.groups):
        part = y[..., layout.start(group) : layout.start(group) + layout.width]
        tables = codec.codebook[:, group :: layout.groups]
        for rows in range(0, y.shape[1], _ENCODE_ROWS):
            found = search_group(part[:, rows : rows + _ENCODE_ROWS], tables, codec.eta)
            codes[:, rows : rows + _ENCODE_ROWS, group :: layout.groups] = found
    return codes[:, :n].contiguous()


def mean_at(position: Tensor, codec: Codec) -> Tensor:
    """The mean, rotated to positions ``[batch, n]``: ``[batch, heads, n, head_dim]``, or with a size of 1 for n."""
    return rotate(codec.mean[:, None], position.unsqueeze(1), codec.inv_freq, codec.interleaved)


def _tiled_product(y: Tensor, matrix: Tensor) -> Tensor:
    """``matrix @ y`` for every row of ``y [heads, n, d]``, padded with zero rows to whole tiles."""
    return F.pad(y, (0, 0, 0, -y.shape[1] % _TILE)) @ matrix.transpose(1, 2)


def search_group(y: Tensor, tables: Tensor, eta: int = 1, steps: int | None = None) -> Tensor:
    """Codes of one group, of low loss ``|e|^2 + (eta - 1) (e . y/|y|)^2`` of the error e.

    The queries that attend to a key are aligned with it, so that the part of an error along the vector costs attention
    more than its size says (the anisotropic loss of ScaNN, arXiv 1908.10396).

    Stage after stage takes the codeword nearest to what those before it leave, greedily, as codebooks were learned. The
    last stage takes the codeword of least loss among the others, and so does every stage that is visited again
    (coordinate descent).

    Args:
        y: ``[heads, n, width]`` float32, n a multiple of the tile. tables: ``[heads, stages, 256, width]``, any
            floating dtype. eta: 1 for the plain squared error. steps: of the search, at least one a stage;
            `search_steps` by default.

    Returns:
        uint8 ``[heads, n, stages]``.
    """
    stages = tables.shape[1]
    norm = y.norm(dim=-1, keepdim=True)
    unit = y / norm.masked_fill(norm == 0, 1)
    rest, codes = y, [torch.zeros(y.shape[:2], dtype=torch.long, device=y.device)] * stages
    for step in range(steps or search_steps(stages, eta)):
        stage = step % stages
        table = tables[:, stage].float()
        if step >= stages:
            rest = rest + _words(table, codes[stage])
        # Of every codeword, less the square of the rest itself: [heads, n, 256].
        loss = torch.baddbmm(table.square().sum(-1).unsqueeze(1), rest, table.transpose(1, 2), alpha=-2)
        if eta > 1 and step >= stages - 1:
            along = unit @ table.transpose(1, 2)
            loss += (eta - 1) * ((rest * unit).sum(-1, keepdim=True) - along).square()
        codes[stage] = loss.argmin(-1)
        if stages > 1:
            rest = rest - _words(table, codes[stage])
    return torch.stack(codes, -1).to(torch.uint8)


def _words(table: Tensor, code: Tensor) -> Tensor:
    return table.gather(1, code.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def codeword_sum(codes: Tensor, codec: Codec) -> Tensor:
    """Codes to vectors in the learned metric, float32 ``[batch, heads, n, head_dim]``."""
    heads, layout = codes.shape[1], codec.layout
    rows = codec.codebook.reshape(-1, layout.width)
    base = torch.arange(heads * layout.codes, device=codes.device).view(1, heads, 1, layout.codes) * CODEWORDS
    index = base + codes.int()
    y: Any = 0
    for stage in range(layout.stages):
        first = stage * layout.groups
        words = rows[index[..., first : first + layout.groups]].float()
        y = y + F.pad(words, (0, 0, 0, layout.groups - layout.groups_in(stage)))
    return y.flatten(-2)


def decode(codes: Tensor, position: Tensor, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes to vectors: ``R(frame start) (R(place) mean + inverse @ sum of codewords)``.

    Args:
        codes: uint8, of `encode`.
        position: ``[batch, n]``.

    Returns:
        ``[batch, heads, n, head_dim]`` of ``dtype``.
    """
    place = position.remainder(codec.frame)
    batch, heads, n, _ = codes.shape
    y = codeword_sum(codes, codec).transpose(0, 1).reshape(heads, batch * n, codec.head_dim)
    x = _tiled_product(y, codec.inverse)[:, : batch * n].unflatten(1, (batch, n)).transpose(0, 1)
    x = x + mean_at(place, codec)
    return rotate(x, (position - place).unsqueeze(1), codec.inv_freq, codec.interleaved).to(dtype)
