"""What is learned from a model, and its layout: layouts, clustering, `Codec`, `Codebooks`."""

from torchgsrq.codec.codebooks import Codebooks
from torchgsrq.codec.codec import Codec, Codecs, LayerCodec

__all__ = ["Codebooks", "Codec", "Codecs", "LayerCodec"]
