"""Nothing in silence: what a user believes to be quantized is, or an error or one warning says that it is not."""

from __future__ import annotations

import copy
import functools
import logging
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache, GenerationConfig

from tests.conftest import SMALL, cached, tiny_books, tiny_llama
from torchgsrq import GSRQCache, GSRQConfig, calibrate, models, new_cache, probe, quantize_kv_
from torchgsrq.learning.text import own_text
from torchgsrq.measure import evaluate
from torchgsrq.measure.evaluate import quantized
from torchgsrq.models import decoder, given_cache, returned_cache

ROOT = Path(__file__).parent.parent
PROMPT = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


def test_both_ways_end_with_a_quantized_cache(llama):
    model, books = llama
    with quantized(model, SMALL, books):
        for out in (model.generate(PROMPT, **GREEDY), model(PROMPT, use_cache=True), model.model(PROMPT)):
            assert isinstance(returned_cache(out), GSRQCache)


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_a_renamed_cache_is_refused_at_once(llama, monkeypatch, way):
    """As a version of transformers would that calls it by another name: what we give is then not looked at."""
    model, books = copy.deepcopy(llama[0]), llama[1]
    if way == "generate":
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", _renamed)
    else:
        monkeypatch.setattr(type(model.model), "forward", _ignoring(type(model.model).forward))
    before = model(PROMPT).logits
    with pytest.raises(
        ValueError, match=rf"{way}.*DynamicCache instead.*transformers {transformers.__version__}.*5.16"
    ):
        quantize_kv_(model, SMALL, codebooks=books)
    assert not hasattr(model, "_gsrq") and torch.equal(model(PROMPT).logits, before)


def _renamed(self, input_ids, **kwargs):
    made = transformers.GenerationMixin.prepare_inputs_for_generation(self, input_ids, **kwargs)
    if isinstance(given_cache(made), GSRQCache):
        made |= cached(DynamicCache(config=self.config))
    return made


def _ignoring(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        probing = given_cache(kwargs) is not None and kwargs.get("position_ids") is not None
        if not probing:  # what comes from the hook alone
            kwargs = {name: x for name, x in kwargs.items() if name not in models.CACHE_NAMES}
        return forward(self, *args, **kwargs)

    return wrapper


@pytest.mark.parametrize("compiled", [False, True])
def test_another_cache_warns_once_by_name(llama, caplog, compiled):
    model, books = llama
    with quantized(model, SMALL, books), caplog.at_level(logging.WARNING, "torchgsrq"):
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        for _ in range(2):
            run(PROMPT, **cached(DynamicCache(config=model.config)))
            run(PROMPT, **cached(new_cache(model)))
        if not compiled:
            model.generate(PROMPT, **GREEDY, **cached(DynamicCache(config=model.config)))
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and "DynamicCache, so this text is not quantized" in said[0] and "new_cache" in said[0]


def test_two_caches_are_refused(llama):
    """What prefix tuning did to a model that was quantized before: its prefix would be dropped."""
    model, books = llama
    both = {"cache": new_cache, "past_key_values": lambda m: DynamicCache(config=m.config)}
    with quantized(model, SMALL, books), pytest.raises(ValueError, match="two caches, a GSRQCache and a DynamicCache"):
        model(PROMPT, **{name: make(model) for name, make in both.items()})


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "LORA"])
def test_prefix_tuning_is_refused(llama, kind):
    """It brings keys and values of its own with every forward; other adapters change weights."""
    model, books = llama

    class Peft(torch.nn.Module):
        active_peft_config = SimpleNamespace(peft_type=f"PeftType.{kind}")

        def get_base_model(self):
            return model

    if kind == "LORA":
        quantize_kv_(Peft(), SMALL, codebooks=books)
        return
    with pytest.raises(ValueError, match="Peft with PREFIX_TUNING gives every forward keys and values of its own"):
        quantize_kv_(Peft(), SMALL, codebooks=books)


@pytest.mark.parametrize("name", ["steered", "sdpa"])
def test_attention_of_a_users_own_is_refused(llama, monkeypatch, name):
    """By a name of its own, or in place of one of transformers'."""
    model, books = copy.deepcopy(llama[0]), llama[1]
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register(name, lambda *args, **kwargs: 0 / 0)
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match=f"runs an attention function of your own, '{name}'"):
        quantize_kv_(model, SMALL, codebooks=books)


def test_no_figure_of_a_run_without_codes(llama):
    model, books = llama
    config = GSRQConfig(bits=1)
    with pytest.raises(ValueError, match="all of the 100 tokens fit the sinks and the window"):
        evaluate.quality(model, [PROMPT.flatten().repeat(2)[:100]], {"": (config, books)})
    with pytest.raises(ValueError, match="returned a DynamicCache: nothing was quantized"):
        evaluate.check_read_codes(DynamicCache())
    assert evaluate.quality(model, [PROMPT[0]], {"": (SMALL, books)})[""].kl > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"eos_token_id": list(range(3, 120))},
        {"max_time": 1e-9},
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 500, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_calibration_text_is_not_the_users_generation_config(settings):
    model = tiny_llama()
    want = own_text(model, 96, 48, seed=3)
    model.generation_config = GenerationConfig(pad_token_id=0, **settings)
    mine = model.generation_config
    got = own_text(model, 96, 48, seed=3)
    assert got.shape == (2, 48) and model.generation_config is mine
    if "eos_token_id" in settings:  # tokens that would end the text are not written
        assert not bool(torch.isin(got[:, 1:], torch.tensor(settings["eos_token_id"])).any())
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("wrapped", [("model",), ("decoder",), ("model", "decoder")], ids="+".join)
def test_wrappers_without_a_signature(llama, wrapped):
    """Profilers and tracers put their own function before a forward, with no names of arguments."""
    model, books = copy.deepcopy(llama[0]), llama[1]
    want = model.generate(PROMPT, **GREEDY).sequences
    for part in [{"model": model, "decoder": decoder(model)}[name] for name in wrapped]:
        inner = part.forward
        part.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)
    with quantized(model, SMALL, books):
        out = model.generate(PROMPT, **GREEDY)
        assert isinstance(returned_cache(out), GSRQCache) and out.sequences.shape == want.shape
        assert isinstance(returned_cache(model(PROMPT, torch.ones_like(PROMPT))), GSRQCache)


def test_versions_are_said_alike():
    """What the probe says is tested, what pip installs, and what CI tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.fullmatch(r"(5\.\d+) to (5\.\d+)", probe.TESTED).groups()
    past = f"5.{int(high.split('.')[1]) + 1}"
    assert f"transformers>={low},<{past}" in project["dependencies"]
    assert f"transformers=={high}." in (ROOT / "constraints.txt").read_text()
    assert f"transformers=={low}." in (ROOT / "Makefile").read_text()
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in (ROOT / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# The cache folder is optional


@pytest.mark.parametrize("broken", ["no folder", "full disk", "no home"])
def test_a_finished_calibration_is_not_thrown_away(llama, monkeypatch, tmp_path, caplog, broken):
    model = copy.deepcopy(llama[0])
    monkeypatch.setattr(
        "torchgsrq.learning.disk.calibrate_layers", lambda model, _, configs: [tiny_books(model, x) for x in configs]
    )
    monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "file").touch()  # of which no folder can be made
    if broken == "full disk":
        monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path))
        monkeypatch.setattr("safetensors.torch.save_file", _full)
    if broken == "no home":
        monkeypatch.delenv("TORCHGSRQ_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(Path, "expanduser", _no_home)
    with caplog.at_level(logging.WARNING, "torchgsrq"):
        quantize_kv_(model, SMALL)
    said = " ".join(r.getMessage() for r in caplog.records)
    assert isinstance(returned_cache(model(PROMPT, use_cache=True)), GSRQCache)
    assert all(word in said for word in ("could not be kept", "TORCHGSRQ_CACHE", "codebooks="))
    assert broken == "no home" or str(tmp_path) in said
    assert not list(tmp_path.glob("*.partial"))


def _full(tensors, path, meta):
    from safetensors import SafetensorError

    Path(path).write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device")


def _no_home(self):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("xdg", ["", None, "set"])
def test_where_the_cache_folder_is(monkeypatch, tmp_path, xdg):
    from torchgsrq.config import cache_folder

    monkeypatch.delenv("TORCHGSRQ_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg and str(tmp_path / "xdg"))
    assert cache_folder() == (tmp_path / "xdg" if xdg else tmp_path / ".cache") / "torchgsrq"


def test_kernels_without_a_folder(monkeypatch, tmp_path, caplog):
    """They are built for this process, and a warning says so; one that is there already is used."""
    from torchgsrq import kernels

    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHGSRQ_CACHE", str(tmp_path / "file"))
    built = []
    monkeypatch.setattr(kernels, "build", lambda path: built.append(path) or path.touch())
    monkeypatch.setattr(kernels, "compiler", lambda: ["c++"])
    monkeypatch.setenv("TORCHGSRQ_KERNELS", "1")
    with caplog.at_level(logging.WARNING, "torchgsrq"):
        path = kernels.cpu_library()
    assert built == [path] and path.exists() and tmp_path not in path.parents
    assert "cannot be kept" in caplog.text and str(tmp_path / "file") in caplog.text


def test_a_compiler_may_have_a_launcher(monkeypatch):
    from torchgsrq import kernels

    monkeypatch.setenv("CXX", "ccache g++")
    assert kernels.compiler() == ["ccache", "g++"]


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and files


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "--model", "/no/such/model"], "Error: "),
        (["evaluate", "--windows", "0"], "greater than or equal to 1"),
        (["evaluate", "--context", "1"], "greater than or equal to 2"),
        (["demo", "--context", "-5"], "greater than or equal to 2"),
        (["memory", "--context", "0"], "greater than or equal to 1"),
        (["calibrate", "x", "--tokens", "1"], "greater than or equal to 128"),
        (["calibrate", "x", "--model", "/no/such/model"], "Error: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_of_the_command_line_are_short(arguments, says):
    from typer.testing import CliRunner

    from torchgsrq.cli import app

    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert found.exit_code and says in found.output and "Traceback" not in found.output
    assert len(found.output.splitlines()) < 12


@torch.no_grad()
def test_load_loads_and_splice_return_the_cache(llama, tmp_path):
    model, books = llama
    with quantized(model, SMALL, books):
        cache = returned_cache(model(PROMPT, use_cache=True))
        cache.save(tmp_path / "prompt")
        for made in (new_cache(model).load(tmp_path / "prompt"), new_cache(model).loads(cache.dumps())):
            assert isinstance(made, GSRQCache) and made.get_seq_length() == 40
        assert made.splice(cache, skip=2) is made and made.get_seq_length() == 78


@torch.no_grad()
def test_a_model_without_one_of_its_layers(tmp_path):
    """What was pruned after quantizing holds nothing: saved, loaded, spliced all the same."""
    model = tiny_llama(num_hidden_layers=3)
    quantize_kv_(model, SMALL, codebooks=tiny_books(model))
    del model.model.layers[1]
    cache = new_cache(model)
    model(PROMPT, **cached(cache), use_cache=True)
    held = [layer.get_seq_length() for layer in cache.layers]
    cache.save(tmp_path / "pruned")
    again = new_cache(model).load(tmp_path / "pruned")
    assert [layer.get_seq_length() for layer in again.layers] == held == [40, 0, 40]
    joined = new_cache(model).splice(cache, skip=0).splice(cache, skip=2)
    assert [layer.get_seq_length() for layer in joined.layers] == [78, 0, 78]


def test_a_file_without_a_checksum_is_refused(llama, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, books = llama
    with quantized(model, SMALL, books), torch.no_grad():
        returned_cache(model(PROMPT, use_cache=True)).save(tmp_path / "cache")
        books.save(tmp_path / "books")
        for name, read in (("cache", new_cache(model).load), ("books", type(books).load)):
            with safe_open(tmp_path / name, "pt") as file:
                meta = {k: v for k, v in file.metadata().items() if k != "checksum"}
            save_file(load_file(tmp_path / name), tmp_path / "without", meta)
            with pytest.raises(ValueError, match="checksum"):
                read(tmp_path / "without")


def test_calibrate_says_what_to_call_instead(llama):
    model, books = llama
    with quantized(model, SMALL, books), pytest.raises(ValueError, match="call dequantize_kv_ first"):
        calibrate(model, SMALL, progress=False)
