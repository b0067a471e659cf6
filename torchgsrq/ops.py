"""The ops as torch sees them: schemas, shapes for tracing, and their implementations.

Ops on plain tensors carry a codec, or those of a layer, as ``Tensor[] codec, int[] layout`` (see `Codec.tensors` and
`Codecs.integers`) and a cache as ``Tensor[] kv, int[] layout`` (see `pack`). The ``kv_`` ops take `GSRQTensor`s and are
what traced code calls, so that inner tensors are read only inside dispatch.
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

from torchgsrq import lowering, reference
from torchgsrq.codec import Codec, Codecs
from torchgsrq.codec.codec import heads_of
from torchgsrq.codec.kmeans import moments_by_code, nearest, sum_by_code
from torchgsrq.kernels import cpu_library
from torchgsrq.reference import Packed

log = logging.getLogger("torchgsrq")
_library = torch.library.Library("torchgsrq", "FRAGMENT")

_SCHEMAS = {
    "encode": "(Tensor x, Tensor position, Tensor[] codec, int[] layout) -> Tensor",
    "search": "(Tensor y, Tensor[] codec, int[] layout) -> Tensor",
    "decode": "(Tensor codes, Tensor position, Tensor[] codec, int[] layout, ScalarType dtype) -> Tensor",
    "append_": "(Tensor(a!)[] kv, Tensor[] codec, int[] layout, Tensor x, Tensor slots) -> ()",
    "append_pair_": "(Tensor(a!)[] key, Tensor[] key_codec, int[] key_layout, Tensor(b!)[] value, "
    "Tensor[] value_codec, int[] value_layout, Tensor k, Tensor v, Tensor slots) -> ()",
    "tail": "(Tensor[] kv, int[] layout, Tensor x, Tensor slots) -> (Tensor, Tensor)",
    "dequantize": "(Tensor[] kv, int[] layout, ScalarType dtype) -> Tensor",
    "attention": "(Tensor q, Tensor[] key, int[] key_layout, Tensor[] value, int[] value_layout, Tensor? mask, "
    "float scale, int causal, float softcap, Tensor? sink_logits, Tensor? key_tail, Tensor? value_tail, "
    "Tensor? tail_start, int view) -> Tensor",
    "check_append": "(Tensor[] kv, int[] layout, Tensor x, Tensor slots) -> ()",
    "nearest": "(Tensor x, Tensor centers) -> (Tensor, Tensor)",
    "sum_by_code": "(Tensor x, Tensor code, int codewords) -> Tensor",
    "moments_by_code": "(Tensor x, Tensor weight, Tensor code, int codewords) -> Tensor",
    "refuse_gradient": "(Tensor grad, SymInt[] shape) -> Tensor",
    "kv_append_": "(Tensor(a!) kv, Tensor x, Tensor slots) -> ()",
    "kv_place_": "(Tensor(a!) kv, Tensor start) -> ()",
    "kv_tail": "(Tensor kv, Tensor x, Tensor slots) -> (Tensor, Tensor)",
    "kv_attention": "(Tensor q, Tensor key, Tensor value, Tensor? mask, float scale, int causal, float softcap, "
    "Tensor? sink_logits, Tensor? key_tail, Tensor? value_tail, Tensor? tail_start, int view) -> Tensor",
}
# What reads lengths on the host must stay outside captured CUDA graphs; the Triton kernels do not.
_CAPTURABLE = (
    ("encode", "decode", "append_", "append_pair_", "tail", "attention") if importlib.util.find_spec("triton") else ()
)
_UNSAFE = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=() if _name.removeprefix("kv_") in _CAPTURABLE else _UNSAFE)


def pack(kv: list[Tensor], layout: list[int]) -> Packed:
    """The parts of a cache from the flat form of the ops: ``window, start, length, encoded, *codes, *codec``."""
    sink_tokens, recent_tokens, block_tokens, *integers = layout
    window, start, length, encoded, *rest = kv
    parts = len(heads_of(integers))
    codec = Codecs.from_flat(rest[parts:], integers)
    return Packed(window, start, length, encoded, rest[:parts], codec, sink_tokens, recent_tokens, block_tokens)


def encode(x: Tensor, position: Tensor, codec: list[Tensor], layout: list[int]) -> Tensor:
    """Vectors ``[b, h, n, d]`` at positions ``[b, n]`` to codes, uint8 ``[b, h, n, codes]``."""
    codec_ = Codec.from_flat(codec, layout)
    _check_vectors(x, position, codec_, values=not _capturing())
    return (_kernel(x, "encode", Codecs.of(codec_)) or reference.encode)(x, position, codec_)


def search(y: Tensor, codec: list[Tensor], layout: list[int]) -> Tensor:
    """The second half of `encode`: float32 ``[h, n, d]`` in the codes' metric to codes, uint8 ``[h, n, codes]``."""
    codec_ = Codec.from_flat(codec, layout)
    heads, dim = codec_.heads, codec_.head_dim
    if y.ndim != 3 or y.shape[::2] != (heads, dim) or y.dtype != torch.float32:
        raise ValueError(f"y has shape {tuple(y.shape)} and is {y.dtype}; expected float32 [{heads}, n, {dim}]")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("x holds NaN or inf, which no codeword stands for")
    return reference.search(y, codec_)


def decode(codes: Tensor, position: Tensor, codec: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Codes of `encode` at positions ``[b, n]`` to vectors of ``dtype``, ``[b, h, n, d]``."""
    codec_ = Codec.from_flat(codec, layout)
    heads, bytes_ = codec_.heads, codec_.layout.codes
    if codes.dtype != torch.uint8 or codes.ndim != 4 or codes.shape[1::2] != (heads, bytes_):
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; this codec reads uint8 [batch, {heads}, n, {bytes_}]: "
            "they come from another codebook"
        )
    return reference.decode(codes, position, codec_, dtype)


def append_(kv: list[Tensor], codec: list[Tensor], layout: list[int], x: Tensor, slots: Tensor) -> None:
    """Append vectors ``[b, h, n, d]`` at slots ``[n]`` in place (`reference.append_`) to the parts of a cache
    ``window, start, length, encoded, *codes``."""
    packed = pack([*kv, *codec], layout)
    kernel = _kernel(x, "append_", packed.codec, caches=(packed,))
    if kernel:
        check_append([*kv, *codec], layout, x, slots)
    (kernel or reference.append_)(packed, x, slots)


def append_pair_(
    key: list[Tensor],
    key_codec: list[Tensor],
    key_layout: list[int],
    value: list[Tensor],
    value_codec: list[Tensor],
    value_layout: list[int],
    k: Tensor,
    v: Tensor,
    slots: Tensor,
) -> None:
    """`append_` to the keys and values of a layer, or to neither."""
    pairs = ((key, key_codec, key_layout, k), (value, value_codec, value_layout, v))
    for kv, codec, layout, x in pairs:
        check_append([*kv, *codec], layout, x, slots)
    for kv, codec, layout, x in pairs:
        append_(kv, codec, layout, x, slots)


def check_append(kv: list[Tensor], layout: list[int], x: Tensor, slots: Tensor) -> None:
    """Refuse what `append_` cannot write (`reference.check_append`).

    On a GPU the values of a single token are not read back: that would stall every step.
    """
    seen = not _on_gpu(x) or (slots.shape[0] > 1 and not _capturing())
    reference.check_append(pack(kv, layout), x, slots, values=seen)


def tail(kv: list[Tensor], layout: list[int], x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The full-precision tokens before an append and the new ones (`reference.tail`)."""
    return reference.tail(pack(kv, layout), x, slots)


def dequantize(kv: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    """Everything a cache holds, ``[b, h, capacity, d]`` (`reference.dequantize`)."""
    return reference.dequantize(pack(kv, layout), dtype)


def attention(
    q: Tensor,
    key: list[Tensor],
    key_layout: list[int],
    value: list[Tensor],
    value_layout: list[int],
    mask: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
    sink_logits: Tensor | None,
    key_tail: Tensor | None,
    value_tail: Tensor | None,
    tail_start: Tensor | None,
    view: int,
) -> Tensor:
    """Attention on the codes of a cache (`reference.attention`)."""
    k, v = pack(key, key_layout), pack(value, value_layout)
    kernel = _kernel(q, "attention", k.codec, v.codec, caches=(k,))
    _check_query(q, k, v, mask, lengths=kernel is None)
    tails = None if key_tail is None or value_tail is None else (key_tail, value_tail)
    return (kernel or reference.attention)(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        causal=causal,
        softcap=softcap,
        sink_logits=sink_logits,
        tails=tails,
        tail_start=tail_start,
        view=view,
    )


def _check_vectors(x: Tensor, position: Tensor, codec: Codec, values: bool = True) -> None:
    if x.ndim != 4 or x.shape[1::2] != (codec.heads, codec.head_dim):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [batch, heads={codec.heads}, n, head_dim={codec.head_dim}]"
        )
    if position.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"position has shape {tuple(position.shape)}; expected {(x.shape[0], x.shape[2])}")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected a floating dtype")
    if values and not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or inf, which no codeword stands for")


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


# ---------------------------------------------------------------------------------------------------------------------
# GPUs


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _triton() -> Any:
    """The modules of the Triton kernels, or None without Triton."""
    if not importlib.util.find_spec("triton"):
        log.warning("torchgsrq: triton is not installed, so the slower reference runs on this GPU")
        return None
    from torchgsrq.kernels import attention, encode

    return SimpleNamespace(attention=attention, encode=encode)


def has_gpu_kernels(key: Codecs, value: Codecs) -> bool:
    """Whether caches with these codecs run on GPUs in Triton kernels, all the way."""
    kernels = _triton()
    return bool(kernels) and kernels.attention.supports(key, value) and all(map(kernels.encode.supports, (key, value)))


def _kernel(x: Tensor, name: str, *codecs: Codecs, caches: tuple[Packed, ...] = ()) -> Callable[..., Any] | None:
    """The Triton function of an op, if ``x`` is on a GPU and the kernels read such codecs and caches.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the reference would run, which reads lengths on the host.
    """
    if not _on_gpu(x):
        return None
    module = getattr(_triton(), "attention" if name == "attention" else "encode", None)
    counted = all(kv.start.shape[1] == 2 for kv in caches)  # positions count up with the slots
    if module is not None and counted and module.supports(*codecs) and x.dtype in module.DTYPES:
        return getattr(module, name)
    if _capturing():
        raise RuntimeError(
            f"{name} runs in plain PyTorch for this codec (frames that are no multiple of 16, more than 8 residual "
            "stages, more than 64 heads, or keys whose heads share codecs otherwise than values), for positions that "
            "do not count up with the slots, or without triton, and cannot be captured in a CUDA graph: choose "
            "another compile mode (in generate, disable_compile=True)"
        )
    return None


def refuse_gradient(grad: Tensor, shape: list[int]) -> Tensor:
    """The backward of attention on codes: an op, so that compiled graphs raise when it runs, not when it is traced."""
    raise RuntimeError(
        "attention on codes has no gradient: call model.train() or dequantize_kv_(model) to train, or torch.no_grad()"
    )


def _subclass_only(*_: object) -> None:
    raise TypeError("the kv_ ops take a GSRQTensor; use torchgsrq::append_ and torchgsrq::attention on plain tensors")


_FUNCTIONS = (
    encode,
    search,
    decode,
    append_,
    append_pair_,
    check_append,
    tail,
    dequantize,
    attention,
    refuse_gradient,
    nearest,
    sum_by_code,
    moments_by_code,
)
# These have a C++ kernel as well, in kernels/.
_COMPILED = (
    "encode",
    "search",
    "append_",
    "append_pair_",
    "check_append",
    "attention",
    "nearest",
    "sum_by_code",
    "moments_by_code",
)
_cpu = torch.library.Library("torchgsrq", "IMPL")


def _on_first_use(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op until it is first called on the CPU; then the compiled kernels take over, or the reference stays."""

    def first(*args: Any) -> Any:
        if not use_kernels():
            return function(*args)
        return getattr(torch.ops.torchgsrq, name)(*args)

    return first


@functools.cache
def use_kernels() -> bool:
    """Hand the CPU implementations over to the compiled kernels, building them first if need be.

    Returns:
        Whether they run; without a compiler, or with ``TORCHGSRQ_KERNELS=0``, the reference does.
    """
    global _cpu
    library = cpu_library()
    _cpu._destroy()
    _cpu = torch.library.Library("torchgsrq", "IMPL")
    if library is not None:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            log.warning("torchgsrq: the CPU kernels cannot be loaded, so the slower reference runs: %s", error)
            library = None
    if library is None:
        for function in _FUNCTIONS:
            if function.__name__ in _COMPILED:
                _cpu.impl(function.__name__, function, "CPU")
    return library is not None


for _function in _FUNCTIONS:
    _library.impl(_function.__name__, _function, "CUDA")
    if _function.__name__ in _COMPILED:
        _cpu.impl(_function.__name__, _on_first_use(_function.__name__, _function), "CPU")
    else:
        _library.impl(_function.__name__, _function, "CPU")
for _key in ("CPU", "CUDA"):
    for _name in ("kv_append_", "kv_place_", "kv_tail", "kv_attention"):
        _library.impl(_name, _subclass_only, _key)


@torch.library.register_fake("torchgsrq::encode", lib=_library)
def _(x: Tensor, position: Tensor, codec: list[Tensor], layout: list[int]) -> Tensor:
    lowering.register()
    return x.new_empty((*x.shape[:3], Codec.from_flat(codec, layout).layout.codes), dtype=torch.uint8)


@torch.library.register_fake("torchgsrq::search", lib=_library)
def _(y: Tensor, codec: list[Tensor], layout: list[int]) -> Tensor:
    return y.new_empty((*y.shape[:2], Codec.from_flat(codec, layout).layout.codes), dtype=torch.uint8)


@torch.library.register_fake("torchgsrq::decode", lib=_library)
def _(codes: Tensor, position: Tensor, codec: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    lowering.register()
    return codes.new_empty((*codes.shape[:3], Codec.from_flat(codec, layout).head_dim), dtype=dtype)


@torch.library.register_fake("torchgsrq::append_", lib=_library)
@torch.library.register_fake("torchgsrq::append_pair_", lib=_library)
def _(*_: object) -> None:
    return None


@torch.library.register_fake("torchgsrq::check_append", lib=_library)
def _(kv: list[Tensor], layout: list[int], x: Tensor, slots: Tensor) -> None:
    return None


@torch.library.register_fake("torchgsrq::tail", lib=_library)
def _(kv: list[Tensor], layout: list[int], x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    window, encoded = kv[0], kv[3]
    shape = (*window.shape[:2], window.shape[2] - layout[0] + x.shape[2], window.shape[3])
    return window.new_empty(shape), torch.empty_like(encoded)


@torch.library.register_fake("torchgsrq::dequantize", lib=_library)
def _(kv: list[Tensor], layout: list[int], dtype: torch.dtype) -> Tensor:
    window, codes = kv[0], kv[4]
    return window.new_empty((*window.shape[:2], codes.shape[2], window.shape[3]), dtype=dtype)


@torch.library.register_fake("torchgsrq::refuse_gradient", lib=_library)
def _(grad: Tensor, shape: list[int]) -> Tensor:
    return grad.new_empty(shape)


@torch.library.register_fake("torchgsrq::attention", lib=_library)
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def round_trip(x: Tensor, position: Tensor, codec: Codec | Codecs) -> Tensor:
    """Vectors ``[b, heads, n, head_dim]`` at positions ``[b, n]``, encoded and decoded, float32."""
    codecs, found = Codecs.of(codec), []
    for heads, one in codecs.parts:
        flat = (one.tensors, one.integers)
        codes = torch.ops.torchgsrq.encode(x[:, list(heads)], position, *flat)
        found.append(torch.ops.torchgsrq.decode(codes, position, *flat, torch.float32))
    return codecs.merged(found)
