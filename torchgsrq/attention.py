"""Attention and mask functions for transformers: on codes where the cache is quantized, dense elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from torchgsrq import models, reference
from torchgsrq.codec.packed import LAST_ALIGNED, NOT_CAUSAL, Options
from torchgsrq.tensor import GSRQTensor, attend, without_gradient

NAME = "gsrq"

# Arguments of transformers' attention functions that have no effect here: the mask, the cache and the scale already
# include them. Any other argument is refused, since ignoring it could change the result.
_NEUTRAL = frozenset(
    {
        "sliding_window",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "num_items_in_batch",
        "position_embeddings",
        "logits_to_keep",
        *models.CACHE_NAMES,
        "layer_idx",
    }
)


class Incoming(NamedTuple):
    """A quantized buffer, and the tail that its newest queries read in full precision (`ops.append_pair_`). ``graph``
    holds the new keys and values themselves if a gradient with respect to them could be requested."""

    buffer: GSRQTensor
    tail: Tensor
    tail_start: Tensor
    view: int
    graph: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Incoming:
        """The same on a device, for layers that attend to another layer's keys and values."""
        if self.tail.device == device:
            return self
        buffer: Any = self.buffer
        graph = tuple(x.to(device) for x in self.graph)
        return Incoming(buffer.to(device), self.tail.to(device), self.tail_start.to(device), self.view, graph)


def gsrq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Incoming,
    value: Tensor | Incoming,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        module: the attention module.
        query: ``[batch, q_heads, queries, head_dim]``.
        key, value: the return values of the cache's ``update``: plain tensors ``[batch, kv_heads, tokens, head_dim]``
            (full-precision layers, an exact prefill), or quantized buffers.
        attention_mask: from `sdpa_mask`: bool, additive, or None for "causal".
        scaling, softcap, s_aux: multiplier of the scores, their soft cap, and a sink logit per query head.

    Returns:
        ``[batch, queries, q_heads, head_dim]`` and None (attention weights are never computed).

    Raises:
        ValueError: dropout or attention weights were requested.
        TypeError: an unknown argument; ignoring it could change the result.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: attention on codes never forms the weights; call dequantize_kv_ first"
        )
    unknown = sorted(k for k, v in kwargs.items() if k not in _NEUTRAL and v is not None and v is not False)
    if unknown and isinstance(key, (GSRQTensor, Incoming)):
        raise TypeError(f"attention on codes does not know the argument(s) {', '.join(unknown)}")
    if not isinstance(key, (GSRQTensor, Incoming)) and isinstance(value, Tensor):
        return dense_attention(
            module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, is_causal, **kwargs
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: attention on codes has no dropout; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    aligned = LAST_ALIGNED if causal and attention_mask is None else NOT_CAUSAL
    options = Options(attention_mask, scale, aligned, softcap or 0.0, s_aux)
    graph: tuple[Tensor, ...] = ()
    if isinstance(key, Incoming):
        assert isinstance(value, Incoming)
        options = options._replace(key_tail=key.tail, value_tail=value.tail, tail_start=key.tail_start, view=key.view)
        graph, key, value = key.graph, key.buffer, value.buffer
    out = attend(query, key, value, options)
    out = without_gradient(out, query, *graph)
    return out.transpose(1, 2).contiguous(), None


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full-precision attention: transformers' SDPA, or plain PyTorch for a soft cap or sinks. See `gsrq_attention`."""
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[-2]:
        attention_mask = attention_mask[..., : key.shape[-2]]  # a mask of a static cache, for an exact prefill
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    group = query.shape[1] // key.shape[1]
    scores = (query @ repeat_kv(key, group).transpose(-1, -2)).float()
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and query.shape[2] > 1:
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        attention_mask = torch.arange(key.shape[2], device=query.device) <= rows
    sinks = None if s_aux is None else s_aux.view(1, -1, 1, 1)
    # The lowest number, not infinity: rows of padding attend to nothing.
    lowest = torch.finfo(scores.dtype).min
    p = reference.probabilities(scores, softcap or 0.0, attention_mask, sinks, lowest).to(query.dtype)
    p = nn.functional.dropout(p, dropout, module.training)
    return (p @ repeat_kv(value, group)).transpose(1, 2).contiguous(), None


def observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`dense_attention` that reports its inputs to calibration's observer."""
    scaling = kwargs.get("scaling")
    weigh = models.notify(
        module,
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap") or 0.0,
        s_aux=kwargs.get("s_aux"),
        reach=kwargs.get("sliding_window"),
    )
    out, weights = dense_attention(module, query, key, value, attention_mask, **kwargs)
    if weigh is not None and out.requires_grad:
        out.register_hook(weigh)
    return out, weights


for _name, _function in ((NAME, gsrq_attention), (models.OBSERVED, observed_attention)):
    AttentionInterface.register(_name, _function)
    # Without an entry here transformers silently passes no mask at all, and padded batches are wrong.
    AttentionMaskInterface.register(_name, sdpa_mask)
