"""GSRQCache: transformers' Cache of quantized layers (layer.py) and others (kept.py)."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)

from torchgsrq.cache import files, kept, splice
from torchgsrq.cache.hybrid import GSRQHybridLayer
from torchgsrq.cache.layer import GSRQLayer
from torchgsrq.cache.memory import MemoryReport
from torchgsrq.codec import Codebooks
from torchgsrq.codec.packed import positions as positions_of
from torchgsrq.config import GSRQConfig
from torchgsrq.models import Rotary


class GSRQCache(Cache):
    """A model's KV cache, quantized layer by layer; layers without codebooks keep transformers' own.

    Supports what `DynamicCache` and, with ``max_cache_len``, `StaticCache` do. Made for models that
    `quantize_kv_` prepared, whose attention reads it; `torchgsrq.new_cache` makes one.

    Args:
        codebooks: for the layers to quantize.
        config: sinks, window and prefill.
        model_config: the decoder's transformers config, for the other layers.
        max_cache_len: fixed capacity; grows without it.
        template: a cache that transformers made for this model, whose other layers and offloading are taken over.
        rotaries: by layer, the model's present RoPE frequencies where they depend on the length of the input.
        decodes: hand out decoded tensors, to a model whose attention cannot read buffers.
    """

    def __init__(
        self,
        codebooks: Codebooks,
        config: GSRQConfig,
        model_config: PreTrainedConfig,
        max_cache_len: int | None = None,
        template: Cache | None = None,
        rotaries: dict[int, Rotary] | None = None,
        decodes: bool = False,
    ) -> None:
        if template is None:
            fixed = max_cache_len is not None
            template = StaticCache(model_config, max_cache_len) if fixed else DynamicCache(config=model_config)
        follow, layers = rotaries or {}, []
        for i, layer in enumerate(template.layers):
            if i in codebooks:
                facts = (codebooks[i], config, max_cache_len, i, follow.get(i), decodes)
                if isinstance(layer, LinearAttentionCacheLayerMixin):
                    layer = GSRQHybridLayer(*facts, states=layer.number_of_states)
                else:
                    layer = GSRQLayer(*facts)
            layers.append(layer)
        offload_only_non_sliding = getattr(template, "only_non_sliding", True)
        super().__init__(layers, offloading=template.offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.codebooks, self.config = codebooks, config
        self.model_dtype: torch.dtype | None = None  # what `load` converts to, where it is known
        self.model_device: torch.device | None = None
        self.rows_are_placed = False
        self.unmovable = ""  # why `splice` cannot be, if it cannot

    def __iter__(self) -> Any:
        raise TypeError(
            "a GSRQCache holds codes, not one tensor of keys and one of values per layer; "
            "cache.layers[i].keys.dequantize() is one (full-precision layers hold plain tensors)"
        )

    def __getitem__(self, layer: int) -> Any:
        return self.__iter__()

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        super().reset()
        self.rows_are_placed = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, see `GSRQLayer.crop`."""
        super().crop(tokens_to_remove)
        if self.rows_are_placed and self.quantized_layers:
            start = next((x.row_start for x in self.quantized_layers if x.is_initialized), None)
            begun = start is None or bool((start[:, 1] < int(self.get_seq_length())).all())
            self.rows_are_placed = begun and not self.is_empty

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have linear attention alone."""
        return [
            isinstance(x, LinearAttentionCacheLayerMixin) and not isinstance(x, CacheLayerMixin) for x in self.layers
        ]

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows, see `GSRQLayer.batch_select_indices`; of linear attention too."""
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            else:
                kept.select_rows(layer, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = next((x.batch_size for x in self.quantized_layers if x.is_initialized), 0)
        if rows:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    @property
    def quantized_layers(self) -> list[GSRQLayer]:
        """The quantized layers."""
        return [layer for layer in self.layers if isinstance(layer, GSRQLayer)]

    def place_rows(self, tokens: Tensor, attention_mask: Any, position_ids: Tensor | None) -> None:
        """Tell the cache where rows begin, and the positions of their tokens where these do not count up with the
        slots: after left padding, padding in the middle, at images, or where they do not begin at 0.

        Called with every input that is not traced; traced ones, after the first, must count up.

        Args:
            tokens: ``[batch, n, ...]``, the input, for its shape.
            attention_mask: ``[batch, past + n]`` with 1 for real tokens, a 4-D mask (bool or additive), a dict of
                them by layer type, or None.
            position_ids: ``[batch or 1, n]``; of several axes (M-RoPE) ``[axes, batch or 1, n]``, of which the
                first of the last three, that of time, is the position; or None where transformers counts slots.
        """
        layers = self.quantized_layers
        if not layers:
            return
        traced = torch.compiler.is_compiling()
        batch, n = tokens.shape[:2]
        one = next((x for x in layers if x.is_initialized), layers[0])  # a pruned model leaves some unwritten
        past = 0 if self.is_empty else int(one.get_seq_length())
        slots = torch.arange(past, past + n, device=tokens.device)
        if position_ids is not None and position_ids.ndim == 3:
            position_ids = position_ids[max(0, position_ids.shape[0] - 3)]
        positions = slots[None] if position_ids is None else position_ids.to(tokens.device)
        start = None if one.row_start is None or not past else one.row_start.to(tokens.device)
        changed = not self.rows_are_placed or not past  # also after a first forward that failed
        new = _real_tokens(attention_mask, batch, past, past + n, tokens.device)
        if changed:
            real = torch.cat((_real_tokens(attention_mask, batch, 0, past, tokens.device), new), 1)
            first = torch.where(real.any(1), real.int().argmax(1), past + n)
            at = (first - past).clamp(0, n - 1)[:, None]
            origin = first - positions.expand(batch, -1).gather(1, at)[:, 0]
            begun = torch.stack((origin, first), 1).int()
            if start is None:
                start = begun
            else:  # rows that began in an earlier chunk stay
                start = torch.cat((torch.where(first[:, None] >= past, begun, start[:, :2]), start[:, 2:]), 1)
            self.rows_are_placed = traced or bool((first < past + n).all())
        if start is not None and not traced:
            off = (positions - positions_of(start, past, past + n)) * new
            if bool(off.any()):  # read back from a GPU, which has just been waited for: the token is known
                last = past + n - 1 - new.flip(1).int().argmax(1)  # the last real token; later ones count on from it
                ahead = positions.expand(batch, -1).gather(1, (last - past)[:, None]) + (past + n - last)[:, None]
                known = positions_of(start, 0, past)
                start = torch.cat((start[:, :2], known, positions.expand(batch, -1), ahead), 1).int()
                changed = True
        if changed and start is not None:
            for layer in layers:
                layer.set_row_start(start)

    @property
    def is_empty(self) -> bool:
        """Whether the quantized layers hold no token."""
        return all(layer.is_empty for layer in self.quantized_layers)

    def memory(self) -> MemoryReport:
        """Bytes by part, from the storages themselves."""
        parts = dict.fromkeys(("codes", "unused", "sinks", "window", "counters", "full_precision_layers"), 0)
        elements = full = 0
        for layer in self.layers:
            parts["full_precision_layers"] += kept.nbytes(layer)
            if not isinstance(layer, GSRQLayer):
                continue
            if not layer.is_initialized:
                continue
            for buffer in (layer.keys, layer.values):
                by_part = buffer.nbytes_by_part()
                batch, heads, capacity, _ = buffer.shape
                parts["codes"] += by_part["codes"]
                used = int(buffer.encoded.sum())
                parts["unused"] += by_part["codes"] - by_part["codes"] * used // max(batch * capacity, 1)
                sinks = by_part["window"] * layer.config.sink_tokens // buffer.window.shape[2]
                parts["sinks"] += sinks
                parts["window"] += by_part["window"] - sinks
                parts["counters"] += by_part["start"] + by_part["length"] + by_part["encoded"]
                elements += batch * heads * int(buffer.length) * buffer.shape[-1]
                full += batch * heads * int(buffer.length) * buffer.shape[-1] * buffer.dtype.itemsize
        tables = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in self.quantized_layers
            for codec in layer.codec
            for t in codec.tensors
        }
        return MemoryReport(**parts, codebooks=sum(tables.values()), elements=elements, full_precision_bytes=full)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole cache to a safetensors file, to `load` with the same model and codebooks."""
        files.CACHE.save(*files.pack(self), path)

    def load(self, path: str | os.PathLike[str]) -> GSRQCache:
        """Fill this cache from a file that `save` wrote; of any kind, growing or fixed. Returns this cache.

        Raises:
            ValueError: not such a file, damaged, written with other codebooks or windows, or too long for this cache,
                which is left as it was.
        """
        files.fill(self, os.fspath(path), os.fspath(path))
        return self

    def splice(self, piece: GSRQCache, *, skip: int) -> GSRQCache:
        """Put a text that was read elsewhere behind what this cache holds, without decoding it: from a library of
        documents, each read once.

        Keys are coded relative to their frame, so codes of the piece are moved by whole frames, to the positions
        nearest before those that would follow (these very positions, if the piece was read from position
        ``len(here) % frame`` on, ``position_ids=``). Its window is exact, and moves to just where it follows; so do
        all later tokens. The piece saw nothing of what is before it here, as it was read alone.

        Models treat the first tokens of a text in a way of their own (sinks), and codes hold these badly. So read a
        piece behind the first ``sink_tokens`` that the prompts begin with, and leave these out with ``skip``.

        Args:
            piece: a cache of the same model, codebooks and window, of one row or as many as here. It is left as it is.
            skip: so many of its first tokens are left out.

        Returns:
            This cache.

        Raises:
            ValueError: other codebooks or windows, rows or RoPE frequencies; a fixed capacity that is too small; a
                model whose positions are not RoPE, or with layers that stay in full precision. Nothing is changed then.
        """
        self._check_piece(piece, skip)
        held, more = int(self.get_seq_length()), int(piece.get_seq_length()) - skip
        if more:
            pairs = list(zip(self.quantized_layers, piece.quantized_layers, strict=True))
            splice.check(pairs, held + more)
            self.rows_are_placed = splice.splice(pairs, held, more, skip, self.model_dtype)
        return self

    def _check_piece(self, piece: GSRQCache, skip: int) -> None:
        """Refuse what cannot be moved, or not here."""
        if piece is self:
            raise ValueError("splice: a cache cannot be put behind itself; save it, and load it into another one")
        if self.unmovable:
            raise ValueError(f"splice: {self.unmovable}, so nothing that was read elsewhere can be moved; read it here")
        if piece.codebooks.digest != self.codebooks.digest:
            raise ValueError("splice: the piece was written with other codebooks than this cache's")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, GSRQLayer) or isinstance(layer, GSRQHybridLayer):
                raise ValueError(
                    f"splice: layer {i} is a {type(layer).__name__}, whose keys or states cannot be moved to other "
                    "positions; read the text here"
                )
        for name in files.WINDOWS:
            ours, theirs = getattr(self.config, name), getattr(piece.config, name)
            if ours != theirs:
                raise ValueError(f"splice: the piece has {name}={theirs}, this cache {ours}")
        held = int(piece.get_seq_length())
        if not 0 <= skip <= held:
            raise ValueError(f"splice: skip={skip}; it must lie between 0 and the piece's {held} tokens")

    def dumps(self) -> bytes:
        """What `save` writes, to send to another process: prefill here, decode there."""
        return safetensors.torch.save(*files.CACHE.sealed(*files.pack(self)))

    def loads(self, data: bytes) -> GSRQCache:
        """Fill this cache with what `dumps` gave, and return it; raises as `load` does."""
        files.fill(self, data, f"what was given, {len(data)} bytes,")
        return self


def _real_tokens(mask: Any, batch: int, first: int, last: int, device: torch.device) -> Tensor:
    """Which of the slots ``[first, last)`` hold real tokens, bool ``[batch, last - first]``: from a 2-D mask, what any
    query sees by a 4-D one (of several, by kind of layer, the one that sees most), or all. Slots past the mask hold
    none."""
    if isinstance(mask, dict):
        some = [m for m in mask.values() if isinstance(m, Tensor) and m.ndim in (2, 4)]
        wide = [mask[kind] for kind in ("full_attention", "hybrid") if kind in mask]
        mask = next(iter(wide or some), None)
    if isinstance(mask, Tensor) and mask.ndim in (2, 4):
        if mask.ndim == 2:
            seen = mask[:, first:last].bool()
        else:
            seen = mask[:, 0, :, first:last]
            seen = (seen if seen.dtype == torch.bool else seen > -1).any(1)  # else additive
        seen = seen.to(device)
        return F.pad(seen, (0, last - first - seen.shape[1])).expand(batch, -1)
    return torch.ones(batch, last - first, dtype=torch.bool, device=device)
