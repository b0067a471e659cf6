"""Every decoder of the installed transformers as a tiny random model, and what becomes of its KV cache.

    python -m tests.families docs/models.md

writes the table of the docs; `test_families.py` holds the families to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conftest import SMALL, cached, tiny_books
from tests.oracle import Oracle, watch
from torchgsrq import models, new_cache
from torchgsrq.measure.evaluate import quantized

# Sizes of tiny models, by the names that configs have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "n_inner", "d_ff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 512),
    "head_dim": 16,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 16,
    "rotary_dim": 16,
    "sliding_window": 32,
    "attention_window_size": 32,
    "attention_chunk_size": 32,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a family wants besides, where a rule of sizes does not do; None takes a size away.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"head_dim": None},
    "cpmant": {"dim_head": 16, "dim_ff": 64},
    "ctrl": {"dff": 64},
    "deepseek_v4": {"o_lora_rank": 16, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 16},
    "falcon": {"head_dim": None},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 1},  # of a stack, of which there are eight
    "inkling_text": {"swa_num_attention_heads": 4, "swa_head_dim": 16, "rel_extent": 64, "sliding_window_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"dense_intermediate_size": 64, "shared_intermediate_size": 32, "index_head_dim": 16},
    "mpt": {"max_seq_len": 512},
    "reformer": {"is_decoder": True},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16, "is_decoder": True},
    "xlm": {"emb_dim": 64},
    "xlstm": {"v_head_dim": None},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "kimi_linear": {"linear_head_dim": 16, "num_experts_per_token": 2},
    "dots1": {"moe_intermediate_size": 32, "n_shared_experts": 1, "n_routed_experts": 4},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "phimoe": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "whisper": {"max_target_positions": 512},
    "rembert": {"input_embedding_size": 64, "is_decoder": True},
}
_ENCODERS = (
    "bert",
    "big",
    "camembert",
    "data2vec",
    "electra",
    "ernie",
    "megatron",
    "rembert",
    "rob",
    "roc",
    "roformer",
)
_ENCODERS += ("xlm-roberta", "xmod")


def families() -> dict[str, str]:
    """Model type and class name of every causal language model of text alone, each class once."""
    found: dict[str, str] = {}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    for kind, name in sorted(names, key=lambda x: (CONFIG_MAPPING[x[0]] is not _class(x[1]).config_class, x)):
        parts = getattr(CONFIG_MAPPING[kind], "sub_configs", {})
        if (not parts or _class(name).config_class is not CONFIG_MAPPING[kind]) and name not in found.values():
            found[kind] = name
    return dict(sorted(found.items()))


def _class(name: str) -> Any:
    return getattr(transformers, name)


def tiny_config(kind: str) -> Any:
    """The config of a family, with small sizes.

    Raises:
        Exception: whatever the family's own config raises.
    """
    make = getattr(transformers, families()[kind]).config_class
    default = make()
    known = default.attribute_map
    plain = default.to_dict()
    sizes = {k: v for k, v in _SIZES.items() if k not in known and (k in plain or hasattr(type(default), k))}
    for windowed in ("sliding_window", "attention_window_size", "attention_chunk_size"):
        if plain.get(windowed) is None:  # as most are by default
            sizes.pop(windowed, None)
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = 4
    if plain.get("layer_types"):  # of each kind that there is
        sizes["layer_types"] = (list(dict.fromkeys(plain["layer_types"])) * 4)[:4]
    if kind.startswith(_ENCODERS) and not kind.startswith("ernie4"):
        sizes["is_decoder"] = True
    sizes |= _SPECIAL.get(kind, {})
    return make(**{k: v for k, v in sizes.items() if v is not None or k == "sliding_window"})


def tiny_model(kind: str) -> Any:
    """A random model of a family."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model = getattr(transformers, families()[kind])(tiny_config(kind)).eval().float()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Outcome:
    """What becomes of a family's cache.

    Attributes:
        quantized, layers: how many of its layers with attention, and how many layers there are.
        decodes: whether its attention reads decoded tensors. refused: why it is refused. unbuilt: why there is no tiny model of it. wrong: what a mode of generation did.
    """

    quantized: int = 0
    layers: int = 0
    decodes: bool = False
    refused: str = ""
    unbuilt: str = ""
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)


PROMPT = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(1))
WHOLE = torch.ones(3, 40, dtype=torch.long)
PADDED = WHOLE.clone()
PADDED[1, :24], PADDED[2, :9] = 0, 0
MODES: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "greedy": (WHOLE, {}),
    "padded": (PADDED, {}),
    "beams": (PADDED, {"num_beams": 3}),
    "static": (WHOLE, {"cache_implementation": "static"}),
}


@torch.no_grad()
def outcome(kind: str, modes: Any = tuple(MODES), config: Any = SMALL) -> Outcome:
    """Quantize a tiny model of a family, and generate with it beside an unquantized one on the oracle's cache."""
    try:
        model = tiny_model(kind)
    except Exception as error:
        return Outcome(unbuilt=_line(error))
    try:
        books = tiny_books(model, config)
        with quantized(model, config, books):
            decodes = model._gsrq.decodes
    except ValueError as error:
        return Outcome(
            refused=_line(error).replace(f"{type(model).__name__}: ", "").replace(f"{type(model).__name__} ", "")
        )
    wrong = {}
    for mode in modes:
        try:
            off: list[float] = []  # a code that falls to the other side of a tie goes on to differ, so of some texts
            while len(off) < 4 and min(off, default=1) > 0.03:
                off.append(_apart(model, books, config, mode, len(off)))
            if min(off) > 0.03:
                wrong[mode] = f"{min(off):.0%} of the logits differ"
        except Exception as error:
            wrong[mode] = _line(error)
        if mode in wrong and _wrong_without(model, mode):
            wrong[mode] = "not right in transformers itself"
    return Outcome(len(books), models.text_config(model).num_hidden_layers, decodes, wrong=wrong)


def _wrong_without(model: Any, mode: str) -> bool:
    """Whether the model itself does not do in a mode what it does in plain ones."""
    mask, arguments = MODES[mode]
    plain = {k: v for k, v in arguments.items() if k == "num_beams"}
    try:
        got, want = (_generate(model, PROMPT * mask, mask, None, how) for how in (arguments, plain))
    except Exception:
        return True
    return bool((got - want).abs().max() > 1e-3)


def _apart(model: Any, books: Any, config: Any, mode: str, seed: int) -> float:
    """The share of logits in which the two differ."""
    mask, arguments = MODES[mode]
    ids = PROMPT.roll(seed, 1) * mask
    with quantized(model, config, books):
        cache = None if "cache_implementation" in arguments else new_cache(model)
        got = _generate(model, ids, mask, cache, arguments)
    oracle = Oracle(books, config, models.text_config(model))
    handle = watch(model, oracle)
    try:
        with models.attention_implementation(model, "eager"):  # which has all that a model says of its attention
            want = _generate(model, ids, mask, oracle, {k: v for k, v in arguments.items() if k == "num_beams"})
    finally:
        handle.remove()
    return float(((got - want).abs().amax(-1) > 1e-3).float().mean())


def _generate(model: Any, ids: Any, mask: Any, cache: Any, arguments: dict[str, Any]) -> torch.Tensor:
    length = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    kept = {"output_logits": True, "return_dict_in_generate": True, **cached(cache)}
    return torch.stack(model.generate(ids, attention_mask=mask, **length, **kept, **arguments).logits)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


def summary(found: Outcome) -> str:
    """What becomes of a family's cache, without reasons."""
    if found.unbuilt or found.refused:
        return "not tested" if found.unbuilt else "refused"
    what = "quantized" if found.quantized == found.layers else f"{found.quantized} of {found.layers} layers quantized"
    return what + (", decoded for its attention" if found.decodes else "")


def table() -> str:
    """The families and their outcomes, in Markdown."""
    rows = []
    for kind, name in families().items():
        found = outcome(kind)
        print(kind, found, flush=True)
        what = summary(found)
        if found.unbuilt:
            what += f": no tiny model of it could be built ({found.unbuilt})"
        elif found.refused:
            what += f": {found.refused}"
        what += "".join(f"; **{mode}: {text}**" for mode, text in found.wrong.items())
        rows.append(f"| {kind} | {name} | {what.replace('|', chr(92) + '|')} |")
    return "\n".join(("| model type | class | KV cache |", "|---|---|---|", *rows))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    page = Path(sys.argv[1])
    begun, _, _ = page.read_text().partition("| model type |") if page.exists() else ("", "", "")
    page.write_text(begun + table() + "\n")
