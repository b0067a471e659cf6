"""What strangers' scripts do: it works, or it is refused by name where it is asked for, and nothing is half done."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import pickle
import shutil
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

from tests.conftest import SMALL, TINY, cached, tiny_books, tiny_llama
from tests.oracle import Oracle, watch
from torchgsrq import Codebooks, GSRQCache, GSRQConfig, calibrate, dequantize_kv_, kernels, new_cache, quantize_kv_
from torchgsrq.config import PREFILLS
from torchgsrq.learning import train
from torchgsrq.measure.evaluate import quantized
from torchgsrq.models import given_cache

PROMPT = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(3, 100, (512,), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Prompt files


def prompt_file(llama, path, config=SMALL):
    model, books = llama
    with quantized(model, config, books), torch.no_grad():
        cache = new_cache(model)
        model(PROMPT, **cached(cache), use_cache=True)
        cache.save(path)
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def without(*names):
    return lambda tensors, facts: [tensors.pop(k) for k in list(tensors) if k.startswith(names)]


def changed(**tensors_or_facts):
    def change(tensors, facts):
        for name, make in tensors_or_facts.items():
            name = name.replace("__", ".")
            if name in facts:
                facts[name] = make
            else:
                tensors[name] = make(tensors[name])

    return change


def named(name, make):
    return lambda tensors, facts: tensors.update({name: make(tensors[name])})


DAMAGES = {
    "a layer": (without("1."), "layer 1 is missing, and should hold 40 tokens"),
    "a tensor": (without("0.keys.window"), r"layer 0 has no keys\.window"),
    "longer than said": (lambda t, f: f.update(lengths=[39, 39]), "layer 0 holds 40 tokens in its keys.*39"),
    "longer than held": (lambda t, f: f.update(lengths=[400, 400]), "layer 0 holds 40 tokens in its keys.*400"),
    "lengths that differ": (lambda t, f: f.update(lengths=[40, 0]), "layer 1 holds 40 tokens"),
    "another batch": (
        named("0.values.codes_0", lambda t: t.repeat(2, 1, 1, 1)),
        r"layer 0 has values\.codes_0 of.*\[4, ",
    ),
    "another batch in all": (lambda t, f: f.update(rows=4), r"layer 0 has a keys\.encoded of torch.int32 \[2\]"),
    "another type": (named("1.keys.codes_0", lambda t: t.float()), r"layer 1 has keys\.codes_0 of torch.float32"),
    "more codes than tokens": (named("0.keys.encoded", lambda t: t + 40), "layer 0 holds 40 tokens in its keys, 72"),
    "a smaller window": (named("0.keys.window", lambda t: t[:, :, 1:].contiguous()), r"layer 0 has a keys\.window"),
    "keys and values apart": (named("0.keys.encoded", lambda t: t - 4), r"layer 0 has keys\.codes_0"),
    "no facts": (lambda t, f: f.clear(), "lengths"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_prompt_file_is_refused_whole(llama, tmp_path, damage):
    model, books = llama
    path = tmp_path / "prompt.safetensors"
    tensors, meta = prompt_file(llama, path)
    facts = json.loads(meta["facts"])
    change, says = DAMAGES[damage]
    change(tensors, facts)
    save_file(tensors, path, {**meta, "facts": json.dumps(facts)})
    cache = GSRQCache(books, SMALL, model.config)
    with pytest.raises(ValueError, match="not a whole cache file.*" + says):
        cache.load(path)
    assert cache.is_empty and not any(layer.is_initialized for layer in cache.layers)


def test_a_prompt_file_holds_what_is_used(llama, tmp_path):
    """A cache of fixed capacity is saved as long as its text."""
    model, books = llama
    prompt_file(llama, tmp_path / "a")
    with quantized(model, SMALL, books), torch.no_grad():
        cache = new_cache(model, 20_000)
        model(PROMPT, **cached(cache), use_cache=True)
        cache.save(tmp_path / "b")
    assert abs((tmp_path / "a").stat().st_size - (tmp_path / "b").stat().st_size) < 100


@torch.no_grad()
def test_a_prompt_file_of_another_dtype(llama, tmp_path):
    """The window is taken over in the model's dtype; codes have none."""
    model, books = llama
    prompt_file(llama, tmp_path / "a", dataclasses.replace(SMALL, skip_layers=(1,)))
    half = copy.deepcopy(model).bfloat16()
    with quantized(half, dataclasses.replace(SMALL, skip_layers=(1,)), books):
        cache = new_cache(half)
        cache.load(tmp_path / "a")
        assert cache.layers[0].keys.dtype == cache.layers[1].keys.dtype == torch.bfloat16
        half(PROMPT[:, :1], **cached(cache), use_cache=True)


SIZES = {"gsrq": 8, "gsrq-paper": 32}  # of groups, by recipe


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of any size, dtypes and modes


@pytest.mark.parametrize("recipe", SIZES)
@pytest.mark.parametrize("size", [2.0**15, 20_000.0, 2.0**-20])
@torch.no_grad()
def test_values_of_any_size(size, recipe):
    """Values times a factor that the output projection takes back: no code may change, no codeword overflow."""
    config = dataclasses.replace(SMALL, recipe=recipe, group_size=SIZES[recipe])
    logits, codes = [], []
    for factor in (1.0, size):
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.div_(factor)
        books = tiny_books(model, config)
        assert all(torch.isfinite(t).all() for i in books for codec in books[i] for t in codec.tensors)
        full = model(torch.cat((PROMPT, PROMPT[:, :8]), 1)).logits[:, -8:]
        with quantized(model, config, books):
            out = model(PROMPT, use_cache=True)
            out = model(PROMPT[:, :8], **cached(out.past_key_values), use_cache=True)
        logits.append(out.logits)
        codes.append(torch.cat([x.flatten() for x in out.past_key_values.layers[0].values.codes]))
    if size != 20_000:
        assert (codes[0] == codes[1]).float().mean() > 0.97
        assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()
    else:  # other factors round, and clusters fall elsewhere: as good, if not the same
        errors = [(x - full).square().mean() for x in logits]
        assert errors[1] < 1.5 * errors[0]


@torch.no_grad()
def test_autocast(llama):
    """Autocast gives float32 and bfloat16 in turn, to one cache; and to calibration, which takes no notice."""
    model, books = llama
    with torch.autocast("cpu", torch.bfloat16):
        again = tiny_books(model)
        assert again.digest == books.digest
        quantize_kv_(model, SMALL, codebooks=books)
        out = model(PROMPT, use_cache=True)
        model.generate(PROMPT, **GREEDY)
    cache = out.past_key_values
    want = copy.deepcopy(cache)
    assert model(PROMPT[:, :1], **cached(cache), use_cache=True).logits.isfinite().all()  # and without
    with torch.autocast("cpu", torch.bfloat16):
        assert model(PROMPT[:, :1], **cached(want), use_cache=True).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", SIZES)
def test_other_default_dtypes(llama, recipe, dtype):
    model, _ = llama
    config = dataclasses.replace(SMALL, recipe=recipe, group_size=SIZES[recipe], bits=2)
    want = tiny_books(model, config)
    torch.set_default_dtype(dtype)
    try:
        books = tiny_books(model, config)
        with quantized(model, config, books):
            assert model.generate(PROMPT, **GREEDY).shape == (2, 52)
    finally:
        torch.set_default_dtype(torch.float32)
    assert books.digest == want.digest


def test_float64_models_are_refused(llama):
    model, books = llama
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is float64.*model\.float\(\)"):
        quantize_kv_(copy.deepcopy(model).double(), SMALL, codebooks=books)


def test_a_cache_filled_in_inference_mode(llama):
    """May be cropped, written, reordered, moved and reset outside of it."""
    model, books = llama
    quantize_kv_(model, SMALL, codebooks=books)
    for fixed in (None, 128):
        with torch.inference_mode():
            cache = new_cache(model, fixed)
            model(PROMPT, **cached(cache), use_cache=True)
            model(PROMPT[:, :1], **cached(cache), use_cache=True)
            cache.batch_repeat_interleave(2)
        with torch.no_grad():
            cache.crop(-5)
            cache.reorder_cache(torch.tensor([3, 0]))
            model(PROMPT[:, :3], **cached(cache), use_cache=True)
            assert int(cache.get_seq_length()) == 39
            cache.layers[0].offload()
            cache.layers[0].prefetch()
            cache.reset()
            model(PROMPT, **cached(cache), use_cache=True)


def test_gradients_are_refused_and_not_lost(llama):
    model, books = llama
    quantize_kv_(model, SMALL, codebooks=books)
    exact = model(PROMPT[:1], use_cache=True)  # an exact prefill is the full-precision model, gradient and all
    exact.logits.sum().backward()
    step = model(PROMPT[:1, :1], **cached(exact.past_key_values), use_cache=True)
    with pytest.raises(RuntimeError, match="attention on codes has no gradient"):
        step.logits.sum().backward()
    model.requires_grad_(False)
    for name in ("k_proj", "v_proj"):  # also where the query needs none
        weight = getattr(model.model.layers[1].self_attn, name).weight.requires_grad_()
        step = model(PROMPT[:1, :1], **cached(exact.past_key_values), use_cache=True)
        with pytest.raises(RuntimeError, match="attention on codes has no gradient"):
            step.logits.sum().backward()
        weight.requires_grad_(False)


def test_a_compiled_backward_is_refused_too(llama):
    """When it runs, not when it is traced; a compiler must not drop the refusal with the gradient."""
    model, books = llama
    quantize_kv_(model, SMALL, codebooks=books)
    cache = model(PROMPT[:1], use_cache=True).past_key_values
    step = torch.compile(model.forward, backend="aot_eager")
    out = step(PROMPT[:1, :1], **cached(cache), use_cache=True)
    with pytest.raises(RuntimeError, match="attention on codes has no gradient"):
        out.logits.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Copies, threads, wrappers


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "copy"])
@torch.no_grad()
def test_copies_of_a_quantized_model_are_quantized(llama, how):
    model = copy.deepcopy(llama[0])
    quantize_kv_(model, SMALL, codebooks=llama[1])
    want = model.generate(PROMPT, **GREEDY)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[how](
            model
        )
    out = other.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, GSRQCache) and torch.equal(out.sequences, want)
    assert isinstance(
        other.generate(PROMPT, **GREEDY, cache_implementation="static", return_dict_in_generate=True).past_key_values,
        GSRQCache,
    )
    assert isinstance(other(PROMPT).past_key_values, GSRQCache)
    dequantize_kv_(model)
    for one in (model, other) if how == "copy" else (model,):  # a shallow copy shares everything
        assert isinstance(one.generate(PROMPT, **GREEDY, return_dict_in_generate=True).past_key_values, DynamicCache)
    if how != "copy":
        assert isinstance(other(PROMPT).past_key_values, GSRQCache)
        dequantize_kv_(other)
        assert type(other(PROMPT).past_key_values) is DynamicCache


def test_two_threads_calibrate_two_models(llama):
    """Each sees its own model's keys and values only; and twice the same model, one after the other."""
    other = tiny_llama(num_key_value_heads=1)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(3)
    wanted = [tiny_books(m) for m in (llama[0], other)]
    got, errors = {}, []

    def run(number, model):
        try:
            got[number] = tiny_books(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, m)) for i, m in enumerate((llama[0], other, llama[0], other))]
    with mock.patch.object(train, "FRAME", 32):  # as `tiny_books` does, which in threads would undo it for each other
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for i in range(4):
        assert got[i].digest == wanted[i % 2].digest
    assert all(p.grad is None and p.requires_grad for p in llama[0].parameters())
    assert llama[0].config._attn_implementation == "sdpa"


class Adapter(nn.Module):
    """The shape of a LoRA layer: the model's own, and a product that begins at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = (
            nn.Linear(layer.in_features, 2, bias=False),
            nn.Linear(2, layer.out_features, bias=False),
        )
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Wrapper(nn.Module):
    """The shape of PEFT's model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def generate(self, *args, **kwargs):
        return self.model.generate(*args, **kwargs)


@torch.no_grad()
def test_adapters_and_wrappers(llama):
    model = copy.deepcopy(llama[0])
    for layer in model.model.layers:
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    wrapped = Wrapper(model)
    quantize_kv_(wrapped, SMALL, codebooks=llama[1])
    assert isinstance(wrapped.generate(PROMPT, **GREEDY, return_dict_in_generate=True).past_key_values, GSRQCache)
    assert isinstance(new_cache(wrapped), GSRQCache)
    dequantize_kv_(wrapped)
    assert len(calibrate(wrapped, SMALL, TOKENS, tokens=512, progress=False)) == 2
    quantize_kv_(torch.compile(model), SMALL, codebooks=llama[1])
    assert isinstance(model(PROMPT).past_key_values, GSRQCache)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model afterwards"])
@torch.no_grad()
def test_weights_that_accelerate_holds(llama, how, tmp_path):
    from accelerate import cpu_offload, disk_offload, dispatch_model

    want = copy.deepcopy(llama[0])
    quantize_kv_(want, SMALL, codebooks=llama[1])
    model = copy.deepcopy(llama[0])
    device = torch.device("cpu")
    if how == "dispatch_model afterwards":
        quantize_kv_(model, SMALL, codebooks=llama[1])
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        model = cpu_offload(model, device) if how == "cpu_offload" else disk_offload(model, tmp_path, device)
        assert any(p.device.type == "meta" for p in model.parameters())
        books = calibrate(model, SMALL, TOKENS, tokens=512, progress=False)
        alike = calibrate(
            llama[0], dataclasses.replace(SMALL, allocation="uniform"), TOKENS, tokens=512, progress=False
        )
        assert books.digest == alike.digest
        assert all(p.requires_grad for p in model.parameters())
        quantize_kv_(model, SMALL, codebooks=llama[1])
    got = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
    assert isinstance(got.past_key_values, GSRQCache)
    assert torch.equal(got.sequences, want.generate(PROMPT, **GREEDY))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring the right thing


@torch.no_grad()
def test_no_forward_escapes_a_measurement(llama, caplog):
    """With prefill="quantized" a forward without a cache sees what one with a cache sees; training mode says so once."""
    model, books = llama
    full = model(PROMPT, use_cache=False).logits
    with quantized(model, dataclasses.replace(SMALL, prefill="quantized"), books):
        want = model(PROMPT, use_cache=True).logits
        assert torch.equal(model(PROMPT, use_cache=False).logits, want)
        assert torch.equal(
            model.model(PROMPT, use_cache=False).last_hidden_state, model.model(PROMPT).last_hidden_state
        )
        model.train()
        with caplog.at_level(logging.WARNING, "torchgsrq"):
            model(PROMPT, use_cache=False)
            model(PROMPT, use_cache=False)
        model.eval()
        assert caplog.text.count("is in training mode, in which forwards run in full precision") == 1
    assert (want - full).abs().max() > 1e-2
    with quantized(model, SMALL, books):  # what a prefill is, exact
        torch.testing.assert_close(model(PROMPT, use_cache=False).logits, full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_set_otherwise_afterwards(llama):
    model, books = llama
    quantize_kv_(model, SMALL, codebooks=books)
    cache = model(PROMPT).past_key_values
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"LlamaModel was set to 'eager' after quantize_kv_.*set_attn_implementation"):
        model.generate(PROMPT, **GREEDY)
    with pytest.raises(ValueError, match="was set to 'eager'"):
        model(PROMPT[:, :1], **cached(cache))
    model.set_attn_implementation("gsrq")
    model.generate(PROMPT, **GREEDY)
    for arguments in ({"output_attentions": True}, {}):
        model.config._output_attentions = not arguments
        with pytest.raises(ValueError, match="output_attentions=True: attention on codes never forms the weights"):
            model(PROMPT, **arguments)
    model.config._output_attentions = False
    dequantize_kv_(model)
    assert model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


FIELDS = [{"bits": b} for b in (2, 1.3, 1, 0.5)] + [
    *({"recipe": "gsrq-paper", "group_size": 32, "bits": b} for b in (2, 1)),
    *({"group_size": x} for x in (16, 64)),
    *({"prefill": x} for x in PREFILLS),
    {"sink_tokens": 0},
    {"recent_tokens": 0},
    {"block_tokens": 1},
    {"allocation": "uniform"},
    {"skip_layers": [1]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@torch.no_grad()
def test_every_field_through_the_front_door(fields, folder):
    """quantize_kv_ calibrates, keeps the codebooks, finds them again, and generate runs on codes."""
    model = tiny_llama()
    config = {"sink_tokens": 2, "recent_tokens": 8, "block_tokens": 4, **fields}
    small = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    calibrated = []
    module = sys.modules["torchgsrq.learning.disk"]
    real, tokens = module.calibrate_layers, TOKENS
    module.calibrate_layers = lambda *args: calibrated.append(1) or real(*args, data=tokens, tokens=512)
    try:
        quantize_kv_(model, config, progress=False)
        out = model.generate(PROMPT, return_dict_in_generate=True, **small)
        dequantize_kv_(model)
        quantize_kv_(model, GSRQConfig(**config), progress=False)
        again = model.generate(PROMPT, **small)
    finally:
        module.calibrate_layers = real
    assert len(calibrated) == 1 and torch.equal(out.sequences, again)
    assert int(out.past_key_values.layers[0].keys.encoded.max()) >= 32


def test_a_damaged_file_in_the_disk_cache_is_replaced(folder, monkeypatch, caplog):
    module = sys.modules["torchgsrq.learning.disk"]
    real = module.calibrate_layers
    monkeypatch.setattr(module, "calibrate_layers", lambda *args: real(*args, data=TOKENS, tokens=512))
    model = tiny_llama()
    for damage in (lambda b: b[:-100], lambda b: b"", lambda b: b[:200] + b"\0" * (len(b) - 200)):
        quantize_kv_(model, SMALL, progress=False)
        dequantize_kv_(model)
        (path,) = folder.glob("*.safetensors")
        path.write_bytes(damage(path.read_bytes()))
        with caplog.at_level(logging.WARNING, "torchgsrq"):
            quantize_kv_(model, SMALL, progress=False)
        assert "cannot be used and are learned again" in caplog.text
        caplog.clear()
        dequantize_kv_(model)
        assert len(Codebooks.load(path)) == 2


def test_what_config_and_codebooks_may_be(llama, tmp_path):
    model, books = llama
    books.save(tmp_path / "books.safetensors")
    fields = {"sink_tokens": 2, "recent_tokens": 8, "block_tokens": 4}
    for config, given in (
        (fields, tmp_path / "books.safetensors"),
        (SMALL, str(tmp_path / "books.safetensors")),
        (None, books),
    ):
        quantize_kv_(model, config, codebooks=given)
        dequantize_kv_(model)
    for config, given, error, says in (
        (1, books, TypeError, "config is a int; expected a GSRQConfig or a dict"),
        (SMALL, 3, TypeError, "codebooks is a int; expected Codebooks or the path"),
        ({"bit": 1}, books, TypeError, "bit"),
        (SMALL, "nowhere", FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(error, match=says):
            quantize_kv_(model, config, codebooks=given)
    for bits in (3, 4, 8):
        with pytest.raises(ValueError, match=f"bits={bits}: .*2 bits and fewer.*QuantizedCache"):
            GSRQConfig(bits=bits)
    for bits in (0, -1, True, "1", 0.2):
        with pytest.raises(ValueError, match=r"must be a number from 0\.25 to 2"):
            GSRQConfig(bits=bits)


def test_bad_calibration_data_is_named(llama):
    model, _ = llama
    for data, error, says in (
        (["some text"], ValueError, "no tokenizer was found for LlamaForCausalLM.*pass tokenizer="),
        ([torch.full((600,), 128)], ValueError, r"data\[0\] holds token ids from 128 to 128.*0 to 127"),
        ([TOKENS, -TOKENS], ValueError, r"data\[1\] holds token ids from -"),
        ([torch.rand(600)], ValueError, r"data\[0\] holds torch.float32; token ids are integers"),
        ([object()], TypeError, r"data\[0\] is a object; expected a string, token ids or a batch"),
        (3, TypeError, "data is a int"),
    ):
        with pytest.raises(error, match=says):
            calibrate(model, SMALL, data, tokens=1024, progress=False)
    quantize_kv_(model, SMALL, codebooks=llama[1])
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized; call dequantize_kv_ first"):
        calibrate(model, SMALL, TOKENS)


def test_models_that_cannot_write_say_so():
    """A text model whose generate fails asks for data, and does not crash in the middle."""
    model = tiny_llama()
    model.generate = lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("pixels, please"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM could not write.*pixels, please.*data="):
        calibrate(model, SMALL, progress=False)


@torch.no_grad()
def test_nan_is_named_by_layer_and_row(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        cache = new_cache(model)
        model(PROMPT, **cached(cache), use_cache=True)
        bad = torch.zeros(2, 2, 1, 32)
        bad[1, 0, 0, 3] = torch.inf
        with pytest.raises(ValueError, match=r"layer 1, values: x holds NaN or inf in row\(s\) 1; nothing was written"):
            cache.layers[1].update(torch.zeros(2, 2, 1, 32), bad)
        assert cache.layers[1].get_seq_length() == 40


# ---------------------------------------------------------------------------------------------------------------------
# transformers' Cache, as its own tests use it


@torch.no_grad()
def test_what_a_cache_does_like_transformers(llama, caplog):
    model, books = llama

    def filled():
        with quantized(model, SMALL, books):
            cache = new_cache(model)
            model(PROMPT, **cached(cache), use_cache=True)
        return cache

    for rows in ([1, 0], (1, 0), torch.tensor([1, 0]), [True, False], torch.tensor([True, False])):
        cache = filled()
        was = cache.layers[0].keys.dequantize()
        cache.batch_select_indices(rows)
        assert torch.equal(cache.layers[0].keys.dequantize(), was[torch.as_tensor(rows)])
    cache = filled()
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and cache.is_empty
    cache = filled()
    cache.crop(0)
    cache.crop(100)
    assert cache.get_seq_length() == 40
    cache.crop(30)
    assert cache.get_seq_length() == 30
    assert len(cache) == 2 and cache.batch_size == 2 and cache.get_max_length() == -1
    assert cache.is_sliding == [False, False] and not cache.is_compileable and cache.is_initialized
    assert cache.get_mask_sizes(3, 0) == (33, 0)
    for use in (lambda: cache[0], lambda: list(cache), lambda: tuple(cache)):
        with pytest.raises(TypeError, match=r"layers\[i\]\.keys\.dequantize\(\)"):
            use()


@torch.no_grad()
def test_a_crop_into_the_padding_forgets_where_the_row_begins(llama):
    model, books = llama
    mask = torch.ones_like(PROMPT)
    mask[1, :24] = 0

    def run(cache):
        model(PROMPT, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), **cached(cache))
        cache.crop(-24)  # 16 are left: nothing of the second row
        later = torch.ones(2, 40, dtype=torch.long)
        later[1, :16] = 0
        at = (later.cumsum(1) - 1).clamp_min(0)[:, 16:]
        return model(PROMPT[:, 16:], attention_mask=later, position_ids=at, **cached(cache)).logits

    with quantized(model, SMALL, books):
        got = run(new_cache(model))
    oracle = Oracle(books, SMALL, model.config)
    handle = watch(model, oracle)
    want = run(oracle)
    handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_kinds_of_caches_that_cannot_be_quantized(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        for kind, says in (
            ("quantized", "takes one of None, 'dynamic'"),
            ("dynamic_full", "cache_implementation"),
            ("paged", "generate_batch keeps"),
        ):
            with pytest.raises(ValueError, match=says):
                model.generate(PROMPT, max_new_tokens=2, cache_implementation=kind)


def test_nbytes_of_a_buffer_is_what_it_owns(llama):
    model, books = llama
    with quantized(model, SMALL, books), torch.no_grad():
        buffer = model(PROMPT).past_key_values.layers[0].keys
    assert buffer.nbytes == sum(buffer.nbytes_by_part().values())


# ---------------------------------------------------------------------------------------------------------------------
# Architectures


REFUSED = {
    "an encoder": ("BertLMHeadModel", "BertConfig", {}, "attends in both directions in layers 0, 1"),
    "all sliding": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 16}, "has no layer to quantize.*layers 0-1: kept in full precision: a sliding window"),
    "all skipped": ("LlamaForCausalLM", "LlamaConfig", {}, "has no layer to quantize.*in skip_layers"),
    "values split": ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}, "is not supported: a forward over a quantized cache failed"),
    "keys transposed": ("DogeForCausalLM", "DogeConfig", {"sliding_window": None}, "is not supported: a forward over a quantized cache failed"),
}  # fmt: skip


def small_model(model, config, changes):
    import inspect

    kind = getattr(transformers, config)
    known = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    for base in kind.__mro__:
        known |= set(inspect.get_annotations(base))
    torch.manual_seed(0)
    facts = {**{k: v for k, v in TINY.items() if k in known}, **changes}
    return getattr(transformers, model)(kind(**facts)).eval()


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_quantized_is_refused_at_once(what):
    """By quantize_kv_, by the model's name and with the reason; the model is as it was."""
    name, kind, changes, says = REFUSED[what]
    model = small_model(name, kind, changes)
    before = model(PROMPT).logits
    skip = (0, 1) if what == "all skipped" else ()
    config = dataclasses.replace(SMALL, skip_layers=skip)
    with pytest.raises(ValueError, match=f"(?s)^{name}.*{says}"):
        quantize_kv_(model, config, codebooks=tiny_books(model) if "split" in what or "keys" in what else None)
    assert torch.equal(model(PROMPT).logits, before)
    out = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
    assert type(out.past_key_values) is not GSRQCache


def test_the_probe_finds_attention_that_does_more(llama):
    """An attention that reads something else than its cache, in a way that raises nothing."""
    model = copy.deepcopy(llama[0])
    module = model.model.layers[1].self_attn
    attend = module.forward

    def forward(hidden_states, *args, **kwargs):
        cache = given_cache(kwargs)
        scale = 2.0 if isinstance(cache, GSRQCache) and cache.get_seq_length(0) > 1 else 1.0
        return attend(scale * hidden_states, *args, **kwargs)

    module.forward = forward
    with pytest.raises(ValueError, match=r"over a quantized cache its hidden states differ by \d+"):
        quantize_kv_(model, SMALL, codebooks=llama[1])
    assert not hasattr(model, "_gsrq")


def vision_language_model(name):
    t = transformers
    text = {**TINY, "hidden_size": 128}
    eyes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    if name == "Qwen2.5-VL":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
        vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8,
                  "fullatt_block_indexes": [0], "out_hidden_size": 128}  # fmt: skip
        model = t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_id=3,
                               video_token_id=4, vision_start_token_id=101, vision_end_token_id=102)
        )  # fmt: skip
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                layer.self_attn.k_proj.bias.normal_(std=8)  # as large as in the real ones
        return model.eval()
    if name == "SmolVLM":
        config = t.SmolVLMConfig(
            text_config={"model_type": "llama", **text}, vision_config=eyes, image_token_id=3, scale_factor=2
        )
        return t.SmolVLMForConditionalGeneration(config).eval()
    if name == "Idefics 2":
        resampler = {"hidden_size": 128, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
                     "resampler_head_dim": 16, "num_key_value_heads": 2}  # fmt: skip
        config = t.Idefics2Config(text_config={"model_type": "mistral", **text, "sliding_window": None}, vision_config=eyes,
                                  perceiver_config=resampler, image_token_id=3)  # fmt: skip
        return t.Idefics2ForConditionalGeneration(config).eval()
    if name == "BLIP-2":
        former = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                  "encoder_hidden_size": 32, "vocab_size": 64}  # fmt: skip
        opt = {"model_type": "opt", **text, "ffn_dim": 64, "word_embed_proj_dim": 128, "num_attention_heads": 4}
        config = t.Blip2Config(
            text_config=opt, vision_config=eyes, qformer_config=former, num_query_tokens=4, image_token_index=3
        )
        return t.Blip2ForConditionalGeneration(config).eval()
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "SmolVLM", "Idefics 2"])
@torch.no_grad()
def test_vision_language_models_on_text(name):
    """Plain forwards are quantized, also where the class makes a cache of its own; a padded row equals the row alone."""
    model = vision_language_model(name)
    books = tiny_books(model)
    ids, mask = PROMPT.clamp_min(5), torch.ones_like(PROMPT)
    mask[1, :20] = 0
    arguments = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with quantized(model, dataclasses.replace(SMALL, block_tokens=1), books):
        assert isinstance(model(input_ids=ids, use_cache=True).past_key_values, GSRQCache)
        batch = model.generate(ids * mask, attention_mask=mask, **arguments)
        alone = model.generate(ids[1:, 20:], attention_mask=mask[1:, 20:], **arguments)
    assert isinstance(batch.past_key_values, GSRQCache)
    for a, b in zip(batch.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[1], b[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_text_after_an_image_is_coded_at_its_position():
    """An image of 64 tokens moves positions by 8: the frames of what follows begin 56 slots later than they would."""
    model = vision_language_model("Qwen2.5-VL")
    config = dataclasses.replace(SMALL, bits=2)
    books = tiny_books(model, config)
    ids = torch.randint(5, 100, (2, 120), generator=torch.Generator().manual_seed(3))
    ids[:, 20], ids[:, 21:85], ids[:, 85] = 101, 3, 102
    image = {"pixel_values": torch.randn(2 * 256, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 16, 16]] * 2)}
    image["mm_token_type_ids"] = (ids == 3).long()
    with quantized(model, config, books):
        cache, plain = new_cache(model), DynamicCache(config=model.config.get_text_config())
        for one in (cache, plain):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **cached(one), use_cache=True, **image)
        keys = cache.layers[0].keys
        assert keys.start[0, 2:][[0, 20, 21, 60, 84, 85, 86, 119, 120]].tolist() == [0, 20, 21, 21, 21, 29, 30, 63, 64]
        got, want = keys.dequantize()[:, :, :120], plain.layers[0].keys
        text = {}
        for where, (a, b) in {"before": (2, 21), "after": (85, int(keys.encoded.max()))}.items():
            text[where] = float((got - want)[:, :, a:b].square().sum() / want[:, :, a:b].square().sum()) if a else 0
        assert text["after"] < 1.5 * text["before"]
        arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **image, **arguments)
        assert out.past_key_values.layers[0].keys.start[0, 2:][[119, 120, 121]].tolist() == [63, 64, 65]


@torch.no_grad()
def test_a_model_that_wants_pixels():
    """Its text decoder is probed and calibrated; generate, which calls that of the text model inside, is quantized."""
    model = vision_language_model("BLIP-2")
    quantize_kv_(model, SMALL, codebooks=tiny_books(model))
    ids = PROMPT.clamp_min(5)
    ids[:, 1:5] = 3
    pixels = torch.randn(2, 3, 16, 16)
    out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, GSRQCache)
    dequantize_kv_(model)
    out = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache


def test_what_else_is_refused_by_name(llama):
    """Continuous batching keeps its own pages; torch.export takes no cache that is made inside."""
    model, books = llama
    with quantized(model, SMALL, books):
        with pytest.raises(ValueError, match="generate_batch keeps keys and values in pages of its own"):
            model.generate_batch(inputs=[[5, 6, 7]])
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"torch.export of a forward that makes its own.*use_cache=False"),
        ):
            torch.export.export(model, (PROMPT,), {"use_cache": True}, strict=False)
        with torch.no_grad():
            torch.export.export(model, (PROMPT,), {"use_cache": False}, strict=False)
    assert "generate_batch" not in model.__dict__


def test_a_damaged_kernel_library_is_built_again(tmp_path, monkeypatch):
    """Half of one would kill the process that loads it."""
    whole = kernels.cpu_library()
    if whole is None:
        pytest.skip("there is no compiled library")
    built = []
    monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHGSRQ_KERNELS", "1")
    monkeypatch.setattr(kernels, "build", lambda output: built.append(shutil.copy(whole, output)))
    path = kernels.cpu_library()
    assert len(built) == 1 and kernels.cpu_library() == path and len(built) == 1
    path.write_bytes(path.read_bytes()[:5000])
    assert kernels.cpu_library() == path and kernels.is_whole(path) and len(built) == 2


def test_transformers_is_imported_first_beside_the_sources():
    # From the root of the sources, `kernels` is found where transformers looks for the hub's package of that name.
    import subprocess

    root = Path(__file__).parents[1]
    code = "from transformers import AttentionInterface; import torchgsrq"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
