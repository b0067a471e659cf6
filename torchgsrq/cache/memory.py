"""MemoryReport: where the bytes of a cache are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache by part. ``total`` is what the cache owns; the tables are shared by all caches of a model.

    Attributes:
        codes: codes of the tokens that left the window, and of slots not used yet.
        unused: the part of ``codes`` that no token has used so far.
        sinks, window: full-precision tokens. counters: lengths and row offsets.
        full_precision_layers: layers that are not quantized.
        codebooks: shared tables.
        elements: key and value elements held by quantized layers.
        full_precision_bytes: what the same tokens take in the model's dtype.
    """

    codes: int
    unused: int
    sinks: int
    window: int
    counters: int
    full_precision_layers: int
    codebooks: int
    elements: int
    full_precision_bytes: int

    @property
    def total(self) -> int:
        """Bytes that the cache owns."""
        return self.codes + self.sinks + self.window + self.counters + self.full_precision_layers

    @property
    def bits_per_element(self) -> float:
        """Bits per element of quantized layers: codes, unused slots, sinks, window and counters."""
        return 8 * (self.total - self.full_precision_layers) / max(self.elements, 1)

    @property
    def bits_per_element_codes(self) -> float:
        """Bits per element of the used codes alone."""
        return 8 * (self.codes - self.unused) / max(self.elements, 1)

    @property
    def bits_per_element_with_codebooks(self) -> float:
        """All counted: `bits_per_element`, with the tables, as if this were the model's only cache."""
        return 8 * (self.total - self.full_precision_layers + self.codebooks) / max(self.elements, 1)

    def __str__(self) -> str:
        kept = self.full_precision_layers
        parts = [
            ("codes", self.codes, f"{self.unused / 2**20:.1f} MiB of it not used yet"),
            ("sinks", self.sinks, "full precision"),
            ("window", self.window, "full precision"),
            ("counters", self.counters, "lengths, row offsets"),
            *([("kept layers", kept, "full precision")] if kept else []),
            ("total", self.total, f"{self.bits_per_element:.2f} bits per element of quantized layers, codebooks apart"),
            ("instead of", self.full_precision_bytes + kept, "full precision"),
            ("codebooks", self.codebooks, f"shared; {self.bits_per_element_with_codebooks:.2f} bits with them"),
        ]
        return "\n".join(f"{name:11} {size / 2**20:9.2f} MiB  {what}" for name, size, what in parts)
