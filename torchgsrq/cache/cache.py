"""GSRQCache: a transformers Cache of quantized layers (layer.py) and other layers (kept.py)."""

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
    """A model's KV cache, quantized layer by layer. Layers without codebooks keep transformers' own cache.

    Supports the operations of `DynamicCache` and, with ``max_cache_len``, `StaticCache`. It requires a model that
    `quantize_kv_` prepared, whose attention can read it. Create one with `torchgsrq.new_cache`.

    Args:
        codebooks: codebooks of the layers to quantize.
        config: sinks, window and prefill.
        model_config: the decoder's transformers config, for the other layers.
        max_cache_len: fixed capacity in tokens; without it, the cache grows.
        template: a cache that transformers made for this model; its other layers and its offloading are kept.
        rotaries: by layer, the model's current RoPE frequencies, if they depend on the length of the input.
        decodes: return decoded tensors from ``update``, for a model whose attention cannot read buffers.
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
        self.model_dtype: torch.dtype | None = None  # the dtype that `load` converts to, if known
        self.model_device: torch.device | None = None
        self.rows_are_placed = False
        self.unmovable = ""  # why `splice` is not possible, if it is not

    def __iter__(self) -> Any:
        raise TypeError(
            "a GSRQCache holds codes, not one tensor of keys and one of values per layer; "
            "cache.layers[i].keys.dequantize() is one (full-precision layers hold plain tensors)"
        )

    def __getitem__(self, layer: int) -> Any:
        return self.__iter__()

    def reset(self) -> None:
        """Discard all tokens; allocated memory is kept."""
        super().reset()
        self.rows_are_placed = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end; see `GSRQLayer.crop`."""
        super().crop(tokens_to_remove)
        if self.rows_are_placed and self.quantized_layers:
            start = next((x.row_start for x in self.quantized_layers if x.is_initialized), None)
            begun = start is None or bool((start[:, 1] < int(self.get_seq_length())).all())
            self.rows_are_placed = begun and not self.is_empty

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have only linear attention."""
        return [
            isinstance(x, LinearAttentionCacheLayerMixin) and not isinstance(x, CacheLayerMixin) for x in self.layers
        ]

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these batch rows, also of linear attention; see `GSRQLayer.batch_select_indices`."""
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            else:
                kept.select_rows(layer, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        rows = next((x.batch_size for x in self.quantized_layers if x.is_initialized), 0)
        if rows:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    @property
    def quantized_layers(self) -> list[GSRQLayer]:
        """The quantized layers."""
        return [layer for layer in self.layers if isinstance(layer, GSRQLayer)]

    def place_rows(self, tokens: Tensor, attention_mask: Any, position_ids: Tensor | None) -> None:
        """Set where rows begin, and the positions of their tokens if these do not count up with the slots: after left
        padding, with padding in the middle or images, or if they do not begin at 0.

        Called with every input that is not traced. Positions of traced inputs after the first must count up.

        Args:
            tokens: ``[batch, n, ...]``, the input; only its shape is used.
            attention_mask: ``[batch, past + n]`` with 1 for real tokens, a 4-D mask (bool or additive), a dict of
                masks by layer type, or None.
            position_ids: ``[batch or 1, n]``; or, with several axes (M-RoPE), ``[axes, batch or 1, n]``, where the
                position is the time axis, the first of the last three; or None if transformers counts slots.
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
            else:  # rows that began in an earlier chunk do not change
                start = torch.cat((torch.where(first[:, None] >= past, begun, start[:, :2]), start[:, 2:]), 1)
            self.rows_are_placed = traced or bool((first < past + n).all())
        if start is not None and not traced:
            off = (positions - positions_of(start, past, past + n)) * new
            if bool(off.any()):  # a GPU sync, cheap here: the token is known, so the GPU has just been waited for
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
        """Whether the quantized layers hold no tokens."""
        return all(layer.is_empty for layer in self.quantized_layers)

    def memory(self) -> MemoryReport:
        """Bytes by part, measured from the tensors' storages."""
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
        """Write the whole cache to a safetensors file; `load` reads it, with the same model and codebooks.

        Raises:
            ValueError: the cache has sliding-window layers of fixed size.
            OSError: the file cannot be written.
        """
        files.CACHE.save(*files.pack(self), path)

    def load(self, path: str | os.PathLike[str]) -> GSRQCache:
        """Fill this empty cache from a file written by `save`. Growing and fixed caches read each other's files.

        Returns:
            This cache.

        Raises:
            ValueError: not a cache file, a damaged file, other codebooks or windows, more tokens than fit, or a cache
                that already holds tokens. The cache is left unchanged.
        """
        files.fill(self, os.fspath(path), os.fspath(path))
        return self

    def splice(self, piece: GSRQCache, *, skip: int) -> GSRQCache:
        """Append the tokens of another cache without reading or decoding them again: for a library of documents, each
        read once.

        Keys are coded relative to their frame, so codes of the piece move by whole frames, to the nearest positions at
        or before those that would follow. (The two are equal if the piece was read from position
        ``len(here) % frame`` on, with ``position_ids=``.) The full-precision window of the piece moves to the positions
        that directly follow, as do all later tokens. The piece was read alone, so its tokens did not attend to the
        tokens before it here.

        Models treat the first tokens of a text (sinks) specially, and codes represent these badly. So read a piece
        behind the first ``sink_tokens`` tokens of the prompts, and leave these out with ``skip``.

        Args:
            piece: a cache of the same model, codebooks and window, with one row or as many as this cache. It is not
                changed.
            skip: number of the piece's first tokens to leave out.

        Returns:
            This cache.

        Raises:
            ValueError: other codebooks, windows, rows or RoPE frequencies; a fixed capacity that is too small; a
                model without RoPE, or with layers in full precision. The cache is left unchanged.
        """
        self._check_piece(piece, skip)
        held, more = int(self.get_seq_length()), int(piece.get_seq_length()) - skip
        if more:
            pairs = list(zip(self.quantized_layers, piece.quantized_layers, strict=True))
            splice.check(pairs, held + more)
            self.rows_are_placed = splice.splice(pairs, held, more, skip, self.model_dtype)
        return self

    def _check_piece(self, piece: GSRQCache, skip: int) -> None:
        """Refuse a piece that cannot be moved, or does not fit this cache."""
        if piece is self:
            raise ValueError("splice: a cache cannot be appended to itself; save it, and load it into another one")
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
        """The bytes of the file that `save` writes, to send to another process: prefill here, decode there."""
        return safetensors.torch.save(*files.CACHE.sealed(*files.pack(self)))

    def loads(self, data: bytes) -> GSRQCache:
        """Fill this empty cache from the bytes of `dumps`, and return it. Raises the errors of `load`."""
        files.fill(self, data, f"what was given, {len(data)} bytes,")
        return self


def _real_tokens(mask: Any, batch: int, first: int, last: int, device: torch.device) -> Tensor:
    """Which of the slots ``[first, last)`` hold real tokens, bool ``[batch, last - first]``: those of a 2-D mask, those
    that any query of a 4-D mask sees, or all without a mask. Of a dict of masks by kind of layer, the widest is used.
    Slots past the mask hold none."""
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
