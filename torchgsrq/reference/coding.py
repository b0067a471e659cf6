"""Vectors to codes and back, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgsrq.codec import Codec
from torchgsrq.codec.layout import CODEWORDS
from torchgsrq.codec.rope import rotate

_TILE = 32  # products are of whole tiles of rows, so that a vector's result never depends on its batch
_ENCODE_ROWS = 128  # rows searched at a time: their distances stay in cache


def encode(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """Vectors to codes: a search over the residual stages of each group (`beam_search`).

    Args:
        x: ``[batch, heads, n, head_dim]``, post-RoPE keys or values.
        position: ``[batch, n]``, integer positions of the tokens in their rows.

    Returns:
        uint8 ``[batch, heads, n, codes]`` (`Codec.codes_shape`). Ties go to the lower code. Independent of batch and
        chunking.
    """
    found = []
    for heads, run in codec.by_run():
        some = x[:, heads]
        batch, count, n, _ = some.shape
        codes = search(to_metric(some, position, run), run)[:, : batch * n]
        found.append(codes.reshape(count, batch, n, run.num_codes).transpose(0, 1).contiguous())
    return codec.join_codes(found)


def to_metric(x: Tensor, position: Tensor, codec: Codec) -> Tensor:
    """Vectors, of heads with one layout, without their mean, in the metric of the codes:
    ``transform (R(-frame start) x - R(place) mean)``.

    Returns:
        float32 ``[heads, batch * n, dims]``, padded with rows to whole tiles.
    """
    batch, heads, n, head_dim = x.shape
    place = position.remainder(codec.frame)
    y = rotate(x.float(), (place - position).unsqueeze(1), codec.inv_freq, codec.interleaved)
    y = y - mean_at(place, codec)
    return _tiled_product(y.transpose(0, 1).reshape(heads, batch * n, head_dim), codec.transform)


def search(y: Tensor, codec: Codec) -> Tensor:
    """Codes of vectors in their metric: float32 ``[heads, n, dims]``, of one layout, to uint8 ``[heads, n, codes]``."""
    head, n = [], y.shape[1]
    y = F.pad(y, (0, 0, 0, -n % _TILE))
    if codec.gains.numel():
        gain = (y.norm(dim=-1, keepdim=True) - codec.gains).abs().argmin(-1, keepdim=True)
        y = y / codec.gains[gain]
        head = [gain.to(torch.uint8)]
    layout = codec.layout
    codes = torch.zeros(*y.shape[:2], layout.codes, dtype=torch.uint8, device=y.device)
    for group in range(layout.groups):
        part = y[..., layout.start(group) : layout.start(group) + layout.width]
        tables = codec.codebook[:, group :: layout.groups]
        for rows in range(0, y.shape[1], _ENCODE_ROWS):
            found = beam_search(part[:, rows : rows + _ENCODE_ROWS], tables, codec.beam, codec.eta)
            codes[:, rows : rows + _ENCODE_ROWS, group :: layout.groups] = found
    return torch.cat([*head, codes], -1)[:, :n].contiguous()


def mean_at(position: Tensor, codec: Codec) -> Tensor:
    """The mean, rotated to positions ``[batch, n]``: ``[batch, heads, n, head_dim]``, or with a size of 1 for n."""
    return rotate(codec.mean[:, None], position.unsqueeze(1), codec.inv_freq, codec.interleaved)


def _tiled_product(y: Tensor, matrix: Tensor) -> Tensor:
    """``matrix @ y`` for every row of ``y [heads, n, d]``, padded with zero rows to whole tiles."""
    return F.pad(y, (0, 0, 0, -y.shape[1] % _TILE)) @ matrix.transpose(1, 2)


def beam_search(y: Tensor, tables: Tensor, beam: int, eta: int = 1) -> Tensor:
    """Codes of one group: of low loss ``|e|^2 + (eta - 1) (e . y/|y|)^2`` of the error e.

    The queries that attend to a key are aligned with it, so that the part of an error along the vector costs attention
    more than its size says (the anisotropic loss of ScaNN, arXiv 1908.10396).

    A beam search ranks candidates by the plain error until the last stage, and by the loss there; then one sweep of
    coordinate descent gives each stage the codeword of least loss among the others. The first candidate is always the
    greedy path, so the result is never worse than it, in the loss.

    Args:
        y: ``[heads, n, width]`` float32, n a multiple of the tile. tables: ``[heads, stages, 256, width]``, any
            floating dtype. beam: candidates kept. eta: 1 for the plain squared error.

    Returns:
        uint8 ``[heads, n, stages]``.
    """
    heads, n, width = y.shape
    stages = tables.shape[1]
    norm = y.norm(dim=-1, keepdim=True)
    unit = (y / norm.masked_fill(norm == 0, 1)).unsqueeze(2)
    residual = y.unsqueeze(2)  # [heads, n, candidates, width]
    cost = residual.square().sum(-1)
    codes = torch.zeros(heads, n, 1, 0, dtype=torch.int64, device=y.device)

    def losses(residual: Tensor, table: Tensor, aligned: bool) -> Tensor:
        """Loss of every codeword for every residual, less the residual's own square: [heads, n, candidates, 256]."""
        squares = table.square().sum(-1).unsqueeze(1)
        change = torch.baddbmm(squares, residual.flatten(1, 2), table.transpose(1, 2), alpha=-2)
        change = change.view(heads, n, -1, CODEWORDS)
        if aligned and eta > 1:
            along = (unit.squeeze(2) @ table.transpose(1, 2)).unsqueeze(2)
            change += (eta - 1) * ((residual * unit).sum(-1, keepdim=True) - along).square()
        return change

    def words(table: Tensor, code: Tensor) -> Tensor:
        return table.gather(1, code.flatten(1).unsqueeze(-1).expand(-1, -1, width)).view(heads, n, -1, width)

    for stage in range(stages):
        table = tables[:, stage].float()
        last = stage + 1 == stages
        change = losses(residual, table, aligned=last)
        if last:
            pick = change.add_(cost.unsqueeze(-1)).flatten(2).argmin(-1, keepdim=True)
        else:
            pick = change[:, :, 0].argmin(-1, keepdim=True)  # candidate 0, greedily
            if beam > 1:
                total = change.add_(cost.unsqueeze(-1)).flatten(2).scatter_(2, pick, torch.inf)
                others = total.topk(beam - 1, dim=-1, largest=False).indices
                pick = torch.cat((pick, others), -1)
        parent, code = pick // CODEWORDS, pick % CODEWORDS
        residual = residual.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, width)) - words(table, code)
        cost = residual.square().sum(-1)
        before = codes.gather(2, parent.unsqueeze(-1).expand(-1, -1, -1, stage))
        codes = torch.cat((before, code.unsqueeze(-1)), -1)
    for stage in range(stages if eta > 1 and stages > 1 else 0):
        table = tables[:, stage].float()
        residual = residual + words(table, codes[..., stage])
        codes[..., stage] = losses(residual, table, aligned=True).argmin(-1)
        residual = residual - words(table, codes[..., stage])
    return codes.squeeze(2).to(torch.uint8)


def codeword_sum(codes: Tensor, codec: Codec) -> Tensor:
    """Codes to vectors in the learned metric, float32 ``[batch, heads, n, dims]``, of heads with one layout."""
    heads = codes.shape[1]
    layout = codec.layout
    gain = None
    if codec.gains.numel():
        gain, codes = codec.gains[codes[..., :1].int()], codes[..., 1:]
    rows = codec.codebook.reshape(-1, layout.width)
    base = torch.arange(heads * layout.codes, device=codes.device).view(1, heads, 1, layout.codes) * CODEWORDS
    index = base + codes.int()
    y: Any = 0
    for stage in range(layout.stages):
        first = stage * layout.groups
        words = rows[index[..., first : first + layout.groups]].float()
        y = y + F.pad(words, (0, 0, 0, layout.groups - layout.groups_in(stage)))
    y = y.flatten(-2)
    return y if gain is None else y * gain


def decode(codes: Tensor, position: Tensor, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes to vectors: ``R(frame start) (R(place) mean + inverse @ sum of codewords)``.

    Args:
        codes: uint8, of `encode`.
        position: ``[batch, n]``.

    Returns:
        ``[batch, heads, n, head_dim]`` of ``dtype``.
    """
    runs = zip(codec.split_codes(codes), codec.by_run(), strict=True)
    return codec.merged([_decode(some, position, run, dtype) for some, (_, run) in runs])


def _decode(codes: Tensor, position: Tensor, codec: Codec, dtype: torch.dtype) -> Tensor:
    place = position.remainder(codec.frame)
    batch, heads, n, _ = codes.shape
    y = codeword_sum(codes, codec).transpose(0, 1).reshape(heads, batch * n, codec.layout.dims)
    x = _tiled_product(y, codec.inverse)[:, : batch * n].unflatten(1, (batch, n)).transpose(0, 1)
    x = x + mean_at(place, codec)
    return rotate(x, (position - place).unsqueeze(1), codec.inv_freq, codec.interleaved).to(dtype)
