"""Clustering: weighted and batched k-means and gain-shape k-means (GSKM), residual stages, and codewords fitted to the
encoder's loss.

learning/train.py decides what is clustered, and with which weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchgsrq.codec.layout import CODEWORDS, Layout

_ops = torch.ops.torchgsrq  # compiled where possible; `nearest` and the sums below are their specification
METHODS = ("kmeans", "gskm")
_PART, _EARLY, _ENOUGH = 3, 5, 48  # the first 5 rounds read every third vector, if that gives 16 per codeword
_ROWS = 1024  # rows of a distance block: it stays in cache; larger ones are slower on CPU


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

    Both methods assign each vector to the nearest codeword by squared distance, which for a gain-shape codeword ``g u``
    is ``argmax 2 g (x . u) - g^2`` (arXiv 2607.01065). They differ in initialization and update:

    - ``"kmeans"`` starts from weighted samples. A codeword becomes the weighted mean of its vectors.
    - ``"gskm"``, the paper's, starts from spherical k-means. Shape: normalized weighted mean of the normalized inputs.
      Gain: weighted mean projection of the inputs on that shape.

    Args:
        x: ``[batch, n, width]``, any floating dtype.
        weight: ``[batch, n]``, non-negative; ones if absent.
        codewords: codewords per batch entry.
        method: one of ``METHODS``.
        iterations: rounds of assignment and update (for ``"gskm"``, after 20 spherical rounds).
        seed: makes the result reproducible.

    Returns:
        float32 ``[batch, codewords, width]``, gains included. If there are no more vectors than codewords, the vectors
        themselves and zeros.

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
    """Rounds of assignment and update.

    Args:
        x, weight: see `cluster`.
        centers: initial codewords ``[batch, codewords, width]``.
        update: maps vectors, their weights ``[batch, n, 1]`` and codes ``[batch, n]``, the weighted mean of the vectors
            of each code, and the current centers to new centers.
        iterations: number of rounds.
        generator: for reseeding codewords without vectors.

    Returns:
        The codewords, of the shape of ``centers``.
    """
    count, weights = centers.shape[1], weight.unsqueeze(-1)
    weighted = x * weights
    part = _PART if x.shape[1] >= _ENOUGH * count else 1
    for i in range(iterations):
        step = part if i < _EARLY else 1
        if i in (0, _EARLY):  # recomputed when another part is read
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
    """Nearest codeword of every vector: the specification of the op `torchgsrq::nearest`.

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
    """Sum the rows of ``x [batch, n, d]`` that share a code: ``[batch, codewords, d]``. Also an op."""
    total = x.new_zeros(x.shape[0], codewords, x.shape[2])
    for out, rows, index in zip(total, x, code, strict=True):
        out.index_add_(0, index, rows)
    return total


def moments_by_code(x: Tensor, weight: Tensor, code: Tensor, codewords: int) -> Tensor:
    """Sum ``weight x x^T`` over the rows of ``x [batch, n, d]`` that share a code: ``[batch, codewords, d, d]``. Also
    an op."""
    width = x.shape[2]
    total = x.new_zeros(x.shape[0], codewords, width * width)
    for out, rows, some, index in zip(total, x, weight, code, strict=True):
        for chunk in range(0, rows.shape[0], _ROWS):
            part = slice(chunk, chunk + _ROWS)
            outer = rows[part, :, None] * (some[part, None] * rows[part])[:, None]
            out.index_add_(0, index[part], outer.flatten(1))
    return total.unflatten(-1, (width, width))


def samples(x: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` vectors per batch entry by weight, without replacement; those of weight 0 only after all
    others."""
    odds = weight.double().cpu().clamp_min(0)
    most = odds.amax(1, keepdim=True)
    odds = torch.where(most > 0, odds.clamp_min(1e-12 * most), 1.0)
    index = torch.multinomial(odds, count, replacement=False, generator=generator).to(x.device)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _reseeded(
    x: Tensor, weight: Tensor, code: Tensor, centers: Tensor, empty: Tensor, generator: torch.Generator
) -> Tensor:
    """``centers``, with those marked in ``empty [batch, codewords]`` replaced by vectors drawn by weighted error."""
    # Not the errors of `nearest`: if most vectors are codewords themselves, those errors are the rounding of |x|^2. It
    # depends on the implementation and, summed over many equal vectors, outweighs the few without a codeword yet.
    error = (x - centers.gather(1, code.unsqueeze(-1).expand_as(x))).square_().sum(-1)
    drawn = samples(x, weight * error, int(empty.sum(1).max()), generator)
    which = (empty.cumsum(1) - 1).clamp_min(0)  # the likeliest draws come first, and none is wasted
    return torch.where(empty.unsqueeze(-1), drawn.gather(1, which.unsqueeze(-1).expand_as(centers)), centers)


def spherical(unit: Tensor, norms: Tensor, weight: Tensor, centers: Tensor, generator: torch.Generator) -> Tensor:
    """Spherical k-means on the unit vectors, 20 rounds; the gain of each codeword is the mean norm of its vectors."""
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
    """Learn residual stages of 256 codewords, each on the residuals of the stages before it.

    Every stage after a group's first has a zero codeword, so that an additional stage never increases the greedy error.

    Args:
        y: ``[heads, n, head_dim]``, in the metric.
        weight: ``[heads, n]``.
        layout: which code covers which slice.
        method, iterations, seed: see `cluster`.
        fit: maps layout and codebook of the stages so far to refitted codewords of the last stage (`fit_to_loss`).

    Returns:
        float32 rounded to float16, ``[heads, layout.codes, 256, layout.width]``.
    """
    heads = y.shape[0]
    out = torch.zeros(heads, layout.codes, CODEWORDS, layout.width, dtype=torch.float32, device=y.device)
    residual = y.unflatten(-1, (layout.groups, layout.width)).permute(0, 2, 1, 3)  # [h, g, n, w]
    residual = residual.clone(memory_format=torch.contiguous_format)  # with one group too: y must not change
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
    """Fit the last stage's codewords to the loss that the encoder minimizes (`reference.search_group`). Each round
    encodes the vectors and solves for the codewords of least weighted loss. Earlier stages do not change.

    Args:
        y: ``[heads, n, head_dim]``, in the metric.
        weight: ``[heads, n]``.
        layout: layout of the stages so far.
        codebook: ``[heads, layout.codes, 256, layout.width]``.
        encode: maps vectors and codewords to codes, uint8 ``[heads, n, layout.codes]``.
        eta: weight of an error along the vector.
        iterations: number of rounds.

    Returns:
        The codewords of the last stage, float32 rounded to float16, ``[heads, groups, 256, layout.width]``.
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
    """Codewords of least ``sum weight (|e|^2 + (eta - 1) (e . unit)^2)``, where e is the difference of each target
    ``[batch, n, width]`` and its codeword. Solves the normal equations of every codeword. Codewords without vectors
    keep their value in ``words [batch, 256, width]``."""
    count = words.shape[1]
    mass = _ops.sum_by_code(weight.unsqueeze(-1), code, count)
    hold = 1e-3 * mass.mean((1, 2), keepdim=True).clamp_min(1e-30)
    normal = (eta - 1) * _ops.moments_by_code(unit, weight, code, count)
    normal.diagonal(dim1=-2, dim2=-1).add_(mass + hold)
    pulled = torch.addcmul(target, unit, (target * unit).sum(-1, keepdim=True), value=eta - 1)
    sums = _ops.sum_by_code(pulled.mul_(weight.unsqueeze(-1)), code, count)
    return torch.linalg.solve(normal, (sums + hold * words).unsqueeze(-1)).squeeze(-1)
