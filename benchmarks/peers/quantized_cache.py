"""transformers' own `QuantizedCache`, by its two backends: quanto (https://github.com/huggingface/optimum-quanto) and
HQQ (https://github.com/mobiusml/hqq).

Their quantizers as transformers calls them: integers in groups of 64 elements of a token, keys after RoPE. Axes are
those that transformers' documentation recommends for each backend. It differs in its window, which is the comparison's,
and each token is quantized once; theirs quantizes all tokens anew whenever 128 have gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peers.base import Method
from torch import Tensor
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

from torchgsrq.models import LayerInfo

GROUP = 64
BACKENDS: dict[str, tuple[type[Any], int]] = {"quanto": (QuantoQuantizedLayer, 0), "hqq": (HQQQuantizedLayer, 1)}


class QuantizedCache(Method):
    """``backend`` is ``"quanto"`` or ``"hqq"``.

    Raises:
        ImportError: its package is not installed.
    """

    def __init__(self, backend: str, nbits: int) -> None:
        super().__init__()
        self.name, self.nbits = f"QuantizedCache, {backend} int{nbits}", nbits
        layer, self.axis = BACKENDS[backend]
        self.layer = layer(nbits=nbits, axis_key=self.axis, axis_value=self.axis, q_group_size=GROUP)

    def decoded(self, x: Tensor) -> Tensor:
        """``x`` after a round trip. HQQ packs whole bytes of groups, and fails where a text leaves an odd number."""
        self.layer.keys = torch.empty(0, dtype=x.dtype)  # where the layer looks up device and dtype
        whole = F.pad(x, (0, 0, 0, -x.shape[2] % 8))
        return self.layer._dequantize(self.layer._quantize(whole, self.axis)).view_as(whole)[:, :, : x.shape[2]]

    def keys(self, index: int, k: Tensor) -> Tensor:
        return self.decoded(k)

    def values(self, index: int, v: Tensor) -> Tensor:
        return self.decoded(v)

    def bits(self, info: LayerInfo) -> float:
        return self.nbits + 2 * 16 / GROUP  # a scale and a zero point
