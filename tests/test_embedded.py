"""The embedded real model, through the command line: what the README promises."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import cached
from torchgsrq import Codebooks, GSRQConfig, calibrate, dequantize_kv_, new_cache, quantize_kv_
from torchgsrq.cli import app
from torchgsrq.measure import retrieval
from torchgsrq.measure.embedded import document, load_model
from torchgsrq.measure.evaluate import key_error, quality, quantized

pytestmark = pytest.mark.slow
FIELDS = {
    "model", "bits", "effective_bits", "codebook_bytes", "context", "kv_bytes_full", "kv_bytes", "ppl_full", "ppl", "kl", "agreement",
    "tokens_per_second_full", "tokens_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """The model, its tokenizer, codebooks from 4k tokens of the language reference, and their file."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    model, tokenizer = load_model()
    text = document()
    configs = [GSRQConfig(bits=1), GSRQConfig(bits=0.5)]
    books, half = calibrate(model, configs, [text[60000:]], tokenizer=tokenizer, tokens=4096)
    path = tmp_path_factory.mktemp("books") / "books.safetensors"
    books.save(path)
    half.save(path.with_name("half.safetensors"))
    yield model, tokenizer, books, path, half
    torch.set_num_threads(1)


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def test_quality_on_real_text(smol):
    """On text of the calibrated kind: near full precision at 1 bit, worse at half a bit, at any position."""
    model, tokenizer, books, _, books_of_half = smol
    window = ids_of(tokenizer, document()[:8000])[:512]
    config = GSRQConfig(bits=1, sink_tokens=1, recent_tokens=32, block_tokens=1)
    half = GSRQConfig(bits=0.5, sink_tokens=1, recent_tokens=32, block_tokens=1)
    found = quality(model, [window], {"1": (config, books), "0.5": (half, books_of_half)})
    assert found["1"].kl < 0.35 and found["1"].agreement > 0.75
    assert found["1"].kl < found["0.5"].kl < 1.0
    moved = quality(model, [window], {"1": (config, books)}, shift=30000)["1"]
    assert moved.kl < 1.35 * found["1"].kl
    near, far = (key_error(model, window, books, shift) for shift in (0, 4000))
    assert abs(far / near - 1) < 0.1


def test_generation_continues_real_text(smol):
    model, tokenizer, books, *_ = smol
    ids = ids_of(tokenizer, document()[:20000])[None, :1000]
    with quantized(model, GSRQConfig(bits=1), books):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        cache = new_cache(model)
        model(ids, **cached(cache), use_cache=True, logits_to_keep=1)
    words = tokenizer.decode(out[0, 1000:])
    assert len(set(words.split())) > 5, f"no language: {words!r}"
    report = cache.memory()
    left = 2 * 30 * 3 * 64 * 864  # keys and values, layers, heads, head_dim, tokens that left the window
    assert report.codes - report.unused == pytest.approx(left * books.bits / 8)
    assert report.total < report.full_precision_bytes / 4


def test_retrieval(smol):
    """The model finds the key in full precision, not without the text, and mostly through the codes of 1 bit."""
    model, tokenizer, books, *_ = smol
    trials = retrieval.trials(tokenizer, document(), 400, tasks=["keys"], count=2)
    full = retrieval.retrieval(model, trials)["keys"]
    floor = retrieval.retrieval(model, retrieval.cut_short(trials, 4, 32))["keys"]
    coded = retrieval.retrieval(model, trials, (GSRQConfig(bits=1), books))["keys"]
    assert full.found >= 0.6 > 0.3 >= floor.found
    assert full.nll < coded.nll < floor.nll


def test_demo_and_evaluate_commands(smol):
    path = smol[3]
    half = str(path.with_name("half.safetensors"))
    runner = CliRunner()
    result = runner.invoke(app, ["demo", "--codebooks", str(path), "--context", "400", "--new-tokens", "4", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts) == FIELDS
    assert facts["context"] == 400 and facts["kv_bytes"] < facts["kv_bytes_full"] and facts["kl"] < 1
    table = runner.invoke(app, ["demo", "--codebooks", half, "--context", "400", "--new-tokens", "4"])
    assert table.exit_code == 0 and "GSRQ 0.5 bit" in table.stdout and "goes on" in table.stdout
    result = runner.invoke(
        app, ["evaluate", "--codebooks", half, "--context", "256", "--windows", "1", "--json", "--bits", "0.5"]
    )
    other = runner.invoke(app, ["evaluate", "--codebooks", half, "--context", "256", "--windows", "1", "--bits", "1"])
    assert other.exit_code == 2 and "are of 0.5 bits" in re.sub(r"[\s│]+", " ", other.output)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["results"][0]
    assert row["bits"] == 0.5 and row["kl"] > 0 and row["ppl"] > 1 and row["ppl_full"] > 1


def test_calibrate_and_memory_commands(smol, tmp_path):
    """A folder with a card that says what was measured, which the other commands take."""
    runner = CliRunner()
    text = tmp_path / "text.txt"
    text.write_text(document()[:9000])
    folder = tmp_path / "books"
    said = runner.invoke(app, ["calibrate", str(folder), "--text", str(text), "--tokens", "512", "--uniform", "--json"])
    assert said.exit_code == 0, said.output
    measured = json.loads(said.stdout)["measured"]
    assert 0 < measured["kl"] < 1 and measured["text"] == "text.txt"
    assert f"KL divergence {measured['kl']:.4f} nats" in (folder / "README.md").read_text()
    said = runner.invoke(app, ["memory", "--codebooks", str(folder), "--context", "512"], env={"COLUMNS": "80"})
    assert said.exit_code == 0, said.output
    assert "131,072 tokens, bfloat16 2880.0 MiB" in said.stdout and max(map(len, said.stdout.splitlines())) <= 80
    said = runner.invoke(app, ["calibrate", str(text)])
    assert said.exit_code == 2 and "is a file; name one" in re.sub(r"[\s│]+", " ", said.output)


def test_bad_command_lines_say_what_is_wrong():
    runner = CliRunner()
    for arguments, says in (
        (["demo", "--bits", "3"], "2 bits and fewer"),
        (["demo", "--text", "/no/such/file"], "is not a file"),
        (["evaluate", "--recipe", "pq"], "gsrq-paper"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2 and says in result.output.replace("\n", " "), result.output


def test_codebook_file_of_the_fixture(smol):
    assert len(Codebooks.load(smol[3])) == 30


def test_lm_evaluation_harness_reads_through_the_cache(smol, tmp_path):
    """Likelihoods are those of the quantized cache with `prefill="quantized"` alone: the harness reads every text in a
    single forward, which with `"exact"` attends to its own full-precision keys and values."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, books, *_ = smol
    words = document()[:30000].split()
    data = tmp_path / "data.jsonl"
    rows = [{"text": " ".join(words[i : i + 250]), "next": words[i + 250]} for i in range(0, 750, 250)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    likely = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{next}}"}
    likely["metric_list"] = [{"metric": "perplexity"}]
    write = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{next}}"}
    write |= {"generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}]}
    tasks = [{"task": name, **source, **what} for name, what in (("likely", likely), ("write", write))]

    def asked(config: GSRQConfig | None) -> tuple[list[float], list[str]]:
        if config:
            quantize_kv_(model, config, codebooks=books)
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        samples = lm_eval.simple_evaluate(runner, tasks=tasks, log_samples=True, bootstrap_iters=0)["samples"]
        texts = [ids_of(tokenizer, row["text"])[None] for row in rows]
        mine = [model.generate(t, max_new_tokens=6, do_sample=False)[0, t.shape[1] :] for t in texts]
        if config:
            dequantize_kv_(model)
        by_doc = {name: sorted(found, key=lambda s: s["doc_id"]) for name, found in samples.items()}
        written = [s["resps"][0][0] for s in by_doc["write"]]
        assert written == [tokenizer.decode(m, skip_special_tokens=True) for m in mine]
        return [s["resps"][0][0][0] for s in by_doc["likely"]], written

    full, _ = asked(None)
    exact, _ = asked(GSRQConfig())
    read, _ = asked(GSRQConfig(prefill="quantized"))
    torch.testing.assert_close(exact, full, rtol=1e-3, atol=1e-3)
    assert all(abs(a - b) > 1e-3 for a, b in zip(read, full, strict=True))
    with quantized(model, GSRQConfig(prefill="quantized"), books), torch.no_grad():
        for row, found in zip(rows, read, strict=True):
            text, word = ids_of(tokenizer, row["text"]), ids_of(tokenizer, " " + row["next"])
            likely = model(torch.cat((text, word))[None]).logits[0].log_softmax(-1)[len(text) - 1 : -1]
            torch.testing.assert_close(float(likely.gather(1, word[:, None]).sum()), found, rtol=1e-3, atol=1e-3)
