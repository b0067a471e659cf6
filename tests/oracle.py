"""What a quantized cache must do, by other means: the *unquantized* model on a cache that keeps every token exactly and
returns what the README says. Attention, masks, beams and crops are transformers' own; only the codec's reference is
shared with what is tested."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from torchgsrq import Codebooks, GSRQConfig, reference
from torchgsrq.codec.rope import rotate
from torchgsrq.models import decoder, given_cache


class _Rows:
    """What is kept of each row beside transformers' own tensors goes along in every operation on rows."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each(lambda t: t[beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices])


class Oracle(_Rows, DynamicCache):
    """A cache for the unquantized model; `watch` it over a model first, so that it knows positions and padding."""

    def __init__(self, books: Codebooks, config: GSRQConfig, model_config: Any) -> None:
        super().__init__(config=model_config)
        for i, layer in enumerate(self.layers):
            if i in books:
                hybrid = isinstance(layer, LinearAttentionLayer)
                self.layers[i] = (OracleHybridLayer if hybrid else OracleLayer)(self, books[i], config)
        self.positions: Tensor | None = None  # [rows, slots]
        self.real: Tensor | None = None  # [rows, slots]

    def see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder: note each token's position, and whether it is padding."""
        if given_cache(kwargs) is not self:
            return
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        rows, n = tokens.shape[:2]
        past = self.get_seq_length()
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if isinstance(mask, dict):
            mask = mask.get("full_attention", mask.get("hybrid"))
        if mask is not None and mask.ndim == 4:
            mask = (mask if mask.dtype == torch.bool else mask > -1)[:, 0].any(1)
        if positions is None:
            positions = torch.arange(past, past + n)[None]
        if positions.ndim == 3:
            positions = positions[-3]
        real = torch.ones(rows, n, dtype=torch.bool) if mask is None else mask[:, past : past + n].bool()
        positions = positions.expand(rows, n)
        if past:
            positions = torch.cat((self.positions, positions), 1)
            real = torch.cat((self.real, real), 1)
        self.positions, self.real = positions, real

    def _each(self, choose: Any) -> None:
        if self.positions is not None:
            self.positions, self.real = choose(self.positions), choose(self.real)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._each(lambda t: t[:, : self.get_seq_length()])

    def splice(self, piece: Oracle, skip: int) -> None:
        """Put a piece behind: codes move by whole frames, what is exact to just where it follows."""
        held, places = self.real.shape[1], torch.arange(skip, piece.get_seq_length())
        wanted = self.real.sum(1, keepdim=True) - skip
        first = self.layers[0]
        frame = first.codecs.key.frame
        shift = torch.where(places < piece.layers[0].coded, wanted // frame * frame, wanted)
        self.positions = torch.cat((self.positions, places + shift), 1)
        self.real = torch.cat((self.real, torch.ones_like(shift, dtype=torch.bool)), 1)
        for layer, other in zip(self.layers, piece.layers, strict=True):
            layer.splice(other, skip, shift, held)


class OracleLayer(_Rows, DynamicLayer):
    """Keys and values as they were given (``keys``, ``values``) and as attention is shown them (``shown``)."""

    def __init__(self, cache: Oracle, codecs: Any, config: GSRQConfig) -> None:
        super().__init__()
        self.cache, self.codecs, self.config = cache, codecs, config
        self.coded: Tensor | None = None  # [rows], slots that are shown decoded
        self.shown: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first, n = self.get_seq_length(), key_states.shape[2]
        super().update(key_states, value_states)
        new = [key_states, value_states]
        self.shown = [torch.cat((a, b), 2) for a, b in zip(self.shown, new, strict=True)] if self.shown else new
        before = [t.clone() for t in self.shown]
        self._become_codes(self._due(first + n))
        return tuple(before if n > 1 else self.shown)  # what became codes by this very prompt was exact to it

    def _start(self) -> Tensor:
        """The slot of each row's first token, ``[rows]``."""
        real = self.cache.real.int()
        return torch.where(real.any(1), real.argmax(1), real.shape[1])

    def _due(self, length: int) -> Tensor:
        """The slots below which rows are codes, by the tokens of their own."""
        c, start = self.config, self._start()
        blocks = (length - start - c.recent_tokens).clamp(min=0) // c.block_tokens
        return (start + blocks * c.block_tokens).clamp(max=length)

    def _become_codes(self, due: Tensor) -> None:
        """Show all slots below these as their codes say, but for sinks."""
        was = torch.zeros_like(due) if self.coded is None else self.coded
        self.coded = was.maximum(due)
        slots = slice(int(was.min()), int(self.coded.max()))
        at, start = torch.arange(self.shown[0].shape[2])[slots], self._start()[:, None]
        coded = (at >= was[:, None]) & (at < self.coded[:, None])
        coded &= (at < start) | (at >= start + self.config.sink_tokens)
        position = self.cache.positions[:, slots]
        self.shown = [t.clone() for t in self.shown]
        for t, codec in zip(self.shown, self.codecs, strict=True):
            exact = t[:, :, slots]
            t[:, :, slots] = torch.where(coded[:, None, :, None], _by_codes(exact, position, codec), exact)

    def splice(self, piece: OracleLayer, skip: int, shift: Tensor, held: int) -> None:
        """What `GSRQCache.splice` promises, of a piece of one row without padding."""
        rows, more = shift.shape
        there = (piece.coded - skip).clamp(min=0).expand(rows)
        super().update(*(x[:, :, skip:].expand(rows, -1, -1, -1) for x in (piece.keys, piece.values)))
        due = self._due(held + more)
        self._become_codes(torch.where(there > 0, held, due.clamp(max=held)))
        start, slots = self._start()[:, None], held + torch.arange(more)
        is_sink = ((slots >= start) & (slots < start + self.config.sink_tokens))[:, None, :, None]
        places = torch.arange(skip, skip + more)[None]
        was_sink = ((places < self.config.sink_tokens) & (places < piece.coded))[:, None, :, None]
        joined = []
        for mine, theirs, codec in zip(self.shown, piece.shown, self.codecs, strict=True):
            theirs = theirs[:, :, skip:]
            theirs = torch.where(was_sink & ~is_sink, _by_codes(theirs, places, codec), theirs)
            moved = rotate(theirs, shift[:, None], codec.inv_freq, codec.first.interleaved).expand(rows, -1, -1, -1)
            joined.append(torch.cat((mine, moved), 2))
        self.shown = joined
        self.coded = torch.where(there > 0, held + there, self.coded)
        self._become_codes(due)

    def _each(self, choose: Any) -> None:
        self.shown = [choose(t) for t in self.shown]
        self.coded = None if self.coded is None else choose(self.coded)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.shown = [t[:, :, : self.get_seq_length()] for t in self.shown]
        self.coded = self.coded.clamp(max=self.get_seq_length())


def _by_codes(x: Tensor, position: Tensor, codec: Any) -> Tensor:
    """Vectors as their codes say."""
    position = position.expand(x.shape[0], -1)
    alone = zip(x.split(1, 1), codec.by_head(), strict=True)
    return torch.cat(
        [reference.decode(reference.encode(y, position, one), position, one, x.dtype) for y, one in alone], 1
    )


class OracleHybridLayer(LinearAttentionLayer, OracleLayer):
    """The same beside linear attention."""

    def __init__(self, *args: Any) -> None:
        LinearAttentionLayer.__init__(self)
        OracleLayer.__init__(self, *args)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        (OracleLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        OracleLayer.reorder_cache(self, beam_idx)


def watch(model: nn.Module, oracle: Oracle) -> Any:
    """Let an oracle see the inputs of a model's decoder; returns the hook's handle."""
    return decoder(model).register_forward_pre_hook(oracle.see, with_kwargs=True)
