"""What calibration keeps of more text than it learns from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SMALL, tiny_llama
from torchgsrq.learning import statistics
from torchgsrq.learning.statistics import chunks, collect_statistics, drawn, share
from torchgsrq.learning.train import _weights, train
from torchgsrq.models import inspect_layers

pytestmark = pytest.mark.core

TOKENS = torch.randint(3, 100, (8, 128), generator=torch.Generator().manual_seed(0))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 60), st.integers(1, 70), st.sampled_from([0, 1, 4, 40]))
def test_drawn(seed, heads, tokens, keep, steep):
    """None twice, in order; with odds of any spread, zeros among them."""
    odds = (torch.rand(heads, tokens, generator=draws(seed)) + 0.1).pow(steep) * (torch.arange(tokens) % 3 > 0)
    which, count = drawn(odds, keep, draws(seed))
    assert which.shape == count.shape == (heads, min(keep, tokens))
    assert bool((which.diff(dim=1) > 0).all()) and int(which.min()) >= 0 and int(which.max()) < tokens
    assert bool((count >= 1).all()) and bool(count.isfinite().all())
    if keep >= tokens:
        assert bool((count == 1).all())
    few = ((odds > 0).sum(1) <= keep) & (steep <= 4)  # all that have any odds are drawn
    kept = torch.zeros_like(odds).scatter(1, which, 1.0)
    assert bool((kept[few][odds[few] > 0] == 1).all())


def test_drawn_stand_for_all():
    """Over many drawings, sums over what was drawn are those over all, and chances are in proportion to odds."""
    odds = torch.rand(1, 40, generator=draws()).square() + 0.01
    odds[0, 3] = 100  # certain
    facts = torch.randn(1, 40, generator=draws(1))
    generator, sums, often = draws(2), [], torch.zeros(40)
    for _ in range(4000):
        which, count = drawn(odds, 10, generator)
        sums.append((facts.gather(1, which) * count).sum())
        often[which[0]] += 1 / 4000
    drawn_sums = torch.stack(sums)
    assert abs(drawn_sums.mean() - facts.sum()) < 5 * drawn_sums.std() / 4000**0.5
    assert often[3] == pytest.approx(1, abs=1e-4)
    others = torch.arange(40) != 3
    torch.testing.assert_close(often[others], 9 * odds[0, others] / odds[0, others].sum(), rtol=0, atol=0.03)


def test_share():
    assert share(24, 1024) == 1024
    assert share(48, 1024) == 512
    assert share(100_000, 16) == 1


@pytest.fixture
def both(monkeypatch):
    """Statistics of all tokens, and of an eighth of them."""
    model = tiny_llama()
    layers = inspect_layers(model)
    everything = collect_statistics(model, layers, TOKENS)
    monkeypatch.setattr(statistics, "KEPT", 128)
    return everything, collect_statistics(model, layers, TOKENS)


def test_more_text_keeps_a_part(both):
    """As many vectors as of little text; weights, keys and places of the tokens drawn; the metric of all."""
    all_of, some = (x[1] for x in both)  # in the first layer, tokens of one kind have one key
    torch.testing.assert_close(all_of.query_metric, some.query_metric)
    for whole, part in ((all_of.keys, some.keys), (all_of.values, some.values)):
        assert [x.shape[1] for x in whole.x] == [128] * 8 and [x.shape[1] for x in part.x] == [16] * 8
        kept = zip(part.x, whole.x, part.weight, whole.weight, part.places, strict=True)
        for x, x_all, weight, weight_all, places in kept:
            for head in range(2):
                which = (x[head][:, None] == x_all[head]).all(-1).nonzero()[:, 1]
                assert len(which) == 16
                assert torch.equal(weight[head], weight_all[head][which])
                assert torch.equal(places[head].diff(), which.diff())


def test_a_part_weighs_what_all_weigh(both):
    """The weights that training gives, and the means by them."""
    for all_of, some in zip(*(x.values() for x in both), strict=True):
        for whole, part in ((all_of.values, some.values), (all_of.keys, some.keys)):
            given_all, given_some = (_weights(x, torch.sqrt) for x in (whole, part))
            torch.testing.assert_close(given_some.sum(1), given_all.sum(1), rtol=0.4, atol=0)
            counted = torch.cat(part.count, 1).sum(1)
            torch.testing.assert_close(counted, torch.full((2,), 8 * 128.0), rtol=0.5, atol=0)


def test_heads_of_a_part(both):
    """A head's vectors, places and weights go with it into a codec of its own."""
    some = both[1][0]
    one = some.of_heads([1])
    assert torch.equal(one.keys.places[2][0], some.keys.places[2][1]) and len(one.keys.x[0]) == 1
    assert torch.equal(one.values.count[2][0], some.values.count[2][1])
    codecs = train(some, [(SMALL, [(1, 1), (0.5, 0.5)])], 512)[0]
    assert [codec.layout.codes for _, codec in codecs.key.parts] == [4, 2]


def test_memory_is_of_what_is_kept(monkeypatch):
    layers = inspect_layers(tiny_llama())
    monkeypatch.setattr(statistics, "KEPT", 128)
    few, many = TOKENS[:1], TOKENS
    room = 4 * 128 * 2 * (2 * 32 + 8) * len(layers)
    assert [len(list(chunks(layers, windows, room))) for windows in (few, many)] == [1, 1]
    assert len(list(chunks(layers, many, room - 1))) == 2


def test_reading_in_bfloat16(monkeypatch):
    """With AMX, a float32 model's products are in bfloat16, the statistics of them are not; other models stay."""
    model = tiny_llama()
    seen = []

    class Seen(statistics.Statistics):
        def add(self, q, k, v, *args, **kwargs):
            seen.append((v.dtype, torch.is_autocast_enabled("cpu")))
            super().add(q, k, v, *args, **kwargs)

    def metric(tiles):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
        return collect_statistics(model, inspect_layers(model), TOKENS[:2])[0].query_metric

    monkeypatch.setattr(statistics, "Statistics", Seen)
    plain, quick = metric(False), metric(True)
    assert {*seen} == {(torch.float32, False), (torch.bfloat16, False)}
    assert float((quick - plain).norm() / plain.norm()) < 0.02
    seen.clear()
    model.half()
    metric(True)
    assert {*seen} == {(torch.float16, False)}
