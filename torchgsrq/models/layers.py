"""What a model caches in each layer, found by probing forwards."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchgsrq.models.fingerprint import sample_of
from torchgsrq.models.observe import Recorder, Seen, evaluating, layer_index, observed, plain_precision, refusing
from torchgsrq.models.parts import LayerInfo, decoder, input_device, layer_kinds, some_input, text_config
from torchgsrq.models.rotary import check_followed, depends_on_length, find_rope
from torchgsrq.models.signature import parameters, with_cache


@torch.no_grad()
def inspect_layers(model: PreTrainedModel) -> list[LayerInfo]:
    """Probe every attention layer with one token at two positions.

    A single token attends only to itself. In a model that uses positions only for RoPE, its un-rotated key is
    therefore the same at both positions. The RoPE of a layer is the candidate, among the model's rotary frequencies in
    both pairings, for which this holds best. If the frequencies depend on the length of the input, the far position
    still has those of short inputs, and two positions beyond the change test whether the keys follow the model's
    buffers.

    Raises:
        ValueError: the model writes no cache, or uses layers several times, or its RoPE changes with the length and
            does not follow its buffers.
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
        beyond: list[tuple[int, dict[int, Seen]]] = []
        if depends_on_length(decoder(model)):
            beyond = [(p, _probe(model, p)[0]) for p in (2 * most + 64, 2 * most + 7)]
            _probe(model, 1)  # restores the frequencies of short inputs
    readers = _readers(near, cache)
    near = {index: x for index, x in near.items() if index not in sum(readers.values(), ())}
    if not _attends_to_its_cache(name, near, cache):
        if beyond:
            raise ValueError(
                f"{name}: RoPE changes with the length of the input, and attention does not receive what is cached, "
                "which is not supported together"
            )
        return _layers_by_cache(kinds, cache, far_cache, far_at)

    layers = []
    for index in sorted(near):
        at = {1: near[index], far_at: far[index]}
        x = near[index]
        inv_freq, interleaved, rope, rotary = find_rope(at)
        if rotary and beyond:
            check_followed(name, index, x, beyond, rotary, inv_freq, interleaved)
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
                sample=sample_of(x.k, x.v),
            )
        )
    return layers


def _probe(model: PreTrainedModel, position: int) -> tuple[dict[int, Seen], Recorder]:
    """A forward of one fixed token at a position: the inputs of each layer's attention, and the cache."""
    inner, device = decoder(model), input_device(model)
    seen: dict[int, Seen] = {}

    def observer(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> None:
        index = layer_index(module)
        if index is not None:
            seen[index] = Seen(q, k, v, getattr(module, "is_causal", True), {})

    config = text_config(model)
    cache = Recorder(config)
    arguments: dict[str, Any] = {"use_cache": True, **with_cache(inner, cache)}
    if "position_ids" in parameters(inner):
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


def _readers(seen: dict[int, Seen], cache: Recorder) -> dict[int, tuple[int, ...]]:
    """Layer to the other layers that attend to its cached keys and values."""
    found: dict[int, tuple[int, ...]] = {}
    own = {index for index, *_ in cache.given}
    held = {seen[index].k.data_ptr(): index for index in own & set(seen)}
    for index in sorted(set(seen) - own):
        source = held.get(seen[index].k.data_ptr())
        if source is not None:
            found[source] = (*found.get(source, ()), index)
    return found


def _attends_to_its_cache(name: str, seen: dict[int, Seen], cache: Recorder) -> bool:
    """Whether the attention of every layer gets exactly what the model caches. If not, only the cached tensors are
    known.

    Raises:
        ValueError: an encoder, no keys and values in the cache, or layers that are used several times.
    """
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
    """Layers of which only the cached tensors are known, for one token at position 1 and at ``far_at``."""

    def info(index: int, one: Tensor, other: Tensor, value: LayerInfo | None = None) -> LayerInfo:
        at = {p: Seen(x, x, x, True, near.rotary) for p, x in ((1, one), (far_at, other))}
        inv_freq, interleaved, rope, _ = find_rope(at)
        kind = kinds[index] if index < len(kinds) else "full_attention"
        sample = sample_of(one)
        heads, width = one.shape[1], one.shape[-1]
        return LayerInfo(index, kind, heads, heads, width, inv_freq, interleaved, rope, value=value, sample=sample)

    return [
        info(i, keys, far_keys, info(i, values, far_values))
        for (i, keys, values), (_, far_keys, far_values) in zip(near.given, far.given, strict=True)
    ]
