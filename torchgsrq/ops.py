"""The ops as torch sees them: one entry each, with its schema, its shapes for tracing and its implementations.

Ops on plain tensors carry a codec, or those of a layer, as ``Tensor[] codec, int[] integers`` (see `Codec.tensors` and
`Codecs.integers`) and a cache as ``Tensor[] kv, int[] integers`` (see `Packed.from_flat`). The ``kv_`` ops take
`GSRQTensor`s and are what traced code calls, so that inner tensors are read only inside dispatch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from torchgsrq import kernels, lowering, reference
from torchgsrq.codec import Codec, Codecs, kmeans
from torchgsrq.codec.packed import Options, Packed

log = logging.getLogger("torchgsrq")
_library = torch.library.Library("torchgsrq", "FRAGMENT")
_cpu = torch.library.Library("torchgsrq", "IMPL")  # what the compiled kernels take over
_compiled: dict[str, Callable[..., Any]] = {}  # ops that have a C++ kernel as well, in kernels/
_UNSAFE = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_TRITON = importlib.util.find_spec("triton") is not None


def op(
    schema: str, fake: Callable[..., Any] | None = None, *, compiled: bool = False, captured: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an op by what it does in PyTorch, or, where there are Triton kernels, which of these it calls.

    Args:
        schema: its arguments and results; the name is that of the function.
        fake: its results by shape alone, for tracing; none of an op that no model calls.
        compiled: there is a C++ kernel, which takes over on the CPU when the op is first called there.
        captured: Triton kernels do all of it, and read no length on the host: CUDA graphs may hold it.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _library.define(name + schema, tags=() if captured and _TRITON else _UNSAFE)
        _library.impl(name, function, "CUDA")
        if compiled:
            _compiled[name] = function
            _cpu.impl(name, _on_first_use(name, function), "CPU")
        else:
            _library.impl(name, function, "CPU")
        if fake is not None:
            torch.library.register_fake(f"torchgsrq::{name}", fake, lib=_library)
        return function

    return define


def _on_first_use(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op until it is first called on the CPU; then the compiled kernels take over, or the reference stays."""

    def first(*args: Any) -> Any:
        return getattr(torch.ops.torchgsrq, name)(*args) if use_kernels() else function(*args)

    return first


@functools.cache
def use_kernels() -> bool:
    """Replace the CPU implementations by the compiled kernels, which are built first if necessary.

    Returns:
        Whether they run; without a compiler, or with ``TORCHGSRQ_KERNELS=0``, the reference does.
    """
    global _cpu
    _cpu._destroy()
    _cpu = torch.library.Library("torchgsrq", "IMPL")
    loaded = kernels.load()
    if not loaded:
        for name, function in _compiled.items():
            _cpu.impl(name, function, "CPU")
    return loaded


def nothing(*_: object) -> None:
    """The fake of an op that returns nothing."""


# ---------------------------------------------------------------------------------------------------------------------
# Coding


def _codes_of(x: Tensor, codec: list[Tensor], integers: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], Codec.from_flat(codec, integers).layout.codes), dtype=torch.uint8)


def _fake_encode(x: Tensor, position: Tensor, codec: list[Tensor], integers: list[int]) -> Tensor:
    lowering.register()
    return _codes_of(x, codec, integers)


@op(
    "(Tensor x, Tensor position, Tensor[] codec, int[] integers) -> Tensor",
    _fake_encode,
    compiled=True,
    captured=True,
)
def encode(x: Tensor, position: Tensor, codec: list[Tensor], integers: list[int]) -> Tensor:
    """Vectors ``[b, h, n, d]`` at positions ``[b, n]`` to codes, uint8 ``[b, h, n, codes]``."""
    codec_ = Codec.from_flat(codec, integers)
    if x.ndim != 4 or x.shape[1::2] != (codec_.heads, codec_.head_dim):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [batch, heads={codec_.heads}, n, head_dim={codec_.head_dim}]"
        )
    if position.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"position has shape {tuple(position.shape)}; expected {(x.shape[0], x.shape[2])}")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating dtype")
    if not _capturing():
        _refuse_infinite(x)
    return (_kernel(x, "encode", Codecs.of(codec_)) or reference.encode)(x, position, codec_)


@op("(Tensor y, Tensor[] codec, int[] integers) -> Tensor", _codes_of, compiled=True)
def search(y: Tensor, codec: list[Tensor], integers: list[int]) -> Tensor:
    """The second half of `encode`: float32 ``[h, n, d]`` in the codes' metric to codes, uint8 ``[h, n, codes]``."""
    codec_ = Codec.from_flat(codec, integers)
    heads, dim = codec_.heads, codec_.head_dim
    if y.ndim != 3 or y.shape[::2] != (heads, dim) or y.dtype != torch.float32:
        raise ValueError(f"y has shape {tuple(y.shape)} and is {y.dtype}; expected float32 [{heads}, n, {dim}]")
    _refuse_infinite(y)
    return reference.search(y, codec_)


def _refuse_infinite(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or inf, which no codeword stands for")


def _fake_decode(
    codes: Tensor, position: Tensor, codec: list[Tensor], integers: list[int], dtype: torch.dtype
) -> Tensor:
    lowering.register()
    return codes.new_empty((*codes.shape[:3], Codec.from_flat(codec, integers).head_dim), dtype=dtype)


@op(
    "(Tensor codes, Tensor position, Tensor[] codec, int[] integers, ScalarType dtype) -> Tensor",
    _fake_decode,
    captured=True,
)
def decode(codes: Tensor, position: Tensor, codec: list[Tensor], integers: list[int], dtype: torch.dtype) -> Tensor:
    """Codes of `encode` at positions ``[b, n]`` to vectors of ``dtype``, ``[b, h, n, d]``."""
    codec_ = Codec.from_flat(codec, integers)
    heads, bytes_ = codec_.heads, codec_.layout.codes
    if codes.dtype != torch.uint8 or codes.ndim != 4 or codes.shape[1::2] != (heads, bytes_):
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; this codec reads uint8 [batch, {heads}, n, {bytes_}]: "
            "they come from another codebook"
        )
    return reference.decode(codes, position, codec_, dtype)


def round_trip(x: Tensor, position: Tensor, codec: Codec | Codecs) -> Tensor:
    """Vectors ``[b, heads, n, head_dim]`` at positions ``[b, n]``, encoded and decoded, float32."""
    codecs, found = Codecs.of(codec), []
    for heads, one in codecs.parts:
        flat = (one.tensors, one.integers)
        codes = torch.ops.torchgsrq.encode(x[:, list(heads)], position, *flat)
        found.append(torch.ops.torchgsrq.decode(codes, position, *flat, torch.float32))
    return codecs.merged(found)


# ---------------------------------------------------------------------------------------------------------------------
# Caches


@op(
    "(Tensor(a!)[] kv, Tensor[] codec, int[] integers, Tensor x, Tensor slots) -> ()",
    nothing,
    compiled=True,
    captured=True,
)
def append_(kv: list[Tensor], codec: list[Tensor], integers: list[int], x: Tensor, slots: Tensor) -> None:
    """Append vectors ``[b, h, n, d]`` at slots ``[n]`` in place (`reference.append_`) to the parts of a cache
    ``window, start, length, encoded, *codes``.

    Raises:
        ValueError: see `reference.check_append`; nothing is written then.
    """
    packed = Packed.from_flat([*kv, *codec], integers)
    _check_append(packed, x, slots)
    _append(packed, x, slots)


def _fake_append_pair(
    key: list[Tensor],
    key_codec: list[Tensor],
    key_integers: list[int],
    value: list[Tensor],
    value_codec: list[Tensor],
    value_integers: list[int],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    tails: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    key_window, value_window, encoded = key[0], value[0], key[3]
    if not tails:
        return key_window.new_empty(0), value_window.new_empty(0), encoded.new_empty(0)
    n = key_window.shape[2] - key_integers[0] + k.shape[2]
    shapes = ((*x.shape[:2], n, x.shape[3]) for x in (key_window, value_window))
    return *(key_window.new_empty(shape) for shape in shapes), torch.empty_like(encoded)  # type: ignore[return-value]


@op(
    "(Tensor(a!)[] key, Tensor[] key_codec, int[] key_integers, Tensor(b!)[] value, Tensor[] value_codec, "
    "int[] value_integers, Tensor k, Tensor v, Tensor slots, bool tails) -> (Tensor, Tensor, Tensor)",
    _fake_append_pair,
    compiled=True,
    captured=True,
)
def append_pair_(
    key: list[Tensor],
    key_codec: list[Tensor],
    key_integers: list[int],
    value: list[Tensor],
    value_codec: list[Tensor],
    value_integers: list[int],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    tails: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`append_` to the keys and values of a layer, or to neither.

    Returns:
        With ``tails``, what the newest queries may see in full precision, of keys and of values, and from which slot on
        (`reference.tail`); else nothing, in tensors without elements.

    Raises:
        ValueError: as `append_`, after ``keys: `` or ``values: ``.
    """
    sides = (
        ("keys", Packed.from_flat([*key, *key_codec], key_integers), k),
        ("values", Packed.from_flat([*value, *value_codec], value_integers), v),
    )
    for name, kv, x in sides:
        try:
            _check_append(kv, x, slots)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    found = k.new_empty(0), v.new_empty(0), slots.new_empty(0, dtype=torch.int32)
    if tails:
        (key_tail, first), (value_tail, _) = (reference.tail(kv, x, slots) for _, kv, x in sides)
        found = key_tail, value_tail, first
    for _, kv, x in sides:
        _append(kv, x, slots)
    return found


def _check_append(kv: Packed, x: Tensor, slots: Tensor) -> None:
    # On a GPU the values of a single token are not read back: that would stall every step.
    reference.check_append(kv, x, slots, values=not _on_gpu(x) or (slots.shape[0] > 1 and not _capturing()))


def _append(kv: Packed, x: Tensor, slots: Tensor) -> None:
    (_kernel(x, "append_", kv.codec, caches=(kv,)) or reference.append_)(kv, x, slots)


def _fake_dequantize(kv: list[Tensor], integers: list[int], dtype: torch.dtype) -> Tensor:
    window, codes = kv[0], kv[4]
    return window.new_empty((*window.shape[:2], codes.shape[2], window.shape[3]), dtype=dtype)


@op("(Tensor[] kv, int[] integers, ScalarType dtype) -> Tensor", _fake_dequantize)
def dequantize(kv: list[Tensor], integers: list[int], dtype: torch.dtype) -> Tensor:
    """Everything a cache holds, ``[b, h, capacity, d]`` (`reference.dequantize`)."""
    return reference.dequantize(Packed.from_flat(kv, integers), dtype)


_OPTIONS = (
    "Tensor? mask, float scale, int causal, float softcap, Tensor? sink_logits, Tensor? key_tail, Tensor? value_tail, "
    "Tensor? tail_start, int view"
)


def like_query(q: Tensor, *_: object) -> Tensor:
    """The fake of attention."""
    return q.new_empty(q.shape)


@op(
    f"(Tensor q, Tensor[] key, int[] key_integers, Tensor[] value, int[] value_integers, {_OPTIONS}) -> Tensor",
    like_query,
    compiled=True,
    captured=True,
)
def attention(
    q: Tensor, key: list[Tensor], key_integers: list[int], value: list[Tensor], value_integers: list[int], *options: Any
) -> Tensor:
    """Attention on the codes of a cache (`reference.attention`), with `Options`."""
    k, v, asked = Packed.from_flat(key, key_integers), Packed.from_flat(value, value_integers), Options(*options)
    kernel = _kernel(q, "attention", k.codec, v.codec, caches=(k,))
    _check_query(q, k, v, asked.mask, lengths=kernel is None)
    return (kernel or reference.attention)(q, k, v, asked)


def _check_query(q: Tensor, key: Packed, value: Packed, mask: Tensor | None, lengths: bool = True) -> None:
    heads, dim = key.codec.heads, key.codec.head_dim
    if q.ndim != 4 or q.shape[-1] != dim or q.shape[1] % heads or q.shape[0] != key.window.shape[0]:
        raise ValueError(
            f"query has shape {tuple(q.shape)}; this cache takes [batch={key.window.shape[0]}, a multiple of {heads} "
            f"heads, queries, head_dim={dim}]"
        )
    if not lengths:
        return
    if int(key.length) != int(value.length):
        raise ValueError(f"the keys hold {int(key.length)} tokens and the values {int(value.length)}")
    if mask is not None and mask.shape[-1] < int(key.length):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; its last size must cover the {int(key.length)} tokens held"
        )


def _fake_gradient(grad: Tensor, shape: list[int]) -> Tensor:
    return grad.new_empty(shape)


@op("(Tensor grad, SymInt[] shape) -> Tensor", _fake_gradient)
def refuse_gradient(grad: Tensor, shape: list[int]) -> Tensor:
    """The backward of attention on codes: an op, so that compiled graphs raise when it runs, not when it is traced."""
    raise RuntimeError(
        "attention on codes has no gradient: call model.train() or dequantize_kv_(model) to train, or torch.no_grad()"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Subclasses: tensor.py has what these do


def _subclass_only(*_: object) -> None:
    raise TypeError(
        "the kv_ ops take a GSRQTensor; use torchgsrq::append_pair_ and torchgsrq::attention on plain tensors"
    )


for _name, _schema, _captured in (
    ("append_pair_", "(Tensor(a!) key, Tensor(b!) value, Tensor k, Tensor v, Tensor slots, bool tails) "
     "-> (Tensor, Tensor, Tensor)", True),
    ("place_", "(Tensor(a!) kv, Tensor start) -> ()", False),
    ("attention", f"(Tensor q, Tensor key, Tensor value, {_OPTIONS}) -> Tensor", True),
):  # fmt: skip
    _library.define(f"kv_{_name}{_schema}", tags=() if _captured and _TRITON else _UNSAFE)
    for _key in ("CPU", "CUDA"):
        _library.impl(f"kv_{_name}", _subclass_only, _key)


# ---------------------------------------------------------------------------------------------------------------------
# Learning

op("(Tensor x, Tensor centers) -> (Tensor, Tensor)", compiled=True)(kmeans.nearest)
op("(Tensor x, Tensor code, int codewords) -> Tensor", compiled=True)(kmeans.sum_by_code)
op("(Tensor x, Tensor weight, Tensor code, int codewords) -> Tensor", compiled=True)(kmeans.moments_by_code)


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _triton() -> Any:
    """The modules of the Triton kernels, or None without Triton."""
    if not _TRITON:
        log.warning("torchgsrq: triton is not installed, so the slower reference runs on this GPU")
        return None
    from torchgsrq.kernels import attention, encode, paged

    return SimpleNamespace(attention=attention, encode=encode, paged=paged)


def has_gpu_kernels(key: Codecs, value: Codecs) -> bool:
    """Whether caches with these codecs run on GPUs in Triton kernels, all the way."""
    found = _triton()
    return bool(found) and found.attention.supports(key, value) and all(map(found.encode.supports, (key, value)))


def _kernel(
    x: Tensor, name: str, *codecs: Codecs, caches: tuple[Packed, ...] = (), alike: tuple[Tensor | None, ...] = ()
) -> Callable[..., Any] | None:
    """The Triton function of an op, if ``x`` is on a GPU, the kernels read such codecs and caches, and the tensors
    ``alike`` have the dtype of ``x``.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the reference would run, which reads lengths on the host.
    """
    if not _on_gpu(x):
        return None
    home = "paged" if name.startswith("paged_") else "attention" if name == "attention" else "encode"
    module = getattr(_triton(), home, None)
    fit = all(kv.counts_up for kv in caches) and all(t is None or t.dtype == x.dtype for t in alike)
    if module is not None and fit and module.supports(*codecs) and x.dtype in module.DTYPES:
        return getattr(module, name)
    if _capturing():
        raise RuntimeError(
            f"{name} runs in plain PyTorch for this codec (frames that are not a multiple of 16, more than 8 residual "
            "stages, more than 64 heads, or keys whose heads share codecs otherwise than values), for positions that "
            "do not count up with the slots, for tensors of several dtypes, or without triton, and cannot be captured "
            "in a CUDA graph: choose another compile mode (in generate, disable_compile=True)"
        )
    return None
