"""Clustering: gain-shape k-means (GSKM) and plain k-means, weighted and batched, residual stages of them, and codewords
fitted to the encoder's loss.

What is clustered, and how it is weighed, is decided in learning/train.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchgsrq.codec.layout import CODEWORDS, Layout

_ops = torch.ops.torchgsrq  # compiled where they can be; `nearest` and the sums below say what they mean
METHODS = ("kmeans", "gskm")
_PART, _EARLY, _ENOUGH = 3, 5, 48  # the first 5 rounds read every third vector, if those are 16 a codeword
_ROWS = 1024  # rows of a distance block: stays in cache, and a larger one is slower on CPU


def cluster(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    codewords: int = 256,
    method: str = "kmeans",
    iterations: int = 10,
    seed: int = 0,
) -> Tensor:
    """Cluster vectors into codewords, independently for every entry of the batch.

    Both methods assign by least squared distance, which for a gain-shape codeword ``g u`` is
    ``argmax 2 g (x . u) - g^2`` (arXiv 2607.01065); they differ in start and update:

    - ``"kmeans"``: starts from weighted samples; a codeword becomes the weighted mean.
    - ``"gskm"``: the paper's. Starts from spherical k-means. Shape: normalised weighted mean of the normalised inputs.
      Gain: weighted mean projection of the inputs on that shape.

    Args:
        x: ``[batch, n, width]``, any floating dtype.
        weight: ``[batch, n]``, non-negative; ones if absent.
        codewords: codewords per batch entry.
        method: one of ``METHODS``.
        iterations: rounds of assignment and update (after 20 spherical ones for ``"gskm"``).
        seed: makes the result reproducible.

    Returns:
        float32 ``[batch, codewords, width]``, gains multiplied in. With no more distinct vectors
        than codewords, the vectors themselves and zeros.

    Raises:
        ValueError: wrong shapes, an unknown method, or no vectors.
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [batch, n, width] with n of at least 1")
    if weight is not None and weight.shape != x.shape[:2]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {tuple(x.shape[:2])}")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    x = x.float()
    weight = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if weight is None else weight.float()
    if x.shape[1] <= codewords:
        return torch.nn.functional.pad(x, (0, 0, 0, codewords - x.shape[1]))

    generator = torch.Generator(device="cpu").manual_seed(seed)
    centers = samples(x, weight, codewords, generator)
    if method == "kmeans":
        return rounds(x, weight, centers, lambda x, weight, code, mean, _: mean, iterations, generator)
    norms = x.norm(dim=-1, keepdim=True)
    unit = x / norms.clamp_min(1e-12)

    def gain_shape(x: Tensor, weight: Tensor, code: Tensor, mean: Tensor, _: Tensor) -> Tensor:
        towards = torch.nn.functional.normalize(x, dim=-1) * weight
        shape = torch.nn.functional.normalize(_ops.sum_by_code(towards, code, codewords), dim=-1)
        return (mean * shape).sum(-1, keepdim=True) * shape

    centers = spherical(unit, norms, weight, centers, generator)
    return rounds(x, weight, centers, gain_shape, iterations, generator)


def rounds(
    x: Tensor,
    weight: Tensor,
    centers: Tensor,
    update: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """Rounds of assignment and update, from ``centers [batch, codewords, width]`` on.

    Args:
        x, weight: see `cluster`.
        update: vectors, their weights ``[batch, n, 1]`` and codes ``[batch, n]``, the weighted mean of the vectors of
            each code, and the present centers, to new ones.
    """
    count, weights = centers.shape[1], weight.unsqueeze(-1)
    weighted = x * weights
    part = _PART if x.shape[1] >= _ENOUGH * count else 1
    for i in range(iterations):
        step = part if i < _EARLY else 1
        if i in (0, _EARLY):  # made anew where another part is read
            given, some, sums = (t[:, ::step].contiguous() for t in (x, weights, weighted))
        code, _ = _ops.nearest(given, centers)
        mass = _ops.sum_by_code(some, code, count)
        mean = _ops.sum_by_code(sums, code, count) / mass.clamp_min(1e-30)
        centers = update(given, some, code, mean, centers)
        empty = mass.squeeze(-1) <= 0
        if empty.any():
            centers = _reseeded(given, some.squeeze(-1), code, centers, empty, generator)
    return centers


def nearest(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codeword of every vector: what the op `torchgsrq::nearest` means.

    Args:
        x: ``[batch, n, width]`` float32. centers: ``[batch, codewords, width]`` float32.

    Returns:
        codes, int64 ``[batch, n]``, and squared distances, float32 ``[batch, n]``.
    """
    squares = centers.square().sum(-1).unsqueeze(1)
    table = centers.transpose(1, 2)
    room = x.new_empty(x.shape[0], min(_ROWS, x.shape[1]), centers.shape[1])  # fresh pages cost more than the product
    codes, errors = [], []
    for rows in x.split(_ROWS, dim=1):
        out = room if rows.shape[1] == room.shape[1] else None
        least, code = torch.baddbmm(squares, rows, table, alpha=-2, out=out).min(-1)
        codes.append(code)
        errors.append(least)
    error = torch.cat(errors, 1) + x.square().sum(-1)
    return torch.cat(codes, 1), error.clamp_min_(0)


def sum_by_code(x: Tensor, code: Tensor, codewords: int) -> Tensor:
    """Sum the rows of ``x [batch, n, d]`` that share a code: ``[batch, codewords, d]``; an op as well."""
    total = x.new_zeros(x.shape[0], codewords, x.shape[2])
    for out, rows, index in zip(total, x, code, strict=True):
        out.index_add_(0, index, rows)
    return total


def moments_by_code(x: Tensor, weight: Tensor, code: Tensor, codewords: int) -> Tensor:
    """Sum ``weight x x^T`` over the rows of ``x [batch, n, d]`` that share a code: ``[batch, codewords, d, d]``; an op
    as well."""
    width = x.shape[2]
    total = x.new_zeros(x.shape[0], codewords, width * width)
    for out, rows, some, index in zip(total, x, weight, code, strict=True):
        for chunk in range(0, rows.shape[0], _ROWS):
            part = slice(chunk, chunk + _ROWS)
            outer = rows[part, :, None] * (some[part, None] * rows[part])[:, None]
            out.index_add_(0, index[part], outer.flatten(1))
    return total.unflatten(-1, (width, width))


def samples(x: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` vectors per batch entry, drawn by weight; those without any only when the others are used up."""
    odds = weight.double().cpu().clamp_min(0)
    most = odds.amax(1, keepdim=True)
    odds = torch.where(most > 0, odds.clamp_min(1e-12 * most), 1.0)
    index = torch.multinomial(odds, count, replacement=False, generator=generator).to(x.device)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _reseeded(
    x: Tensor, weight: Tensor, code: Tensor, centers: Tensor, empty: Tensor, generator: torch.Generator
) -> Tensor:
    """``centers``, with vectors drawn by weighted error in place of those that are ``empty [batch, codewords]``."""
    # Not the errors of `nearest`: where most vectors are codewords themselves, those are the rounding of |x|^2, which
    # differs by implementation and, summed over many equal vectors, outweighs the few that have no codeword yet.
    error = (x - centers.gather(1, code.unsqueeze(-1).expand_as(x))).square_().sum(-1)
    drawn = samples(x, weight * error, int(empty.sum(1).max()), generator)
    which = (empty.cumsum(1) - 1).clamp_min(0)  # the likeliest are drawn first, and no draw is wasted
    return torch.where(empty.unsqueeze(-1), drawn.gather(1, which.unsqueeze(-1).expand_as(centers)), centers)


def spherical(unit: Tensor, norms: Tensor, weight: Tensor, centers: Tensor, generator: torch.Generator) -> Tensor:
    """Spherical k-means on the unit vectors, 20 rounds; each codeword gets its mean norm as gain."""
    count = centers.shape[1]
    shape = torch.nn.functional.normalize(centers, dim=-1)
    for _ in range(20):
        code, _ = _ops.nearest(unit, shape)
        shape = torch.nn.functional.normalize(_ops.sum_by_code(unit * weight.unsqueeze(-1), code, count), dim=-1)
        empty = (shape == 0).all(-1)
        if empty.any():
            shape = _reseeded(unit, weight, code, shape, empty, generator)
    code, _ = _ops.nearest(unit, shape)
    mass = _ops.sum_by_code(weight.unsqueeze(-1), code, count)
    gain = _ops.sum_by_code(norms * weight.unsqueeze(-1), code, count) / mass.clamp_min(1e-30)
    return gain * shape


def train_codebook(
    y: Tensor,
    weight: Tensor,
    layout: Layout,
    *,
    method: str = "kmeans",
    iterations: int = 7,
    seed: int = 0,
    fit: Callable[[Layout, Tensor], Tensor] | None = None,
) -> Tensor:
    """Residual stages of 256 codewords, each learned on what those before it leave.

    Every stage after a group's first keeps a zero codeword, so that one more stage never makes the
    greedy error worse.

    Args:
        y: ``[heads, n, head_dim]``, in the metric.
        weight: ``[heads, n]``.
        layout: which code writes which slice.
        method, iterations, seed: see `cluster`.
        fit: layout and codebook of the stages so far to the last stage's codewords (`fit_to_loss`).

    Returns:
        float32 rounded to float16, ``[heads, layout.codes, 256, layout.width]``.
    """
    heads = y.shape[0]
    out = torch.zeros(heads, layout.codes, CODEWORDS, layout.width, dtype=torch.float32, device=y.device)
    residual = y.unflatten(-1, (layout.groups, layout.width)).permute(0, 2, 1, 3)  # [h, g, n, w]
    residual = residual.clone(memory_format=torch.contiguous_format)  # of one group too: the caller's y stays
    for stage in range(layout.stages):
        groups = layout.groups_in(stage)
        part = residual[:, :groups].flatten(0, 1)
        some_weight = weight[:, None].expand(-1, groups, -1).flatten(0, 1)
        zero = int(stage > 0)
        words = cluster(
            part,
            some_weight,
            codewords=CODEWORDS - zero,
            method=method,
            iterations=iterations,
            seed=seed + 1000 * stage,
        )
        words = torch.cat((words.new_zeros(words.shape[0], zero, layout.width), words), 1).half().float()
        first, past = stage * layout.groups, stage * layout.groups + groups
        out[:, first:past] = words.unflatten(0, (heads, groups))
        if fit:
            out[:, first:past] = fit(replace(layout, codes=past), out[:, :past])
            words = out[:, first:past].flatten(0, 1)
        if stage + 1 == layout.stages:
            break
        code, _ = _ops.nearest(part, words)
        part = part - words.gather(1, code.unsqueeze(-1).expand_as(part))
        residual[:, :groups] = part.unflatten(0, (heads, groups))
    return out


def fit_to_loss(
    y: Tensor,
    weight: Tensor,
    layout: Layout,
    codebook: Tensor,
    encode: Callable[[Tensor, Tensor], Tensor],
    eta: int,
    iterations: int = 4,
) -> Tensor:
    """The last stage's codewords, for the loss that the encoder minimises (`reference.search_group`): rounds of
    encoding vectors and giving each codeword the least weighted loss. Earlier stages stay.

    Args:
        y: ``[heads, n, head_dim]``. weight: ``[heads, n]``. layout: of the stages so far.
        codebook: ``[heads, layout.codes, 256, layout.width]``.
        encode: vectors and codewords to codes, uint8 ``[heads, n, layout.codes]``.
        eta: weight of an error along the vector.

    Returns:
        The last stage, float32 rounded to float16, ``[heads, groups, 256, layout.width]``.
    """
    last, groups = layout.stages - 1, layout.groups_in(layout.stages - 1)
    tables = codebook.clone()
    part = _PART if y.shape[1] >= _ENOUGH * tables.shape[2] else 1
    for step, times in ((part, iterations - 1), (1, 1)):
        some = y[:, ::step].contiguous()
        whole = some.unflatten(-1, (layout.groups, layout.width)).permute(0, 2, 1, 3)[:, :groups]  # [h, g, n, w]
        unit = torch.nn.functional.normalize(whole, dim=-1).flatten(0, 1)
        counted = weight[:, None, ::step].expand(-1, groups, -1).flatten(0, 1)
        for _ in range(times):
            codes = encode(some, tables).long().transpose(1, 2)  # [h, codes, n]
            target = whole
            for first in range(0, last * layout.groups, layout.groups):
                index = codes[:, first : first + groups, :, None].expand_as(whole)
                target = target - tables[:, first : first + groups].gather(2, index)
            words = tables[:, last * layout.groups :]
            code = codes[:, last * layout.groups :].flatten(0, 1)
            found = _least_loss(target.flatten(0, 1), unit, counted, code, words.flatten(0, 1), eta)
            if last:
                found[:, 0] = 0
            words.copy_(found.half().float().view_as(words))
    return tables[:, last * layout.groups :]


def _least_loss(target: Tensor, unit: Tensor, weight: Tensor, code: Tensor, words: Tensor, eta: int) -> Tensor:
    """Codewords of least ``sum weight (|e|^2 + (eta - 1) (e . unit)^2)``, with e the rest of each target
    ``[batch, n, width]`` without its codeword: the normal equations of every codeword. One without vectors stays as it
    is in ``words [batch, 256, width]``."""
    count = words.shape[1]
    mass = _ops.sum_by_code(weight.unsqueeze(-1), code, count)
    hold = 1e-3 * mass.mean((1, 2), keepdim=True).clamp_min(1e-30)
    normal = (eta - 1) * _ops.moments_by_code(unit, weight, code, count)
    normal.diagonal(dim1=-2, dim2=-1).add_(mass + hold)
    pulled = torch.addcmul(target, unit, (target * unit).sum(-1, keepdim=True), value=eta - 1)
    sums = _ops.sum_by_code(pulled.mul_(weight.unsqueeze(-1)), code, count)
    return torch.linalg.solve(normal, (sums + hold * words).unsqueeze(-1)).squeeze(-1)
