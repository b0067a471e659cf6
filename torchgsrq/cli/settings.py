"""`torchgsrq recommend`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table

from torchgsrq.cli.common import Json, app, mib
from torchgsrq.config import GSRQConfig
from torchgsrq.measure.recommend import choose, full_precision, markdown_tables, settings


@app.command()
def recommend(
    model: Annotated[str | None, typer.Option("--model", help="hub ID or folder; only its config is read")] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens to hold")] = 32768,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB for the cache, besides the weights")] = None,
    table: Annotated[bool, typer.Option("--table", help="print Markdown tables for models of usual sizes")] = False,
    json_only: Json = False,
) -> None:
    """Recommend bits and group size: the size of each setting, what fits, and a setting to start with."""
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
    chosen = choose(found)
    if json_only:
        rows = [dataclasses.asdict(x) for x in found]
        print(json.dumps({"bf16": plain, "settings": rows, "chosen": chosen and dataclasses.asdict(chosen)}))
        return
    positions = getattr(about, "max_position_embeddings", None)
    shown = Table(title=f"{model}: one row of {context} tokens, {mib(plain)} in bfloat16")
    for name in ("group size", "bits", "cache", "of bfloat16", "codebooks", "longest context"):
        shown.add_column(name, justify="right")
    for x in found:
        longest = "" if x.longest is None else f"{min(x.longest, positions or x.longest):,}"
        longest += "" if x.fits else ", too short"
        share = f"1/{plain / x.cache:.1f}"
        row = (str(x.group_size), f"{x.bits:g}", mib(x.cache), share, mib(x.codebooks), longest)
        shown.add_row(*row, style="bold" if x == chosen else None)
    Console(width=100).print(shown)
    if positions and context > positions:
        print(f"The model has {positions:,} positions, fewer than --context {context:,}.")
    if chosen is None:
        print("None of them fits. A shorter context, or more memory, would.")
        return
    group = "" if chosen.group_size == GSRQConfig.group_size else f", group_size={chosen.group_size}"
    print(f"Begin with GSRQConfig(bits={chosen.bits:g}{group}), and compare with torchgsrq evaluate.")
