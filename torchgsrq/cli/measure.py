"""`torchgsrq evaluate` and `memory`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from torchgsrq.api import new_cache
from torchgsrq.cli.common import (
    LONG,
    WIDTH,
    Bits,
    Books,
    Json,
    Model,
    Seed,
    TextFile,
    Uniform,
    app,
    bar,
    config_of,
    console,
    mib,
    rates_of,
    read,
    with_books,
)
from torchgsrq.config import GSRQConfig
from torchgsrq.learning import progress
from torchgsrq.learning.calibrate import calibrate
from torchgsrq.learning.text import FEWEST, TOKENS, token_ids
from torchgsrq.measure import evaluate as measures
from torchgsrq.measure import retrieval as tasks
from torchgsrq.measure.embedded import NAME, load_model


@app.command("evaluate")
def evaluate_command(
    model: Model = None,
    text: TextFile = None,
    context: Annotated[int, typer.Option(min=2, help="tokens per window")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="number of windows, from the start of the text")] = 3,
    stride: Annotated[int, typer.Option(min=1, help="tokens between the starts of windows")] = 4096,
    recipe: Annotated[list[str] | None, typer.Option(help="gsrq or gsrq-paper; can be repeated")] = None,
    bits: Bits = None,
    calibration: Annotated[
        Path | None, typer.Option(help="calibration text; by default the model writes its own", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=FEWEST, help=f"tokens of --calibration to read; up to {TOKENS} by default", show_default=False
        ),
    ] = None,
    group_size: Annotated[
        list[int] | None, typer.Option(help="elements that share a code; can be repeated", show_default=False)
    ] = None,
    uniform: Uniform = False,
    sinks: Annotated[int, typer.Option(min=0, help="sink tokens")] = GSRQConfig.sink_tokens,
    recent: Annotated[int, typer.Option(min=0, help="recent tokens")] = GSRQConfig.recent_tokens,
    block: Annotated[int, typer.Option(min=1, help="tokens encoded together")] = GSRQConfig.block_tokens,
    shift: Annotated[int, typer.Option(min=0, help="added to all positions")] = 0,
    retrieval: Annotated[int, typer.Option(min=0, help="trials per retrieval task, of --context tokens")] = 0,
    codebooks: Books = None,
    seed: Seed = 0,
    json_only: Json = False,
) -> None:
    """Measure quantized caches: perplexity, KL divergence, error of attention, and retrieval."""
    rates = sorted(rates_of(bits, codebooks), reverse=True)
    llm, tokenizer = load_model(model)
    document_text = read(text)
    ids = token_ids(tokenizer, document_text)
    starts = [i * stride for i in range(windows) if i * stride + context <= ids.numel()]
    if not starts:
        raise typer.BadParameter(f"the text has {ids.numel()} tokens, fewer than --context {context}")

    configs = [
        config_of(
            bits=rate,
            group_size=size,
            recipe=name,
            allocation="uniform" if uniform else None,
            sink_tokens=sinks,
            recent_tokens=recent,
            block_tokens=block,
        )
        for name in recipe or ["gsrq"]
        for size in ([32] if name == "gsrq-paper" else group_size or [GSRQConfig.group_size])
        for rate in rates
    ]
    if codebooks is None and calibration is not None:
        given = [read(calibration)]
        learned = calibrate(llm, configs, given, tokenizer=tokenizer, tokens=tokens, seed=seed)
        pairs = list(zip(configs, learned, strict=True))
    else:
        pairs = with_books(llm, configs, codebooks)
    cuts = [ids[s : s + context] for s in starts]
    candidates: dict[str, measures.Candidate] = {
        f"{c.recipe} {c.group_size} {c.bits:g}": (c, books) for c, books in pairs
    }
    console.print(f"Reading {len(cuts)} windows in full precision and with {len(candidates)} caches ...")
    found = measures.quality(llm, progress.bar(cuts, "reading"), candidates, shift)
    answered: dict[str, dict[str, tasks.Score]] = {}
    if retrieval:
        console.print(f"Asking questions about texts of {context} tokens ...")
        trials = tasks.trials(tokenizer, document_text, context, count=retrieval, seed=seed)
        answered["full precision"] = tasks.retrieval(llm, trials)
        answered["sinks and window alone"] = tasks.retrieval(llm, tasks.cut_short(trials, sinks, recent))
    rows: list[dict[str, Any]] = []
    for name, (config, books) in progress.bar(candidates.items(), "measuring caches"):
        row: dict[str, Any] = {"recipe": config.recipe, "group_size": config.group_size, "bits": config.bits}
        row |= dataclasses.asdict(found[name])
        row["key_error"] = measures.key_error(llm, cuts[0], books, shift)
        row["output_error"] = measures.output_error(llm, cuts[0], config, books)
        for tokens_held in (context, LONG):
            row[f"true_bits_{tokens_held}"] = measures.true_bits(config, books, tokens_held)
        rows.append(row)
        if retrieval:
            answered[name] = tasks.retrieval(llm, trials, (config, books))
    facts = {
        "model": model or NAME,
        "context": context,
        "windows": len(cuts),
        "shift": shift,
        "sinks": sinks,
        "recent": recent,
        "block": block,
        "environment": measures.environment(),
    }
    if json_only:
        found_by = {name: {task: dataclasses.asdict(s) for task, s in x.items()} for name, x in answered.items()}
        print(json.dumps({**facts, "results": rows, "retrieval": found_by}))
        return
    table = Table(
        title=f"{facts['model']}: {len(cuts)} windows of {context} tokens, positions + {shift}; "
        f"{sinks} sinks, {recent} recent tokens, blocks of {block}",
        caption=measures.environment(),
    )
    names = (
        "recipe",
        "group",
        "bits",
        "at 128k, all",
        "perplexity",
        "KL, nats",
        "95%",
        "KL p99",
        "same token",
        "output error",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "recipe" else "right")
    width = f"{8 * llm.dtype.itemsize}"
    table.add_row("full precision", "", width, width, f"{rows[0]['ppl_full']:.3f}", "0", "", "0", "100%", "0")
    for row in rows:
        outputs = row["output_error"].values()
        table.add_row(
            row["recipe"],
            str(row["group_size"]),
            f"{row['bits']:g}",
            f"{row[f'true_bits_{LONG}']:.2f}",
            f"{row['ppl']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['kl_low']:.3f}-{row['kl_high']:.3f}",
            f"{row['kl_p99']:.2f}",
            f"{row['agreement']:.1%}",
            f"{sum(outputs) / len(outputs):.4f}",
        )
    Console(width=120).print(table)
    if retrieval:
        _print_answers(answered)


def _print_answers(answered: dict[str, dict[str, tasks.Score]]) -> None:
    table = Table(title="answers found: fraction, and nats per token of the right answer")
    table.add_column("")
    for task, score in next(iter(answered.values())).items():
        table.add_column(f"{task} ({score.answers})", justify="right")
    for name, scores in answered.items():
        table.add_row(name, *(f"{s.found:.0%}  {s.nll:.2f}" for s in scores.values()))
    Console(width=120).print(table)


@app.command()
def memory(
    model: Model = None,
    bits: Bits = None,
    context: Annotated[int, typer.Option(min=1, help="tokens held")] = 8192,
    codebooks: Books = None,
    json_only: Json = False,
) -> None:
    """Print the bytes of a KV cache by part, for a cache filled to a context."""
    llm, _ = load_model(model)
    rows = []
    configs = [config_of(bits=rate) for rate in rates_of(bits, codebooks)]
    for config, books in with_books(llm, configs, codebooks):
        with measures.quantized(llm, config, books):
            cache = new_cache(llm)
            for layer in cache.quantized_layers:
                codec = layer.codec.key
                for first in range(0, context, 1024):
                    x = torch.zeros(1, codec.heads, min(1024, context - first), codec.head_dim, dtype=llm.dtype)
                    layer.update(x, x)
            report = cache.memory()
        facts = dataclasses.asdict(report)
        facts |= {
            "bits": config.bits,
            "context": context,
            "slots": cache.quantized_layers[0].keys.shape[2],
            "kept_layers": len(cache.layers) - len(cache.quantized_layers),
            "total": report.total,
            "bits_per_element": report.bits_per_element,
            "bits_per_element_codes": report.bits_per_element_codes,
            "bits_per_element_with_codebooks": report.bits_per_element_with_codebooks,
            "bf16": 2 * report.elements,
        }
        rows.append(facts)
    if json_only:
        print(json.dumps(rows))
        return
    table = Table(title=f"{model or NAME}: KV cache of {context} tokens", caption=measures.environment())
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['bits']:g} bit", justify="right")
    labels = {
        "codes": "codes",
        "unused": "  of them slots not used yet",
        "sinks": "sinks, full precision",
        "window": "recent window, full precision",
        "counters": "lengths and row offsets",
        "total": "total",
        "bf16": "the same tokens in bf16",
        "codebooks": "codebooks, shared by all caches",
    }
    for key, label in labels.items():
        table.add_row(label, *(f"{r[key] / 2**10:,.1f} KiB" for r in rows))
    for key, label in {
        "bits_per_element_codes": "bits per element, codes alone",
        "bits_per_element": "bits per element, the cache alone",
        "bits_per_element_with_codebooks": "bits per element, all counted",
    }.items():
        table.add_row(label, *(f"{r[key]:.3f}" for r in rows))
    Console(width=WIDTH).print(table)
    _print_bars(rows)


def _print_bars(rows: list[dict[str, Any]]) -> None:
    """Print bytes by context, relative to the same tokens in bfloat16."""
    print("\nby context, as a share of bfloat16 (the window in the model's own dtype)")
    for context in (512, 2048, 8192, 32768, LONG):
        bf16 = 2 * rows[0]["elements"] * context // rows[0]["context"]
        print(f"{context:>7,} tokens, bfloat16 {mib(bf16)}")
        for row in rows:
            size = bytes_at(row, context)
            print(f"  {row['bits']:>5g} bit {bar(size / bf16, 40):40} {mib(size)}, {size / bf16:.0%}")
    if rows[0]["kept_layers"]:
        print(f"{rows[0]['kept_layers']} layers that stay in full precision are not counted")


def bytes_at(row: dict[str, Any], context: int) -> int:
    """Bytes of the quantized layers at another context than that of ``row``: codes grow with the slots, the window does
    not."""
    return int(row["sinks"] + row["window"] + row["counters"] + row["codes"] * context // row["slots"])
