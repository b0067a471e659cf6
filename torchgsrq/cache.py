"""GSRQCache: transformers' Cache on quantized buffers. How attention reads them is in attention.py."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from torchgsrq import ops, reference
from torchgsrq.attention import Incoming
from torchgsrq.codec import Codebooks, LayerCodec
from torchgsrq.config import GSRQConfig
from torchgsrq.memory import MemoryReport
from torchgsrq.tensor import PARTS, GSRQTensor

_FORMAT, _VERSION = "torchgsrq.cache", "1"
_GROWTH = 256  # a growing buffer is a multiple of this many tokens, and grows by at least an eighth


class GSRQLayer(CacheLayerMixin):
    """One layer's keys and values as `GSRQTensor`s.

    Args:
        codec: the layer's codecs.
        config: sink, recent and block tokens, and ``prefill``.
        max_cache_len: a fixed capacity, for `torch.compile`; grows without it.
    """

    is_sliding = False
    is_croppable = False  # a block that became codes in between stays codes

    keys: GSRQTensor
    values: GSRQTensor

    def __init__(self, codec: LayerCodec, config: GSRQConfig, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.codec = codec
        self.config = config
        self.max_cache_len = max_cache_len
        # transformers compiles with CUDA graphs, which only the kernels can be captured in.
        captured = not torch.cuda.is_available() or ops.has_gpu_kernels(codec.key, codec.value)
        self.is_compileable = max_cache_len is not None and captured
        self.is_empty = True
        self.row_start: Tensor | None = None
        # The length, kept beside the buffers: traced code must not read their inner tensors. A tensor where the
        # capacity is fixed, so that a compiled step serves every length.
        self.cumulative_length: Any = 0 if max_cache_len is None else torch.zeros((), dtype=torch.long)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for these heads, device and dtype."""
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = _round_up(key_states.shape[2]) if self.max_cache_len is None else self.max_cache_len
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, head_dim = states.shape
            codec = self.codec.key if name == "keys" else self.codec.value
            buffer = GSRQTensor.empty(
                batch,
                heads,
                capacity,
                head_dim,
                codec=codec,
                device=self.device,
                dtype=self.dtype,
                config=self.config,
                start=self.row_start,
            )
            setattr(self, name, buffer)
        if self.max_cache_len is not None:
            self.cumulative_length = self.cumulative_length.to(self.device)
        self._hold(self.keys, self.values)
        self.is_initialized = True

    def _hold(self, keys: GSRQTensor, values: GSRQTensor) -> None:
        """Take these buffers. Those of a fixed capacity stay where they are, which CUDA graphs want to know."""
        self.keys, self.values = keys, values
        if self.max_cache_len is not None and not torch.compiler.is_compiling():
            for tensor in (keys, values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append, and return what attention reads: the buffers, with what the new queries see exactly if they
        are several; or the incoming tensors themselves, for an exact prefill of an empty cache."""
        other_batch = self.is_initialized and key_states.shape[0] != self.keys.shape[0]
        if not self.is_initialized or (other_batch and self.is_empty and self.max_cache_len is None):
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        slots = torch.arange(tokens, device=key_states.device) + self.cumulative_length
        if self.max_cache_len is None:
            self._reserve(self.cumulative_length + tokens)
        if not torch.compiler.is_compiling():  # both, before either is written
            for buffer, states in ((self.keys, key_states), (self.values, value_states)):
                torch.ops.torchgsrq.check_append(buffer.parts, list(buffer.integers), states, slots)
        exact = self.config.prefill == "exact"
        out: tuple[Any, Any] = (self.keys, self.values)
        if tokens > 1 and exact and self.is_empty:
            out = (key_states, value_states)
        elif tokens > 1:
            view = reference.EXACT_TAIL if exact else reference.STREAMING
            key_tail, tail_start = torch.ops.torchgsrq.kv_tail(self.keys, key_states, slots)
            value_tail, _ = torch.ops.torchgsrq.kv_tail(self.values, value_states, slots)
            out = (
                Incoming(self.keys, key_tail, tail_start, view),
                Incoming(self.values, value_tail, tail_start, view),
            )
        torch.ops.torchgsrq.kv_append_(self.keys, key_states, slots)
        torch.ops.torchgsrq.kv_append_(self.values, value_states, slots)
        self.cumulative_length += tokens
        self.is_empty = False
        return out

    def set_row_start(self, start: Tensor) -> None:
        """Set where each row begins, int32 ``[batch, 2]`` (`GSRQTensor.start`), before its first real token."""
        self.row_start = start
        if self.is_initialized and start.shape == self.keys.start.shape:
            for buffer in (self.keys, self.values):
                torch.ops.torchgsrq.kv_place_(buffer, start)

    def offload(self) -> None:
        """Move what the layer owns to the CPU; the tables stay."""
        if self.is_initialized:
            self._hold(self.keys.held_on("cpu"), self.values.held_on("cpu"))

    def prefetch(self) -> None:
        """Bring it back."""
        if self.is_initialized and self.keys.device != self.device:
            self._hold(self.keys.held_on(self.device), self.values.held_on(self.device))

    def _reserve(self, tokens: int) -> None:
        capacity = self.keys.shape[2]
        if tokens > capacity:
            capacity = _round_up(max(tokens, capacity + capacity // 8))
            self._hold(self.keys.grown(capacity), self.values.grown(capacity))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask of the next step."""
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held; a tensor where the capacity is fixed."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Capacity, or -1 for a growing layer."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys.shape[0] if self.is_initialized else -1

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
        self._set_length(0)
        self.is_empty, self.row_start = True, None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end: ``-n`` removes n; a positive number is the length to keep, as in transformers."""
        held = int(self.get_seq_length())
        keep = held + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, held)
        if keep < 0:
            raise ValueError(f"crop({tokens_to_remove}) of a cache of {held} tokens")
        if keep == held:
            return
        for buffer in (self.keys, self.values):
            buffer.crop_(keep)
        self._set_length(keep)
        self.is_empty = keep == 0

    def _set_length(self, length: int) -> None:
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.fill_(length)
        else:
            self.cumulative_length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            self._hold(self.keys.select_rows(indices), self.values.select_rows(indices))

    def state(self) -> dict[str, Tensor]:
        """The tensors that this layer owns, by name."""
        buffers = (("keys", self.keys), ("values", self.values))
        return {f"{name}.{part}": getattr(buffer, part) for name, buffer in buffers for part in PARTS}

    def set_state(self, state: dict[str, Tensor], length: int) -> None:
        """Take over what `state` gave, of a layer of any capacity that held ``length`` tokens."""
        c = self.config
        for name, codec in (("keys", self.codec.key), ("values", self.codec.value)):
            codes, *rest = (state[f"{name}.{part}"].to(codec.mean.device) for part in PARTS)
            capacity = codes.shape[2] if self.max_cache_len is None else self.max_cache_len
            layout = (c.sink_tokens, c.recent_tokens, c.block_tokens, *codec.integers)
            buffer = GSRQTensor([codes[:, :, :capacity].contiguous(), *rest, *codec.tensors], layout)
            setattr(self, name, buffer.grown(capacity))
        self._hold(self.keys, self.values)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized, self.is_empty = True, length == 0
        self._set_length(length)


def _round_up(tokens: int) -> int:
    return max(1, -(-tokens // _GROWTH)) * _GROWTH


class GSRQCache(Cache):
    """A model's KV cache, quantized layer by layer; layers without codebooks keep transformers' own.

    Supports what `DynamicCache` and, with ``max_cache_len``, `StaticCache` do. Made for models that
    `quantize_kv_` prepared, whose attention reads it.

    Args:
        codebooks: for the layers to quantize.
        config: sinks, window and prefill.
        model_config: the decoder's transformers config, for the other layers.
        max_cache_len: fixed capacity; grows without it.
        template: a cache that transformers made for this model, whose other layers and offloading are taken over.
    """

    def __init__(
        self,
        codebooks: Codebooks,
        config: GSRQConfig,
        model_config: PreTrainedConfig,
        max_cache_len: int | None = None,
        template: Cache | None = None,
    ) -> None:
        if template is None:
            fixed = max_cache_len is not None
            template = StaticCache(model_config, max_cache_len) if fixed else DynamicCache(config=model_config)
        layers = [
            GSRQLayer(codebooks[i], config, max_cache_len) if i in codebooks else layer
            for i, layer in enumerate(template.layers)
        ]
        offload_only_non_sliding = getattr(template, "only_non_sliding", True)
        super().__init__(layers, offloading=template.offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.codebooks, self.config = codebooks, config
        self.rows_are_placed = False

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        super().reset()
        self.rows_are_placed = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, see `GSRQLayer.crop`."""
        super().crop(tokens_to_remove)
        self.rows_are_placed = self.rows_are_placed and not self.is_empty

    @property
    def quantized_layers(self) -> list[GSRQLayer]:
        """The quantized layers."""
        return [layer for layer in self.layers if isinstance(layer, GSRQLayer)]

    def place_rows(self, tokens: Tensor, attention_mask: Any, position_ids: Tensor | None) -> None:
        """Tell the cache where rows begin: their left padding, and positions that do not begin at 0.

        Called with every input until each row had a real token (the first chunk of a prefill may be padding).

        Args:
            tokens: ``[batch, n, ...]``, the input, for its shape.
            attention_mask: ``[batch, past + n]`` with 1 for real tokens, a 4-D mask (bool or additive), a dict of
                them by layer type, or None.
            position_ids: ``[batch or 1, n]``, or None where transformers counts slots.
        """
        layers = self.quantized_layers
        if not layers:
            return
        batch, n = tokens.shape[:2]
        past = 0 if self.is_empty else int(layers[0].get_seq_length())
        mask = attention_mask.get("full_attention") if isinstance(attention_mask, dict) else attention_mask
        real = torch.ones(batch, past + n, dtype=torch.bool, device=tokens.device)
        if isinstance(mask, Tensor) and mask.ndim == 4:  # what the newest query sees
            seen = mask[:, 0, -1, : past + n]
            real = (seen if seen.dtype == torch.bool else seen > -1).expand(batch, -1)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, : past + n].bool()
        first = torch.where(real.any(1), real.int().argmax(1), past + n)
        origin = torch.zeros_like(first)
        if position_ids is not None and position_ids.ndim == 2:
            at = (first - past).clamp(0, n - 1)[:, None]
            origin = first - position_ids.expand(batch, -1).gather(1, at)[:, 0]
        start = torch.stack((origin, first), 1).int()
        if past and layers[0].row_start is not None:  # rows that began in an earlier chunk stay
            start = torch.where(first[:, None] >= past, start, layers[0].row_start.to(start.device))
        for layer in layers:
            layer.set_row_start(start)
        self.rows_are_placed = torch.compiler.is_compiling() or bool((first < past + n).all())

    @property
    def is_empty(self) -> bool:
        """Whether the quantized layers hold no token."""
        return all(layer.is_empty for layer in self.quantized_layers)

    def memory(self) -> MemoryReport:
        """Bytes by part, from the storages themselves."""
        parts = dict.fromkeys(("codes", "unused", "sinks", "window", "counters", "full_precision_layers"), 0)
        elements = full = 0
        for layer in self.layers:
            if not isinstance(layer, GSRQLayer):
                for tensor in (layer.keys, layer.values):
                    if tensor is not None:
                        parts["full_precision_layers"] += tensor.untyped_storage().nbytes()
                continue
            if not layer.is_initialized:
                continue
            for buffer in (layer.keys, layer.values):
                by_part = buffer.nbytes_by_part()
                batch, heads, capacity, _ = buffer.shape
                parts["codes"] += by_part["codes"]
                parts["unused"] += by_part["codes"] - by_part["codes"] * int(buffer.encoded) // max(capacity, 1)
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
        tensors = {}
        for i, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            if isinstance(layer, GSRQLayer):
                state = layer.state()
            elif layer.is_sliding and layer.is_compileable:
                raise ValueError(f"layer {i} is a {type(layer).__name__}, which cannot be saved; use a growing cache")
            else:  # a fixed layer is longer than what it holds
                held = layer.keys.shape[2] if layer.is_sliding else int(layer.get_seq_length())
                state = {"keys": layer.keys[:, :, :held], "values": layer.values[:, :, :held]}
            tensors.update({f"{i}.{name}": tensor.contiguous() for name, tensor in state.items()})
        lengths = [int(layer.get_seq_length()) for layer in self.layers]
        facts = {"config": self.config.to_dict(), "codebooks": self.codebooks.digest, "lengths": lengths}
        save_file(tensors, path, {"format": _FORMAT, "version": _VERSION, "facts": json.dumps(facts)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Fill this cache from a file that `save` wrote; of any kind, growing or fixed.

        Raises:
            ValueError: not such a file, written with other codebooks or windows, or too long for this cache, which
                is left as it was.
        """
        name = os.fspath(path)
        if any(int(layer.get_seq_length()) for layer in self.layers):
            raise ValueError("this cache holds tokens already; load into a new one")
        if any(not isinstance(layer, GSRQLayer) and layer.is_sliding and layer.is_compileable for layer in self.layers):
            raise ValueError("fixed sliding-window layers cannot be filled from a file; use a growing cache")
        try:
            with safe_open(name, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"{name} is not a whole cache file: {error}") from error
        if (meta.get("format"), meta.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"{name} is not a torchgsrq cache file that this version reads")
        facts = json.loads(meta["facts"])
        if facts["codebooks"] != self.codebooks.digest or len(facts["lengths"]) != len(self.layers):
            raise ValueError(f"{name} was written with other codebooks than this cache's")
        for field in ("sink_tokens", "recent_tokens", "block_tokens"):
            if facts["config"][field] != getattr(self.config, field):
                raise ValueError(f"{name} has {field}={facts['config'][field]}; this cache has {self.config}")
        longest, fits = max(facts["lengths"], default=0), [x.get_max_length() for x in self.quantized_layers]
        if any(-1 < capacity < longest for capacity in fits):
            raise ValueError(f"{name} holds {longest} tokens; this cache holds {min(fits)}")
        for i, (layer, length) in enumerate(zip(self.layers, facts["lengths"], strict=True)):
            prefix = f"{i}."
            state = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            if not state:
                continue
            if isinstance(layer, GSRQLayer):
                layer.set_state(state, length)
            else:
                layer.update(state["keys"], state["values"])
                if isinstance(getattr(layer, "cumulative_length", None), int):
                    layer.cumulative_length = length  # a sliding window saw more tokens than it holds
        self.rows_are_placed = True
