"""Recommend a setting: bytes of a model's KV cache at each rate and group size, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedConfig

from torchgsrq.codec.layout import CODEWORDS, Layout, rates
from torchgsrq.config import GSRQConfig
from torchgsrq.models import UNBOUNDED, kinds_of_layers

_WORD = 2  # bytes per element of bfloat16, the assumed dtype of windows and full-precision layers
RATES = (2.0, 1.0, 0.5)
GROUPS = (8, 32)  # elements of a group
SHAPES = {"1.5B": (28, 2, 128), "3B": (28, 8, 128), "8B": (32, 8, 128), "70B": (80, 8, 128)}  # layers, KV heads, width
CONTEXTS = (8192, 32768, 131072)


@dataclass(frozen=True)
class Setting:
    """The memory of a setting.

    Attributes:
        group_size, bits: fields of the config.
        cache: bytes of one row's cache: codes, sinks, window, and layers in full precision.
        codebooks: bytes of the codebooks, shared by all caches, if all heads have the same bits.
        longest: maximum number of tokens that fit into the memory, or None without a limit.
        fits: whether the requested context fits.
    """

    group_size: int
    bits: float
    cache: int
    codebooks: int
    longest: int | None
    fits: bool


def shape_of(config: PreTrainedConfig) -> tuple[int, int, int]:
    """The number of KV heads, and the widths of keys and of values. For MLA, those of the latent and of its RoPE part.

    Raises:
        ValueError: they differ between layers.
    """
    if getattr(config, "kv_lora_rank", None):
        return 1, config.kv_lora_rank, config.qk_rope_head_dim
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except AttributeError as error:
        raise ValueError(f"the heads of {config.model_type} differ from layer to layer; see cache.memory()") from error
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        heads = 1 if config.multi_query else heads
    elif config.model_type == "falcon":
        heads = config.num_kv_heads
    return heads, dim, dim


def _count(config: PreTrainedConfig, kinds: tuple[str, ...]) -> int:
    """The number of layers of these kinds that cache their own keys and values."""
    own = kinds_of_layers(config)
    own = own[: len(own) - (getattr(config, "num_kv_shared_layers", 0) or 0)]
    return sum(kind in kinds for kind in own)


def full_precision(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of a bfloat16 cache of one row of ``tokens`` tokens."""
    heads, *widths = shape_of(config)
    whole = _count(config, UNBOUNDED)
    return heads * sum(widths) * _WORD * whole * tokens + _kept(config, tokens)


def _kept(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of layers with sliding windows or chunks. Linear attention takes constant memory, which is not counted."""
    heads, *widths = shape_of(config)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or tokens
    bounded = _count(config, ("sliding_attention", "chunked_attention"))
    return heads * sum(widths) * _WORD * bounded * min(window, tokens)


def settings(config: PreTrainedConfig, tokens: int, memory: int | None = None) -> list[Setting]:
    """The settings for each group size and rate, for contexts of ``tokens`` tokens.

    Args:
        config: the decoder's transformers config.
        tokens: length of the context.
        memory: bytes for the cache and the codebooks, besides the weights; None for no limit.

    Raises:
        ValueError: no layer has full attention, or no rate is offered for the head_dim.
    """
    heads, *widths = shape_of(config)
    whole = _count(config, UNBOUNDED)
    if not whole:
        raise ValueError(f"{config.model_type} has no layer with full attention; its cache is bounded already")
    offered = [bits for bits in RATES if all(bits in rates(dim) for dim in widths)]
    if not offered:
        raise ValueError(f"no rate is offered for heads of {widths}")
    found = []
    for group_size in GROUPS:
        for bits in offered:
            one = GSRQConfig(bits=bits, group_size=group_size)
            slots = one.sink_tokens + one.recent_tokens + one.block_tokens
            fixed = heads * sum(widths) * _WORD * slots * whole + _kept(config, tokens)
            each = int(heads * sum(widths) * bits / 8) * whole
            layouts = [Layout.of(width, bits, group_size) for width in widths]
            tables = sum(CODEWORDS * x.codes * x.width * 2 + 4 * x.head_dim * (2 * x.head_dim + 1) for x in layouts)
            codebooks = heads * tables * whole
            longest = None if memory is None else max(0, (memory - fixed - codebooks) // each)
            cache = each * tokens + fixed
            found.append(Setting(group_size, bits, cache, codebooks, longest, longest is None or longest >= tokens))
    return found


def choose(found: list[Setting]) -> Setting | None:
    """The setting to start with: among those that fit, the one with the most bits and the smallest groups."""
    return max((s for s in found if s.fits), key=lambda s: (s.bits, -s.group_size), default=None)


def markdown_tables() -> str:
    """Two Markdown tables: the sizes of caches and of codebooks for the decoders of `SHAPES` and for `CONTEXTS`."""
    names = [f"{bits:g} bit{'s' if bits > 1 else ''}" for bits in RATES]
    caches = [("model", "layers, KV heads, head_dim", "tokens", "bfloat16", *names)]
    books = [("model", "group size", *names)]
    for name, (layers, heads, dim) in SHAPES.items():
        config = LlamaConfig(
            num_hidden_layers=layers, num_attention_heads=heads, hidden_size=heads * dim, num_key_value_heads=heads
        )
        for tokens in CONTEXTS:
            plain = full_precision(config, tokens)
            found = {s.bits: s.cache for s in settings(config, tokens) if s.group_size == GROUPS[0]}
            row = [f"{_mib(found[bits])} (1/{plain / found[bits]:.1f})" for bits in RATES]
            caches.append((name, f"{layers}, {heads}, {dim}", f"{tokens // 1024}k", _mib(plain), *row))
        for size in GROUPS:
            tables = [_mib(s.codebooks) for s in settings(config, CONTEXTS[0]) if s.group_size == size]
            books.append((name, str(size), *tables))
    return "\n\n".join(
        (
            "The cache of one row, in MiB, and its share of bfloat16:",
            _markdown(caches, left=2),
            "Codebooks, in MiB, with the same bits in all heads:",
            _markdown(books, left=2),
        )
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.{0 if nbytes >= 100 * 2**20 else 1}f}"


def _markdown(rows: list[tuple[str, ...]], left: int) -> str:
    """A Markdown table; the first ``left`` columns are aligned to the left, the others to the right."""
    line = ("---",) * left + ("---:",) * (len(rows[0]) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], line, *rows[1:]))
