"""torchgsrq: an LLM's KV cache at 2 bits per element and fewer, and attention on the codes themselves.

Method: gain-shape residual quantization (arXiv 2607.01065), with anchored frames and weights from
attention. Start with `quantize_kv_`.
"""

import torchgsrq.paged  # noqa: F401 (its ops must be known before the compiled kernels are loaded)
from torchgsrq.api import dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.cache import GSRQCache
from torchgsrq.cache.memory import MemoryReport
from torchgsrq.codec import Codebooks, Codec
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.calibrate import calibrate, calibrate_qkv
from torchgsrq.tensor import GSRQTensor

__version__ = "0.1.0"
__all__ = [
    "Codebooks",
    "Codec",
    "GSRQCache",
    "GSRQConfig",
    "GSRQTensor",
    "MemoryReport",
    "calibrate",
    "calibrate_qkv",
    "dequantize_kv_",
    "new_cache",
    "quantize_kv_",
]
