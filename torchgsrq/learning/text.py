"""Calibration text: from data, written by the model itself, and made-up windows for repetition and look-ups."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from torchgsrq import models
from torchgsrq.learning.progress import bar

log = logging.getLogger("torchgsrq")

TOKENS = 32768  # maximum tokens of data that calibration reads by default; more helps less, and takes longer
OWN_TOKENS = 16384  # if the data has fewer, the model writes the rest
FEWEST = 128  # minimum tokens of calibration


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text, int64 ``[n]``, without special tokens that a tokenizer would add."""
    return torch.as_tensor(
        tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    ).long()


def token_stream(model: PreTrainedModel, data: Iterable[Any], tokens: int, tokenizer: Any = None) -> Tensor:
    """The first tokens of the data, whose items are joined: strings, 1-D or 2-D token tensors, lists of token IDs, or
    batches with ``input_ids``.

    Returns:
        int64 ``[n]``, n at most ``tokens``; fewer if the data is shorter.

    Raises:
        TypeError: an item of another type.
        ValueError: no tokenizer, token IDs that are not integers of the model's vocabulary, or too few tokens.
    """
    vocabulary = getattr(models.text_config(model), "vocab_size", None)
    pieces: list[Tensor] = []
    have = 0
    data = [data] if isinstance(data, (str, Tensor)) or hasattr(data, "keys") else data
    if not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}; expected strings, token tensors or batches")
    for number, item in enumerate(data):
        if isinstance(item, str):
            tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
            item = token_ids(tokenizer, item)
        elif hasattr(item, "keys"):
            mask, item = item.get("attention_mask"), torch.as_tensor(item["input_ids"])
            item = item if mask is None else item[torch.as_tensor(mask).bool()]
        try:
            piece = torch.as_tensor(item).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"data[{number}] is a {type(item).__name__}; expected a string, token ids or a batch with input_ids"
            ) from error
        if piece.is_floating_point() or piece.is_complex() or piece.dtype == torch.bool:
            raise ValueError(f"data[{number}] holds {piece.dtype}; token ids are integers")
        if piece.numel() and (int(piece.min()) < 0 or (vocabulary and int(piece.max()) >= vocabulary)):
            raise ValueError(
                f"data[{number}] holds token ids from {int(piece.min())} to {int(piece.max())}; "
                f"the model's vocabulary is 0 to {vocabulary - 1 if vocabulary else '...'}"
            )
        pieces.append(piece.long())
        have += piece.numel()
        if have >= tokens:
            break
    stream = torch.cat(pieces)[:tokens] if pieces else torch.zeros(0, dtype=torch.long)
    if stream.numel() < FEWEST:
        raise ValueError(f"data holds {stream.numel()} tokens; calibration needs at least {FEWEST}, better {TOKENS}")
    return stream


def cut(stream: Tensor, window: int) -> Tensor:
    """Tokens ``[n]`` as windows ``[n // window, window]``; the remainder is dropped. If there are fewer tokens than a
    window, one window of all."""
    window = min(window, stream.numel())
    return stream[: stream.numel() // window * window].view(-1, window)


def tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer of ``model.name_or_path``.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except Exception as error:  # the hub, the folder and its files raise various types
        raise ValueError(
            f"data holds strings, and no tokenizer was found for {type(model).__name__} "
            f"(name_or_path={model.name_or_path!r}): pass tokenizer="
        ) from error


def known_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer of ``model.name_or_path``, or None."""
    try:
        return tokenizer_of(model) if model.name_or_path else None
    except ValueError:
        log.info("no tokenizer= was given or found: calibration reads no lists, and 1 bit will find a little less")
        return None


def own_text(model: PreTrainedModel, tokens: int, window: int, seed: int) -> Tensor:
    """Text that the model writes itself: sampled at temperature 1 from its start token, in one batch. The model's
    ``generation_config`` is ignored.

    Returns:
        Token IDs ``[rows, window]``, at least ``tokens`` in total.

    Raises:
        ValueError: the model cannot generate, or generated fewer tokens.
    """
    from transformers import LogitsProcessorList

    config = models.text_config(model)
    start = next((t for t in (config.bos_token_id, config.eos_token_id, 0) if isinstance(t, int)), 0)
    rows = -(-tokens // window)
    prompt = torch.full((rows, 1), start, device=models.input_device(model))
    named = [getattr(x, "eos_token_id", None) for x in (config, getattr(model, "generation_config", None))]
    ends = sorted({t for x in named if x is not None for t in torch.as_tensor(x).flatten().tolist()})
    what = f"{type(model).__name__} could not write its own calibration text"
    with (
        bar(what="writing calibration text", total=window - 1) as shown,
        torch.random.fork_rng(devices=[prompt.device] if prompt.is_cuda else []),
        models.refusing(what, ": call calibrate(model, config, data=...) with text"),
    ):
        torch.manual_seed(seed)
        writer = models.own_generation(model, do_sample=False, max_new_tokens=window - 1, pad_token_id=start)
        with models.quick_products(model):
            written = writer.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                logits_processor=LogitsProcessorList([_sampler(ends, shown)]),
                **_roomy_cache(model, window),
            )
        if written.shape != (rows, window):
            raise ValueError(f"it wrote {list(written.shape)} tokens of {[rows, window]}")
        return written


def _roomy_cache(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """The argument of `generate` with the cache that it would make, but with room for ``tokens`` in the layers that
    grow: concatenation at each step takes a quarter of the time."""
    if not models.takes_cache(model) or not getattr(model, "_supports_default_dynamic_cache", bool)():
        return {}
    cache = DynamicCache(config=models.text_config(model))
    cache.layers = [_RoomyLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return models.with_cache(model, cache)


class _RoomyLayer(DynamicLayer):
    """A layer of a cache that holds ``tokens`` without growing, in the dtype in which attention reads them."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Copy the keys and values ``[batch, heads, n, head_dim]`` behind the others; returns all of them."""
        given, device = (key_states, value_states), key_states.device.type
        if not self.is_initialized:
            self.lazy_initialization(*given)
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.room = [x.new_empty((*x.shape[:2], self.tokens, x.shape[3]), dtype=dtype) for x in given]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for room, x in zip(self.room, given, strict=True):
            room[:, :, start:end] = x
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


def _sampler(ends: list[int], shown: Any) -> Any:
    """A processor that samples a token, none of ``ends``, and leaves only this one to `generate`. It samples by a
    cumulative sum: torch's sampling draws a number for every token of the vocabulary, which takes a quarter of a small
    model's time."""
    from transformers import LogitsProcessor

    class Sample(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            shown.update()
            scores[:, [t for t in ends if 0 <= t < scores.shape[1]]] = -torch.inf
            total = scores.float().softmax(-1).cumsum(-1)
            drawn = torch.rand(len(total), 1, dtype=total.dtype, device=total.device) * total[:, -1:]
            token = torch.searchsorted(total, drawn, right=True).clamp_max(total.shape[1] - 1)
            return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    return Sample()


def recall_windows(windows: Tensor, tokenizer: Any, seed: int) -> Tensor:
    """Windows of the same size in which a model looks things up: half as many as the given ones, none for a single one.

    In ordinary text, attention seldom returns to one distant token, and codebooks learn little of the keys and queries
    that this needs. Half of these windows therefore repeat half of a given window; the others are lists of names and
    numbers that come twice, in two orders.

    Args:
        windows: token IDs of text, ``[n, window]``.
        tokenizer: for the lists; without it, all windows are repetitions.
        seed: seed of the lists.

    Returns:
        Token IDs ``[n // 2, window]``.
    """
    count, size = len(windows) // 2, windows.shape[1]
    lists = [] if tokenizer is None else [_list(tokenizer, size, f"{seed} {i}") for i in range(count // 2)]
    twice_listed = [x.repeat(2)[:size].to(windows.device) for x in lists if 2 * len(x) >= size]  # too short: few words
    twice = windows[len(windows) - (count - len(twice_listed)) :, : size // 2]
    return torch.stack([*(x.repeat(3)[:size] for x in twice), *twice_listed]) if count else windows[:0]


def _list(tokenizer: Any, size: int, seed: str) -> Tensor:
    """Lines of two words and a number, twice, in two orders: at least ``size / 2`` tokens."""
    draw = random.Random(seed)
    # Words of the tokenizer's own vocabulary, in any script; there may be few.
    drawn = (tokenizer.decode([draw.randrange(len(tokenizer))]).strip() for _ in range(20 * size))
    words = list(itertools.islice(filter(str.isalpha, drawn), size))
    lines: list[str] = []
    have = 0
    while have < size // 2 - 16 and len(words) > 1:
        lines.append(f"{words.pop()} {words.pop()}: {draw.randrange(10**5):05d}\n")
        have += len(token_ids(tokenizer, lines[-1]))
    again = draw.sample(lines, len(lines))
    return token_ids(tokenizer, "".join((*lines, *again)))
