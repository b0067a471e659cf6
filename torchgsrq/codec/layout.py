"""Layout: which code covers which slice of a vector, and the valid rates. There are no tensors here."""

from __future__ import annotations

from dataclasses import dataclass

from torchgsrq.config import BITS, RATES

CODEWORDS = 256
STAGES = 8  # maximum per group: the search of more is not worth its time


def search_steps(stages: int, eta: int) -> int:
    """Steps of the encoder's search (`reference.search_group`), step i in stage ``i % stages``: once over all, and of
    more than two stages once more over all but the last."""
    return 2 * stages - 1 if stages > 2 and eta > 1 else stages


@dataclass(frozen=True)
class Layout:
    """The one-byte codes of a vector, stage-major: code m is stage m // groups of group m % groups.

    Every layout is additive: code m adds a row of its ``[256, width]`` table to the slice
    ``[start(m), start(m) + width)``. The last stage may cover only the first groups.

    Attributes:
        head_dim: elements of a vector.
        groups: number of equal slices of a vector.
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
        """The layout of a rate, with groups of ``group_size`` elements. Groups are larger if the rate has too few codes
        for that, and smaller if it would need more than ``STAGES`` stages.

        If head_dim is a multiple of 8, so is the size of a group, which aligns the rows of tables.

        Args:
            head_dim: elements of a vector.
            bits: bits per element.
            group_size: the intended number of elements in a group.

        Raises:
            ValueError: the rate is not a whole number of bytes for this head_dim.
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
        ValueError: the rate is not a whole number of bytes for this head_dim; the message lists the rates that are.
    """
    if bits not in rates(head_dim):
        allowed = ", ".join(str(b) for b in rates(head_dim) if b in BITS) or "none"
        raise ValueError(f"bits={bits} is not offered for head_dim={head_dim}; choose one of {allowed}")
    return int(bits * head_dim) // 8
