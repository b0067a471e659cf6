"""What measures: distributions side by side, bits, and the retrieval tasks."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.conftest import SMALL, Words, cached
from torchgsrq import new_cache
from torchgsrq.measure import retrieval
from torchgsrq.measure.evaluate import Comparison, quality, quantized, true_bits

TEXT = "Here is some text to hide things in, and it goes on and on. " * 100


def test_comparison():
    ids = torch.randint(0, 7, (200,))
    full = torch.randn(200, 7).log_softmax(-1)
    same = Comparison()
    same.add(ids, full, full)
    found = same.result()
    assert found.kl == found.kl_p99 == found.kl_low == found.kl_high == 0 and found.agreement == 1
    assert found.ppl == found.ppl_full == pytest.approx(float((-full[:-1].gather(1, ids[1:, None])).mean().exp()))
    other = (full + 0.5 * torch.randn(200, 7)).log_softmax(-1)
    compared = Comparison()
    compared.add(ids, full, other)
    compared.add(ids, full, full)
    found = compared.result()
    want = torch.nn.functional.kl_div(other[:-1], full[:-1], log_target=True, reduction="sum") / 398
    assert found.kl == pytest.approx(float(want), rel=1e-4)
    assert found.kl_low < found.kl < found.kl_high and found.kl_median < found.kl < found.kl_p99 and found.agreement < 1


def test_true_bits_are_those_of_a_cache(llama):
    model, books = copy.deepcopy(llama[0]).half(), llama[1]
    ids = torch.randint(3, 100, (1, 200))
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        model(ids, **cached(cache))
        memory = cache.memory()
    counted = memory.total - memory.unused - memory.counters + memory.codebooks
    assert true_bits(SMALL, books, 200) == pytest.approx(8 * counted / memory.elements)


@pytest.mark.parametrize("task", retrieval.TASKS)
def test_tasks(task):
    words = Words()
    made = retrieval.trials(words, TEXT, 400, tasks=[task], count=3)[task]
    again = retrieval.trials(words, TEXT, 400, tasks=[task], count=3)[task]
    assert len(made) == 3
    for trial, same in zip(made, again, strict=True):
        assert torch.equal(trial.context, same.context) and 200 < len(trial.context) <= 410
        context = words.decode(trial.context)
        for question in trial.questions:
            assert question.answer.any() and not question.answer[0]
            answer = words.decode(question.tokens[question.answer])
            for piece in answer.split():
                assert piece in context
            if task in ("passkey", "keys", "lookup"):  # stated in the words of the question
                asked = words.decode(question.tokens).strip().split("? ")[-1]
                assert asked in context
    assert not torch.equal(made[0].context, made[1].context)
    short = retrieval.cut_short({task: made}, 4, 32)[task][0]
    assert torch.equal(short.context, torch.cat((made[0].context[:4], made[0].context[-32:])))


def test_trials_refuse():
    with pytest.raises(ValueError, match="tasks has 'riddle'; there are passkey"):
        retrieval.trials(Words(), TEXT, 100, tasks=["riddle"])
    with pytest.raises(ValueError, match="tokens=99999: the text to hide facts in has"):
        retrieval.trials(Words(), TEXT, 99999, tasks=["keys"])


def some_trial(model):
    g = torch.Generator().manual_seed(1)
    sizes = ((3, 2), (4, 1))
    questions = [
        retrieval.Question(torch.randint(3, 100, (p + a,), generator=g), torch.arange(p + a) >= p) for p, a in sizes
    ]
    return retrieval.Trial(torch.randint(3, 100, (60,), generator=g), questions)


@torch.no_grad()
def test_answers_are_scored_as_a_forward_of_the_whole_text_would(llama):
    model, books = llama
    trial = some_trial(model)
    score = retrieval.retrieval(model, {"x": [trial, trial]})["x"]
    nll, found = [], []
    for question, given in zip(trial.questions, retrieval.answer_likelihoods(model, trial), strict=True):
        whole = torch.cat((trial.context, question.tokens))[None]
        at = len(trial.context) + question.answer.nonzero().flatten()
        want = model(whole, use_cache=False).logits[0, at - 1].log_softmax(-1)
        torch.testing.assert_close(given, want)
        nll.append(-want.gather(1, whole[0, at, None]))
        found.append(bool((want.argmax(-1) == whole[0, at]).all()))
    assert score.answers == 4 and score.found == sum(found) / 2 and score.error > 0
    assert score.nll == pytest.approx(float(torch.cat(nll).mean()), rel=1e-4)
    coded = retrieval.retrieval(model, {"x": [trial, trial]}, (SMALL, books))["x"]
    assert coded.answers == 4 and coded.nll != pytest.approx(score.nll, rel=1e-6), "read through codes"


def test_an_answer_counts_when_each_of_its_tokens_is_the_likeliest():
    trial = retrieval.Trial(torch.zeros(1), [retrieval.Question(torch.tensor([7, 1, 2]), torch.arange(3) > 0)])
    right = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.3, 0.5]]).log()
    wrong = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]).log()
    assert retrieval.score([trial], [[right]]) == retrieval.Score(1, pytest.approx(-0.5 * math.log(0.8 * 0.5)), 1)
    assert retrieval.score([trial, trial], [[right], [wrong]]).found == 0.5


@torch.no_grad()
def test_quality_reads_through_the_cache(llama):
    model, books = llama
    trial = some_trial(model)
    found = quality(model, [trial.context], {"": (SMALL, books)})[""]
    assert found.kl > 0
