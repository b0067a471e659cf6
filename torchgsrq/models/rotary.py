"""Detection of a layer's RoPE from its keys, and frequencies that change with the length of the input."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchgsrq.codec.rope import rotate
from torchgsrq.models.observe import Seen
from torchgsrq.models.parts import LayerInfo, decoder

NO_ROPE, UNKNOWN_ROPE = "none", "not recognized"


def difference(x: Tensor, want: Tensor) -> float:
    """``|x - want| / |want|``."""
    return float((x - want).norm() / want.norm().clamp_min(1e-30))


def find_rope(seen: dict[int, Seen]) -> tuple[Tensor, bool, str, str]:
    """The rotation that makes a token's un-rotated keys at two positions most similar.

    Returns:
        Frequencies ``[pairs]``, whether pairs are interleaved, the name of the pairing, and the buffer's name.
    """
    one = next(iter(seen.values()))
    none = one.k.new_zeros(0, dtype=torch.float32)
    candidates = [(none, False, NO_ROPE, "")]
    for buffer, inv_freq in one.rotary.items():
        if 2 * inv_freq.numel() <= one.k.shape[-1]:
            for sign in (1, -1):
                candidates.append((sign * inv_freq.to(none.device), False, "half-split", buffer))
                candidates.append((sign * inv_freq.to(none.device), True, "interleaved", buffer))

    def misfit(candidate: tuple[Tensor, bool, str, str]) -> float:
        near, far = (unrotated(x.k, at, *candidate[:2]) for at, x in seen.items())
        return difference(far, near)

    best = min(candidates, key=misfit)
    if misfit(best) <= _tolerance(one.k.dtype):
        return best
    return none, False, UNKNOWN_ROPE if one.rotary else NO_ROPE, ""


def unrotated(k: Tensor, position: int, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """A key, rotated back from a position to position 0."""
    return rotate(k, torch.tensor(-position, device=k.device), inv_freq.to(k.device), interleaved)


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def depends_on_length(model: nn.Module) -> bool:
    """Whether a rotary module recomputes its frequencies in the forward (transformers' dynamic RoPE)."""
    return any("dynamic" in kind or kind == "longrope" for module in model.modules() for kind in _rope_types(module))


def _rope_types(module: nn.Module) -> list[str]:
    """A rotary module's RoPE types (one, or one per kind of layer); empty for other modules."""
    types = getattr(module, "rope_type", None)
    return [x for x in (types.values() if isinstance(types, dict) else [types]) if isinstance(x, str)]


def _sign(inv_freq: Tensor) -> int:
    """-1 for a model that rotates in the other direction."""
    return -1 if bool((inv_freq < 0).any()) else 1


def check_followed(
    name: str,
    index: int,
    near: Seen,
    beyond: list[tuple[int, dict[int, Seen]]],
    rotary: str,
    inv_freq: Tensor,
    interleaved: bool,
) -> None:
    """Check that keys of long inputs, un-rotated by the frequencies in the model's buffer, equal those of short inputs.

    Raises:
        ValueError: they differ.
    """
    want = unrotated(near.k, 1, inv_freq, interleaved)
    sign = _sign(inv_freq)
    for position, seen in beyond:
        got = unrotated(seen[index].k, position, sign * seen[index].rotary[rotary], interleaved)
        if difference(got, want) > _tolerance(near.k.dtype):
            raise ValueError(
                f"{name} layer {index}: RoPE changes with the length of the input, and at position {position} its keys "
                f"do not follow the buffer {rotary}, so they could not be coded; use a fixed RoPE scaling"
            )


def unmovable(layers: list[LayerInfo]) -> str:
    """Why cached tokens cannot be moved to other positions; "" if they can."""
    kinds = {one.rope for info in layers for one in (info, info.value) if one}
    if UNKNOWN_ROPE in kinds:
        return "the model's RoPE was not recognized"
    return "the model's positions are not RoPE" if kinds == {NO_ROPE} else ""


class Rotary:
    """Access to the current RoPE frequencies, for models that recompute them in the forward.

    Args:
        module: the rotary module.
        buffer: the name of its buffer.
        sign: -1 for a model that rotates in the other direction, else 1.
    """

    def __init__(self, module: nn.Module, buffer: str, sign: int) -> None:
        self.module, self.buffer, self.sign = weakref.ref(module), buffer, sign
        self._seen: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        return self  # a copy of a cache belongs to the same model

    def __call__(self) -> Tensor:
        """The frequencies of the running forward, or of the last one: the same tensor until they change.

        Raises:
            ValueError: the model no longer exists.
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
        """The number of tokens after which the frequencies change while a text grows from ``first`` to ``last`` tokens;
        None if they do not."""
        module: Any = self.module()
        if any("dynamic" in kind for kind in _rope_types(module)):  # each token past the limit changes them
            limit = int(module.original_max_seq_len)
            return limit if last > max(first, limit) else None
        parameters = module.config.rope_parameters
        parts = [p for p in (parameters, *parameters.values()) if isinstance(p, dict)]
        switches = [p["original_max_position_embeddings"] for p in parts if "original_max_position_embeddings" in p]
        return next((n for n in switches if first <= n < last), None)


def rotaries(model: PreTrainedModel, layers: list[LayerInfo]) -> dict[int, Rotary]:
    """Layer to its `Rotary`, for the layers whose frequencies depend on the length of the input."""
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
