"""`torchgsrq demo`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchgsrq.cli.common import (
    WIDTH,
    Bits,
    Books,
    GroupSize,
    Json,
    Model,
    TextFile,
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
from torchgsrq.learning.text import token_ids
from torchgsrq.measure import evaluate as measures
from torchgsrq.measure.embedded import NAME, document, load_model

_FIRST = "if"  # the topic to begin with: the default number of tokens then ends in prose, not in a grammar


@app.command()
def demo(
    model: Model = None,
    bits: Bits = None,
    text: TextFile = None,
    context: Annotated[int, typer.Option(min=2, help="tokens of the document to read")] = 8000,
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 32,
    group_size: GroupSize = GSRQConfig.group_size,
    codebooks: Books = None,
    json_only: Json = False,
) -> None:
    """Read a document with a quantized KV cache, and compare it with full precision."""
    rates = rates_of(bits, codebooks)
    configs = [config_of(bits=b, group_size=group_size) for b in rates]
    console.print(f"Loading {model or NAME} ...")
    llm, tokenizer = load_model(model)
    ids = token_ids(tokenizer, read(text) if text else document(_FIRST))[None, : context + 1]
    context = ids.shape[1] - 1
    if context < 2 * configs[0].recent_tokens:
        raise typer.BadParameter(f"{context} tokens leave nothing to quantize", param_hint="--context")
    candidates = with_books(llm, configs, codebooks)
    configs = [config for config, _ in candidates]

    console.print(f"Reading {context} tokens in full precision and with each cache ...")
    full = measures.read_and_write(llm, ids, new_tokens)
    full_bytes = sum(t.untyped_storage().nbytes() for layer in full.cache.layers for t in (layer.keys, layer.values))
    results, said = [], []
    for config, books in candidates:
        with measures.quantized(llm, measures.for_measuring(config), books):
            got = measures.read_and_write(llm, ids, new_tokens)
        measures.check_read_codes(got.cache)
        comparison = measures.Comparison()
        comparison.add(ids[0], full.logits, got.logits)
        memory, score = got.cache.memory(), comparison.result()
        results.append(
            {
                "model": model or NAME,
                "bits": config.bits,
                "effective_bits": round(memory.bits_per_element_with_codebooks, 4),
                "codebook_bytes": memory.codebooks,
                "context": context,
                "kv_bytes_full": full_bytes,
                "kv_bytes": memory.total,
                "ppl_full": round(score.ppl_full, 4),
                "ppl": round(score.ppl, 4),
                "kl": round(score.kl, 4),
                "agreement": round(score.agreement, 4),
                "tokens_per_second_full": round(full.tokens_per_second, 2),
                "tokens_per_second": round(got.tokens_per_second, 2),
            }
        )
        said.append(got.written)
    if json_only:
        print(json.dumps(results[0] if len(results) == 1 else results))
        return
    out = Console(width=min(WIDTH, Console().width))
    table = Table(title=f"{model or NAME}, {context} tokens read", caption=measures.environment())
    table.add_column("")
    table.add_column("full precision", justify="right")
    for config in configs:
        table.add_column(f"GSRQ {config.bits:g} bit", justify="right")
    rows: list[tuple[str, str, list[str]]] = [
        ("KV cache", mib(full_bytes), [mib(r["kv_bytes"]) for r in results]),
        ("codebooks, shared by all caches", "", [mib(r["codebook_bytes"]) for r in results]),
        (
            "bits per element, all counted",
            f"{8 * llm.dtype.itemsize}",
            [f"{r['effective_bits']:.2f}" for r in results],
        ),
        ("perplexity", f"{results[0]['ppl_full']:.3f}", [f"{r['ppl']:.3f}" for r in results]),
        ("KL divergence, nats", "0", [f"{r['kl']:.4f}" for r in results]),
        ("same next token", "100%", [f"{r['agreement']:.1%}" for r in results]),
        ("tokens per second", f"{full.tokens_per_second:.1f}", [f"{r['tokens_per_second']:.1f}" for r in results]),
    ]
    for name, plain, others in rows:
        table.add_row(name, plain, *others)
    out.print(table)
    out.print("KV cache")
    for name, size in [("full precision", full_bytes), *((f"{r['bits']:g} bit", r["kv_bytes"]) for r in results)]:
        out.print(f"  {name:14} {bar(size / full_bytes, 40)} {mib(size)}", highlight=False)
    out.print(
        "[dim]Quality is measured with every token outside the recent window quantized, as a long generation would "
        "see it. The full-precision window and sinks weigh less the longer the context.[/dim]"
    )
    out.print("\n[bold]The document ends:[/bold] ..." + escape(tokenizer.decode(ids[0, -40:]).replace("\n", " ")))
    out.print(_side_by_side(tokenizer, full.written, configs, said))


def _side_by_side(tokenizer: Any, full: Any, configs: list[GSRQConfig], said: list[Any]) -> Table:
    """The continuations in columns, underlined from the first token that differs from full precision."""
    table = Table(title="and goes on", show_lines=False, expand=True)
    table.add_column("full precision", ratio=1, overflow="fold")
    cells = [Text(tokenizer.decode(full))]
    for config, words in zip(configs, said, strict=True):
        table.add_column(f"GSRQ {config.bits:g} bit", ratio=1, overflow="fold")
        pairs = enumerate(zip(full.tolist(), words.tolist(), strict=False))
        apart = next((i for i, (a, b) in pairs if a != b), len(words))
        cell = Text(tokenizer.decode(words[:apart]))
        cells.append(cell.append(tokenizer.decode(words[apart:]), style="underline"))
    table.add_row(*cells)
    return table
