"""Clustering: pinned against straightforward recomputation and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchgsrq import reference
from torchgsrq.codec.kmeans import METHODS, cluster, fit_to_loss, nearest, train_codebook
from torchgsrq.codec.layout import Layout

pytestmark = pytest.mark.core


def points(n: int = 400, width: int = 3, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


def slow_update(x, w, centers, method):
    """One round, vector by vector, as the paper writes it (arXiv 2607.01065), in float64."""
    shape = [c / np.linalg.norm(c) if np.linalg.norm(c) else c for c in centers]
    gain = [np.linalg.norm(c) for c in centers]
    code = [max(range(len(shape)), key=lambda k: 2 * gain[k] * (v @ shape[k]) - gain[k] ** 2) for v in x]
    out = []
    for k in range(len(shape)):
        mine = [(v, m) for v, m, c in zip(x, w, code, strict=True) if c == k]
        total = sum(m for _, m in mine)
        if method == "kmeans":
            out.append(sum(m * v for v, m in mine) / total)
            continue
        direction = sum(m * v / np.linalg.norm(v) for v, m in mine)
        new = direction / np.linalg.norm(direction)
        out.append(sum(m * (v @ new) for v, m in mine) / total * new)
    return np.stack(out)


@pytest.mark.parametrize("method", METHODS)
def test_one_round_is_the_papers(method, monkeypatch):
    """From a given start, one round equals the plain loop."""
    import torchgsrq.codec.kmeans as module

    x, w = points(200, 4, 1), torch.rand(1, 200, generator=torch.Generator().manual_seed(1)) + 0.1
    start = points(6, 4, 1, seed=2)
    monkeypatch.setattr(module, "samples", lambda *_: start)
    monkeypatch.setattr(module, "spherical", lambda *_: start)
    got = cluster(x, w, codewords=6, method=method, iterations=1)
    want = slow_update(x[0].double().numpy(), w[0].double().numpy(), start[0].double().numpy(), method)
    np.testing.assert_allclose(got[0].numpy(), want, rtol=1e-4, atol=1e-5)


def test_assignment_is_the_nearest_codeword():
    x, centers = points(300, 5), points(20, 5, seed=3)
    code, error = nearest(x, centers)
    distance = torch.cdist(x, centers).square()
    assert torch.equal(code, distance.argmin(-1))
    torch.testing.assert_close(error, distance.amin(-1), rtol=1e-4, atol=1e-5)


def test_distortion_is_that_of_scipy():
    """Within 2% of scipy's k-means with k-means++ starts, on clustered data."""
    from scipy.cluster.vq import kmeans2

    g = torch.Generator().manual_seed(5)
    x = torch.randn(1, 3000, 4, generator=g) + 1.5 * torch.randn(16, 4, generator=g)[torch.arange(3000) % 16]
    ours = float(np.mean([nearest(x, cluster(x, codewords=32, iterations=30, seed=s))[1].mean() for s in range(3)]))
    theirs = []
    for seed in range(3):
        centers, _ = kmeans2(x[0].double().numpy(), 32, iter=30, minit="++", seed=seed)
        theirs.append(float(torch.cdist(x[0].double(), torch.from_numpy(centers)).amin(-1).square().mean()))
    assert ours < 1.02 * np.mean(theirs)


@pytest.mark.parametrize("method", METHODS)
def test_more_rounds_do_not_hurt_and_seeds_repeat(method):
    x = points(600, 6)
    few, many = (nearest(x, cluster(x, codewords=16, method=method, iterations=i))[1].mean() for i in (1, 20))
    assert many <= few * 1.01
    assert torch.equal(cluster(x, codewords=16, method=method, seed=4), cluster(x, codewords=16, method=method, seed=4))
    assert not torch.equal(
        cluster(x, codewords=16, method=method, seed=4), cluster(x, codewords=16, method=method, seed=5)
    )


def test_batch_entries_do_not_see_each_other():
    x = points(300, 4, batch=1).repeat(3, 1, 1)
    w = torch.ones(3, 300)
    out = cluster(x, w, codewords=300 // 4, iterations=3)
    again = cluster(x.clone().index_fill_(0, torch.tensor([2]), 7.0), w, codewords=300 // 4, iterations=3)
    assert torch.equal(out[:2], again[:2])


def test_weights_move_codewords():
    x = torch.tensor([[[0.0], [1.0]]]).repeat(1, 50, 1)
    w = torch.where(x[..., 0] > 0, 3.0, 1.0)
    out = cluster(x, w, codewords=1, iterations=2)
    torch.testing.assert_close(out, torch.tensor([[[0.75]]]))


@pytest.mark.parametrize("method", METHODS)
def test_awkward_data(method):
    """Fewer vectors than codewords, equal vectors, zeros, weights of zero: finite, and exact where it can be."""
    few = points(5, 3, 1)
    out = cluster(few, codewords=8, method=method)
    assert out.shape == (1, 8, 3)
    assert nearest(few, out)[1].max() < 1e-6
    same = torch.ones(2, 100, 3)
    out = cluster(same, codewords=4, method=method, iterations=3)
    assert out.isfinite().all() and nearest(same, out)[1].max() < 2e-3
    zeros = torch.zeros(1, 50, 3)
    assert cluster(zeros, codewords=4, method=method, iterations=2).abs().max() <= 1e-4
    unweighted = cluster(points(50), torch.zeros(2, 50), codewords=4, method=method, iterations=2)
    assert unweighted.isfinite().all()


def test_empty_clusters_are_seeded_again():
    """Two far points among thousands of equal ones: every codeword still ends somewhere useful."""
    x = torch.zeros(1, 1000, 2)
    x[0, :3] = torch.tensor([[50.0, 0], [0, 50.0], [-50.0, 0]])
    out = cluster(x, codewords=4, iterations=10)
    assert nearest(x, out)[1].max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("distinct", "bound"), [(60, 1e-6), (200, 1e-6), (300, 2e-3)])
def test_equal_vectors_are_learned_alike_with_and_without_kernels(distinct, bound, method, monkeypatch):
    """Of few distinct vectors, as keys and values of bytes are, each gets a codeword while there are any, whatever the
    order in which distances were summed up."""
    import torchgsrq.codec.kmeans as module

    g = torch.Generator().manual_seed(distinct)
    often = 1 / torch.arange(1.0, distinct + 1).expand(2, -1)
    which = torch.multinomial(often, 2000, replacement=True, generator=g)
    y = torch.randn(2, distinct, 16, generator=g).gather(1, which.unsqueeze(-1).expand(-1, -1, 16))
    weight, errors = torch.rand(2, 2000, generator=g), []
    for ops in (torch.ops.torchgsrq, module):
        monkeypatch.setattr(module, "_ops", ops)
        book = train_codebook(y.clone(), weight, Layout(16, 1, 1), method=method)
        errors.append(float((weight * nearest(y.double(), book[:, 0].double())[1]).sum()))
    assert max(errors) < bound * float((weight * y.square().sum(-1)).sum())
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.sampled_from(METHODS))
def test_never_worse_than_one_codeword(n, width, seed, method):
    x = points(n, width, 1, seed)
    one = (x - x.mean(1, keepdim=True)).square().sum()
    out = cluster(x, codewords=4, method=method, iterations=5, seed=seed)
    assert out.isfinite().all()
    assert float(nearest(x, out)[1].sum()) <= float(x.square().sum()) * 1.01 + 1e-4
    if method == "kmeans":
        assert float(nearest(x, out)[1].sum()) <= float(one) * 1.5 + 1e-4


def loss(y, weight, layout, codebook, codes, eta):
    """What the encoder minimizes, group by group, as its docstring writes it."""
    total = 0.0
    for g in range(layout.groups):
        part = y[..., layout.start(g) : layout.start(g) + layout.width].double()
        tables, some = codebook[:, g :: layout.groups].double(), codes[..., g :: layout.groups].long()
        heads = torch.arange(y.shape[0])[:, None]
        error = part - sum(tables[heads, s, some[..., s]] for s in range(tables.shape[1]))
        along = (error * torch.nn.functional.normalize(part, dim=-1)).sum(-1)
        total += float((weight * (error.square().sum(-1) + (eta - 1) * along.square())).sum())
    return total


def encoder(layout, eta):
    def encode(y, codebook):
        found = torch.zeros(*y.shape[:2], layout.codes, dtype=torch.uint8)
        for g in range(layout.groups):
            part = y[..., layout.start(g) : layout.start(g) + layout.width].contiguous()
            found[..., g :: layout.groups] = reference.search_group(part, codebook[:, g :: layout.groups], eta)
        return found

    return encode


@given(st.sampled_from([(1, 1), (2, 2), (2, 3), (1, 3)]), st.sampled_from([1, 4, 8]), st.integers(0, 5))
def test_codewords_fitted_to_the_loss_have_less_of_it(shape, eta, seed):
    layout = Layout(8, *shape)
    y = points(1600, 8, 2, seed) + 0.5
    weight = torch.rand(2, 1600, generator=torch.Generator().manual_seed(seed))
    before = train_codebook(y, weight, layout, iterations=2)
    last = (layout.stages - 1) * layout.groups
    after = before.clone()
    after[:, last:] = fit_to_loss(y, weight, layout, before, encoder(layout, eta), eta, iterations=2)
    assert torch.equal(after, after.half().float())
    assert not after[:, layout.groups :, 0].any()  # the zero codewords stay
    losses = [loss(y, weight, layout, book, encoder(layout, eta)(y, book), eta) for book in (before, after)]
    assert losses[1] < losses[0]
    again = fit_to_loss(y, weight, layout, before, encoder(layout, eta), eta, iterations=2)
    assert torch.equal(after[:, last:], again)


@pytest.mark.parametrize("groups", [1, 2])
def test_training_leaves_what_it_is_given(groups):
    y = points(300, 8)
    train_codebook(y, torch.ones(2, 300), Layout(8, groups, 2 * groups), iterations=1)
    assert torch.equal(y, points(300, 8))


def test_fitted_stages_are_nested():
    y, w = points(900, 8, 2), torch.ones(2, 900)

    def fit(layout, codebook):
        return fit_to_loss(y, w, layout, codebook, encoder(layout, 4), 4, iterations=2)

    many, few = (train_codebook(y, w, Layout(8, 2, n), iterations=2, fit=fit) for n in (4, 2))
    assert torch.equal(many[:, :2], few)
    assert not torch.equal(few, train_codebook(y, w, Layout(8, 2, 2), iterations=2))


def test_one_fitted_stage_is_the_least_of_its_loss():
    """With the codes given, the closed form: each codeword solves its own normal equations."""
    eta, layout = 8, Layout(4, 1, 1)
    y, weight = points(3000, 4, 1, seed=1), torch.ones(1, 3000)
    before = train_codebook(y, weight, layout, iterations=2)
    code = nearest(y, before[:, 0])[0]
    after = fit_to_loss(y, weight, layout, before, lambda *_: code[..., None].to(torch.uint8), eta, iterations=1)
    for c in code[0, :16].tolist():
        mine = y[0, code[0] == c].double()
        unit = torch.nn.functional.normalize(mine, dim=-1)
        normal = mine.shape[0] * torch.eye(4).double() + (eta - 1) * unit.T @ unit
        want = torch.linalg.solve(normal, eta * mine.sum(0))
        torch.testing.assert_close(after[0, 0, c].double(), want, rtol=2e-2, atol=2e-2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\)"):
        cluster(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least 1"):
        cluster(torch.zeros(2, 0, 3))
    with pytest.raises(ValueError, match="weight has shape"):
        cluster(torch.zeros(2, 4, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="choose one of kmeans"):
        cluster(torch.zeros(2, 4, 3), method="lloyd")
