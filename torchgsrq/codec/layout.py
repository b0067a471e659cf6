"""Layout: which code writes which slice of a vector; rates and what they allow. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass

from torchgsrq.config import BITS, RATES

CODEWORDS = 256


@dataclass(frozen=True)
class Layout:
    """One-byte codes of a vector, stage-major: code m is stage m // groups of group m % groups.

    Every layout is additive: code m adds a row of its ``[256, width]`` table to the slice
    ``[start(m), start(m) + width)``. The last stage may cover only the first groups, so any prefix
    of the codes that reaches every group is a layout too, at a lower rate.

    Attributes:
        head_dim: elements of a vector.
        groups: equal slices that its coded part is cut into.
        codes: bytes per vector.
        dims: how many of its principal directions are coded; all by default (0). Below a rate's water level a
            direction gets no bits, so its tables would be paid for in vain.
    """

    head_dim: int
    groups: int
    codes: int
    dims: int = 0

    def __post_init__(self) -> None:
        if not self.dims:
            object.__setattr__(self, "dims", self.head_dim)
        if not 0 < self.dims <= self.head_dim:
            raise ValueError(f"dims={self.dims} must lie between 1 and head_dim={self.head_dim}")
        if self.groups < 1 or self.dims % self.groups:
            raise ValueError(f"groups={self.groups} does not divide the {self.dims} coded dimensions")
        if self.codes < self.groups:
            raise ValueError(f"codes={self.codes} leaves some of the groups={self.groups} without a code")

    @property
    def width(self) -> int:
        """Elements of a group."""
        return self.dims // self.groups

    @property
    def stages(self) -> int:
        """Residual stages of the first group."""
        return -(-self.codes // self.groups)

    @property
    def bits(self) -> float:
        """Bits per element."""
        return 8 * self.codes / self.head_dim

    def start(self, code: int) -> int:
        """First element of the slice that ``code`` adds to."""
        return (code % self.groups) * self.width

    def groups_in(self, stage: int) -> int:
        """Groups that have a code in this stage."""
        return min(self.groups, self.codes - stage * self.groups)


@dataclass(frozen=True)
class Run:
    """KV heads that share a layout.

    Attributes:
        heads: which of a layer's heads, in ascending order; so their codes and tables are kept.
        layout: of each.
    """

    heads: tuple[int, ...]
    layout: Layout

    def __post_init__(self) -> None:
        if not self.heads or min(self.heads) < 0 or list(self.heads) != sorted(set(self.heads)):
            raise ValueError(f"heads={self.heads} of a run must be indices in ascending order")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tables of a `Codec` that depend on the layout."""
        heads, x = len(self.heads), self.layout
        return {
            "transform": (heads, x.dims, x.head_dim),
            "inverse": (heads, x.head_dim, x.dims),
            "codebook": (heads, x.codes, CODEWORDS, x.width),
        }


def rates(head_dim: int) -> list[float]:
    """The rates of ``RATES`` that give a whole number of bytes for this head_dim."""
    return [b for b in RATES if (b * head_dim) % 8 == 0 and b * head_dim >= 8]


def num_codes(head_dim: int, bits: float) -> int:
    """Bytes of a vector at this rate.

    Raises:
        ValueError: the rate is no whole number of bytes for this head_dim; says which rates are.
    """
    if bits not in rates(head_dim):
        allowed = ", ".join(str(b) for b in rates(head_dim) if b in BITS) or "none"
        raise ValueError(f"bits={bits} is not offered for head_dim={head_dim}; choose one of {allowed}")
    return int(bits * head_dim) // 8


def grouped(head_dim: int, codes: int, width: int, part: float = 1) -> Layout:
    """The fewest groups of at most ``width`` elements, in multiples of 8 for aligned table rows; of each, a part."""
    for groups in range(-(-head_dim // width), head_dim + 1):
        if head_dim % groups == 0 and (head_dim // groups) % 8 == 0 and groups <= codes:
            coded = -(-int(head_dim // groups * part) // 8) * 8
            return Layout(head_dim, groups, codes, groups * coded)
    return Layout(head_dim, 1, codes)


def _short(head_dim: int, codes: int) -> Layout:
    """The most groups that have a code each, of a multiple of 8 elements: one stage at 1 bit and below."""
    for groups in range(codes, 0, -1):
        if head_dim % groups == 0 and (head_dim // groups) % 8 == 0:
            return Layout(head_dim, groups, codes)
    return Layout(head_dim, 1, codes)


def key_layout(head_dim: int, bits: float, preset: str = "quality") -> Layout:
    """Keys: whole heads up to 64 elements, 64-element groups above; ``"fast"``: groups of a single code.

    The spectrum of keys falls steeply: below 1.5 bits three quarters of their principal directions are coded, which
    makes tables smaller and costs nothing that was measurable. Values have a flat spectrum and keep all. Above 2 bits,
    where many stages would cost much and gain little, groups are those of ``"fast"``.
    """
    codes = num_codes(head_dim, bits)
    if preset == "fast" or bits > 2:
        return _short(head_dim, codes)
    return grouped(head_dim, codes, 64, 1 if bits >= 1.5 else 0.75)


def value_layout(head_dim: int, bits: float, preset: str = "quality") -> Layout:
    """Values: whole heads or 64-element groups; ``"fast"``: groups of a single code."""
    codes = num_codes(head_dim, bits)
    return _short(head_dim, codes) if preset == "fast" or bits > 2 else grouped(head_dim, codes, 64)
