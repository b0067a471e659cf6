"""What a setting takes, from a config alone, is what a cache of it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from tests.conftest import TINY, cached, tiny_books, tiny_llama
from torchgsrq import GSRQConfig, new_cache
from torchgsrq.cli import app
from torchgsrq.measure.evaluate import quantized
from torchgsrq.measure.recommend import choose, full_precision, settings

pytestmark = pytest.mark.core


@pytest.mark.parametrize("size", [8, 32])
@torch.no_grad()
def test_bytes_are_those_of_a_cache(size):
    model = tiny_llama().to(torch.bfloat16)
    config = GSRQConfig(bits=1, group_size=size, allocation="uniform")
    books = tiny_books(model, config)
    with quantized(model, config, books):
        cache = new_cache(model, 512)
        model(torch.arange(3, 100)[None], **cached(cache), use_cache=True)
        memory = cache.memory()
    said = next(s for s in settings(model.config, 512) if (s.group_size, s.bits) == (size, 1))
    assert said.cache == memory.total - memory.counters
    assert said.codebooks == pytest.approx(memory.codebooks, rel=0.02)
    assert full_precision(model.config, 512) == 2 * 2 * 2 * 32 * 512 * 2


def test_a_latent_is_counted_once():
    """MLA caches one vector for all heads, of 512 elements, and 64 that RoPE turns."""
    config = transformers.DeepseekV3Config()
    assert full_precision(config, 1000) == 576 * 2 * 61 * 1000
    assert next(s for s in settings(config, 4096) if s.bits == 1).cache == 61 * (4096 * 72 + 164 * 576 * 2)


def test_what_fits_is_chosen():
    config = transformers.LlamaConfig(**TINY)
    all_of_them = settings(config, 4096)
    best = choose(all_of_them)
    assert (best.bits, best.group_size) == (2, 8)
    middle = next(s for s in all_of_them if s.bits == 1 and s.group_size == 8)
    found = settings(config, 4096, middle.cache + middle.codebooks)
    assert choose(found).bits == 1
    assert next(s for s in found if s.bits == 1 and s.group_size == 8).longest == 4096
    assert choose(settings(config, 4096, 1000)) is None


def test_models_that_cannot_be_quantized_are_named():
    with pytest.raises(ValueError, match="no layer with full attention"):
        settings(transformers.MistralConfig(sliding_window=16), 4096)


def test_the_command_reads_the_config_alone(tmp_path):
    transformers.Gemma3TextConfig(sliding_window=512).save_pretrained(tmp_path)
    run = CliRunner().invoke(app, ["recommend", "--model", str(tmp_path), "--context", "65536", "--memory", "1"])
    assert run.exit_code == 0 and "Begin with GSRQConfig(bits=2), and compare" in run.output
    run = CliRunner().invoke(app, ["recommend", "--model", str(tmp_path), "--context", "200000", "--memory", "64"])
    assert "The model has 131,072 positions, fewer than --context 200,000" in run.output and "131,072 │" in run.output
    run = CliRunner().invoke(app, ["recommend", "--model", str(tmp_path), "--json"])
    said = json.loads(run.output)
    assert len(said["settings"]) == 6 and said["bf16"] > said["chosen"]["cache"]
    assert CliRunner().invoke(app, ["recommend", "--model", str(tmp_path / "no")]).exit_code == 2


def test_the_page_holds_the_table():
    page = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    run = CliRunner().invoke(app, ["recommend", "--table"])
    _, _, shown = page.partition("<!-- torchgsrq recommend --table -->\n\n")
    assert run.exit_code == 0 and shown.partition("\n<!-- end of the table -->")[0] == run.output
    assert CliRunner().invoke(app, ["recommend"]).exit_code == 2
