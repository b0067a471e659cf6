"""The cache that transformers uses while it generates: quantized layers, the cache of a model, and its file."""

from torchgsrq.cache.cache import GSRQCache
from torchgsrq.cache.hybrid import GSRQHybridLayer
from torchgsrq.cache.layer import GSRQLayer

__all__ = ["GSRQCache", "GSRQHybridLayer", "GSRQLayer"]
