"""How many tokens a page holds: of codes, of the window, of sinks. No vLLM here."""

from __future__ import annotations

from dataclasses import dataclass

from torchgsrq.codec import LayerCodec
from torchgsrq.reference.paged import head_bytes

_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
_WINDOW_BLOCK = 16  # tokens that a page of the window should hold, at least
_FILLED = 0.75  # of a page of codes, at least: the window's page may be larger
_ALIGNED = 64


@dataclass(frozen=True)
class Sizes:
    """The pages of a model's layers.

    Attributes:
        block: tokens on a page of codes.
        window_block: tokens on a page of the window, and of sinks; a power of two that divides ``block``.
        token_bytes: bytes of a token's codes, by layer.
        pages: bytes of a page of codes, by layer; all pages of codes together are at least as many bytes as those of
            the window, so that one block of vLLM's serves either.
        window_page: bytes of a page of the window of one layer.
    """

    block: int
    window_block: int
    token_bytes: dict[int, int]
    pages: dict[int, int]
    window_page: int

    @property
    def alike(self) -> bool:
        """Whether the pages of all layers have one size."""
        return len(set(self.pages.values())) == 1


def token_bytes(codec: LayerCodec) -> int:
    """Bytes of a token's codes in a layer."""
    return sum(map(sum, map(head_bytes, codec)))


def plan(tokens: dict[int, int], exact_bytes: int, sink_tokens: int, frame: int, block: int | None = None) -> Sizes:
    """Choose the pages of a model.

    Args:
        tokens: bytes of a token's codes, by layer.
        exact_bytes: bytes of a token's keys and values in a layer, in full precision.
        sink_tokens: a page of the window must hold so many.
        frame: tokens of the codecs' frames, which a page of codes must not straddle; 1 without frames.
        block: tokens on a page of codes; chosen if None.

    Raises:
        ValueError: ``block`` does not divide the frame or is no power of two, or no page can hold the sinks.
    """
    if block is not None and (block & (block - 1) or (frame > 1 and frame % block)):
        raise ValueError(
            f"--block-size {block}: pages of codes hold a power of two of tokens that divides the codecs' frame of "
            f"{frame}; choose one of {', '.join(str(b) for b in _BLOCKS if frame == 1 or frame % b == 0)}"
        )
    offered = [block] if block else [b for b in _BLOCKS if frame == 1 or frame % b == 0]
    if not offered:
        raise ValueError(f"the codecs have frames of {frame} tokens, too few for a page of codes")
    total, layers = sum(tokens.values()), len(tokens)
    wanted = max(_WINDOW_BLOCK, _power_above(sink_tokens))
    fitting = [b for b in offered if b * total >= _FILLED * wanted * layers * exact_bytes]
    chosen = fitting[0] if fitting else offered[-1]
    window_block = chosen
    while window_block > 1 and chosen * total < _FILLED * window_block * layers * exact_bytes:
        window_block //= 2
    window_block = max(window_block, _power_above(sink_tokens), 1)
    if window_block > chosen:
        raise ValueError(
            f"sink_tokens={sink_tokens} do not fit a page of {chosen} tokens; choose a larger --block-size"
        )
    window_page = window_block * exact_bytes
    spare = max(0, -(-(layers * window_page - chosen * total) // layers))
    pages = {i: -(-(chosen * size + spare) // _ALIGNED) * _ALIGNED for i, size in tokens.items()}
    counts = [list(pages.values()).count(page) for page in set(pages.values())]
    if len(counts) > 1 and len(set(counts)) == 1:
        # vLLM would take as many layers of each size for a pattern that repeats, and split the window by it.
        least, next_larger = sorted(set(pages.values()))[:2]
        pages[next(i for i, page in pages.items() if page == least)] = next_larger
    if len(set(pages.values())) == 1:
        window_page = next(iter(pages.values()))
    return Sizes(chosen, window_block, dict(tokens), pages, window_page)


def _power_above(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length()) if n else 1
