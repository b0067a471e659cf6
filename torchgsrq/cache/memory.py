"""MemoryReport: the bytes of a cache by part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache by part. ``total`` is what the cache owns; codebooks are shared by all caches of a model.

    Attributes:
        codes: bytes of all code slots, used or not.
        unused: the part of ``codes`` that no token uses yet.
        sinks, window: bytes of full-precision tokens.
        counters: bytes of lengths and row offsets.
        full_precision_layers: bytes of layers that are not quantized.
        codebooks: bytes of the shared tables.
        elements: number of key and value elements held by quantized layers.
        full_precision_bytes: bytes of the same tokens in the model's dtype.
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
        """`bits_per_element` including the codebooks, as if this were the model's only cache."""
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
