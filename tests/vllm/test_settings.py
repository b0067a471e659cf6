"""What is asked for, what is refused, and how pages are planned: no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from torchgsrq.vllm.engine import refusals, shards  # noqa: E402
from torchgsrq.vllm.settings import settings_of  # noqa: E402
from torchgsrq.vllm.sizes import plan, token_bytes  # noqa: E402


def asking(**gsrq):
    return SimpleNamespace(additional_config={"gsrq": gsrq})


def test_who_does_not_ask_gets_nothing():
    assert settings_of(SimpleNamespace(additional_config={})) is None
    assert settings_of(SimpleNamespace(additional_config={"other": 1})) is None
    assert settings_of(SimpleNamespace()) is None


@pytest.mark.parametrize(
    "gsrq, error, said",
    [
        ({}, ValueError, "names no codebooks"),
        ({"codebooks": ""}, ValueError, "names no codebooks"),
        ({"codebooks": "nowhere.safetensors"}, FileNotFoundError, "no codebooks at nowhere"),
        ({"codebooks": "x", "bits": 1}, ValueError, "unknown keys: bits"),
        ({"codebooks": "x", "recent": 1, "sinks": 2}, ValueError, "unknown keys: recent, sinks"),
        ({"codebooks": "x", "recent_tokens": -1}, ValueError, "recent_tokens=-1 must be an integer of at least 0"),
        ({"codebooks": "x", "prefill": "fast"}, ValueError, "prefill='fast' is not offered"),
        ({"codebooks": "x", "recent_tokens": 0, "block_tokens": 1}, ValueError, "sink_tokens without a window"),
    ],
)
def test_settings_are_checked(gsrq, error, said):
    with pytest.raises(error, match=said):
        settings_of(asking(**gsrq))


def test_settings(folder):
    found = settings_of(asking(codebooks=str(folder / "books" / "uniform.safetensors"), recent_tokens=64))
    assert (found.config.recent_tokens, found.config.sink_tokens, found.held_tokens) == (64, 4, 95)
    assert len(found.books) == 3
    with pytest.raises(ValueError, match="not a torchgsrq codebook file"):
        settings_of(asking(codebooks=str(folder / "model.safetensors")))


def config_of(folder, **changes):
    """A stand-in for vLLM's config of the tests' model, as far as it is read."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(folder)
    heads, dim = text.num_key_value_heads, text.head_dim
    for name in list(changes):
        if name.startswith("text_"):
            setattr(text, name.removeprefix("text_"), changes.pop(name))
    model = {
        "hf_text_config": text,
        "get_total_num_kv_heads": lambda: changes.get("heads", heads),
        "get_head_size": lambda: changes.get("dim", dim),
        "use_mla": changes.get("use_mla", False),
        "is_encoder_decoder": changes.get("encoder", False),
        "runner_type": changes.get("runner", "generate"),
    }
    parallel = {"tensor_parallel_size": changes.get("tp", 1), "pipeline_parallel_size": changes.get("pp", 1)}
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=changes.get("one_group", False)),
        device_config=SimpleNamespace(device_type=changes.get("device", "cpu")),
        speculative_config=changes.get("speculative"),
        kv_transfer_config=changes.get("transfer"),
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"device": "cuda"}, "never run on devices of type 'cuda'; use its CPU build"),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"encoder": True}, "no encoders and no cross attention"),
        ({"runner": "pooling"}, "only decoders that generate"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"speculative": object()}, "speculative_config"),
        ({"transfer": object()}, "kv_transfer_config"),
        ({"pp": 2}, "pipeline_parallel_size=2"),
        ({"one_group": True}, "disable_hybrid_kv_cache_manager"),
        ({"heads": 4}, "2 heads of 32 in layer 0 and the model has 4 of 32"),
        ({"text_num_hidden_layers": 2}, "codebooks of 3 layers and the model has 2"),
        ({"text_hidden_size": 128}, "calibrated on another model"),
        ({"text_rope_parameters": {"rope_type": "dynamic"}}, "RoPE of type 'dynamic'"),
        ({"tp": 3}, "tensor_parallel_size=3 does not divide the model's 2 KV heads"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(folder, changes, said):
    settings = settings_of(asking(codebooks=str(folder / "books" / "uniform.safetensors")))
    assert list(refusals(settings, config_of(folder))) == []
    reasons = list(refusals(settings, config_of(folder, **changes)))
    assert reasons and any(said in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    "given, said",
    [
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"attn_type": "encoder_decoder"}, "attention of type encoder_decoder"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "read the cache of another layer"),
        ({"sinks": torch.zeros(4)}, "sinks"),
    ],
)
def test_layers_that_cannot_be_served_are_refused_by_name(given, said):
    from torchgsrq.vllm.layer import GSRQImpl

    with pytest.raises(ValueError, match=f"torchgsrq: .*{said}.* cannot be served on pages of codes"):
        GSRQImpl(4, 32, 0.1, 2, **given)


def test_pages():
    alike = plan(dict.fromkeys(range(30), 48), 1536, 4, 1024)
    assert (alike.block, alike.window_block, alike.alike) == (512, 16, True)
    assert set(alike.pages.values()) == {alike.window_page} == {512 * 48}
    assert plan(dict.fromkeys(range(30), 48), 768, 4, 1024).block == 256, "in bfloat16"
    assert plan(dict.fromkeys(range(30), 96), 1536, 4, 1024, 1024).block == 1024
    few = plan(dict.fromkeys(range(2), 12), 1536, 4, 1024)
    assert few.window_block == 8 and few.pages[0] == few.window_page >= 8 * 1536
    uneven = plan({i: 40 + i % 7 for i in range(30)}, 1536, 4, 1024)
    assert not uneven.alike and sum(uneven.pages.values()) >= 30 * uneven.window_page
    assert all(uneven.pages[i] >= uneven.block * size for i, size in uneven.token_bytes.items())
    assert all(page % 64 == 0 for page in uneven.pages.values())
    for sizes in ([40, 56] * 15, [16, 17, 18], [16, 17]):
        even = plan(dict(enumerate(sizes)), 512, 4, 1024)
        counts = [list(even.pages.values()).count(page) for page in set(even.pages.values())]
        assert even.alike or len(set(counts)) > 1, "vLLM would take equal numbers for a pattern"
        assert all(even.pages[i] >= even.block * size for i, size in even.token_bytes.items())


@pytest.mark.parametrize("block, frame", [(48, 1024), (2048, 1024), (96, 1)])
def test_blocks_that_do_not_fit_are_refused(block, frame):
    with pytest.raises(ValueError, match=f"--block-size {block}: pages of codes hold a power of two"):
        plan({0: 48}, 1536, 4, frame, block)
    with pytest.raises(ValueError, match="sink_tokens=4 do not fit a page of 2 tokens"):
        plan({0: 48}, 1536, 4, 1024, 2)


def test_shards_have_equal_pages(folder):
    settings = settings_of(asking(codebooks=str(folder / "books" / "by-head.safetensors")))
    parts = [shards(settings.books, rank, 2) for rank in range(2)]
    assert parts[0][1] == parts[1][1]
    for books, sizes in parts:
        assert all(token_bytes(books[i]) <= sizes[i] for i in books)
        assert next(iter(books.layers.values())).key.heads == 1
    whole = {i: token_bytes(c) for i, c in settings.books.layers.items()}
    assert all(sum(token_bytes(books[i]) for books, _ in parts) == whole[i] for i in whole)


def test_what_a_window_holds():
    from torchgsrq.vllm.layer import first_held

    table = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 0], [0, 0, 0, 0]])
    assert first_held(table, torch.tensor([14, 11, 9]), 4).tolist() == [8, 0, 9]
