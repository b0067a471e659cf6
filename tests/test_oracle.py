"""Every mode of generation, and every operation on a cache, against the oracle."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.conftest import SMALL, cached, tiny_books, tiny_llama
from tests.oracle import Oracle, watch
from torchgsrq import new_cache
from torchgsrq.measure.evaluate import quantized

PROMPT = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(3, 40, dtype=torch.long)
PADDED[1, :24], PADDED[2, :9] = 0, 0

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 5},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 16},
    "static": {"cache_implementation": "static"},
}


def both(model, books, config, run):
    """What ``run(cache)`` gives on a quantized cache and on the oracle."""
    out = []
    for kind in ("quantized", "oracle"):
        torch.manual_seed(0)
        if kind == "quantized":
            with quantized(model, config, books):
                out.append(run(new_cache(model)))
        else:
            oracle = Oracle(books, config, model.config)
            handle = watch(model, oracle)
            out.append(run(oracle))
            handle.remove()
    return out


def generate(model, cache, mode, ids, mask, tokens=24):
    arguments = {"do_sample": False, **mode}
    if isinstance(cache, Oracle):
        arguments.pop("cache_implementation", None)
    if isinstance(cache, Oracle) or "cache_implementation" not in mode:
        arguments |= cached(cache)
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )


def assert_alike(got, want):
    """Logits are alike; a code that falls to the other side of a tie, where rounding differs, is forgiven."""
    got, want = (x if isinstance(x, torch.Tensor) else torch.stack(x.logits) for x in (got, want))
    off = (got - want).abs().amax(-1) > 1e-3
    assert off.float().mean() < 0.03, (
        f"{off.float().mean():.0%} of the logits differ, by up to {(got - want).abs().max():.3g}"
    )


@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_generation(llama, mode, padded):
    model, books = llama
    mask = PADDED if padded else torch.ones_like(PADDED)
    got, want = both(model, books, SMALL, lambda cache: generate(model, cache, MODES[mode], PROMPT * mask, mask))
    assert torch.equal(got.sequences, want.sequences)
    assert_alike(got, want)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
@torch.no_grad()
def test_assisted_generation(llama, how):
    """A token that became code while drafting stays code, in both."""
    model, books = llama
    arguments = (
        {"assistant_model": tiny_llama(num_hidden_layers=1)} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    )
    ids = PROMPT[:1].repeat(1, 2)
    mask = torch.ones_like(ids)
    got, want = both(model, books, SMALL, lambda cache: generate(model, cache, arguments, ids, mask, 40))
    assert torch.equal(got.sequences, want.sequences)


def turns(model, cache, pieces, mask, positions=None, between=lambda cache, piece: None):
    """The logits of several forwards on one cache."""
    out, past = [], 0
    for number, n in enumerate(pieces):
        ids = PROMPT[: mask.shape[0], past : past + n]
        arguments = {} if positions is None else {"position_ids": positions[..., past : past + n]}
        past += n
        out.append(model(ids, attention_mask=mask[:, :past], **cached(cache), use_cache=True, **arguments).logits)
        between(cache, number)
    return torch.cat(out, 1)


def by_mask(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("rows", [[1, 0, 2], [1, 1, 0], [2], (1, 2), [False, True, True]], ids=str)
@torch.no_grad()
def test_rows_that_have_not_begun_follow(llama, rows):
    """Selecting rows while one is still padding."""
    model, books = llama

    def run(cache):
        model(PROMPT[:, :16], attention_mask=PADDED[:, :16], position_ids=by_mask(PADDED)[:, :16],
              **cached(cache), use_cache=True)  # fmt: skip
        cache.batch_select_indices(torch.tensor(rows) if isinstance(cache, Oracle) else rows)
        picked = torch.tensor(rows)
        mask, ids = PADDED[picked], PROMPT[picked]
        later = [model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=by_mask(mask)[:, a:b],
                       **cached(cache), use_cache=True).logits for a, b in ((16, 32), (32, 33), (33, 40))]  # fmt: skip
        return torch.cat(later, 1)[mask[:, 16:].bool()]

    got, want = both(model, books, SMALL, run)
    assert_alike(got, want)


GAPS = {
    "left padding, again": [[1] * 40, [0] * 8 + [1] * 10 + [0] * 6 + [1] * 16],
    "right padding": [[1] * 40, [1] * 12 + [0] * 6 + [1] * 22],
    "three turns": [[1] * 12 + [0] * 2 + [1] * 26, [0] * 3 + [1] * 9 + [0] * 4 + [1] * 4 + [0] * 8 + [1] * 12],
}


@pytest.mark.parametrize("fixed", [None, 64])
@pytest.mark.parametrize("pieces", [(40,), (18, 22), (12, 12, 16), (1,) * 40], ids=len)
@pytest.mark.parametrize("gap", GAPS)
@torch.no_grad()
def test_padding_in_the_middle(llama, gap, pieces, fixed):
    """Keys after a gap are coded at their positions, however the text was cut."""
    model, books = llama
    mask = torch.tensor(GAPS[gap])
    positions = by_mask(mask)
    kept = {}

    def run(cache):
        if fixed and not isinstance(cache, Oracle):
            cache = new_cache(model, fixed)
        logits = turns(model, cache, pieces, mask, positions)
        kept[isinstance(cache, Oracle)] = cache
        return logits[mask.bool()]

    got, want = both(model, books, SMALL, run)
    assert_alike(got, want)
    codes = int(kept[False].layers[1].keys.encoded.max())
    for name, i in (("keys", 0), ("values", 1)):
        ours = getattr(kept[False].layers[1], name).dequantize()[:, :, :codes]
        off = ((ours - kept[True].layers[1].shown[i][:, :, :codes]).abs().amax((1, 3)) > 1e-3) & mask[:, :codes].bool()
        assert off.float().mean() < 0.03


@torch.no_grad()
def test_positions_of_a_gap_follow_every_operation(llama):
    """Reorder, repeat, select, crop, growth and a file keep what a row's positions are."""
    model, books = llama
    mask = torch.tensor(GAPS["left padding, again"])
    positions = by_mask(mask)

    def run(cache):
        turns(model, cache, (40,), mask, positions)
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        cache.crop(-5)
        out = []
        for i in range(35, 35 + 300):  # past the first capacity
            ids = torch.full((2, 1), 3 + i % 90)
            at = positions[1, 34] + 1 + i - 35
            out.append(model(ids, **cached(cache), position_ids=at.expand(2, 1), use_cache=True,
                             attention_mask=torch.cat((mask[[1, 1], :35], torch.ones(2, i - 34)), 1).long()).logits)  # fmt: skip
        return torch.cat(out, 1)

    got, want = both(model, books, SMALL, run)
    assert_alike(got, want)


@torch.no_grad()
def test_a_gap_beyond_the_capacity(llama):
    """A chunk that makes the buffers grow, with padding in what is new."""
    model, books = llama
    ids = torch.randint(3, 100, (2, 300), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 258:270] = 0

    def run(cache):
        cut = [model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=by_mask(mask)[:, a:b],
                     **cached(cache), use_cache=True).logits for a, b in ((0, 250), (250, 300))]  # fmt: skip
        return torch.cat(cut, 1)[mask.bool()]

    got, want = both(model, books, SMALL, run)
    assert_alike(got, want)
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        run(cache)
        assert cache.layers[0].keys.start[1, 272:302].tolist() == [*range(258, 288)]


FORMS = {
    "one row for all": lambda mask: mask[:1],
    "shorter than the text": lambda mask: mask[:, :-2],
    "of four dimensions": lambda mask: (
        torch.ones(40, 40, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    ),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forms_of_masks(llama, form):
    """What transformers takes, the cache takes."""
    model, books = llama
    mask = torch.ones(2, 40, dtype=torch.long)
    if form == "of four dimensions":
        mask[1, :9] = 0
    with quantized(model, SMALL, books):
        cache = model(
            PROMPT[:2], attention_mask=FORMS[form](mask), position_ids=by_mask(mask), use_cache=True
        ).past_key_values
    assert cache.layers[0].keys.start[:, :2].tolist() == [[0, 0], [9, 9] if form == "of four dimensions" else [0, 0]]


@torch.no_grad()
def test_after_a_forward_that_failed(llama):
    """Where rows began in it is forgotten."""
    model, books = llama
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :20] = 0
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        with pytest.raises(ValueError, match="layer 0, keys: x holds NaN or inf in row"):
            model(
                inputs_embeds=torch.full((2, 40, 64), torch.nan),
                attention_mask=mask,
                position_ids=by_mask(mask),
                **cached(cache),
            )
        model(PROMPT[:1], **cached(cache), use_cache=True)
        assert cache.layers[0].keys.start.tolist() == [[0, 0]]


@torch.no_grad()
def test_a_gap_survives_a_file(llama, tmp_path):
    model, books = llama
    mask = torch.tensor(GAPS["three turns"])
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        turns(model, cache, (40,), mask, by_mask(mask))
        cache.save(tmp_path / "gap.safetensors")
        for fixed in (None, 300):
            again = new_cache(model, fixed)
            again.load(tmp_path / "gap.safetensors")
            for a, b in zip(cache.layers, again.layers, strict=True):
                assert torch.equal(a.keys.dequantize()[:, :, :40], b.keys.dequantize()[:, :, :40])
            one, two = (model(PROMPT[:2, :3], **cached(copy.deepcopy(c)), position_ids=by_mask(mask)[:, -1:] + 1 + torch.arange(3),
                              use_cache=True).logits for c in (cache, again))  # fmt: skip
            torch.testing.assert_close(one, two)


@torch.no_grad()
def test_many_queries_over_a_gap(llama):
    """The block-wise form of attention, for many query rows, knows the positions as well."""
    model, books = llama
    config = dataclasses.replace(SMALL, recent_tokens=2)
    mask = torch.tensor(GAPS["left padding, again"])

    def run(cache):
        return turns(model, cache, (20, 20), mask, by_mask(mask))[mask.bool()]

    got, want = both(model, books, config, run)
    assert_alike(got, want)


def test_the_oracle_is_not_the_model(llama):
    """Were the oracle to show exact tokens, all tests here would pass a cache that does not quantize."""
    model, books = llama
    with torch.no_grad():
        full = generate(model, None, {}, PROMPT, torch.ones_like(PROMPT))
        got, _ = both(model, books, SMALL, lambda cache: generate(model, cache, {}, PROMPT, torch.ones_like(PROMPT)))
    assert (torch.stack(got.logits) - torch.stack(full.logits)).abs().max() > 0.1


@torch.no_grad()
def test_contrastive_positions_of_tiny_books():
    """Codebooks of another seed give other logits: the oracle reads the same codec as the cache, not any."""
    model = tiny_llama()
    a, b = tiny_books(model), tiny_books(model, seed=1)
    mask = torch.ones_like(PROMPT)
    got, _ = both(model, a, SMALL, lambda cache: generate(model, cache, {}, PROMPT, mask))
    _, want = both(model, b, SMALL, lambda cache: generate(model, cache, {}, PROMPT, mask))
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() > 1e-2
