"""GSRQCache: transformers' Cache on quantized buffers. How attention reads them is in attention.py."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache
from transformers.utils import logging as hf_logging

from torchgsrq import ops, reference
from torchgsrq.attention import Incoming
from torchgsrq.codec import Codebooks, LayerCodec
from torchgsrq.config import GSRQConfig
from torchgsrq.memory import MemoryReport
from torchgsrq.models import Rotary
from torchgsrq.tensor import PARTS, GSRQTensor

_FORMAT, _VERSION = "torchgsrq.cache", "2"
_GROWTH = 256  # a growing buffer is a multiple of this many tokens, and grows by at least an eighth

_WINDOWS = ("sink_tokens", "recent_tokens", "block_tokens")

hf_log = hf_logging.get_logger(__name__)


def _owned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make tensors outside of inference mode, so that a cache filled there can be written elsewhere too."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


class GSRQLayer(CacheLayerMixin):
    """One layer's keys and values as `GSRQTensor`s.

    Args:
        codec: the layer's codecs.
        config: sink, recent and block tokens, and ``prefill``.
        max_cache_len: a fixed capacity, for `torch.compile`; grows without it.
        index: the layer's number, for messages.
        rotary: the model's present RoPE frequencies, where they depend on the length of the input.
    """

    is_sliding = False
    is_croppable = False  # a block that became codes in between stays codes

    keys: GSRQTensor
    values: GSRQTensor

    @_owned
    def __init__(
        self,
        codec: LayerCodec,
        config: GSRQConfig,
        max_cache_len: int | None = None,
        index: int = 0,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.config = config
        self.max_cache_len = max_cache_len
        self.index, self.rotary = index, rotary
        self._followed: Tensor | None = None  # the frequencies that the buffers are known to have
        # transformers compiles with CUDA graphs, which only the kernels can be captured in.
        captured = not torch.cuda.is_available() or ops.has_gpu_kernels(codec.key, codec.value)
        self.is_compileable = max_cache_len is not None and captured and rotary is None
        self.is_empty = True
        self.row_start: Tensor | None = None
        # The length, kept beside the buffers: traced code must not read their inner tensors. A tensor where the
        # capacity is fixed, so that a compiled step serves every length.
        self.cumulative_length: Any = 0 if max_cache_len is None else torch.zeros((), dtype=torch.long)

    @_owned
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for these heads and device, and a dtype that holds both."""
        self.dtype, self.device = torch.promote_types(key_states.dtype, value_states.dtype), key_states.device
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
                start=None if self.row_start is None else _fitted(self.row_start, name, capacity),
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
        are several; or the incoming tensors themselves, for an exact prefill of an empty cache.

        Raises:
            ValueError: what cannot be written (`reference.check_append`), naming the layer and the row; RoPE
                frequencies other than those of the tokens held. Nothing is written then.
        """
        incoming = (key_states, value_states)
        other_batch = self.is_initialized and key_states.shape[0] != self.keys.shape[0]
        if not self.is_initialized or (other_batch and self.is_empty and self.max_cache_len is None):
            self.lazy_initialization(key_states, value_states)
        if self.keys.device != key_states.device:  # loaded from a file, or offloaded
            self.device = key_states.device
            self.prefetch()
        if self.rotary is not None:
            self._follow(self.rotary())
        # Autocast gives keys and values of several dtypes, and other ones than outside of it.
        key_states, value_states = key_states.detach().to(self.dtype), value_states.detach().to(self.dtype)
        tokens = key_states.shape[2]
        slots = torch.arange(tokens, device=key_states.device) + self.cumulative_length
        if self.max_cache_len is None:
            self._reserve(self.cumulative_length + tokens)
        if not torch.compiler.is_compiling():  # both, before either is written
            self._check(key_states, value_states, slots)
        exact = self.config.prefill == "exact"
        graph = incoming if torch.is_grad_enabled() and any(x.requires_grad for x in incoming) else ()
        out: tuple[Any, Any] = (self.keys, self.values)
        if tokens > 1 and exact and self.is_empty:
            out = incoming
        elif tokens > 1 or graph:
            view = reference.EXACT_TAIL if exact and tokens > 1 else reference.STREAMING
            key_tail, tail_start = torch.ops.torchgsrq.kv_tail(self.keys, key_states, slots)
            value_tail, _ = torch.ops.torchgsrq.kv_tail(self.values, value_states, slots)
            out = (
                Incoming(self.keys, key_tail, tail_start, view, graph),
                Incoming(self.values, value_tail, tail_start, view, graph),
            )
        torch.ops.torchgsrq.kv_append_(self.keys, key_states, slots)
        torch.ops.torchgsrq.kv_append_(self.values, value_states, slots)
        self.cumulative_length += tokens
        self.is_empty = False
        return out

    def _check(self, key_states: Tensor, value_states: Tensor, slots: Tensor) -> None:
        for name, buffer, states in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            try:
                torch.ops.torchgsrq.check_append(buffer.parts, list(buffer.integers), states, slots)
            except ValueError as error:
                rows = (~torch.isfinite(states)).flatten(1).any(1).nonzero().flatten().tolist()
                where = f", row(s) {', '.join(map(str, rows))}" if rows else ""
                raise ValueError(f"layer {self.index}, {name}{where}: {error}") from error

    @_owned
    def _follow(self, inv_freq: Tensor) -> None:
        """Code keys in frames of the frequencies that the model uses now."""
        if inv_freq is self._followed:
            return
        if torch.equal(self.keys.inv_freq, inv_freq.to(self.keys.inv_freq)):
            self._followed = inv_freq
            return
        if not self.is_empty:
            raise ValueError(
                f"layer {self.index}: the model's RoPE frequencies changed with the length of the input, while the "
                f"cache holds {int(self.get_seq_length())} tokens that were turned by others; read the whole text with "
                "a new cache, in one forward"
            )
        turned = self.codec.key.with_frequencies(inv_freq).inv_freq.to(self.device)
        self._hold(self.keys.with_frequencies(turned), self.values)
        self._followed = inv_freq

    @_owned
    def set_row_start(self, start: Tensor) -> None:
        """Set where each row begins, and the positions of slots, int32 (`GSRQTensor.start`; of any number of slots,
        those beyond count on)."""
        self.row_start = start
        if self.is_initialized and start.shape[0] == self.keys.shape[0]:
            keys, values = self.keys, self.values
            self.keys, self.values = (
                buffer.placed(_fitted(start, name, buffer.shape[2]))
                for name, buffer in (("keys", keys), ("values", values))
            )
            if self.keys is not keys:
                self._hold(self.keys, self.values)

    @_owned
    def offload(self) -> None:
        """Move what the layer owns to the CPU; the tables stay."""
        if self.is_initialized:
            self._hold(self.keys.held_on("cpu"), self.values.held_on("cpu"))

    @_owned
    def prefetch(self) -> None:
        """Bring it back."""
        if self.is_initialized and self.keys.device != self.device:
            self._hold(self.keys.held_on(self.device), self.values.held_on(self.device))

    @_owned
    def _reserve(self, tokens: int) -> None:
        capacity = self.keys.shape[2]
        if tokens > capacity:
            capacity = _round_up(max(tokens, capacity + capacity // 8))
            keys, start = self.keys.grown(capacity), self.row_start
            if start is not None and start.shape[1] > 2:  # it may know slots beyond the old capacity
                keys = keys.placed(_fitted(start, "keys", capacity))
            self._hold(keys, self.values.grown(capacity))

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
        """Remove tokens from the end, as transformers does it: ``-n`` removes n, or all that there are; a positive
        number, which transformers will drop, is the length to keep."""
        held = int(self.get_seq_length())
        if tokens_to_remove > 0:
            hf_log.warning_once("crop with a positive number is deprecated: pass -n to remove n tokens")
        keep = max(0, held + tokens_to_remove) if tokens_to_remove <= 0 else min(tokens_to_remove, held)
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

    @_owned
    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows: a tensor, list or tuple of indices, or a bool mask; with all that is known of them."""
        if self.is_initialized:
            rows = torch.as_tensor(indices, device=self.keys.device)
            rows = rows if rows.numel() else rows.long()
            self._hold(self.keys.select_rows(rows), self.values.select_rows(rows))
            if self.row_start is not None:
                self.row_start = self.row_start[rows.to(self.row_start.device)]

    def state(self) -> dict[str, Tensor]:
        """The tensors that this layer owns, by name, without slots that no token has used."""
        held, coded = int(self.keys.length), int(self.keys.encoded)
        used = {"codes": lambda t: t[:, :, :coded], "start": lambda t: t[:, : 2 + held]}
        frequencies = {} if self.rotary is None else {"keys.inv_freq": self.keys.inv_freq}
        return frequencies | {
            f"{name}.{part}": used.get(part, lambda t: t)(getattr(buffer, part))
            for name, buffer in (("keys", self.keys), ("values", self.values))
            for part in PARTS
        }

    def check_state(self, state: dict[str, Tensor], length: int, rows: int) -> str | None:
        """What is wrong with a file's tensors for this layer, if anything: `state` of ``length`` tokens in ``rows``."""
        c = self.config
        inv_freq = state.get("keys.inv_freq")
        if (inv_freq is None) != (self.rotary is None):
            return "was written for RoPE that " + ("is fixed" if inv_freq is None else "depends on the length")
        if inv_freq is not None and (inv_freq.shape != self.codec.key.inv_freq.shape or not inv_freq.isfinite().all()):
            return f"has a keys.inv_freq of {list(inv_freq.shape)}"
        for name, codec in (("keys", self.codec.key), ("values", self.codec.value)):
            want = {f"{name}.{part}" for part in PARTS}
            if not want <= set(state):
                return f"has no {', '.join(sorted(want - set(state)))}"
            codes, window, start, held, encoded = (state[f"{name}.{part}"] for part in PARTS)
            slots = c.sink_tokens + c.recent_tokens + c.block_tokens
            if held.shape != () or encoded.shape != () or held.dtype != torch.int32 or encoded.dtype != torch.int32:
                return f"has a {name}.length or {name}.encoded that is no int32 number"
            coded = int(encoded)
            if int(held) != length or not 0 <= coded <= length or length - coded > c.recent_tokens + c.block_tokens:
                return (
                    f"holds {int(held)} tokens in its {name}, {coded} of them in codes, where {length} are said to be"
                )
            if codes.dtype != torch.uint8 or codes.shape != (rows, codec.heads, coded, codec.num_codes):
                return f"has {name}.codes of {codes.dtype} {list(codes.shape)}"
            if not window.is_floating_point() or window.shape != (rows, codec.heads, slots, codec.head_dim):
                return f"has a {name}.window of {window.dtype} {list(window.shape)}"
            if start.dtype != torch.int32 or start.shape not in ((rows, 2), (rows, 2 + length)):
                return f"has a {name}.start of {start.dtype} {list(start.shape)}"
        if int(state["keys.encoded"]) != int(state["values.encoded"]):
            return "has as many keys in codes as values not"
        return None

    @_owned
    def set_state(self, state: dict[str, Tensor], length: int, dtype: torch.dtype | None) -> None:
        """Take over what `state` gave, of a layer of any capacity that held ``length`` tokens (`check_state`)."""
        c = self.config
        capacity = _round_up(length) if self.max_cache_len is None else self.max_cache_len
        key = self.codec.key
        if "keys.inv_freq" in state:
            key = key.with_frequencies(state["keys.inv_freq"])
        for name, codec in (("keys", key), ("values", self.codec.value)):
            codes, window, start, *counters = (state[f"{name}.{part}"].to(codec.mean.device) for part in PARTS)
            codes = F.pad(codes, (0, 0, 0, capacity - codes.shape[2]))
            if start.shape[1] > 2:
                start = _fitted(start, name, capacity)
            layout = (c.sink_tokens, c.recent_tokens, c.block_tokens, *codec.integers)
            parts = [codes, window.to(dtype or window.dtype), start, *counters, *codec.tensors]
            setattr(self, name, GSRQTensor(parts, layout))
        self._hold(self.keys, self.values)
        self.row_start = self.keys.start
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized, self.is_empty = True, length == 0
        self._set_length(length)


def _fitted(start: Tensor, name: str, capacity: int) -> Tensor:
    """``start`` with as many slots as a buffer has: keys only know the positions of slots; missing ones count on."""
    if start.shape[1] == 2 or name == "values":
        return start[:, :2]
    more = 2 + capacity - start.shape[1]
    ahead = start[:, -1:] + torch.arange(1, max(more, 0) + 1, dtype=start.dtype, device=start.device)
    return torch.cat((start, ahead), 1)[:, : 2 + capacity]


def _round_up(tokens: int) -> int:
    return max(1, -(-tokens // _GROWTH)) * _GROWTH


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
    """

    def __init__(
        self,
        codebooks: Codebooks,
        config: GSRQConfig,
        model_config: PreTrainedConfig,
        max_cache_len: int | None = None,
        template: Cache | None = None,
        rotaries: dict[int, Rotary] | None = None,
    ) -> None:
        if template is None:
            fixed = max_cache_len is not None
            template = StaticCache(model_config, max_cache_len) if fixed else DynamicCache(config=model_config)
        follow = rotaries or {}
        layers = [
            GSRQLayer(codebooks[i], config, max_cache_len, i, follow.get(i)) if i in codebooks else layer
            for i, layer in enumerate(template.layers)
        ]
        offload_only_non_sliding = getattr(template, "only_non_sliding", True)
        super().__init__(layers, offloading=template.offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.codebooks, self.config = codebooks, config
        self.model_dtype: torch.dtype | None = None  # what `load` converts to, where it is known
        self.model_device: torch.device | None = None
        self.rows_are_placed = False

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
            start = self.quantized_layers[0].row_start
            begun = start is None or bool((start[:, 1] < int(self.get_seq_length())).all())
            self.rows_are_placed = begun and not self.is_empty

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
        past = 0 if self.is_empty else int(layers[0].get_seq_length())
        slots = torch.arange(past, past + n, device=tokens.device)
        if position_ids is not None and position_ids.ndim == 3:
            position_ids = position_ids[max(0, position_ids.shape[0] - 3)]
        positions = slots[None] if position_ids is None else position_ids.to(tokens.device)
        real = _real_tokens(attention_mask, batch, past + n, tokens.device)
        start = None if layers[0].row_start is None or not past else layers[0].row_start.to(tokens.device)
        changed = not self.rows_are_placed or not past  # also after a first forward that failed
        if changed:
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
            new = real[:, past:]
            off = (positions - _positions(start, past, past + n)) * new
            if bool(off.any()):  # read back from a GPU, which has just been waited for: the token is known
                last = past + n - 1 - new.flip(1).int().argmax(1)  # the last real token; later ones count on from it
                ahead = positions.expand(batch, -1).gather(1, (last - past)[:, None]) + (past + n - last)[:, None]
                known = _positions(start, 0, past)
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

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the window, of the model's as long as the cache is empty."""
        return next((layer.dtype for layer in self.quantized_layers if layer.is_initialized), self.model_dtype)

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
        rows = next((layer.keys.shape[0] for layer in self.layers if layer.is_initialized), 0)
        windows = {field: getattr(self.config, field) for field in _WINDOWS}
        facts = {**windows, "codebooks": self.codebooks.digest, "lengths": lengths, "rows": rows}
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
        try:
            facts = json.loads(meta["facts"])
            lengths, rows = [int(x) for x in facts["lengths"]], int(facts["rows"])
            windows = {field: int(facts[field]) for field in _WINDOWS}
            digest = str(facts["codebooks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is not a whole cache file: {error}") from error
        if digest != self.codebooks.digest or len(lengths) != len(self.layers):
            raise ValueError(f"{name} was written with other codebooks than this cache's")
        for field, value in windows.items():
            if value != getattr(self.config, field):
                raise ValueError(f"{name} has {field}={value}; this cache has {self.config}")
        longest, fits = max(lengths, default=0), [x.get_max_length() for x in self.quantized_layers]
        if any(-1 < capacity < longest for capacity in fits):
            raise ValueError(f"{name} holds {longest} tokens; this cache holds {min(fits)}")
        states = [
            {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.partition(".")[0] == str(i)}
            for i in range(len(self.layers))
        ]
        for i, (layer, state, length) in enumerate(zip(self.layers, states, lengths, strict=True)):
            wrong = _wrong_with(layer, state, length, rows)
            if length != longest and not wrong:
                wrong = f"is said to hold {length} tokens, others {longest}"
            if wrong:
                raise ValueError(f"{name} is not a whole cache file: layer {i} {wrong}")
        for layer, state, length in zip(self.layers, states, lengths, strict=True):
            if not state:
                continue
            if isinstance(layer, GSRQLayer):
                layer.set_state(state, length, self.model_dtype)
            else:
                keys, values = (
                    state[x].to(self.model_device, self.model_dtype or state[x].dtype) for x in ("keys", "values")
                )
                layer.update(keys, values)
                if isinstance(getattr(layer, "cumulative_length", None), int):
                    layer.cumulative_length = length  # a sliding window saw more tokens than it holds
        self.rows_are_placed = longest > 0


def _wrong_with(layer: Any, state: dict[str, Tensor], length: int, rows: int) -> str | None:
    """What is wrong with a file's tensors for a layer, if anything."""
    if not state:
        return f"is missing, and should hold {length} tokens" if length else None
    if isinstance(layer, GSRQLayer):
        return layer.check_state(state, length, rows)
    if set(state) != {"keys", "values"}:
        return f"has {', '.join(sorted(state))} instead of keys and values"
    keys, values = state["keys"], state["values"]
    least = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    for x in (keys, values):
        if not x.is_floating_point() or x.ndim != 4 or x.shape[0] != rows or not least <= x.shape[2] <= length:
            return f"has {x.dtype} {list(x.shape)}, not {least} tokens of {rows} rows"
    return None


def _real_tokens(mask: Any, batch: int, width: int, device: torch.device) -> Tensor:
    """Which slots hold real tokens, bool ``[batch, width]``: from a 2-D mask, what the newest query sees by a 4-D one
    (or that of full attention), or all."""
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if isinstance(mask, Tensor) and mask.ndim in (2, 4):
        seen = mask.to(device)[:, :width] if mask.ndim == 2 else mask.to(device)[:, 0, -1, :width]
        seen = seen.bool() if mask.ndim == 2 else seen if seen.dtype == torch.bool else seen > -1
        return F.pad(seen, (0, width - seen.shape[1])).expand(batch, -1)
    return torch.ones(batch, width, dtype=torch.bool, device=device)


def _positions(start: Tensor, first: int, last: int) -> Tensor:
    """Positions of slots ``[first, last)``, ``[batch, last - first]``, by a `GSRQTensor.start` of any width."""
    slots = torch.arange(first, last, device=start.device)
    if start.shape[1] == 2:
        return slots - start[:, :1]
    known = start.shape[1] - 2
    beyond = (slots - (known - 1)).clamp_min(0)
    return start[:, 2 + slots.clamp_max(known - 1)] + beyond
