"""Quantized models generate correctly in every mode, and architectures are quantized, kept or refused by name."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache

from tests.conftest import SMALL, TINY, cached, tiny_books, tiny_llama
from torchgsrq import Codebooks, GSRQCache, GSRQConfig, GSRQTensor, dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.measure.evaluate import quantized

PROMPT = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_decode_equals_the_dequantized_twin(llama):
    """Every step's logits are those of the full-precision model on a past that is what the cache decodes to."""
    model, books = llama
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        model(PROMPT, **cached(cache), use_cache=True)
    token = PROMPT[:, -1:]
    for _ in range(12):
        with quantized(model, SMALL, books):
            got = model(token, **cached(cache), use_cache=True).logits[:, -1]
        twin = DynamicCache(config=model.config)
        for i, layer in enumerate(cache.layers):
            past = int(layer.keys.length) - 1
            twin.update(layer.keys.dequantize()[:, :, :past], layer.values.dequantize()[:, :, :past], i)
        want = model(token, **cached(twin), use_cache=True).logits[:, -1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        token = got.argmax(-1, keepdim=True)
    assert int(cache.layers[0].keys.encoded.max()) == 44


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@torch.no_grad()
def test_a_short_text_is_exact(llama, prefill):
    """Whatever lies within the window is full precision, so nothing may change."""
    model, books = llama
    wide = dataclasses.replace(SMALL, recent_tokens=128, prefill=prefill)
    want = model(PROMPT).logits
    with quantized(model, wide, books):
        torch.testing.assert_close(model(PROMPT).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_quantized_prefill_equals_token_by_token(llama):
    model, books = llama
    with quantized(model, dataclasses.replace(SMALL, prefill="quantized"), books):
        whole = model(PROMPT, use_cache=True)
        cache = new_cache(model)
        steps = [model(PROMPT[:, i : i + 1], **cached(cache), use_cache=True).logits for i in range(40)]
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(whole.past_key_values.layers, cache.layers, strict=True):
        coded = int(a.keys.encoded.max())
        assert torch.equal(a.keys.encoded, b.keys.encoded)
        for x, y in zip(a.keys.codes, b.keys.codes, strict=True):
            same = x[:, :, :coded] == y[:, :, :coded]
            assert same.float().mean() > 0.97  # the hidden states round differently in products of other shapes


@pytest.mark.parametrize("chunks", [(40,), (7, 33), (1, 1, 38), (20, 20), (39, 1)])
@torch.no_grad()
def test_chunked_quantized_prefill_is_the_same(llama, chunks):
    model, books = llama
    with quantized(model, dataclasses.replace(SMALL, prefill="quantized"), books):
        whole = model(PROMPT, use_cache=True).logits
        cache, logits = new_cache(model), []
        for part in PROMPT.split(chunks, 1):
            logits.append(model(part, **cached(cache), use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_exact_prefill_is_the_full_precision_model(llama):
    model, books = llama
    want = model(PROMPT).logits
    with quantized(model, SMALL, books):
        out = model(PROMPT)
    torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-4)
    assert isinstance(out.past_key_values, GSRQCache)


@pytest.mark.parametrize("block", [1, 4, 32])
@torch.no_grad()
def test_left_padding_changes_nothing(llama, block):
    """Each row of a left-padded batch equals that row alone: masks, sinks, frames, means, and what is exact."""
    model, books = llama
    lengths = (40, 23, 31)
    rows = [PROMPT[0, :n] for n in lengths]
    ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.zeros(3, 40, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 40 - len(row) :], mask[i, 40 - len(row) :] = row, 1
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    with quantized(model, dataclasses.replace(SMALL, block_tokens=block), books):
        batch = model.generate(ids, attention_mask=mask, **settings)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings)
            assert torch.equal(batch.sequences[i, 40:], alone.sequences[0, len(row) :])
            for a, b in zip(batch.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[i], b[0], rtol=1e-3, atol=1e-3)
            ours, own = (x.past_key_values.layers[0].keys for x in (batch, alone))
            assert int(ours.encoded[i]) - (40 - len(row)) == int(own.encoded[0])


PADDED = torch.tensor([[1] * 40, [0] * 20 + [1] * 20])


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}], ids=str)
@torch.no_grad()
def test_padding_is_known_in_every_kind_of_prefill(llama, how):
    """Row offsets come from 2-D and 4-D masks, and from later chunks where the first is all padding."""
    model, books = llama
    ids = PROMPT * PADDED
    arguments = {"attention_mask": PADDED, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with quantized(model, dataclasses.replace(SMALL, block_tokens=1), books):
        out = model.generate(ids, **arguments, **how, return_dict_in_generate=True)
        alone = model.generate(PROMPT[1:, 20:], max_new_tokens=20, min_new_tokens=20, do_sample=False)
    for layer in out.past_key_values.layers:
        assert layer.keys.start.tolist() == [[0, 0], [20, 20]]
    if "prefill_chunk_size" not in how:  # with a chunked prompt, earlier chunks are read from the cache
        assert torch.equal(out.sequences[1, 40:], alone[0, 20:])


@torch.no_grad()
def test_positions_that_count_slots(llama):
    """Without position_ids transformers rotates by slot, padding included; with moved ones, sinks still are real."""
    model, books = llama
    ids = PROMPT * PADDED
    with quantized(model, SMALL, books):
        plain = model(ids, attention_mask=PADDED, use_cache=True).past_key_values
        moved = torch.arange(40)[None] + torch.tensor([[100], [80]])
        shifted = model(ids, attention_mask=PADDED, position_ids=moved, use_cache=True).past_key_values
    assert plain.layers[0].keys.start.tolist() == [[0, 0], [0, 20]]
    assert shifted.layers[0].keys.start.tolist() == [[-100, 0], [-80, 20]]


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
}


@pytest.mark.parametrize("mode", GENERATE)
def test_generate_modes_match_when_the_window_holds_all(llama, mode):
    """With a window wider than the text every mode must give the full-precision tokens."""
    model, books = llama
    arguments = {"max_new_tokens": 24, **GENERATE[mode]}
    mask = torch.ones_like(PROMPT)
    torch.manual_seed(0)
    want = model.generate(PROMPT, attention_mask=mask, **arguments)
    with quantized(model, dataclasses.replace(SMALL, recent_tokens=128), books):
        torch.manual_seed(0)
        got = model.generate(PROMPT, attention_mask=mask, **arguments)
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", GENERATE)
def test_generate_modes_run_on_codes(llama, mode):
    model, books = llama
    arguments = {"max_new_tokens": 24, "min_new_tokens": 24, "return_dict_in_generate": True, **GENERATE[mode]}
    with quantized(model, SMALL, books):
        torch.manual_seed(0)
        out = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **arguments)
    assert out.sequences.shape[1] == 64
    assert isinstance(out.past_key_values, GSRQCache)
    assert all(int(layer.keys.encoded.max()) >= 44 for layer in out.past_key_values.layers)


@torch.no_grad()
def test_beam_search_reorders_codes_and_windows(llama):
    """Beam search with a cache gives what beam search without one gives from the same decoded past."""
    model, books = llama
    cache = quantized_cache(model, books)
    order = torch.tensor([1, 0, 0])
    before = [layer.keys.dequantize() for layer in cache.layers]
    cache.reorder_cache(order)
    for layer, was in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys.dequantize(), was[order])


@torch.no_grad()
def quantized_cache(model: nn.Module, books: Codebooks, config: GSRQConfig = SMALL) -> GSRQCache:
    with quantized(model, config, books):
        cache = new_cache(model)
        model(PROMPT, **cached(cache), use_cache=True)
    return cache


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_gives_the_greedy_tokens(llama, how):
    """A block that became codes while drafting may differ, so blocks are wider than a draft is long here."""
    model, books = llama
    config = dataclasses.replace(SMALL, recent_tokens=32, block_tokens=1)
    assistant = tiny_llama(num_hidden_layers=1)
    arguments = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    ids = PROMPT[:1].repeat(1, 2)
    with quantized(model, dataclasses.replace(config, recent_tokens=256), books):
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, **arguments)
    assert torch.equal(got, want)
    with quantized(model, config, books):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, **arguments)
    assert out.shape[1] > ids.shape[1]


@torch.no_grad()
def test_multi_turn_continuation_keeps_the_cache(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        first = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=10, min_new_tokens=10,
                               do_sample=False, return_dict_in_generate=True)  # fmt: skip
        turn = torch.cat((first.sequences, PROMPT[:, :9]), 1)
        second = model.generate(turn, attention_mask=torch.ones_like(turn), **cached(first.past_key_values),
                                max_new_tokens=10, min_new_tokens=10, do_sample=False)  # fmt: skip
    assert second.shape[1] == turn.shape[1] + 10
    assert first.past_key_values.get_seq_length() == second.shape[1] - 1


def test_a_callers_own_cache_is_left_alone(llama):
    model, books = llama
    with quantized(model, SMALL, books), torch.no_grad():
        out = model(PROMPT, **cached(DynamicCache(config=model.config)), use_cache=True)
    assert type(out.past_key_values) is DynamicCache


def test_undo_is_exact(llama):
    model, books = llama
    before = model(PROMPT).logits
    keys = set(model.__dict__)
    quantize_kv_(model, SMALL, codebooks=books)
    assert model.config._attn_implementation == "gsrq"
    dequantize_kv_(model)
    assert set(model.__dict__) == keys and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(PROMPT).logits, before)
    assert type(model(PROMPT, use_cache=True).past_key_values) is DynamicCache
    with pytest.raises(ValueError, match="not quantized"):
        dequantize_kv_(model)


def test_a_model_is_quantized_once(llama):
    model, books = llama
    with quantized(model, SMALL, books), pytest.raises(ValueError, match="quantized already"):
        quantize_kv_(model, SMALL, codebooks=books)


def test_copies_of_a_model_are_quantized_and_independent(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        twin = copy.deepcopy(model)
        cache = model(PROMPT, use_cache=True).past_key_values
        forked = copy.deepcopy(cache)
        assert forked.layers[0].keys.codebook_0 is cache.layers[0].keys.codebook_0
        assert forked.layers[0].keys.codes_0.data_ptr() != cache.layers[0].keys.codes_0.data_ptr()
        want = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False)
    got = twin.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)
    assert isinstance(twin(PROMPT, use_cache=True).past_key_values, GSRQCache)
    dequantize_kv_(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert type(twin(PROMPT, use_cache=True).past_key_values) is DynamicCache


def test_save_and_reload_a_quantized_model(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model, books = llama
    with quantized(model, SMALL, books):
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != "gsrq"
    torch.testing.assert_close(again(PROMPT).logits, model(PROMPT).logits)


def test_pipeline(llama):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    model, books = llama
    words = {f"w{i}": i for i in range(128)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", pad_token="w0")
    with quantized(model, SMALL, books):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        said = write(" ".join(f"w{int(i)}" for i in PROMPT[0]), max_new_tokens=8, do_sample=False)
    assert len(said[0]["generated_text"].split()) >= 41


@pytest.mark.parametrize("kept", [(0,), (1,)])
@torch.no_grad()
def test_skipped_layers_keep_full_precision(llama, kept):
    model, books = llama
    config = dataclasses.replace(SMALL, skip_layers=kept)
    with quantized(model, config, books):
        cache = model(PROMPT, use_cache=True).past_key_values
        step = model(PROMPT[:, :1], **cached(cache), use_cache=True)
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer.keys, GSRQTensor) == (i not in kept)
    assert step.logits.isfinite().all()


def test_bad_values_leave_the_cache_as_it_was(llama):
    model, books = llama
    cache = quantized_cache(model, books)
    layer = cache.layers[0]
    before = [p.clone() for x in (layer.keys, layer.values) for p in x.parts[: x.owned]]
    k = torch.randn(2, 2, 1, 32)
    bad = k.clone()
    bad[0, 0, 0, 0] = torch.nan
    for keys, values, message in (
        (k, bad, "NaN"),
        (bad, k, "NaN"),
        (k, k[..., :16], "shape"),
        (k[:1], k[:1], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.update(keys, values)
        after = [p for x in (layer.keys, layer.values) for p in x.parts[: x.owned]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert layer.get_seq_length() == 40


def test_a_full_static_cache_says_so(llama):
    model, books = llama
    with quantized(model, SMALL, books), torch.no_grad():
        cache = new_cache(model, max_cache_len=42)
        model(PROMPT, **cached(cache), use_cache=True)
        model(PROMPT[:, :2], **cached(cache), use_cache=True)
        with pytest.raises(ValueError, match="capacity of 42"):
            model(PROMPT[:, :1], **cached(cache), use_cache=True)


def test_unknown_arguments_are_refused(llama):
    model, books = llama
    cache = quantized_cache(model, books)
    with quantized(model, SMALL, books), torch.no_grad():
        with pytest.raises(TypeError, match="position_bias"):
            model(PROMPT[:, :1], **cached(cache), use_cache=True, position_bias=torch.zeros(1))
        with pytest.raises(ValueError, match="cache_implementation='quantized'"):
            model.generate(PROMPT, max_new_tokens=2, cache_implementation="quantized")


@torch.no_grad()
def test_crop_after_drafting_is_as_if_never_drafted(llama):
    model, books = llama
    config = dataclasses.replace(SMALL, block_tokens=16)
    a, b = quantized_cache(model, books, config), quantized_cache(model, books, config)
    g = torch.Generator().manual_seed(3)
    new = torch.randn(2, 2, 5, 32, generator=g)
    for layer in b.layers:
        layer.update(-new, -new)  # 40 -> 45 tokens: no block is due before 56
    b.crop(-5)
    for cache in (a, b):
        for layer in cache.layers:
            layer.update(new, new)
    for one, two in zip(a.layers, b.layers, strict=True):
        assert torch.equal(one.keys.encoded, two.keys.encoded)
        assert torch.equal(one.keys.dequantize(), two.keys.dequantize())


@pytest.mark.parametrize("fixed", [None, 64])
@torch.no_grad()
def test_cache_operations_commute_with_decode(llama, fixed):
    model, books = llama
    with quantized(model, SMALL, books):
        cache = new_cache(model, fixed)
        model(PROMPT, **cached(cache), use_cache=True)
    was = cache.layers[1].values.dequantize()
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.layers[1].values.dequantize(), was.repeat_interleave(3, 0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(cache.layers[1].values.dequantize(), was.flip(0))
    cache.crop(-7)
    got = cache.layers[1].values.dequantize()
    assert torch.equal(got[:, :, :33], was.flip(0)[:, :, :33]) and not got[:, :, 33:].any()
    assert int(cache.get_seq_length()) == 33 and cache.batch_size == 2
    cache.reset()
    assert int(cache.get_seq_length()) == 0 and not cache.layers[1].values.dequantize().any()
    with quantized(model, SMALL, books):
        again = model(PROMPT, **cached(cache), use_cache=True)
    assert torch.equal(again.past_key_values.layers[1].values.dequantize(), was)


@torch.no_grad()
def test_offloaded_layers_come_back(llama):
    model, books = llama
    layer = quantized_cache(model, books).layers[0]
    was = layer.keys.dequantize()
    tables = layer.keys.codebook_0.data_ptr()
    layer.offload()
    layer.prefetch()
    assert layer.keys.codebook_0.data_ptr() == tables
    assert torch.equal(layer.keys.dequantize(), was)
    layer.update(torch.ones(2, 2, 1, 32), torch.ones(2, 2, 1, 32))
    assert layer.get_seq_length() == 41


@pytest.mark.parametrize("fixed", [None, 64])
@torch.no_grad()
def test_a_prompt_cache_survives_a_file(llama, tmp_path, fixed):
    model, books = llama
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        model(PROMPT, **cached(cache), use_cache=True)
        cache.save(tmp_path / "prompt.safetensors")
        again = new_cache(model, fixed)
        again.load(tmp_path / "prompt.safetensors")
        one, two = (model(PROMPT[:, :1], **cached(c), use_cache=True).logits for c in (cache, again))
    assert torch.equal(one, two)
    others = tiny_books(model, seed=1)
    path = tmp_path / "prompt.safetensors"
    for changed, says in (
        (GSRQCache(others, SMALL, model.config), "other codebooks"),
        (GSRQCache(books, dataclasses.replace(SMALL, recent_tokens=9), model.config), "recent_tokens=8"),
        (GSRQCache(books, SMALL, model.config, 39), "holds 40 tokens; this cache holds 39"),
    ):
        with pytest.raises(ValueError, match=says):
            changed.load(path)
        assert changed.is_empty
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole cache file"):
        GSRQCache(books, SMALL, model.config).load(path)


@torch.no_grad()
def test_files_of_mixed_caches(llama, tmp_path):
    """Unquantized layers are saved as long as they are, and nothing is poured into a cache that holds something."""
    model, books = llama
    path = tmp_path / "mixed.safetensors"
    with quantized(model, dataclasses.replace(SMALL, skip_layers=(1,)), books):
        cache = new_cache(model, max_cache_len=64)
        model(PROMPT, **cached(cache), use_cache=True)
        cache.save(path)
        again = new_cache(model)
        again.load(path)
        assert [int(layer.get_seq_length()) for layer in again.layers] == [40, 40]
        one, two = (model(PROMPT[:, :1], **cached(c), use_cache=True).logits for c in (cache, again))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="holds tokens already"):
            again.load(path)


@torch.no_grad()
def test_an_empty_cache_takes_any_batch(llama):
    model, books = llama
    cache = quantized_cache(model, books)
    cache.reset()
    with quantized(model, SMALL, books):
        model(PROMPT[:1], **cached(cache), use_cache=True)
    assert cache.batch_size == 1 and cache.get_seq_length() == 40
    cache.batch_select_indices(torch.tensor([True]))
    assert cache.batch_size == 1


def test_fingerprint_does_not_depend_on_the_dtype(llama):
    """Nor on the token embeddings, which do not reach the cache by themselves; but on every other weight."""
    from torchgsrq.models import fingerprint, inspect_layers, same_model

    model, _ = llama

    def of(changed):
        return fingerprint(changed, inspect_layers(changed))

    for dtype in (torch.bfloat16, torch.float16):
        assert same_model(of(model), of(copy.deepcopy(model).to(dtype)))
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(140)
    assert same_model(of(model), of(resized))
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)  # not what tests before left of the global one
    with torch.no_grad():
        for layer in other.model.layers:
            weight = layer.self_attn.v_proj.weight
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
    assert not same_model(of(model), of(other))


@torch.no_grad()
def test_memory_counts_every_storage(llama):
    model, books = llama
    with quantized(model, dataclasses.replace(SMALL, skip_layers=(1,)), books):
        cache = model(PROMPT, use_cache=True).past_key_values
    report = cache.memory()
    owned = {}
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            for t in held.parts[: held.owned] if isinstance(held, GSRQTensor) else [held]:
                owned[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    assert report.total == sum(owned.values())
    elements = 2 * 2 * 2 * 40 * 32
    assert report.elements == elements
    used = sum(2 * 32 * 32 * codec.heads * codec.bits / 8 for codec in books[0])  # rows, coded tokens, head_dim
    assert report.codes - report.unused == used
    assert report.bits_per_element > report.bits_per_element_codes
    assert report.bits_per_element_with_codebooks > report.bits_per_element


def test_moved_positions_give_the_same_codes(llama):
    """Anchored frames: a text at positions moved by whole frames is stored in the same bytes."""
    model, books = llama
    with quantized(model, SMALL, books), torch.no_grad():
        cut = PROMPT[:, :40]
        caches = [
            model(cut, use_cache=True, position_ids=torch.arange(40)[None] + shift).past_key_values
            for shift in (0, 32 * 100)
        ]
    a, b = (c.layers[0].keys for c in caches)
    assert b.start.tolist() == [[-3200, 0], [-3200, 0]]
    for x, y in zip(a.codes, b.codes, strict=True):
        assert (
            x[:, :, :32] == y[:, :, :32]
        ).float().mean() > 0.9  # rotations by large angles round, which now and then another codeword wins by


ARCHITECTURES = {
    "Llama": ("LlamaConfig", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Gemma3": ("Gemma3TextConfig", {"head_dim": 256, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "Gemma2, soft cap": ("Gemma2Config", {"sliding_window": 16, "attn_logit_softcapping": 5.0}),
    "Phi3": ("Phi3Config", {"pad_token_id": 0}),
    "GPT-2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}),
    "OPT": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2}),
    "GLM, interleaved": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "GPT-OSS, sinks": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16}),
}  # fmt: skip


def architecture(name: str) -> nn.Module:
    import transformers

    kind, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    facts = {**TINY, "initializer_range": 0.1, **changes}
    if kind in ("Phi3Config", "OPTConfig", "GPT2Config"):
        facts.pop("head_dim")
    if kind == "Phi3Config":
        facts["num_attention_heads"], facts["num_key_value_heads"] = 2, 1
    config = getattr(transformers, kind)(**facts)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_architectures(name):
    """Every architecture: exact while the window holds all, equal to its decoded self on codes, undone at the end."""
    model = architecture(name)
    books = tiny_books(model)
    mask = torch.ones_like(PROMPT)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(PROMPT, **arguments)
    want_logits = model(PROMPT).logits
    with quantized(model, dataclasses.replace(SMALL, recent_tokens=128), books):
        assert torch.equal(model.generate(PROMPT, **arguments), want)
    with quantized(model, dataclasses.replace(SMALL, prefill="quantized"), books):
        whole = model(PROMPT, use_cache=True)
        cache = new_cache(model)
        steps = [model(PROMPT[:, i : i + 1], **cached(cache), use_cache=True).logits for i in range(40)]
        out = model.generate(PROMPT, **arguments)
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits, rtol=1e-3, atol=1e-3)
    assert out.shape == want.shape
    full_attention = [i for i, kind in enumerate(layer_kinds(model)) if kind == "full_attention"]
    assert [i for i, layer in enumerate(cache.layers) if isinstance(layer.keys, GSRQTensor)] == full_attention
    if full_attention:
        assert not torch.allclose(whole.logits, want_logits, atol=1e-3), "nothing was quantized"
    torch.testing.assert_close(model(PROMPT).logits, want_logits)


def layer_kinds(model: nn.Module) -> list[str]:
    from torchgsrq.models import layer_kinds

    return layer_kinds(model)


def test_static_generation_with_mixed_layers():
    """Static caches pass decoders a dict of 4-D masks by layer type."""
    model = architecture("Gemma3")
    with quantized(model, SMALL, tiny_books(model)):
        arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
        want = model.generate(PROMPT, **arguments)
        assert torch.equal(model.generate(PROMPT, cache_implementation="static", **arguments), want)


@pytest.mark.parametrize(
    ("name", "rope"),
    [("Llama", "half-split"), ("Gemma3", "half-split"), ("GLM, interleaved", "interleaved"), ("GPT-2", "none"), ("OPT", "none")],
)  # fmt: skip
def test_rope_is_recognized(name, rope):
    from torchgsrq.models import inspect_layers

    infos = inspect_layers(architecture(name))
    expected = "not recognized" if rope == "none" else rope
    # Learned positions move the keys too, but by no rotation.
    assert {info.rope for info in infos} <= {rope, expected}
    assert all((info.inv_freq.numel() > 0) == (rope != "none") for info in infos)


def test_unsupported_models_are_refused_by_name():
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        MambaConfig,
        MambaForCausalLM,
    )

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    bart = BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)  # fmt: skip
    for model, message in (
        (BartForConditionalGeneration(bart), "BartForConditionalGeneration is an encoder-decoder"),
        (MambaForCausalLM(MambaConfig(**small, state_size=4)), "MambaForCausalLM writes no keys and values"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_kv_(model.eval(), GSRQConfig())
        assert not hasattr(model, "_gsrq")
    with pytest.raises(TypeError, match="Linear"):
        quantize_kv_(nn.Linear(2, 2))


def test_rates_are_checked_against_the_head(llama):
    model, _ = llama
    with pytest.raises(ValueError, match=r"bits=0\.375 is not offered for head_dim=32; choose one of 2, 1\.5, 1"):
        quantize_kv_(model, GSRQConfig(bits=0.375, allocation="uniform"))


def test_codebooks_say_what_the_config_is(llama):
    """Without a config it is theirs; another rate or group size than theirs is refused by name."""
    model, books = llama
    quantize_kv_(model, codebooks=books)
    assert (model._gsrq.config.bits, model._gsrq.config.group_size) == (1, 8)
    dequantize_kv_(model)
    for name, value in (("bits", 0.5), ("group_size", 16)):
        with pytest.raises(ValueError, match=f"the codebooks were made for {name}=.*calibrate for it"):
            quantize_kv_(model, dataclasses.replace(SMALL, **{name: value}), codebooks=books)


def test_codebooks_of_another_model_are_refused(llama):
    _, books = llama
    with pytest.raises(ValueError, match="another model"):
        quantize_kv_(tiny_llama(rms_norm_eps=1e-3, vocab_size=130), SMALL, codebooks=books)


def test_static_caches_of_other_makers_are_refused_by_type(llama):
    model, books = llama
    with quantized(model, SMALL, books), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=64)
        out = model(PROMPT, **cached(cache), use_cache=True)  # the caller's own choice: full precision
    assert out.logits.isfinite().all()
