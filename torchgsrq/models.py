"""What a transformers decoder is made of: its layers, its RoPE, which model it is. Nothing is changed here."""

from __future__ import annotations

import hashlib
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from torchgsrq.rope import rotate

NO_ROPE, UNKNOWN_ROPE = "none", "not recognised"
UNBOUNDED = ("full_attention", "hybrid")  # kinds of layers whose keys and values grow with the text
_SAMPLE = 8  # elements of a layer's keys, and of its values, that tell models apart
_SAME_MODEL = 0.5  # relative difference of samples below which they are of one model: 4-bit weights stay below


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer, as a probing forward saw it.

    Attributes:
        index: its ``layer_idx``. kind: ``"full_attention"``, ``"sliding_attention"``, ...
        q_heads, kv_heads, head_dim: its shape. inv_freq: RoPE frequencies, empty where it has none that
            was recognised; negative where it turns the other way. interleaved: RoPE pairs are neighbours.
        rope: one word for the report.
        rotary: where the frequencies depend on the length of the input, the buffer of the decoder that holds the
            present ones, by its dotted name; empty where they are fixed.
        readers: other layers that attend to this layer's keys and values, and have none of their own.
        value: where attention is not handed what the model caches (MLA; attention outside of transformers' interface),
            what is cached as values, with heads, width and RoPE of its own. Such layers are decoded for the model.
        sample: some elements of a fixed input's keys and values, by which `same_model` knows a model again.
    """

    index: int
    kind: str
    q_heads: int
    kv_heads: int
    head_dim: int
    inv_freq: Tensor
    interleaved: bool
    rope: str
    rotary: str = ""
    readers: tuple[int, ...] = ()
    value: LayerInfo | None = None
    sample: tuple[float, ...] = field(default=(), repr=False)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a model


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile`'s wrapper or PEFT's, whose adapters sit in its own layers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
    return inner


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the decoder, also of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part that turns token embeddings into hidden states and writes the KV cache, without images or a head."""
    found = model
    while True:
        inner = found.get_decoder()
        if inner is None or inner is found or not takes_cache(inner):
            return found
        found = inner


def rope_span(model: PreTrainedModel) -> int:
    """How far apart a query and a key can be: the context that the model supports."""
    return getattr(text_config(model), "max_position_embeddings", None) or 8192


def path_to_decoder(model: PreTrainedModel) -> list[nn.Module]:
    """The modules from the model down to its decoder, both included: any of them may make a cache or generate."""
    inner = decoder(model)
    name = next(name for name, module in model.named_modules() if module is inner)
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def speaker(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost part that turns token ids into logits; the decoder of a model that has no head."""
    path: list[Any] = path_to_decoder(model)
    heads = [part for part in path if getattr(part, "get_output_embeddings", lambda: None)() is not None]
    return heads[-1] if heads else path[-1]


def takes_cache(module: nn.Module) -> bool:
    """Whether a module's forward has ``past_key_values``."""
    return isinstance(module, nn.Module) and "past_key_values" in inspect.signature(module.forward).parameters


def input_device(model: nn.Module) -> torch.device:
    """Where inputs belong; with weights that accelerate has put elsewhere, where it brings them to."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    held = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(held, torch.device("cpu"))


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """Kind of every layer, as transformers names and infers them."""
    return kinds_of_layers(text_config(model))


def kinds_of_layers(config: PreTrainedConfig) -> list[str]:
    """The same from a decoder's config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        chunked = getattr(config, "attention_chunk_size", None) is not None
        kind = "sliding_attention" if windowed else "chunked_attention" if chunked else "full_attention"
        kinds = [kind] * config.num_hidden_layers
    return list(kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Looking on


def attention_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The distinct config objects of a model's parts; each names an attention implementation."""
    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run with another attention implementation, and put the old ones back."""
    before = [(config, config._attn_implementation) for config in attention_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


OBSERVED = "gsrq_observed"  # the attention implementation (attention.py) that calls `notify`
Observer = Callable[..., Callable[[Tensor], None] | None]
_here = threading.local()  # the observers of this thread's forwards
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locking = threading.Lock()


@contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call ``observer(module, q, k, v, **kwargs)`` in every attention of the model's forwards in this thread.

    What it returns, if anything, is called with the gradient of that attention's output, ``[b, n, q_heads, d]``. A
    second thread that wants to observe the same model waits.
    """
    with _locking:
        lock = _locks.setdefault(model, threading.RLock())
    observers = _here.__dict__.setdefault("observers", [])
    with lock, attention_implementation(model, OBSERVED):
        observers.append(observer)
        try:
            yield
        finally:
            observers.pop()


def are_decoded(layers: Iterable[LayerInfo]) -> bool:
    """Whether a model's attention reads decoded tensors: that of all its layers, or of none."""
    return any(info.value is not None for info in layers)


def cached_by(layers: Iterable[LayerInfo]) -> dict[int | None, int]:
    """Layer to the one whose keys and values it attends to: itself, but for readers."""
    return {index: info.index for info in layers for index in (info.index, *info.readers)}


def layer_index(module: nn.Module) -> int | None:
    """Which layer's self-attention an observed module is; None of cross-attention, and of what has no ``layer_idx``."""
    return None if getattr(module, "is_cross_attention", False) else getattr(module, "layer_idx", None)


def notify(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Callable[[Tensor], None] | None:
    """Tell this thread's newest observer of an attention call; gives what wants to know its gradient."""
    observers = _here.__dict__.get("observers")
    return observers[-1](module, q, k, v, **kwargs) if observers else None


class Recorder(DynamicCache):
    """A cache that remembers what each of its slots was given."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.given: list[tuple[int, Tensor, Tensor]] = []
        self.rotary: dict[str, Tensor] = {}  # the model's frequencies in the forward that filled it

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Note what is given, and do as any cache does."""
        self.given.append((layer_idx, key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# What can be quantized


def check_supported(model: nn.Module) -> PreTrainedModel:
    """Refuse, by name, what cannot be quantized; what only a forward shows, `inspect_layers` refuses.

    Raises:
        TypeError: not a transformers decoder with the attention interface.
        ValueError: an architecture whose cache is no plain keys and values per layer, or float64 weights.
    """
    model = unwrap(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {name}; expected a transformers PreTrainedModel (for your own model see GSRQTensor)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; only decoder-only models are supported")
    if model.dtype == torch.float64:
        raise ValueError(f"{name} is float64; the cache holds float32, float16 or bfloat16: call model.float() first")
    return model


@dataclass
class _Seen:
    """What one layer's attention was given at one position, and the RoPE frequencies of that forward."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    rotary: dict[str, Tensor]


@torch.no_grad()
def inspect_layers(model: PreTrainedModel) -> list[LayerInfo]:
    """Probe every attention layer with one token at two positions.

    A lone token attends to itself alone, so in a model whose only use of positions is RoPE its
    un-rotated key is the same at both. Which of the model's rotary frequencies, in either pairing,
    comes nearest to that in a layer is that layer's RoPE. Where the frequencies depend on the length of
    the input, the far position is one that still has those of short inputs, and two beyond the change show
    whether the model's buffers can be followed there.

    Raises:
        ValueError: a model that writes no cache, or uses layers several times; RoPE that changes with the length and
            cannot be followed.
    """
    name = type(model).__name__
    kinds = layer_kinds(model)
    most = getattr(text_config(model), "max_position_embeddings", None) or 1026
    with plain_precision(model):
        near, cache = _probe(model, 1)
        far, far_cache, far_at = near, cache, 1
        for position in (1025, 513, 257, 129, 65, 33, 17, 9, 5, 2):
            if position < most:
                (far, far_cache), far_at = _probe(model, position), position
                if all(torch.equal(f, far_cache.rotary[n]) for n, f in cache.rotary.items()):
                    break
        beyond: list[tuple[int, dict[int, _Seen]]] = []
        if _depends_on_length(decoder(model)):
            beyond = [(p, _probe(model, p)[0]) for p in (2 * most + 64, 2 * most + 7)]
            _probe(model, 1)  # puts the frequencies of short inputs back
    readers = _readers(near, cache)
    near = {index: x for index, x in near.items() if index not in sum(readers.values(), ())}
    if not _attends_to_its_cache(name, near, cache):
        if beyond:
            raise ValueError(
                f"{name}: RoPE changes with the length of the input, and attention is not handed what is cached, which "
                "is not supported together"
            )
        return _layers_by_cache(kinds, cache, far_cache, far_at)

    layers = []
    for index in sorted(near):
        at = {1: near[index], far_at: far[index]}
        x = near[index]
        inv_freq, interleaved, rope, rotary = _find_rope(at)
        if rotary and beyond:
            _check_followed(name, index, x, beyond, rotary, inv_freq, interleaved)
        kind = kinds[index] if index < len(kinds) else "full_attention"
        layers.append(
            LayerInfo(
                index,
                kind,
                x.q.shape[1],
                x.k.shape[1],
                x.k.shape[-1],
                inv_freq,
                interleaved,
                rope,
                rotary if beyond else "",
                readers.get(index, ()),
                sample=_sample(x.k, x.v),
            )
        )
    return layers


def _readers(seen: dict[int, _Seen], cache: Recorder) -> dict[int, tuple[int, ...]]:
    """The layers that attend to what another one cached, by that layer."""
    found: dict[int, tuple[int, ...]] = {}
    own = {index for index, *_ in cache.given}
    held = {seen[index].k.data_ptr(): index for index in own & set(seen)}
    for index in sorted(set(seen) - own):
        source = held.get(seen[index].k.data_ptr())
        if source is not None:
            found[source] = (*found.get(source, ()), index)
    return found


def _sample(*vectors: Tensor) -> tuple[float, ...]:
    """A few elements of each, to four digits."""
    flat = [x.float().flatten() for x in vectors]
    some = [x[:: max(1, x.numel() // _SAMPLE)][:_SAMPLE].tolist() for x in flat]
    return tuple(float(f"{e:.4g}") for elements in some for e in elements)


@contextmanager
def plain_precision(model: PreTrainedModel) -> Iterator[None]:
    """Run in the model's own dtypes, whatever autocast is on around it, and outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(input_device(model).type, enabled=False):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, and put every module's mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def refusing(what: str, instead: str = "") -> Iterator[None]:
    """Whatever a strange architecture raises becomes a ValueError that says ``what`` failed, and what to do instead.

    Running out of memory stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error}){instead}") from error


def _probe(model: PreTrainedModel, position: int) -> tuple[dict[int, _Seen], Recorder]:
    """A forward of one token, always the same, at a position: what each layer's attention saw, and the cache."""
    inner, device = decoder(model), input_device(model)
    seen: dict[int, _Seen] = {}

    def observer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> None:
        index = layer_index(module)
        if index is not None:
            seen[index] = _Seen(q, k, v, getattr(module, "is_causal", True), {})

    config = text_config(model)
    cache = Recorder(config)
    arguments: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if "position_ids" in inspect.signature(inner.forward).parameters:
        arguments["position_ids"] = torch.tensor([[position]], device=device)
    arguments.update(some_input(model, 1))
    what = f"a forward of its decoder {type(inner).__name__} with one token failed"
    with refusing(f"{type(model).__name__} is not supported: {what}"), observed(model, observer), evaluating(inner):
        inner(**arguments)
    rotary = {
        name: buffer.detach().float().clone()
        for name, buffer in inner.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1
    }
    turned = getattr(config, "rotary_dim", None)
    if not rotary and turned:  # GPT-J and CodeGen keep a table of sines
        steps = torch.arange(0, turned, 2, dtype=torch.float32, device=device)
        rotary["rotary_dim"] = 1.0 / 10000 ** (steps / turned)
    cache.rotary = rotary
    for layer in seen.values():
        layer.rotary = rotary
    return seen, cache


def some_input(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """Always the same input of a decoder, one row: made-up embeddings, or token ids where it takes nothing else."""
    config, device = text_config(model), input_device(model)
    takes = inspect.signature(decoder(model).forward).parameters
    looked_up_again = getattr(config, "hidden_size_per_layer_input", None)  # in every layer: Gemma 3n and 4
    if "inputs_embeds" not in takes or looked_up_again:
        return {"input_ids": torch.arange(tokens, device=device)[None] % config.vocab_size}
    width = (
        getattr(config, "word_embed_proj_dim", None) or getattr(config, "embedding_size", None) or config.hidden_size
    )
    noise = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return {"inputs_embeds": noise.to(device, model.dtype)[None]}


def _depends_on_length(model: nn.Module) -> bool:
    """Whether a rotary module recomputes its frequencies in the forward, as transformers' decorator does it."""
    return any("dynamic" in kind or kind == "longrope" for module in model.modules() for kind in _rope_types(module))


def _rope_types(module: nn.Module) -> list[str]:
    """A rotary module's kinds of RoPE (one, or one for each kind of layer); none of another module."""
    types = getattr(module, "rope_type", None)
    return [x for x in (types.values() if isinstance(types, dict) else [types]) if isinstance(x, str)]


def difference(x: Tensor, want: Tensor) -> float:
    """``|x - want| / |want|``."""
    return float((x - want).norm() / want.norm().clamp_min(1e-30))


def _sign(inv_freq: Tensor) -> int:
    """-1 for the frequencies of a model that turns the other way."""
    return -1 if bool((inv_freq < 0).any()) else 1


def _attends_to_its_cache(name: str, seen: dict[int, _Seen], cache: Recorder) -> bool:
    """Whether attention is handed just what the model puts into its cache, layer by layer; if not, only what is cached
    is known of it."""
    both_ways = [index for index, x in seen.items() if not x.causal]
    if both_ways:
        raise ValueError(
            f"{name} attends in both directions in layers {', '.join(map(str, both_ways))}: an encoder, which needs no "
            "KV cache (to use it as a decoder, set is_decoder=True in its config)"
        )
    if not cache.given:
        raise ValueError(f"{name} writes no keys and values to its cache in a forward: nothing to quantize")
    slots = Counter(index for index, *_ in cache.given)
    if max(slots.values()) > 1:
        raise ValueError(
            f"{name} fills {sum(slots.values())} entries of its cache in a forward of {len(slots)} layers: models that "
            "use layers several times are not supported"
        )
    if any(x.ndim != 4 or x.shape[2] != 1 for _, *pair in cache.given for x in pair):
        raise ValueError(f"{name} caches something else than keys and values [batch, heads, tokens, width]")
    return set(slots) == set(seen) and all(
        keys.shape == seen[i].k.shape == values.shape == seen[i].v.shape
        and seen[i].q.shape[-1] == keys.shape[-1]
        and seen[i].q.shape[1] % keys.shape[1] == 0
        for i, keys, values in cache.given
    )


def _layers_by_cache(kinds: list[str], near: Recorder, far: Recorder, far_at: int) -> list[LayerInfo]:
    """Layers of which only what they cache is known, of one token at position 1 and at ``far_at``."""

    def info(index: int, one: Tensor, other: Tensor, value: LayerInfo | None = None) -> LayerInfo:
        at = {p: _Seen(x, x, x, True, near.rotary) for p, x in ((1, one), (far_at, other))}
        inv_freq, interleaved, rope, _ = _find_rope(at)
        kind = kinds[index] if index < len(kinds) else "full_attention"
        sample = _sample(one)
        heads, width = one.shape[1], one.shape[-1]
        return LayerInfo(index, kind, heads, heads, width, inv_freq, interleaved, rope, value=value, sample=sample)

    return [
        info(i, keys, far_keys, info(i, values, far_values))
        for (i, keys, values), (_, far_keys, far_values) in zip(near.given, far.given, strict=True)
    ]


def _find_rope(seen: dict[int, _Seen]) -> tuple[Tensor, bool, str, str]:
    """The rotation that makes a token's keys at two positions most alike: frequencies, pairing, name, buffer."""
    one = next(iter(seen.values()))
    none = one.k.new_zeros(0, dtype=torch.float32)
    candidates = [(none, False, NO_ROPE, "")]
    for buffer, inv_freq in one.rotary.items():
        if 2 * inv_freq.numel() <= one.k.shape[-1]:
            for sign in (1, -1):
                candidates.append((sign * inv_freq.to(none.device), False, "half-split", buffer))
                candidates.append((sign * inv_freq.to(none.device), True, "interleaved", buffer))

    def misfit(candidate: tuple[Tensor, bool, str, str]) -> float:
        near, far = (_unrotated(x.k, at, *candidate[:2]) for at, x in seen.items())
        return difference(far, near)

    best = min(candidates, key=misfit)
    if misfit(best) <= _tolerance(one.k.dtype):
        return best
    return none, False, UNKNOWN_ROPE if one.rotary else NO_ROPE, ""


def _unrotated(k: Tensor, position: int, inv_freq: Tensor, interleaved: bool) -> Tensor:
    return rotate(k, torch.tensor(-position, device=k.device), inv_freq.to(k.device), interleaved)


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def _check_followed(
    name: str,
    index: int,
    near: _Seen,
    beyond: list[tuple[int, dict[int, _Seen]]],
    rotary: str,
    inv_freq: Tensor,
    interleaved: bool,
) -> None:
    """Whether keys of long inputs, turned back by the frequencies in the model's buffer, are those of short ones."""
    want = _unrotated(near.k, 1, inv_freq, interleaved)
    sign = _sign(inv_freq)
    for position, seen in beyond:
        got = _unrotated(seen[index].k, position, sign * seen[index].rotary[rotary], interleaved)
        if difference(got, want) > _tolerance(near.k.dtype):
            raise ValueError(
                f"{name} layer {index}: RoPE changes with the length of the input, and at position {position} its keys "
                f"do not follow the buffer {rotary}, so they could not be coded; use a fixed RoPE scaling"
            )


class Rotary:
    """Where layers' present RoPE frequencies are, for models that recompute them in the forward.

    Args:
        module: the rotary module. buffer: its buffer. sign: -1 for a model that turns the other way.
    """

    def __init__(self, module: nn.Module, buffer: str, sign: int) -> None:
        self.module, self.buffer, self.sign = weakref.ref(module), buffer, sign
        self._seen: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        return self  # a copy of a cache goes on with the same model

    def __call__(self) -> Tensor:
        """The frequencies of the forward that runs now, or of the last one: the same tensor until they change.

        Raises:
            ValueError: the model does not exist any more.
        """
        module = self.module()
        if module is None:
            raise ValueError("the model that this cache follows is gone; make a new cache for the one in use")
        buffer = getattr(module, self.buffer)
        if self._seen is None or self._seen[0] is not buffer:
            value = self.sign * buffer.detach()
            old = None if self._seen is None else self._seen[1]
            self._seen = (buffer, old if old is not None and torch.equal(old, value) else value)
        return self._seen[1]

    def changes_within(self, first: int, last: int) -> int | None:
        """The number of tokens past which the frequencies change, if they do while a text grows from ``first`` to
        ``last`` tokens."""
        module: Any = self.module()
        if any("dynamic" in kind for kind in _rope_types(module)):  # each token past the limit changes them
            limit = int(module.original_max_seq_len)
            return limit if last > max(first, limit) else None
        parameters = module.config.rope_parameters
        parts = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]
        switches = [p["original_max_position_embeddings"] for p in parts if "original_max_position_embeddings" in p]
        return next((n for n in switches if first <= n < last), None)


def rotaries(model: PreTrainedModel, layers: list[LayerInfo]) -> dict[int, Rotary]:
    """Where the present RoPE frequencies of those layers are that have other ones for longer inputs."""
    made: dict[tuple[str, int], Rotary] = {}
    found = {}
    for info in layers:
        if info.rotary:
            sign = _sign(info.inv_freq)
            if (info.rotary, sign) not in made:
                path, _, buffer = info.rotary.rpartition(".")
                made[info.rotary, sign] = Rotary(decoder(model).get_submodule(path), buffer, sign)
            found[info.index] = made[info.rotary, sign]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which model it is


def fingerprint(model: PreTrainedModel, layers: list[LayerInfo]) -> dict[str, Any]:
    """Which model codebooks belong to: its shape, and samples of the keys and values of a fixed input.

    The same for a model in another dtype, with resized token embeddings, offloaded weights, or adapters that do
    nothing yet: just what shapes keys and values counts.
    """
    shape = [(x.index, x.q_heads, x.kv_heads, x.head_dim) for x in layers]
    about = f"{text_config(model).model_type}{text_config(model).hidden_size}{shape}"
    return {
        "class": type(model).__name__,
        "shape": hashlib.sha256(about.encode()).hexdigest()[:12],
        "samples": [list(x.sample) for x in layers],
    }


def same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one model: most of their layers' samples are alike."""
    if a["shape"] != b["shape"] or len(a["samples"]) != len(b["samples"]):
        return False
    x, y = (torch.tensor(f["samples"], dtype=torch.float64) for f in (a, b))
    apart = (x - y).norm(dim=1) / torch.minimum(x.norm(dim=1), y.norm(dim=1)).clamp_min(1e-30)
    return bool(apart.median() <= _SAME_MODEL)
