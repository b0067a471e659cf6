"""GSRQHybridLayer: quantized attention beside linear attention in one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from torchgsrq.cache import kept
from torchgsrq.cache.layer import GSRQLayer


class GSRQHybridLayer(LinearAttentionLayer, GSRQLayer):
    """A layer with linear attention, which is not changed, beside attention whose keys and values are quantized."""

    is_compileable = False  # shadows a property of linear attention

    get_max_length = GSRQLayer.get_max_length  # linear attention has none

    def __init__(self, *args: Any, states: int = 1, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        GSRQLayer.__init__(self, *args, **kwargs)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Initialize the attention (positional arguments) or the linear attention (keyword arguments), like
        transformers' own hybrid layers."""
        kind: Any = GSRQLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def offload(self) -> None:
        """Move what the layer owns to the CPU."""
        LinearAttentionLayer.offload(self)
        GSRQLayer.offload(self)

    def prefetch(self) -> None:
        """Move it back to its device."""
        LinearAttentionLayer.prefetch(self)
        GSRQLayer.prefetch(self)

    def reset(self) -> None:
        """Discard all tokens; allocated memory is kept."""
        LinearAttentionLayer.reset(self)
        GSRQLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these batch rows; see `GSRQLayer.batch_select_indices`."""
        kept.select_rows(self, indices)
        GSRQLayer.batch_select_indices(self, indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, if linear attention supports it."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        GSRQLayer.crop(self, tokens_to_remove)
