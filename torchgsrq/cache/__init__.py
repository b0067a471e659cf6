"""What transformers keeps while it generates: layers on quantized buffers, the cache of a model, and its file."""

from torchgsrq.cache.cache import GSRQCache
from torchgsrq.cache.hybrid import GSRQHybridLayer
from torchgsrq.cache.layer import GSRQLayer

__all__ = ["GSRQCache", "GSRQHybridLayer", "GSRQLayer"]
