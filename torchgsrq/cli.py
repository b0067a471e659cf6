"""The command line: ``torchgsrq demo | calibrate | evaluate | memory | recommend``."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from torchgsrq import evaluate as measures
from torchgsrq import retrieval as tasks
from torchgsrq.api import new_cache
from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.embedded import NAME, document, load_model
from torchgsrq.learning.calibrate import TOKENS, cached_codebooks, calibrate
from torchgsrq.learning.text import token_ids
from torchgsrq.recommend import choose, full_precision, markdown_tables, settings

LONG = 131072  # tokens, where window and codebooks weigh little

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_show_locals=False)
console = Console(stderr=True)

Model = Annotated[str | None, typer.Option("--model", help="hub ID or folder; the embedded model by default")]
TextFile = Annotated[Path | None, typer.Option("--text", help="a text file; the Python language reference by default")]
Bits = Annotated[list[float] | None, typer.Option("--bits", help="bits per element; may be repeated")]
Json = Annotated[bool, typer.Option("--json", help="print JSON only, for a program")]
Seed = Annotated[int, typer.Option("--seed")]
Layout = Annotated[str, typer.Option("--layout", help="quality or fast")]
Books = Annotated[Path | None, typer.Option("--codebooks", help="a file of codebooks; else cached or calibrated")]
Uniform = Annotated[bool, typer.Option("--uniform", help="the same bits for all layers")]


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log more")] = False) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    logging.getLogger("torchgsrq").setLevel(level)
    logging.getLogger("torchgsrq").handlers = [handler]


def _read(text: Path | None) -> str:
    if text is None:
        return document()
    if not text.is_file():
        raise typer.BadParameter(f"{text} is no file", param_hint="--text")
    return text.read_text()


def _config(**fields: Any) -> GSRQConfig:
    try:
        return GSRQConfig(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


@app.command()
def demo(
    model: Model = None,
    bits: Bits = None,
    text: TextFile = None,
    context: Annotated[int, typer.Option(help="tokens of the document to read")] = 2048,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 32,
    layout: Layout = "quality",
    codebooks: Books = None,
    json_only: Json = False,
) -> None:
    """Read a document with a quantized KV cache, and compare with full precision."""
    rates = bits or [1.0]
    configs = [_config(bits=b, layout=layout) for b in rates]
    console.print(f"Loading {model or NAME} ...")
    llm, tokenizer = load_model(model)
    ids = token_ids(tokenizer, _read(text))[None, : context + 1]
    context = ids.shape[1] - 1
    if context < 2 * configs[0].recent_tokens:
        raise typer.BadParameter(f"{context} tokens leave nothing to quantize", param_hint="--context")
    most = max(configs, key=lambda c: c.bits)
    books = Codebooks.load(codebooks) if codebooks else cached_codebooks(llm, most)
    nested: dict[float, Codebooks] = {}
    for config in configs:
        try:
            nested[config.bits] = books.at(config.bits)
        except ValueError as error:  # a layout whose groups follow the rate
            if codebooks:
                raise typer.BadParameter(str(error), param_hint="--bits") from error
            nested[config.bits] = cached_codebooks(llm, config)

    console.print(f"Reading {context} tokens in full precision and with each cache ...")
    scores = measures.quality(llm, [ids[0]], {str(c.bits): (c, nested[c.bits]) for c in configs})
    speed_full, said_full, full_cache = measures.decode_speed(llm, ids, new_tokens)
    full_bytes = sum(t.untyped_storage().nbytes() for layer in full_cache.layers for t in (layer.keys, layer.values))
    results, said = [], []
    for config in configs:
        with measures.quantized(llm, config, nested[config.bits]):
            speed, words, cache = measures.decode_speed(llm, ids, new_tokens)
        memory, score = cache.memory(), scores[str(config.bits)]
        results.append(
            {
                "model": model or NAME,
                "bits": config.bits,
                "effective_bits": round(memory.bits_per_element, 4),
                "context": context,
                "kv_bytes_full": full_bytes,
                "kv_bytes": memory.total,
                "ppl_full": round(score.ppl_full, 4),
                "ppl": round(score.ppl, 4),
                "kl": round(score.kl, 4),
                "agreement": round(score.agreement, 4),
                "tokens_per_second_full": round(speed_full, 2),
                "tokens_per_second": round(speed, 2),
            }
        )
        said.append(words)
    if json_only:
        print(json.dumps(results[0] if len(results) == 1 else results))
        return
    out = Console()
    table = Table(title=f"{model or NAME}, {context} tokens read", caption=measures.environment())
    table.add_column("")
    table.add_column("full precision", justify="right")
    for config in configs:
        table.add_column(f"GSRQ {config.bits:g} bit", justify="right")
    rows: list[tuple[str, str, list[str]]] = [
        ("KV cache", _mib(full_bytes), [_mib(r["kv_bytes"]) for r in results]),
        (
            "bits per element, all counted",
            f"{8 * llm.dtype.itemsize}",
            [f"{r['effective_bits']:.2f}" for r in results],
        ),
        ("perplexity", f"{results[0]['ppl_full']:.3f}", [f"{r['ppl']:.3f}" for r in results]),
        ("KL divergence, nats", "0", [f"{r['kl']:.4f}" for r in results]),
        ("same next token", "100%", [f"{r['agreement']:.1%}" for r in results]),
        ("tokens per second", f"{speed_full:.1f}", [f"{r['tokens_per_second']:.1f}" for r in results]),
    ]
    for name, full, others in rows:
        table.add_row(name, full, *others)
    out.print(table)
    out.print(
        "[dim]Quality is measured with every token outside the recent window quantized, as a long generation would "
        "see it. The full-precision window and sinks weigh less the longer the context.[/dim]"
    )
    out.print("\n[bold]The document ends:[/bold] ..." + escape(tokenizer.decode(ids[0, -40:]).replace("\n", " ")))
    out.print("[bold]Full precision goes on:[/bold] " + escape(tokenizer.decode(said_full)))
    for config, words in zip(configs, said, strict=True):
        out.print(f"[bold]GSRQ at {config.bits:g} bit goes on:[/bold] " + escape(tokenizer.decode(words)))


@app.command("calibrate")
def calibrate_command(
    output: Annotated[Path, typer.Argument(help="file to write, .safetensors")],
    model: Model = None,
    bits: Annotated[float, typer.Option(help="bits per element")] = 1,
    text: Annotated[Path | None, typer.Option("--text", help="calibration text; the model's own by default")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of it to use")] = TOKENS,
    layout: Layout = "quality",
    frame: Annotated[int | None, typer.Option(help="tokens per anchored frame; 512 for quality, 1024 else")] = None,
    recipe: Annotated[str, typer.Option(help="gsrq, gsrq-paper, kmeans or universal")] = "gsrq",
    uniform: Uniform = False,
    seed: Seed = 0,
    json_only: Json = False,
) -> None:
    """Learn a model's codebooks and write them to a file."""
    allocation = "uniform" if uniform else None
    config = _config(bits=bits, layout=layout, frame=frame, recipe=recipe, allocation=allocation, seed=seed)
    llm, tokenizer = load_model(model)
    data = None if text is None else [_read(text)]
    books = calibrate(llm, config, data, tokenizer=tokenizer, tokens=tokens)
    books.save(output)
    facts = {"file": str(output), "layers": len(books), **books.metadata}
    print(json.dumps(facts) if json_only else f"{books.describe()}\nwritten to {output}")


@app.command("evaluate")
def evaluate_command(
    model: Model = None,
    text: TextFile = None,
    context: Annotated[int, typer.Option(help="tokens of a window")] = 1024,
    windows: Annotated[int, typer.Option(help="windows, evenly spread from the start of the text")] = 3,
    stride: Annotated[int, typer.Option(help="tokens between the starts of windows")] = 4096,
    recipe: Annotated[list[str] | None, typer.Option(help="recipes; may be repeated")] = None,
    bits: Bits = None,
    calibration: Annotated[
        Path | None, typer.Option(help="calibration text; the model's own by default", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens of calibration text")] = TOKENS,
    layout: Layout = "quality",
    frame: Annotated[int | None, typer.Option(help="tokens per anchored frame; 512 for quality, 1024 else")] = None,
    uniform: Uniform = False,
    sinks: Annotated[int, typer.Option(help="sink tokens")] = GSRQConfig.sink_tokens,
    recent: Annotated[int, typer.Option(help="recent tokens")] = GSRQConfig.recent_tokens,
    block: Annotated[int, typer.Option(help="tokens encoded together")] = GSRQConfig.block_tokens,
    shift: Annotated[int, typer.Option(help="move all positions by this much")] = 0,
    retrieval: Annotated[int, typer.Option(help="also so many trials of each retrieval task, of --context tokens")] = 0,
    codebooks: Books = None,
    seed: Seed = 0,
    json_only: Json = False,
) -> None:
    """What quantized caches cost: perplexity, KL divergence, error of attention, and what they still find."""
    rates = sorted(bits or [1.0], reverse=True)
    llm, tokenizer = load_model(model)
    document_text = _read(text)
    ids = token_ids(tokenizer, document_text)
    starts = [i * stride for i in range(windows) if i * stride + context <= ids.numel()]
    if not starts:
        raise typer.BadParameter(f"the text has {ids.numel()} tokens, fewer than --context {context}")
    candidates: dict[str, measures.Candidate] = {}
    cuts = [ids[s : s + context] for s in starts]
    for name in recipe or ["gsrq"]:
        base = _config(
            bits=rates[0],
            recipe=name,
            layout=layout,
            frame=frame,
            allocation="uniform" if uniform else None,
            sink_tokens=sinks,
            recent_tokens=recent,
            block_tokens=block,
            seed=seed,
        )
        if codebooks is not None:
            books = Codebooks.load(codebooks)
        elif calibration is not None and name != "universal":
            books = calibrate(llm, base, [_read(calibration)], tokenizer=tokenizer, tokens=tokens)
        else:
            books = cached_codebooks(llm, base)
        for rate in rates:
            config = dataclasses.replace(base, bits=rate)
            nested = books
            try:
                nested = books.at(rate) if rate != rates[0] else books
            except ValueError:  # a layout whose groups change with the rate
                if codebooks is not None:
                    raise
                data = [_read(calibration)] if calibration is not None else None
                nested = calibrate(llm, config, data, tokenizer=tokenizer, tokens=tokens)
            candidates[f"{name} {rate:g}"] = (config, nested)
    found = measures.quality(llm, cuts, candidates, shift) if windows else {}
    answered: dict[str, dict[str, tasks.Score]] = {}
    if retrieval:
        trials = tasks.trials(tokenizer, document_text, context, count=retrieval, seed=seed)
        answered["full precision"] = tasks.retrieval(llm, trials)
        answered["sinks and window alone"] = tasks.retrieval(llm, tasks.cut_short(trials, sinks, recent))
    rows: list[dict[str, Any]] = []
    for name, (config, books) in candidates.items():
        row = {"recipe": config.recipe, "bits": config.bits, **dataclasses.asdict(found[name])}
        nested = books.at(config.bits)
        row["key_error"] = measures.key_error(llm, cuts[0], nested, shift)
        row["output_error"] = measures.output_error(llm, cuts[0], config, nested)
        for tokens_held in (context, LONG):
            row[f"true_bits_{tokens_held}"] = measures.true_bits(config, nested, tokens_held)
        rows.append(row)
        if retrieval:
            answered[name] = tasks.retrieval(llm, trials, (config, books))
    facts = {
        "model": model or NAME,
        "context": context,
        "windows": len(cuts),
        "shift": shift,
        "layout": layout,
        "frame": base.key_frame,
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
        title=f"{facts['model']}: {len(cuts)} windows of {context} tokens, positions + {shift}; layout {layout}, frame "
        f"{facts['frame']}, {sinks} sinks, {recent} recent tokens, blocks of {block}",
        caption=measures.environment(),
    )
    names = ("recipe", "bits", "at 128k, all", "perplexity", "KL, nats", "95%", "KL p99", "same token", "output error")
    for name in names:
        table.add_column(name, justify="left" if name == "recipe" else "right")
    width = f"{8 * llm.dtype.itemsize}"
    table.add_row("full precision", width, "16", f"{rows[0]['ppl_full']:.3f}", "0", "", "0", "100%", "0")
    for row in rows:
        outputs = row["output_error"].values()
        table.add_row(
            row["recipe"],
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
    context: Annotated[int, typer.Option(help="tokens held")] = 8192,
    json_only: Json = False,
) -> None:
    """KV bytes by part, with a cache filled to a context."""
    llm, _ = load_model(model)
    rows = []
    for rate in bits or [1.0]:
        config = _config(bits=rate)
        books = cached_codebooks(llm, _config(bits=max(bits or [1.0])))
        try:
            books = books.at(rate)
        except ValueError:  # not nested in those of the highest rate
            books = cached_codebooks(llm, config)
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
            "bits": rate,
            "context": context,
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
        "bits_per_element": "bits per element, all but codebooks",
        "bits_per_element_with_codebooks": "bits per element, codebooks too",
    }.items():
        table.add_row(label, *(f"{r[key]:.3f}" for r in rows))
    Console(width=100).print(table)


@app.command()
def recommend(
    model: Annotated[str | None, typer.Option("--model", help="hub ID or folder; only its config is read")] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens to hold")] = 32768,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB for the cache, beside the weights")] = None,
    table: Annotated[bool, typer.Option("--table", help="print tables for models of usual sizes, as Markdown")] = False,
    json_only: Json = False,
) -> None:
    """Which bits and layout: what each takes, what fits, and where to begin."""
    if table:
        print(markdown_tables())
        return
    if model is None:
        raise typer.BadParameter("name a model, or ask for --table", param_hint="--model")
    try:
        about = transformers.AutoConfig.from_pretrained(model).get_text_config(decoder=True)
        found = settings(about, context, None if memory is None else int(memory * 2**30))
        plain = full_precision(about, context)
    except (OSError, ValueError, AttributeError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    chosen = choose(found, context, torch.cuda.is_available())
    if json_only:
        rows = [dataclasses.asdict(x) for x in found]
        print(json.dumps({"bf16": plain, "settings": rows, "chosen": chosen and dataclasses.asdict(chosen)}))
        return
    shown = Table(title=f"{model}: one row of {context} tokens, {_mib(plain)} in bfloat16")
    for name in ("layout", "bits", "cache", "of bfloat16", "codebooks", "longest context"):
        shown.add_column(name, justify="left" if name == "layout" else "right")
    for x in found:
        longest = "" if x.longest is None else f"{x.longest:,}" + ("" if x.fits else ", too short")
        share = f"1/{plain / x.cache:.1f}"
        row = (x.layout, f"{x.bits:g}", _mib(x.cache), share, _mib(x.codebooks), longest)
        shown.add_row(*row, style="bold" if x == chosen else None)
    Console(width=100).print(shown)
    if chosen is None:
        print("None of them fits. A shorter context, or more memory, would.")
        return
    print(
        f'Begin with GSRQConfig(bits={chosen.bits:g}, layout="{chosen.layout}"), and compare with torchgsrq evaluate.'
    )
