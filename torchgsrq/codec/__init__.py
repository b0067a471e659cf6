"""What is learned of a model, and how it is laid out: layouts, clustering, `Codec`, `Codebooks`."""

from torchgsrq.codec.codebooks import Codebooks
from torchgsrq.codec.codec import Codec, Codecs, LayerCodec

__all__ = ["Codebooks", "Codec", "Codecs", "LayerCodec"]
