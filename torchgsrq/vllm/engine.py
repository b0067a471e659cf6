"""One engine's codebooks and pages, and all that it is refused for before it starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torchgsrq.codec import Codebooks
from torchgsrq.vllm.settings import Settings, settings_of
from torchgsrq.vllm.sizes import Sizes, plan, token_bytes

_MOVING_ROPE = ("dynamic", "longrope")  # frequencies that change with the length: codes would mean other keys


class Engine:
    """What the layers of one model share.

    Raises:
        ValueError: it cannot be served on codes; says why.

    Attributes:
        config: how codes are used. books: those of this rank.
        sizes: the pages; `place` makes them anew, once it is known which layers have a sliding window.
        kept: names of the layers that keep vLLM's own cache.
        dtype: of keys and values. longest: ``max_model_len``.
        exact_bytes: of a token's keys and values in one layer, on this rank.
        held_tokens: tokens before the newest one that a window holds.
        shares_window: whether requests can hit each other's windows.
        window_blocks: most pages of the window of one request, once its spec was made.
    """

    def __init__(self, settings: Settings, vllm_config: Any) -> None:
        for reason in refusals(settings, vllm_config):
            raise ValueError(f"torchgsrq: {reason}")
        parallel = vllm_config.parallel_config
        self.config, self.held_tokens, self.window_blocks = settings.config, settings.held_tokens, 0
        ranks = parallel.tensor_parallel_size
        self.books, self._bytes = shards(settings.books, parallel.rank % ranks, ranks)
        self.kept: set[str] = set()
        self._placed, self.described = False, parallel.rank > 0  # one rank says for all what is served
        self.dtype, self.longest = vllm_config.model_config.dtype, vllm_config.model_config.max_model_len
        codec = next(iter(self.books.layers.values())).key
        self.exact_bytes = codec.heads * codec.head_dim * 2 * self.dtype.itemsize
        cache = vllm_config.cache_config
        self.shares_window = bool(cache.enable_prefix_caching) and self.config.prefill == "quantized"
        self._block = cache.block_size if cache.user_specified_block_size else None
        self._frame = codec.frame
        self.sizes = self._plan({i for i in self._bytes if i not in self.config.skip_layers})

    def _plan(self, layers: set[int]) -> Sizes:
        some = {i: self._bytes[i] for i in sorted(layers)}
        return plan(some, self.exact_bytes, self.config.sink_tokens, self._frame, self._block)

    def place(self, layers: dict[str, bool]) -> None:
        """Decide which layers are codes.

        Args:
            layers: names of all attention layers, and whether they have a sliding window.

        Raises:
            ValueError: a layer has no codebooks, or none is left to be quantized.
        """
        if self._placed:
            return
        coded = set()
        for name, sliding in layers.items():
            index = self.layer_of(name)
            if sliding or index in self.config.skip_layers:
                self.kept.add(name)
            elif index not in self.books:
                raise ValueError(f"torchgsrq: no codebooks for layer {index}: calibrate it, or name it in skip_layers")
            else:
                coded.add(index)
        if not coded:
            raise ValueError("torchgsrq: no layer is left to be quantized: all are skipped or have a sliding window")
        self.sizes, self._placed = self._plan(coded), True

    @property
    def alike(self) -> bool:
        """Whether the pages of all layers of the model have one size."""
        return self.sizes.alike and not self.kept

    def layer_of(self, name: str) -> int:
        """The index of a layer, of its name in vLLM."""
        from vllm.model_executor.models.utils import extract_layer_index

        return extract_layer_index(name)

    def describe(self, blocks: int) -> str:
        """What is logged once at the start, of a cache of so many blocks."""
        sizes, layers, longest = self.sizes, len(self.sizes.pages), self.longest
        block_bytes = max(sum(sizes.pages.values()), layers * sizes.window_page)
        each = -(-longest // sizes.block) + self.window_blocks + bool(self.config.sink_tokens and self.window_blocks)
        fit, full = blocks * longest // each, blocks * block_bytes // (layers * self.exact_bytes)
        bits = self.books.bits
        return (
            f"torchgsrq: keys and values of {layers} layers are codes of {bits:.3g} bits, "
            f"{sum(sizes.token_bytes.values()):,} bytes a token where {str(self.dtype).removeprefix('torch.')} takes "
            f"{layers * self.exact_bytes:,}; {self.config.sink_tokens} sinks and {self.config.recent_tokens} recent "
            f"tokens stay exact, prefill={self.config.prefill!r}. "
            + (
                f"{len(self.kept)} layers keep vLLM's own cache, and take most of the memory"
                if self.kept
                else f"The cache holds {fit:,} tokens in requests of {longest:,}; full precision would hold {full:,}"
            )
        )


def engine_of(vllm_config: Any) -> Engine:
    """The engine of a config, made once.

    Raises:
        ValueError: it cannot be served on codes; says why.
    """
    known = vllm_config.__dict__.get("_torchgsrq")
    if known is None:
        settings = settings_of(vllm_config)
        assert settings is not None, "asked by a layer that is not ours"
        known = vllm_config.__dict__["_torchgsrq"] = Engine(settings, vllm_config)
    return known


def shards(books: Codebooks, rank: int, ranks: int) -> tuple[Codebooks, dict[int, int]]:
    """The codebooks of a rank, and bytes of a token by layer: those of the rank that takes most, since pages are equal
    on all ranks."""
    if ranks == 1:
        return books, {i: token_bytes(c) for i, c in books.layers.items()}
    parts = [books.shard(i, ranks) for i in range(ranks)]
    return parts[rank], {i: max(token_bytes(part[i]) for part in parts) for i in books}


def refusals(settings: Settings, vllm_config: Any) -> Iterator[str]:
    """Why an engine cannot be served on codes, as far as its config says."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    device = vllm_config.device_config.device_type
    if device != "cpu":
        yield f"vLLM with pages of codes was never run on devices of type {device!r}; use its CPU build"
    if getattr(model, "use_mla", False):
        yield "models with multi-head latent attention cache no keys and values that codes could stand for"
    if getattr(model, "is_encoder_decoder", False) or getattr(model, "runner_type", "generate") != "generate":
        yield "only decoders that generate are served on codes, no encoders and no cross attention"
    if cache.cache_dtype != "auto":
        yield f"kv_cache_dtype={cache.cache_dtype!r} is another quantization of the same cache; leave it at auto"
    for name, value in (
        ("speculative_config", vllm_config.speculative_config),
        ("kv_transfer_config", vllm_config.kv_transfer_config),
    ):
        if value is not None:
            yield f"{name} is not supported with pages of codes"
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            yield f"{name}={getattr(parallel, name)} is not supported with pages of codes; only tensor parallelism is"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "the window and the sinks are cache groups of their own, which disable_hybrid_kv_cache_manager forbids"
    yield from _of_model(settings, vllm_config)


def _of_model(settings: Settings, vllm_config: Any) -> Iterator[str]:
    """The refusals that compare the codebooks with the model."""
    model, books = vllm_config.model_config, settings.books
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind in _MOVING_ROPE:
        yield f"RoPE of type {kind!r} changes its frequencies with the length, which pages of codes cannot follow"
    layers, heads = text.num_hidden_layers, model.get_total_num_kv_heads()
    dim, ranks = model.get_head_size(), vllm_config.parallel_config.tensor_parallel_size
    if max(books, default=-1) >= layers:
        yield (
            f"{settings.path} has codebooks of {len(books)} layers and the model has {layers}: they are another model's"
        )
    for i, codec in books.layers.items():
        if (codec.key.heads, codec.key.head_dim) != (heads, dim):
            yield (
                f"{settings.path} has {codec.key.heads} heads of {codec.key.head_dim} in layer {i} and the model has "
                f"{heads} of {dim}: they are another model's"
            )
    if heads % ranks:
        yield f"tensor_parallel_size={ranks} does not divide the model's {heads} KV heads"
    known = books.metadata.get("model", {}).get("shape")
    if known is not None and known != _shape(text, layers, heads, dim):
        yield f"{settings.path} was calibrated on another model ({books.metadata['model'].get('class')})"


def _shape(text: Any, layers: int, heads: int, dim: int) -> str:
    """The hash of a model's shape that `models.fingerprint` keeps."""
    shape = [(i, text.num_attention_heads, heads, dim) for i in range(layers)]
    return hashlib.sha256(f"{text.model_type}{text.hidden_size}{shape}".encode()).hexdigest()[:12]
