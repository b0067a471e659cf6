"""Layout: which code writes which slice of a vector; rates and what they allow. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass

from torchgsrq.config import BITS, RATES

CODEWORDS = 256
STAGES = 8  # most of a group: more take longer to search than they are worth
SWEEPS = (
    1  # of the encoder over the stages of a group, after the greedy search; more give nothing: docs/research/quality.md
)


@dataclass(frozen=True)
class Layout:
    """One-byte codes of a vector, stage-major: code m is stage m // groups of group m % groups.

    Every layout is additive: code m adds a row of its ``[256, width]`` table to the slice
    ``[start(m), start(m) + width)``. The last stage may cover only the first groups.

    Attributes:
        head_dim: elements of a vector.
        groups: equal slices that it is cut into.
        codes: bytes per vector.
    """

    head_dim: int
    groups: int
    codes: int

    def __post_init__(self) -> None:
        if self.groups < 1 or self.head_dim % self.groups:
            raise ValueError(f"groups={self.groups} does not divide head_dim={self.head_dim}")
        if self.codes < self.groups:
            raise ValueError(f"codes={self.codes} leaves some of the groups={self.groups} without a code")

    @classmethod
    def of(cls, head_dim: int, bits: float, group_size: int = 8) -> Layout:
        """The layout of a rate: groups of ``group_size`` elements; of as few more as its codes suffice for, or of as
        few less as take no more than ``STAGES`` stages.

        Groups are of a multiple of 8 elements where head_dim is, so that rows of tables are aligned.

        Raises:
            ValueError: the rate is no whole number of bytes for this head_dim.
        """
        codes = num_codes(head_dim, bits)
        fit = [g for g in range(1, codes + 1) if head_dim % g == 0 and head_dim // g % 8 == 0]
        small = [g for g in fit if head_dim // g <= group_size and g * STAGES >= codes]
        return cls(head_dim, min(small) if small else max(fit, default=1), codes)

    @property
    def width(self) -> int:
        """Elements of a group."""
        return self.head_dim // self.groups

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
