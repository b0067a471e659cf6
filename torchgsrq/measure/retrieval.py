"""Retrieval: synthetic tasks with known answers, for any model and tokenizer.

Each task hides facts in a text that the model reads once, through the tested cache. Questions repeat the wording of the
facts, so that models without instruction tuning can answer too. An answer counts as found if each of its tokens is the
model's most likely next token after the right ones before it: then greedy decoding would write it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from torchgsrq import models
from torchgsrq.api import new_cache
from torchgsrq.cache import GSRQCache
from torchgsrq.learning.text import token_ids
from torchgsrq.measure.evaluate import Candidate, check_read_codes, for_measuring, quantized

_WORDS = (
    "anchor apple arrow basket bell bicycle boat book bottle bridge button camera candle carpet castle chain "
    "chair clock cloud coat compass crown desk diamond door drum eagle engine feather field flag flower forest "
    "fountain fox garden gate glove guitar hammer harbor hat helmet hill horse house island jacket kettle key "
    "kite ladder lake lamp leaf lemon library lion map market mirror moon mountain needle nest ocean orange paint "
    "palace paper pencil piano pillow pocket pond queen rabbit ring river road robot rocket roof rope rose sail "
    "school ship shoe silver sock spoon star stone storm sugar sword table tent tiger tower train tree tunnel "
    "umbrella valley violin wagon wall watch wheel window winter wolf wood yard zebra"
)
_THINGS = _WORDS.split()


@dataclass(frozen=True)
class Question:
    """A question followed by its answer: token IDs ``[n]``, and which of them are the answer, bool ``[n]``."""

    tokens: Tensor
    answer: Tensor

    def then(self, other: Question) -> Question:
        """Both, one after the other."""
        return Question(torch.cat((self.tokens, other.tokens)), torch.cat((self.answer, other.answer)))


@dataclass(frozen=True)
class Trial:
    """A text, token IDs ``[n]``, and questions, each asked directly after it."""

    context: Tensor
    questions: list[Question]


@dataclass(frozen=True)
class Score:
    """The result of a task.

    Attributes:
        found: fraction of the answers that greedy decoding would write.
        nll: mean negative log-likelihood per token of the answers, in nats. It is more informative than ``found`` if
            few or all answers are found.
        answers: number of answers.
    """

    found: float
    nll: float
    answers: int

    @property
    def error(self) -> float:
        """Standard error of ``found``."""
        return math.sqrt(max(self.found * (1 - self.found), 0.25 / self.answers) / self.answers)


class _Writer:
    """Writes texts as token IDs, with facts hidden in a filler text."""

    def __init__(self, tokenizer: Any, filler: Tensor, seed: str) -> None:
        self.tokenizer, self.filler, self.random = tokenizer, filler, random.Random(seed)

    def ids(self, text: str) -> Tensor:
        return token_ids(self.tokenizer, text)

    def question(self, prompt: str, answer: str) -> Question:
        """A question. The answer begins where the tokens of prompt and answer differ from those of the prompt alone."""
        alone, whole = self.ids(prompt), self.ids(prompt + answer)
        size = min(len(alone), len(whole) - 1)
        same = (alone[:size] == whole[:size]).long().cumprod(0).sum()
        return Question(whole, torch.arange(len(whole)) >= same)

    def hidden(self, facts: list[Tensor], tokens: int, head: Tensor | None = None, at: float | None = None) -> Tensor:
        """The facts, hidden in a stretch of the filler: evenly spread, or a single one at depth ``at`` from 0 to 1."""
        head = self.ids("") if head is None else head
        room = max(tokens - len(head) - sum(map(len, facts)), len(facts))
        if room > len(self.filler):
            raise ValueError(f"tokens={tokens}: the text to hide facts in has {len(self.filler)} tokens, not {room}")
        start = self.random.randrange(len(self.filler) - room + 1)
        stretch = self.filler[start : start + room]
        depths = [at] if at is not None else [(i + 0.5) / len(facts) for i in range(len(facts))]
        pieces, done = [head], 0
        for fact, depth in zip(facts, depths, strict=True):
            cut = int(depth * room)
            pieces += [stretch[done:cut], fact]
            done = cut
        return torch.cat((*pieces, stretch[done:]))

    def digits(self, count: int = 5) -> str:
        return "".join(str(self.random.randrange(10)) for _ in range(count))

    def things(self, count: int) -> list[str]:
        return self.random.sample(_THINGS, count)


def passkey(write: _Writer, tokens: int, depth: float) -> Trial:
    """One pass key in a long text."""
    key = write.digits()
    head = write.ids(
        "There is an important pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    )
    fact = write.ids(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    asked = write.question("\nWhat is the pass key? The pass key is", f" {key}")
    return Trial(write.hidden([fact], tokens, head, depth), [asked])


def keys(write: _Writer, tokens: int, depth: float) -> Trial:
    """Eight codes of eight things, in the same wording: each question has one right and seven wrong answers."""
    codes = {thing: write.digits() for thing in write.things(8)}
    facts = [write.ids(f"\nThe secret code of the {thing} is {code}.\n") for thing, code in codes.items()]
    asked = [write.question(f"\nThe secret code of the {thing} is", f" {code}") for thing, code in codes.items()]
    return Trial(write.hidden(facts, tokens), asked)


def lookup(write: _Writer, tokens: int, depth: float) -> Trial:
    """A list of names and numbers, as long as the text; eight of them are looked up."""
    first, second = write.things(len(_THINGS)), write.things(len(_THINGS))
    lines = [(f"{one} {other}", write.digits()) for one, other in zip(first, second, strict=True)]
    line = len(write.ids("\nold lamp: 12345"))
    lines = lines[: max(8, tokens // (line + 1))]
    context = write.ids("Names and numbers.\n" + "".join(f"\n{name}: {number}" for name, number in lines) + "\n")
    asked = [write.question(f"\n{name}:", f" {number}") for name, number in lines[len(lines) // 16 :: len(lines) // 8]]
    return Trial(context, asked[:8])


def tracing(write: _Writer, tokens: int, depth: float) -> Trial:
    """Two hops, far apart in the text: the box that a thing is in, and the room that the box is in."""
    things, boxes, rooms = (write.things(4) for _ in range(3))
    inside = [f"The {thing} is in the {box} box." for thing, box in zip(things, boxes, strict=True)]
    stands = [f"The {box} box is in the {room} room." for box, room in zip(boxes, rooms, strict=True)]
    facts = [write.ids(f"\n{fact}\n") for fact in (*write.random.sample(stands, 4), *inside)]
    asked = [
        write.question(f"\nThe {thing} is in the", f" {box}").then(
            write.question(f" box.\n\nThe {box} box is in the", f" {room}")
        )
        for thing, box, room in zip(things, boxes, rooms, strict=True)
    ]
    return Trial(write.hidden(facts, tokens), asked)


def counting(write: _Writer, tokens: int, depth: float) -> Trial:
    """Lists in which one word makes up a third of all words, each followed by that word; asked for the last, longest
    list."""
    words = write.things(len(_THINGS))

    def listed(common: str, count: int) -> str:
        others = [word for word in words if word != common]
        found = [common] * (count // 3) + [write.random.choice(others) for _ in range(count - count // 3)]
        write.random.shuffle(found)
        return "List: " + ", ".join(found) + ".\nThe most common word:"

    size = len(write.ids(f" {words[0]},"))
    short = "".join(f"{listed(word, 12)} {word}\n\n" for word in words[:3])
    room = tokens - len(write.ids(short))
    text = short + listed(words[3], max(12, room // (size + 1)))
    ask = "\nThe most common word:"
    return Trial(write.ids(text.removesuffix(ask)), [write.question(ask, f" {words[3]}")])


TASKS: dict[str, Callable[[_Writer, int, float], Trial]] = {
    task.__name__: task for task in (passkey, keys, lookup, tracing, counting)
}


def trials(
    tokenizer: Any, text: str, tokens: int, *, tasks: Iterable[str] = tuple(TASKS), count: int = 8, seed: int = 0
) -> dict[str, list[Trial]]:
    """Create trials, by task.

    Args:
        tokenizer: the model's tokenizer.
        text: the filler in which facts are hidden; longer than ``tokens`` tokens.
        tokens: length, in tokens, of the text that the model reads.
        tasks: names in `TASKS`.
        count: trials per task, at evenly spread depths.
        seed: seed of all random draws.

    Raises:
        ValueError: an unknown task, or a text that is too short.
    """
    filler = token_ids(tokenizer, text)
    made = {}
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks has {task!r}; there are {', '.join(TASKS)}")
        writers = (_Writer(tokenizer, filler, f"{seed} {task} {i}") for i in range(count))
        made[task] = [TASKS[task](write, tokens, (i + 0.5) / count) for i, write in enumerate(writers)]
    return made


def cut_short(trials: dict[str, list[Trial]], sinks: int, recent: int) -> dict[str, list[Trial]]:
    """The same questions after only the first and last tokens of the text: the baseline of sinks and window alone."""

    def cut(trial: Trial) -> Trial:
        inside = max(len(trial.context) - recent, sinks)
        return Trial(torch.cat((trial.context[:sinks], trial.context[inside:])), trial.questions)

    return {task: [cut(trial) for trial in several] for task, several in trials.items()}


@torch.no_grad()
def retrieval(
    model: PreTrainedModel, trials: dict[str, list[Trial]], candidate: Candidate | None = None
) -> dict[str, Score]:
    """Measure a model's answers, by task.

    Args:
        model: a model that is not quantized.
        trials: from `trials`.
        candidate: config and codebooks of the tested cache; None for the model's own cache.
    """
    scores = {}
    with nullcontext() if candidate is None else quantized(model, for_measuring(candidate[0]), candidate[1]):
        for task, several in trials.items():
            scores[task] = score(several, [answer_likelihoods(model, trial) for trial in several])
    return scores


def score(trials: Sequence[Trial], likelihoods: Sequence[list[Tensor]]) -> Score:
    """The score of trials, from the `answer_likelihoods` of each."""
    nll, found = [], []
    for trial, given in zip(trials, likelihoods, strict=True):
        for question, likely in zip(trial.questions, given, strict=True):
            right = likely.gather(1, question.tokens[question.answer, None])
            nll.append(-right[:, 0])
            found.append(bool((likely <= right).all()))
    return Score(sum(found) / len(found), float(torch.cat(nll).mean()), len(found))


@torch.no_grad()
def answer_likelihoods(model: PreTrainedModel, trial: Trial) -> list[Tensor]:
    """Log-probabilities ``[n, vocabulary]`` at each of the n answer tokens, for every question.

    The text is read once; the questions then follow as the rows of a batch.
    """
    cache = new_cache(model) if hasattr(model, "_gsrq") else DynamicCache(config=model.config)
    model(trial.context[None].to(model.device), **models.with_cache(model, cache), use_cache=True, logits_to_keep=1)
    if isinstance(cache, GSRQCache):
        check_read_codes(cache)
    cache.batch_repeat_interleave(len(trial.questions))
    rows = pad_sequence([q.tokens for q in trial.questions], batch_first=True)
    out = model(rows.to(model.device), **models.with_cache(model, cache), use_cache=True)
    logits = out.logits.float().log_softmax(-1).cpu()
    return [row[q.answer.nonzero().flatten() - 1] for q, row in zip(trial.questions, logits, strict=True)]
