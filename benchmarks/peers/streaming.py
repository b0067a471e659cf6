"""StreamingLLM (arXiv 2309.17453): sinks and a window in full precision, nothing else; a control.

It holds as many recent tokens as fit the bytes of a quantized cache. Positions stay as they were in the text, which
the paper counts anew within the window.
"""

from __future__ import annotations

from peers.base import Method

from torchgsrq.models import LayerInfo


class Streaming(Method):
    """Forgets what another method would store.

    Args:
        bits: of the quantized cache, whose bytes at ``tokens`` it may use.
    """

    forgets, sinks = True, 4

    def __init__(self, bits: float, tokens: int) -> None:
        super().__init__()
        self.name, self.rate = f"StreamingLLM, {bits:g} bit", bits
        self.recent = max(1, round(tokens * bits / 16) + 33 - self.sinks)

    def bits(self, info: LayerInfo) -> float:
        return self.rate  # of a text of any length, though the window is that of ``tokens``
