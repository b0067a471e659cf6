"""The cost of errors in the keys and in the values of each head, for the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchgsrq import models, ops, reference
from torchgsrq.codec import Codecs, LayerCodec
from torchgsrq.codec.layout import rates
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.progress import bar
from torchgsrq.learning.statistics import FAR, blocks, chunks, collect_statistics, seen
from torchgsrq.learning.train import train
from torchgsrq.models import LayerInfo

_ROWS = 64  # rows of logits at a time
_WINDOWS = 4  # maximum number of windows for gradients; as many others train the codecs whose errors are measured


def sensitivity(
    model: PreTrainedModel,
    layers: Iterable[LayerInfo],
    windows: Tensor,
    max_memory: int = 2 << 30,
) -> dict[int, Tensor]:
    """The cost of coding the keys, and the values, of each layer's heads, extrapolated to rate 0, in nats per token.

    To second order, an error ``e`` of a layer's attention output changes the distribution of the next tokens by a KL
    divergence of ``E[(g . e)^2] / 2``, where ``g`` is the gradient of the log-likelihood of tokens drawn from the model
    itself (its Fisher information). The errors are those of codecs that are quick to train, at one rate, with sinks and
    near neighbors exact. Each additional bit quarters the cost.

    Args:
        model: a model that is not quantized.
        layers: the layers to measure.
        windows: token IDs ``[n, window]``; a few windows are read, evenly spread.
        max_memory: bytes of vectors held at a time to train codecs.

    Returns:
        Layer to float64 ``[2, kv_heads, kv_heads]``, for its keys and its values. The diagonal has the cost of each
        head's errors alone (`by_head`). Errors of two heads can add up or cancel: the cost of the layer is the sum.

    Raises:
        ValueError: the model has no backward pass, or one that overflows; or its weights are offloaded, and a backward
            pass would hold all of them at once.
    """
    name, instead = type(model).__name__, "; choose allocation='uniform'"
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(f"{name} has offloaded weights, which a backward pass would hold all at once{instead}")
    if getattr(getattr(model, "hf_quantizer", None), "is_trainable", True) is False:
        raise ValueError(f"the quantized weights of {name} have no backward pass{instead}")
    layers = list(layers)
    step = max(2, -(-len(windows) // _WINDOWS))
    read = windows[::step]
    span = models.rope_span(model)
    codecs: dict[int, LayerCodec] = {}
    learned = windows[step // 2 :: step] if len(windows) > 1 else windows
    for chunk in chunks(layers, learned, max_memory):
        stats = collect_statistics(model, chunk, learned)
        for info in chunk:
            offered = rates(info.head_dim)
            bits: float = 1 if 1 in offered else offered[-1]
            same = [(bits, bits)] * info.kv_heads
            codecs[info.index] = train(stats.pop(info.index), [(GSRQConfig(), same)], span)[0]
    costs = {info.index: torch.zeros(2, info.kv_heads, info.kv_heads, dtype=torch.float64) for info in layers}
    with models.refusing(f"a backward pass of {name}, by which heads are given their bits, failed", instead):
        for seed, window in enumerate(bar(read, "weighing heads")):
            weighed: set[int] = set()
            _backward(model, window, seed, _observer(model, layers, codecs, costs, weighed))
            if weighed != set(costs):
                missed = ", ".join(map(str, sorted(set(costs) - weighed)))
                raise RuntimeError(f"no gradient reached the attention of layers {missed}")
    if not torch.stack([cost.sum() for cost in costs.values()]).isfinite().all():
        raise ValueError(
            f"gradients of {name} in {model.dtype}, by which heads are given their bits, are not "
            "finite; calibrate in float32 or bfloat16, or choose allocation='uniform'"
        )
    return {index: cost / (2 * read.numel()) for index, cost in costs.items()}


def by_head(costs: dict[int, Tensor]) -> dict[int, list[tuple[float, float]]]:
    """Layer to the costs of the keys and of the values of each of its heads, from `sensitivity`."""
    return {
        index: list(zip(keys.diagonal().tolist(), values.diagonal().tolist(), strict=True))
        for index, (keys, values) in costs.items()
    }


def _observer(
    model: PreTrainedModel,
    layers: list[LayerInfo],
    codecs: dict[int, LayerCodec],
    costs: dict[int, Tensor],
    weighed: set[int],
) -> models.Observer:
    """An observer that adds each layer's cost to ``costs``, the error of its codecs projected on the gradient of its
    attention output, and the layer to ``weighed``."""
    rotary = models.rotaries(model, layers)
    source = models.cached_by(layers)

    def observer(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        softcap: float,
        s_aux: Tensor | None,
        reach: int | None,
    ) -> Callable[[Tensor], None] | None:
        index = source.get(models.layer_index(module), -1)
        if index not in codecs:
            return None
        given = [x.detach()[0] for x in (q, k, v)]
        key, value = codecs[index]
        key = key.with_frequencies(rotary[index]()) if index in rotary else key

        @torch.no_grad()
        def weigh(gradient: Tensor) -> None:  # [1, tokens, q_heads, head_dim]
            q, k, v = (x.float() for x in given)
            decoded = _decoded(k, key), _decoded(v, value)
            sinks = None if s_aux is None else s_aux.detach().float().view(len(k), -1, 1, 1)
            q, slope = (x.unflatten(0, (len(k), -1)) for x in (q, gradient[0].transpose(0, 1).float()))
            along = torch.zeros(2, *k.shape[:2], dtype=torch.float64, device=k.device)
            for queries, past in blocks(k.shape[1]):
                errors = _errors(q[:, :, queries], k, v, decoded, queries, past, scaling, softcap, sinks, reach)
                along[:, :, queries] = torch.stack([(x * slope[:, :, queries]).sum((1, 3)) for x in errors]).double()
            bits = torch.tensor([key.bits, value.bits], dtype=torch.float64)
            costs[index] += (along @ along.mT).cpu() * 4 ** bits[:, None, None]
            weighed.add(index)

        return weigh

    return observer


def _decoded(x: Tensor, codec: Codecs) -> Tensor:
    """Vectors ``[heads, n, d]`` at positions 0 to n - 1, encoded and decoded."""
    return ops.round_trip(x[None], torch.arange(x.shape[1], device=x.device)[None], codec)[0]


def _errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decoded: tuple[Tensor, Tensor],
    queries: slice,
    past: slice,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    reach: int | None,
) -> tuple[Tensor, Tensor]:
    """Errors of the attention output ``[heads, group, queries, d]`` if distant keys are coded, and if distant values
    are coded.

    q is ``[heads, group, queries, d]``, a block of ``queries``, which read the slots ``past``; keys, values and what
    their codes decode to are ``[heads, n, d]``, sink logits ``[heads, group, 1, 1]``. Each query sees ``reach`` tokens,
    or all.
    """
    slots = torch.arange(k.shape[1], device=k.device)
    asking, read = slots[queries, None], slots[past]
    k, v, coded_k, coded_v = (x[:, None, past] for x in (k, v, *decoded))
    far = (asking - read >= FAR) & (read >= 1)

    def attend(scores: Tensor) -> Tensor:
        return reference.probabilities(scores, softcap, seen(slots[queries], read, reach), sinks)

    exact = q @ k.mT * scaling
    p = attend(exact)
    return (attend(torch.where(far, q @ coded_k.mT * scaling, exact)) - p) @ v, (p * far) @ (coded_v - v)


def _backward(model: PreTrainedModel, window: Tensor, seed: int, observer: models.Observer) -> None:
    """Read a window, draw the token after each of its tokens from the model, and backpropagate their log-likelihood."""
    model_with_head: Any = models.language_model(model)
    device = models.input_device(model)
    generator = torch.Generator().manual_seed(seed)
    # `observed` lets only one thread at a time freeze the weights. Compiling is not worth it for so few passes.
    with (
        models.observed(model, observer),
        _from_embeddings(model, model_with_head),
        torch.compiler.set_stance("force_eager"),
    ):
        with models.quick_products(model):
            out = model_with_head(input_ids=window[None].to(device), use_cache=False)
        if getattr(out, "logits", None) is None:  # without a head: a random direction, relative to the output's size
            hidden = out[0].float()
            drawn = torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden.device)
            (hidden * drawn / hidden.detach().square().mean().sqrt().clamp_min(1e-30)).sum().backward()
        else:
            out.logits[0].backward(_towards_drawn(out.logits[0].detach(), generator))


def _towards_drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, with respect to ``logits [n, vocabulary]``, of the log-likelihood of a token drawn in every row. It
    processes a few rows at a time, since all probabilities in float32 would be the largest tensor in memory."""
    slope = torch.empty_like(logits)
    chance = torch.rand(len(logits), 1, generator=generator, dtype=torch.float32).to(logits.device)
    for out, some, at in zip(slope.split(_ROWS), logits.split(_ROWS), chance.split(_ROWS), strict=True):
        p = some.float().softmax(-1)
        drawn = torch.searchsorted(p.cumsum(-1), at).clamp_max(p.shape[1] - 1)
        out.copy_(p.neg_().scatter_add_(1, drawn, torch.ones_like(at)))
    return slope


@contextmanager
def _from_embeddings(model: nn.Module, language_model: Any) -> Iterator[None]:
    """Enable gradients from the token embeddings on, and disable those of all weights."""
    if any(p.is_inference() for p in model.parameters()):
        raise RuntimeError("its weights were made in inference mode")
    trained = [p for p in model.parameters() if p.requires_grad]
    leaf = language_model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        for p in trained:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        leaf.remove()
        for p in trained:
            p.requires_grad_(True)
