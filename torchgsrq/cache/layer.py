"""GSRQLayer: one layer of a cache, on quantized buffers. The cache of all layers is in cache.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging as hf_logging

from torchgsrq import ops
from torchgsrq.attention import Incoming
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.packed import EXACT_TAIL, STREAMING, fitted, positions
from torchgsrq.config import GSRQConfig
from torchgsrq.models import Rotary
from torchgsrq.tensor import PARTS, GSRQTensor, append_pair_, without_gradient

_GROWTH = 256  # a growing buffer is a multiple of this many tokens, and grows by at least an eighth
hf_log = hf_logging.get_logger(__name__)


def _owned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Create tensors outside of inference mode, so that a cache filled in inference mode can be written outside of
    it."""

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
        max_cache_len: a fixed capacity in tokens, for `torch.compile`; without it, the layer grows.
        index: the layer's index, for messages.
        rotary: the model's current RoPE frequencies, if they depend on the length of the input.
        decodes: return decoded tensors from ``update``, for a model whose attention cannot read buffers.
    """

    is_sliding = False
    is_croppable = True  # the remaining tokens decode as before; encoded blocks stay encoded

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
        decodes: bool = False,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.config = config
        self.max_cache_len = max_cache_len
        self.index, self.rotary, self.decodes = index, rotary, decodes
        self._followed: Tensor | None = None  # the frequencies that the buffers are known to have
        # transformers compiles with CUDA graphs, which can capture only the kernels.
        captured = not torch.cuda.is_available() or ops.has_gpu_kernels(codec.key, codec.value)
        self.is_compileable = max_cache_len is not None and captured and rotary is None and not decodes
        self.is_empty = True
        self.row_start: Tensor | None = None
        # The length, stored outside of the buffers: traced code must not read their inner tensors. It is a tensor if
        # the capacity is fixed, so that a compiled step works for every length.
        self.cumulative_length: Any = 0 if max_cache_len is None else torch.zeros((), dtype=torch.long)

    @_owned
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers for the shapes and device of these keys and values, in a dtype that holds both."""
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
                start=None if self.row_start is None else _start_of(codec, self.row_start, capacity),
            )
            setattr(self, name, buffer)
        if self.max_cache_len is not None:
            self.cumulative_length = self.cumulative_length.to(self.device)
        self._hold(self.keys, self.values)
        self.is_initialized = True

    def _hold(self, keys: GSRQTensor, values: GSRQTensor) -> None:
        """Set the buffers. Those of a fixed capacity are marked as static addresses, for CUDA graphs."""
        self.keys, self.values = keys, values
        # Read once here: every attribute access on a tensor subclass goes through Python.
        self._rows, self._capacity, self._place = keys.shape[0], keys.shape[2], keys.device
        if self.max_cache_len is not None and not torch.compiler.is_compiling():
            for tensor in (keys, values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values ``[batch, kv_heads, tokens, head_dim]``, and return what attention reads.

        Returns:
            The buffers, with the full-precision tail of the new queries if there are several; or the incoming tensors
            themselves, for an exact prefill of an empty cache; or decoded tensors, if the layer ``decodes``.

        Raises:
            ValueError: the tensors cannot be written (`reference.check_append`; the message names the layer and the
                row), or the RoPE frequencies differ from those of the tokens held. Nothing is written.
        """
        incoming = (key_states, value_states)
        other_batch = self.is_initialized and key_states.shape[0] != self._rows
        if not self.is_initialized or (other_batch and self.is_empty and self.max_cache_len is None):
            self.lazy_initialization(key_states, value_states)
        if self._place != key_states.device:  # loaded from a file, or offloaded
            self.device = key_states.device
            self.prefetch()
        if self.rotary is not None:
            self.follow(self.rotary())
        # With autocast, keys and values can differ in dtype, from each other and from those outside of autocast.
        key_states, value_states = key_states.detach().to(self.dtype), value_states.detach().to(self.dtype)
        tokens = key_states.shape[2]
        slots = self._next_slots(tokens, key_states.device)
        if self.max_cache_len is None:  # else the length is a tensor
            self.reserve(self.cumulative_length + tokens)
        graph = incoming if torch.is_grad_enabled() and any(x.requires_grad for x in incoming) else ()
        if self.decodes:
            keys, values = self._decoded(key_states, value_states, slots)
            return without_gradient(keys, *graph), without_gradient(values, *graph)
        exact = tokens > 1 and self.config.prefill == "exact"
        first = exact and self.is_empty
        tails = (tokens > 1 or bool(graph)) and not first
        key_tail, value_tail, tail_start = self._append(key_states, value_states, slots, tails)
        if first:
            return incoming
        if not tails:
            return self.keys, self.values
        view = EXACT_TAIL if exact else STREAMING
        return (
            Incoming(self.keys, key_tail, tail_start, view, graph),
            Incoming(self.values, value_tail, tail_start, view, graph),
        )

    def _decoded(self, key_states: Tensor, value_states: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and return plain keys and values of all tokens. If there are several new tokens, these are returned
        as they came, after the earlier tokens as they were stored before the append."""
        tokens, held = key_states.shape[2], int(self.cumulative_length)
        new = (key_states, value_states)
        past = [x.dequantize() for x in (self.keys, self.values)] if tokens > 1 else []
        self._append(*new, slots)
        if past:
            keys, values = (x.index_copy_(2, slots, y) for x, y in zip(past, new, strict=True))
        else:
            keys, values = self.keys.dequantize(), self.values.dequantize()
        return keys[:, :, : held + tokens], values[:, :, : held + tokens]

    def _next_slots(self, tokens: int, device: torch.device) -> Tensor:
        length = self.cumulative_length
        if isinstance(length, int):
            return torch.arange(length, length + tokens, device=device)
        return torch.arange(tokens, device=device) + length

    def _append(self, key_states: Tensor, value_states: Tensor, slots: Tensor, tails: bool = False) -> Any:
        try:
            found = append_pair_(self.keys, self.values, key_states, value_states, slots, tails)
        except ValueError as error:
            raise ValueError(f"layer {self.index}, {error}") from error
        self.cumulative_length += slots.shape[0]
        self.is_empty = False
        return found

    @_owned
    def follow(self, inv_freq: Tensor) -> None:
        """Use the model's current RoPE frequencies in the frames of the keys.

        Raises:
            ValueError: the frequencies changed while the cache holds tokens.
        """
        if inv_freq is self._followed:
            return
        if torch.equal(self.keys.inv_freq, inv_freq.to(self.keys.inv_freq)):
            self._followed = inv_freq
            return
        if not self.is_empty:
            raise ValueError(
                f"layer {self.index}: the model's RoPE frequencies changed with the length of the input, while the "
                f"cache holds {int(self.get_seq_length())} tokens that were rotated by others; read the whole text "
                "with a new cache, in one forward"
            )
        turned = self.codec.key.with_frequencies(inv_freq).inv_freq.to(self.device)
        self._hold(self.keys.with_frequencies(turned), self.values)
        self._followed = inv_freq

    @_owned
    def set_row_start(self, start: Tensor) -> None:
        """Set where each row begins, and the positions of any number of slots, int32 (`GSRQTensor.start`); positions of
        later slots count up."""
        self.row_start = start
        if self.is_initialized and start.shape[0] == self._rows:
            keys, values = (
                buffer.placed(_start_of(codec, start, buffer.shape[2]))
                for codec, buffer in ((self.codec.key, self.keys), (self.codec.value, self.values))
            )
            if keys is not self.keys or values is not self.values:
                self._hold(keys, values)

    @_owned
    def offload(self) -> None:
        """Move the tensors that the layer owns to the CPU; the shared tables do not move."""
        if self.is_initialized:
            self._hold(self.keys.held_on("cpu"), self.values.held_on("cpu"))

    @_owned
    def prefetch(self) -> None:
        """Move them back to the layer's device."""
        if self.is_initialized and self._place != self.device:
            self._hold(self.keys.held_on(self.device), self.values.held_on(self.device))

    @_owned
    def reserve(self, tokens: int) -> None:
        """Grow the capacity to at least this many tokens, in a growing layer."""
        if self.max_cache_len is not None:
            return
        capacity = self._capacity
        if tokens > capacity:
            capacity = _round_up(max(tokens, capacity + capacity // 8))
            self._hold(self.keys.grown(capacity), self.values.grown(capacity))
            if self.row_start is not None:  # it may have positions beyond the old capacity
                self.set_row_start(self.row_start)

    def take_length(self, length: int) -> None:
        """Set the length after tokens were written to the buffers by other means than `update`."""
        self._set_length(length)
        self.is_empty = length == 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask for the next step."""
        if self.max_cache_len is not None and not self.decodes:
            return self.max_cache_len, 0
        held = int(self.cumulative_length) if self.decodes else self.cumulative_length
        return held + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens held; a tensor if the capacity is fixed."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Capacity, or -1 for a growing layer."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Number of batch rows; -1 before the first update."""
        return self._rows if self.is_initialized else -1

    def reset(self) -> None:
        """Discard all tokens; allocated memory is kept."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
        self._set_length(0)
        self.is_empty, self.row_start = True, None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, like transformers: ``-n`` removes n tokens, or all if there are fewer. A positive
        number (deprecated) is the length to keep."""
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
        if self.row_start is not None and self.row_start.shape[1] > 2:
            start = self.row_start[:, : 2 + keep]
            counted = positions(start[:, :2], 0, keep)
            self.set_row_start(start[:, :2] if bool((start[:, 2:] == counted).all()) else start)

    def _set_length(self, length: int) -> None:
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.fill_(length)
        else:
            self.cumulative_length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @_owned
    def batch_select_indices(self, indices: Any) -> None:
        """Keep these batch rows: a tensor, list or tuple of indices, or a bool mask."""
        if self.is_initialized:
            rows = torch.as_tensor(indices, device=self._place)
            rows = rows if rows.numel() else rows.long()
            self._hold(self.keys.select_rows(rows), self.values.select_rows(rows))
            if self.row_start is not None:
                self.row_start = self.row_start[rows.to(self.row_start.device)]

    def state(self) -> dict[str, Tensor]:
        """The tensors that this layer owns, by name, without unused slots."""
        held, coded = int(self.keys.length), int(self.keys.encoded.max()) if self.batch_size else 0
        found = {} if self.rotary is None else {"keys.inv_freq": self.keys.inv_freq}
        for name, buffer in (("keys", self.keys), ("values", self.values)):
            used = {"start": buffer.start[:, : 3 + held]}
            used |= {f"codes_{i}": codes for i, codes in enumerate(buffer.packed.coded(0, coded))}
            found |= {f"{name}.{part}": used.get(part, getattr(buffer, part)) for part in buffer.names[: buffer.owned]}
        return found

    def check_state(self, state: dict[str, Tensor], length: int, rows: int) -> str | None:
        """Describe what is wrong with a file's tensors for this layer, a `state` of ``length`` tokens in ``rows`` rows;
        None if they are valid."""
        c = self.config
        inv_freq = state.get("keys.inv_freq")
        if (inv_freq is None) != (self.rotary is None):
            return "was written for RoPE that " + ("is fixed" if inv_freq is None else "depends on the length")
        if inv_freq is not None and (inv_freq.shape != self.codec.key.inv_freq.shape or not inv_freq.isfinite().all()):
            return f"has a keys.inv_freq of {list(inv_freq.shape)}"
        for name, codec in (("keys", self.codec.key), ("values", self.codec.value)):
            several = [f"{name}.codes_{i}" for i in range(len(codec.parts))]
            want = {*several, *(f"{name}.{part}" for part in PARTS)}
            if not want <= set(state):
                return f"has no {', '.join(sorted(want - set(state)))}"
            window, start, held, encoded = (state[f"{name}.{part}"] for part in PARTS)
            slots = c.sink_tokens + c.recent_tokens + c.block_tokens
            if held.shape != () or held.dtype != torch.int32:
                return f"has a {name}.length that is not an int32 number"
            if encoded.shape != (rows,) or encoded.dtype != torch.int32:
                return f"has a {name}.encoded of {encoded.dtype} {list(encoded.shape)}"
            least, coded = (int(encoded.min()), int(encoded.max())) if rows else (length, 0)
            if int(held) != length or least < 0 or coded > length or length - least > c.recent_tokens + c.block_tokens:
                return (
                    f"holds {int(held)} tokens in its {name}, {least} to {coded} of them in codes; the metadata has "
                    f"{length} tokens"
                )
            for which, (heads, part) in zip(several, codec.parts, strict=True):
                codes, shape = state[which], (rows, len(heads), coded, part.layout.codes)
                if codes.dtype != torch.uint8 or codes.shape != shape:
                    return f"has {which} of {codes.dtype} {list(codes.shape)}, not uint8 {list(shape)}"
            if not window.is_floating_point() or window.shape != (rows, codec.heads, slots, codec.head_dim):
                return f"has a {name}.window of {window.dtype} {list(window.shape)}"
            if start.dtype != torch.int32 or start.shape not in ((rows, 2), (rows, 2 + length), (rows, 3 + length)):
                return f"has a {name}.start of {start.dtype} {list(start.shape)}"
        if not torch.equal(state["keys.encoded"], state["values.encoded"]):
            return "has other numbers of keys and of values in codes"
        return None

    @_owned
    def set_state(self, state: dict[str, Tensor], length: int, dtype: torch.dtype | None) -> None:
        """Load a checked `state` of a layer of any capacity that held ``length`` tokens (`check_state`)."""
        c = self.config
        capacity = _round_up(length) if self.max_cache_len is None else self.max_cache_len
        key = self.codec.key
        if "keys.inv_freq" in state:
            key = key.with_frequencies(state["keys.inv_freq"])
        for name, codec in (("keys", key), ("values", self.codec.value)):
            window, start, length_, encoded = (state[f"{name}.{part}"].to(codec.inv_freq.device) for part in PARTS)
            held = [state[f"{name}.codes_{i}"].to(window.device) for i in range(len(codec.parts))]
            coded = [F.pad(codes, (0, 0, 0, capacity - codes.shape[2])) for codes in held]
            integers = (c.sink_tokens, c.recent_tokens, c.block_tokens, *codec.integers)
            window, start = window.to(dtype or window.dtype), fitted(start, capacity)
            parts = [window, start, length_, encoded, *coded, *codec.tensors]
            setattr(self, name, GSRQTensor(parts, integers))
        self._hold(self.keys, self.values)
        self.row_start = max(self.keys.start, self.values.start, key=lambda t: t.shape[1])
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized, self.is_empty = True, length == 0
        self._set_length(length)


def _start_of(codec: Codecs, start: Tensor, capacity: int) -> Tensor:
    """The `GSRQTensor.start` for a buffer of this capacity; only codecs with frames need the positions of slots."""
    return fitted(start, capacity) if codec.inv_freq.numel() else start[:, :2]


def _round_up(tokens: int) -> int:
    return max(1, -(-tokens // _GROWTH)) * _GROWTH
