"""GSRQTensor: a KV buffer that looks like ``[batch, heads, capacity, head_dim]`` and holds codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from torchgsrq import ops  # noqa: F401 (defines torch.ops.torchgsrq)
from torchgsrq.codec import Codec, Codecs
from torchgsrq.codec.codec import TABLES, heads_of
from torchgsrq.codec.packed import NOT_CAUSAL, UPPER_LEFT, Options, Packed, fitted
from torchgsrq.config import GSRQConfig

aten = torch.ops.aten
gsrq = torch.ops.torchgsrq

PARTS = ("window", "start", "length", "encoded")


class GSRQTensor(Tensor):
    """A quantized KV buffer that replaces a plain one of shape ``[batch, heads, capacity, head_dim]``.

    Write with ``index_copy_(2, slots, x)`` or ``buffer[:, :, slots] = x``. Read with
    ``F.scaled_dot_product_attention`` (on the codes) or ``dequantize()``. Attention ignores slots past the
    length. Tokens are written in order; writing at an earlier slot discards the slots from there on.

    Tensor Attributes:
        window: ``[batch, heads, sink_tokens + ring, head_dim]``, the dtype of the buffer: the first real tokens of
            each row, and a ring of the newest tokens, in full precision.
        start: int32 ``[batch, 2]``: the slot of each row's position 0 (negative if positions begin above 0),
            and the slot of its first real token (its left padding). ``[batch, 2 + capacity]`` if positions do not
            count up with the slots (padding in the middle, images): then also the position of every slot.
        length: int32 ``[]``, the number of slots held.
        encoded: int32 ``[batch]``, the number of each row's first slots that are encoded.
        codes_0, codes_1, ...: for each part of the codecs, uint8 ``[batch, heads of the part, capacity, codes]``, the
            encoded tokens; ``codes`` is their list.
        inv_freq, mean_0, transform_0, inverse_0, codebook_0, mean_1, ...: the tables of `Codecs`, shared.

    Non-Tensor Attributes:
        integers: sink, recent and block tokens, then `Codecs.integers`.
        head_repeat: how often each head is repeated in the logical shape (``repeat_interleave`` is lazy).
        read_only: the buffer is a view; appending to it would not change the original.
        split_heads: the repeated heads have their own dimension, as between ``expand`` and ``reshape``.
        names: names of the tensor attributes.
        owned: how many of the tensor attributes, counted from the first, are not shared.
        parts: the tensor attributes in order, as ops take them.
    """

    window: Tensor
    start: Tensor
    length: Tensor
    encoded: Tensor
    inv_freq: Tensor
    integers: tuple[int, ...]
    head_repeat: int
    read_only: bool
    split_heads: bool
    names: tuple[str, ...]
    owned: int
    parts: list[Tensor]

    @staticmethod
    def __new__(
        cls,
        tensors: list[Tensor],
        integers: tuple[int, ...],
        repeat: int = 1,
        read_only: bool = False,
        split: bool = False,
    ) -> GSRQTensor:
        """Wrap the tensor attributes, given in order; users call `empty`."""
        window, capacity = tensors[0], tensors[len(PARTS)].shape[2]
        batch, heads, _, head_dim = window.shape
        size = (batch, heads, repeat, capacity, head_dim) if split else (batch, heads * repeat, capacity, head_dim)
        self = Tensor._make_wrapper_subclass(cls, size, dtype=window.dtype, device=window.device)
        self.integers, self.head_repeat, self.read_only, self.split_heads = tuple(integers), repeat, read_only, split
        self.names, self.owned = _names(len(heads_of(self.integers[3:])))
        self.parts = list(tensors)
        for name, tensor in zip(self.names, tensors, strict=True):
            setattr(self, name, tensor)
        return self

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        codec: Codec | Codecs,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: GSRQConfig | None = None,
        start: Tensor | None = None,
    ) -> GSRQTensor:
        """Create an empty buffer.

        Args:
            batch: rows.
            kv_heads: KV heads.
            capacity: tokens that fit.
            head_dim: elements of a head's vector.
            codec: ``codebooks[layer].key`` or ``.value``, or one codec for all heads.
            device: device of all tensors.
            dtype: dtype of the full-precision window and of decoded tensors; torch's default dtype by default.
            config: sets the sink, recent and block tokens; the defaults of `GSRQConfig` without it.
            start: int ``[batch]``, the left padding of each row, or all of the tensor attribute ``start``; zeros by
                default.

        Raises:
            ValueError: the codec is for another head_dim or number of heads, a size is negative, or ``start`` has a
                wrong shape.
        """
        codec = Codecs.of(codec)
        if (codec.heads, codec.head_dim) != (kv_heads, head_dim):
            raise ValueError(
                f"codec is for {codec.heads} heads of {codec.head_dim}, not kv_heads={kv_heads} and head_dim={head_dim}"
            )
        if batch < 0 or capacity < 0:
            raise ValueError(f"batch={batch} and capacity={capacity} must be at least 0")
        config = config or GSRQConfig()
        dtype = dtype or torch.get_default_dtype()
        ring = config.recent_tokens + config.block_tokens
        window = torch.zeros(batch, kv_heads, config.sink_tokens + ring, head_dim, dtype=dtype, device=device)
        device = window.device
        codec = codec.to(device)
        tensors = [
            window,
            torch.zeros(batch, 2, dtype=torch.int32, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            *(
                torch.zeros(batch, len(heads), capacity, part.layout.codes, dtype=torch.uint8, device=device)
                for heads, part in codec.parts
            ),
            *codec.tensors,
        ]
        if start is not None:
            if start.shape not in ((batch,), (batch, 2), (batch, 2 + capacity)):
                raise ValueError(
                    f"start has shape {tuple(start.shape)}; expected [{batch}], [{batch}, 2] or [{batch}, 2 + capacity]"
                )
            start = start if start.ndim == 2 else start[:, None].expand(-1, 2)
            tensors[1] = start.to(device=device, dtype=torch.int32).clone()
        return cls(tensors, (config.sink_tokens, config.recent_tokens, config.block_tokens, *codec.integers))

    # -- the interface of a wrapper subclass

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.names), (self.integers, self.head_repeat, self.read_only, self.split_heads)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> GSRQTensor:
        return cls([inner[name] for name in _names(len(heads_of(meta[0][3:])))[0]], *meta)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        held = sum(codes.shape[1] * codes.shape[3] for codes in self.codes)
        bits = 8 * held / (self.window.shape[1] * self.window.shape[3])
        rate = f"{bits:g}" if isinstance(bits, float) else str(bits)  # torch prints what it traces, in symbols
        return f"GSRQTensor(shape={tuple(self.shape)}, bits={rate}, dtype={self.dtype}, device={self.device})"

    def _stable_hash_for_caching(self) -> str:
        inner = [(name, tuple(getattr(self, name).shape), str(getattr(self, name).dtype)) for name in self.names]
        return repr((type(self).__name__, str(self.device), inner, self.__tensor_flatten__()[1]))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.index_copy_ and _made_in_graph(args):
            return _index_copy_(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _sdpa(*args, **kwargs)
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            return _repeat_interleave(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # the default would label plain results as this class
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"GSRQTensor does not support {func}: its tokens are codes. Call .dequantize() for a plain tensor."
            )
        return handler(*args, **(kwargs or {}))

    # -- the user API

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode all tokens to a plain tensor of the buffer's shape; slots past the length are zero.

        Args:
            dtype: dtype of the result; that of the buffer by default.
        """
        out = gsrq.dequantize(self.parts, self.integers, dtype or self.dtype)
        if self.split_heads:
            return out.unsqueeze(2).expand(-1, -1, self.head_repeat, -1, -1)
        return out.repeat_interleave(self.head_repeat, 1) if self.head_repeat > 1 else out

    @property
    def codes(self) -> list[Tensor]:
        """The encoded tokens, one tensor per part of the codecs."""
        return self.parts[len(PARTS) : self.owned]

    @property
    def codec(self) -> Codecs:
        """The codecs."""
        return Codecs.from_flat(self.parts[self.owned :], self.integers[3:])

    @property
    def packed(self) -> Packed:
        """The tensors by name."""
        return Packed.from_flat(self.parts, self.integers)

    def crop_(self, length: int) -> None:
        """Discard all slots from ``length`` on. The remaining tokens decode as before: encoded tokens stay encoded.

        Raises:
            ValueError: ``length`` is negative or more than the tokens held.
        """
        held = int(self.length)
        if not 0 <= length <= held:
            raise ValueError(f"length={length} must lie between 0 and the {held} tokens held")
        self.length.fill_(length)
        self.encoded.clamp_(max=length)

    def grown(self, capacity: int) -> GSRQTensor:
        """A buffer of at least this capacity with the same tokens; codes are copied, the rest is shared."""
        more = capacity - self.codes[0].shape[2]
        if more <= 0:
            return self
        window, start, *rest = self.parts
        codes = [F.pad(codes, (0, 0, 0, more)) for codes in self.codes]
        others = [*rest[: len(PARTS) - 2], *codes, *self.parts[self.owned :]]
        return _like(self, [window, fitted(start, capacity), *others])

    def placed(self, start: Tensor) -> GSRQTensor:
        """The same buffer with a copy of another ``start``, written in place if the shapes match."""
        start = start.to(self.start.device, self.start.dtype)
        if start.shape == self.start.shape:
            gsrq.kv_place_(self, start)
            return self
        window, _, *rest = self.parts
        return _like(self, [window, start.clone(), *rest])

    def with_frequencies(self, inv_freq: Tensor) -> GSRQTensor:
        """The same buffer with other RoPE frequencies in its frame rotation."""
        return _like(self, [inv_freq if t is self.inv_freq else t for t in self.parts])

    def __deepcopy__(self, memo: dict[int, Any]) -> GSRQTensor:
        return _clone(self)  # the tables are shared

    def held_on(self, device: torch.device | str) -> GSRQTensor:
        """The same buffer with the tensors it owns on a device, for offloading; the shared tables do not move."""
        return _like(self, [t.to(device) if i < self.owned else t for i, t in enumerate(self.parts)])

    def select_rows(self, rows: Tensor) -> GSRQTensor:
        """A copy of the batch rows at ``rows`` (indices in any order, or a bool mask)."""
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        held = self.parts[: self.owned]
        held = [t.index_select(0, rows.to(t.device)) if t.ndim else t.clone() for t in held]  # the length is of all
        return _like(self, [*held, *self.parts[self.owned :]])

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that this buffer owns; its shape and dtype would imply those of full precision."""
        return sum(self.nbytes_by_part().values())

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of the storages that this buffer owns, without the shared tables, by attribute; codes together."""
        found = {name: getattr(self, name).untyped_storage().nbytes() for name in PARTS}
        return found | {"codes": sum(codes.untyped_storage().nbytes() for codes in self.codes)}


@functools.cache
def _names(parts: int) -> tuple[tuple[str, ...], int]:
    """The names of a buffer's tensors for codecs with this many parts, and how many of them it owns."""
    owned = (*PARTS, *(f"codes_{i}" for i in range(parts)))
    return (*owned, "inv_freq", *(f"{table}_{i}" for i in range(parts) for table in TABLES)), len(owned)


def _made_in_graph(args: Any) -> bool:
    """Whether a buffer was built from plain tensors in a graph that is being exported.

    Exported graphs for AOTInductor take plain tensors only, and see such a buffer only as its parts.
    """
    mode = get_proxy_mode() if torch.compiler.is_exporting() else None
    known = getattr(getattr(mode, "tracer", None), "tensor_tracker", None)
    return known is not None and any(isinstance(x, GSRQTensor) and x not in known for x in args)


def _like(x: GSRQTensor, tensors: list[Tensor], **changes: Any) -> GSRQTensor:
    facts = {"repeat": x.head_repeat, "read_only": x.read_only, "split": x.split_heads, **changes}
    return GSRQTensor(tensors, x.integers, **facts)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


_VIEW = "this GSRQTensor is a view; write to the buffer that it was made from"


def _append(kv: GSRQTensor, x: Tensor, slots: Tensor) -> None:
    if kv.read_only or kv.head_repeat > 1:
        raise ValueError(_VIEW)
    gsrq.append_(kv.parts[: kv.owned], kv.parts[kv.owned :], kv.integers, x, slots)


def append_pair_(
    key: GSRQTensor, value: GSRQTensor, k: Tensor, v: Tensor, slots: Tensor, tails: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Append to both buffers or to neither. With ``tails``, return the tails that the newest queries read in full
    precision (`ops.append_pair_`).

    This is a single op per layer and step.
    """
    if torch.compiler.is_compiling():
        return gsrq.kv_append_pair_(key, value, k, v, slots, tails)
    return _append_pair(key, value, k, v, slots, tails)


def _append_pair(
    key: GSRQTensor, value: GSRQTensor, k: Tensor, v: Tensor, slots: Tensor, tails: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if key.read_only or value.read_only:
        raise ValueError(_VIEW)
    a, b = key.owned, value.owned
    return gsrq.append_pair_(
        key.parts[:a], key.parts[a:], key.integers, value.parts[:b], value.parts[b:], value.integers, k, v, slots, tails
    )


def _index_copy_(kv: GSRQTensor, dim: int, index: Tensor, source: Tensor) -> GSRQTensor:
    if dim not in (2, -2):
        raise ValueError(f"index_copy_ along dim={dim}: a GSRQTensor is written along dim 2, its tokens")
    _append(kv, source, index)
    return kv


def _index_put_(kv: GSRQTensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> GSRQTensor:
    if accumulate or len(indices) != 3 or indices[0] is not None or indices[1] is not None or indices[2] is None:
        raise ValueError("a GSRQTensor is written along its tokens: buffer[:, :, slots] = x")
    slots = indices[2].reshape(-1)
    # `buffer[...] = x` drops leading dimensions of size 1 from x.
    _append(kv, values.expand(*kv.shape[:2], slots.shape[0], kv.shape[3]), slots)
    return kv


def _copy_(kv: GSRQTensor, source: Tensor, non_blocking: bool = False) -> GSRQTensor:
    if isinstance(source, GSRQTensor):
        pairs = list(zip(kv.parts, source.parts, strict=True)) if source.integers == kv.integers else []
        owned, tables = pairs[: kv.owned], pairs[kv.owned :]
        if not pairs or any(a.shape != b.shape for a, b in pairs):
            raise ValueError(f"cannot copy {source!r} into {kv!r}: their codecs or shapes differ")
        same = torch.compiler.is_compiling() or all(a is b or torch.equal(a, b) for a, b in tables)
        if not same:
            raise ValueError(f"cannot copy {source!r} into {kv!r}: their codebooks differ")
        for a, b in owned:
            a.copy_(b, non_blocking)
    else:
        _append(kv, source.to(kv.dtype), torch.arange(source.shape[2], device=kv.device))
    return kv


def _place(kv: GSRQTensor, start: Tensor) -> None:
    kv.start.copy_(start)


def _zero_(kv: GSRQTensor) -> GSRQTensor:
    for tensor in kv.parts[: kv.owned]:
        tensor.zero_()
    return kv


# ---------------------------------------------------------------------------------------------------------------------
# Moving, copying, viewing


def _clone(kv: GSRQTensor, memory_format: Any = None) -> GSRQTensor:
    if kv.split_heads:  # the middle of expand().reshape(): still a view, nothing to copy
        return kv
    return _like(kv, [t.clone() if i < kv.owned else t for i, t in enumerate(kv.parts)], read_only=False)


def _alias(kv: GSRQTensor) -> GSRQTensor:
    return _like(kv, kv.parts)


def _to_copy(
    kv: GSRQTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> GSRQTensor:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"a GSRQTensor holds floating values; dtype={dtype} is not one")
    moved = [t.to(device=device, non_blocking=non_blocking, copy=i < kv.owned) for i, t in enumerate(kv.parts)]
    moved[0] = moved[0].to(dtype or kv.dtype)
    return _like(kv, moved)


def _index_select(kv: GSRQTensor, dim: int, index: Tensor) -> GSRQTensor:
    if dim not in (0, -4):
        raise ValueError(f"index_select along dim={dim}: only rows of the batch can be selected; call .dequantize()")
    return kv.select_rows(index)


def _index(kv: GSRQTensor, indices: list[Tensor | None]) -> GSRQTensor:
    if len(indices) == 0 or indices[0] is None or any(i is not None for i in indices[1:]) or indices[0].ndim != 1:
        raise ValueError("only rows of the batch can be indexed; call .dequantize() for anything else")
    return kv.select_rows(indices[0])


def _slice(kv: GSRQTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> GSRQTensor:
    size = kv.shape[dim]
    first = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    last = min(max(size if end is None else end + (size if end < 0 else 0), first), size)
    if (first, last, step) == (0, size, 1):
        return _alias(kv)
    held, tables = kv.parts[: kv.owned], kv.parts[kv.owned :]
    dim = dim % kv.ndim
    if dim == 0 and step == 1:
        return _like(kv, [*(t[first:last] if t.ndim else t for t in held), *tables], read_only=True)
    if dim == kv.ndim - 2 and first == 0 and step == 1:
        window, begin, length, encoded, *codes = held
        counters = [length.clamp(max=last), encoded.clamp(max=last)]
        return _like(kv, [window, begin, *counters, *(c[:, :, :last] for c in codes), *tables], read_only=True)
    raise ValueError(
        f"slice [{start}:{end}:{step}] along dim {dim}: only rows of the batch and the first tokens can be cut out; "
        "call .dequantize() for anything else"
    )


def _unsqueeze(kv: GSRQTensor, dim: int) -> GSRQTensor:
    if kv.split_heads or dim not in (2, -3) or kv.head_repeat != 1:
        raise ValueError(f"unsqueeze at dim={dim}: only heads can be repeated, as in buffer[:, :, None].expand(...)")
    return _like(kv, kv.parts, split=True, read_only=True)


def _expand(kv: GSRQTensor, size: list[int], implicit: bool = False) -> GSRQTensor:
    if not kv.split_heads:
        if all(s in (-1, have) for s, have in zip(size, kv.shape, strict=True)):
            return _alias(kv)
        raise ValueError(f"expand to {list(size)}: only heads can be repeated, as in buffer[:, :, None].expand(...)")
    batch, heads, _, capacity, dim = kv.shape
    if any(s not in (-1, have) for s, have in zip((*size[:2], *size[3:]), (batch, heads, capacity, dim), strict=True)):
        raise ValueError(f"expand {tuple(kv.shape)} to {list(size)}: only heads can be repeated")
    return _like(kv, kv.parts, repeat=max(size[2], 1))


def _view(kv: GSRQTensor, size: list[int]) -> GSRQTensor:
    if tuple(size) == tuple(kv.shape):
        return _alias(kv)
    batch, heads, _, dim = kv.window.shape
    if tuple(size) == (batch, heads * kv.head_repeat, kv.codes[0].shape[2], dim):
        return _like(kv, kv.parts, split=False, read_only=True)
    raise ValueError(f"cannot view {tuple(kv.shape)} as {list(size)}: only repeated heads can be merged")


def _repeat_interleave(kv: GSRQTensor, repeats: Any, dim: int | None = None, **_: Any) -> Tensor:
    if dim in (0, -4):
        rows = torch.arange(kv.shape[0], device=kv.device).repeat_interleave(repeats)
        return kv.select_rows(rows)
    if dim in (1, -3) and isinstance(repeats, int):
        return _repeat_heads(kv, repeats)
    raise ValueError(f"repeat_interleave({repeats}, dim={dim}): rows (dim 0) and heads (dim 1) can be repeated")


def _repeat_heads(kv: GSRQTensor, repeats: int) -> Tensor:
    """Repeat heads lazily, with the ops that plain code would use, so that tracing records them."""
    if _made_in_graph((kv,)):
        return _like(kv, kv.parts, repeat=kv.head_repeat * repeats, read_only=True)
    batch, heads, capacity, dim = kv.shape
    return kv[:, :, None].expand(batch, heads, repeats, capacity, dim).reshape(batch, heads * repeats, capacity, dim)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def attend(q: Tensor, key: Any, value: Any, options: Options) -> Tensor:
    """Attention of plain queries ``[batch, query heads, queries, head_dim]`` on the codes of two buffers.

    Returns:
        ``[batch, query heads, queries, head_dim]``.

    Raises:
        TypeError: the keys or the values are a plain tensor.
    """
    # Outside of graphs, skip the subclass dispatch of the op, which costs as much as attention on short texts.
    traced = torch.compiler.is_compiling() and not _made_in_graph((key, value))
    return (gsrq.kv_attention if traced else _attention)(q, key, value, *options)


def _attention(q: Tensor, key: Any, value: Any, *options: Any) -> Tensor:
    for name, kv in (("key", key), ("value", value)):
        if not isinstance(kv, GSRQTensor):
            raise TypeError(f"{name} is a plain tensor; attention on codes takes a GSRQTensor for both")
    return gsrq.attention(q, key.parts, key.integers, value.parts, value.integers, *options)


def _sdpa(
    query: Tensor,
    key: GSRQTensor,
    value: GSRQTensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not (isinstance(key, GSRQTensor) and isinstance(value, GSRQTensor)) or isinstance(query, GSRQTensor):
        raise TypeError("scaled_dot_product_attention takes a plain query and a GSRQTensor for both key and value")
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p}: attention on codes has no dropout")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"{query.shape[1]} query heads and {key.shape[1]} key heads need enable_gqa=True")
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal=True exclude each other")
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = attend(query, key, value, Options(attn_mask, scale, UPPER_LEFT if is_causal else NOT_CAUSAL))
    return without_gradient(out, query, key, value)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in inputs]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # As the gradients themselves, so that no compiler drops the op that raises.
        needed = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return None, *(gsrq.refuse_gradient(grads[0], shape) if need else None for shape, need in needed)


def without_gradient(out: Tensor, *inputs: Tensor) -> Tensor:
    """The output of attention on codes for these inputs: its backward raises, instead of silently losing a gradient."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _WithoutGradient.apply(out, *inputs)
    return out


_HANDLERS: dict[Any, Callable[..., Any]] = {
    gsrq.kv_append_pair_.default: _append_pair,
    gsrq.kv_place_.default: _place,
    gsrq.kv_attention.default: _attention,
    aten.index_copy_.default: _index_copy_,
    aten.index_put_.default: _index_put_,
    aten.copy_.default: _copy_,
    aten.zero_.default: _zero_,
    aten.clone.default: _clone,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten._to_copy.default: _to_copy,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.slice.Tensor: _slice,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}
