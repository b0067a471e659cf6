"""`torchgsrq calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from torchgsrq.cli.common import (
    GroupSize,
    Json,
    Model,
    Seed,
    Uniform,
    app,
    config_of,
    console,
    read,
)
from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.calibrate import WINDOW, calibrate
from torchgsrq.learning.text import FEWEST, OWN_TOKENS, TOKENS, token_ids
from torchgsrq.measure import evaluate as measures
from torchgsrq.measure.embedded import load_model


@app.command("calibrate")
def calibrate_command(
    output: Annotated[
        Path, typer.Argument(help="output file (.safetensors), or a folder, which also gets a model card")
    ],
    model: Model = None,
    bits: Annotated[float, typer.Option(help="bits per element")] = 1,
    text: Annotated[
        Path | None,
        typer.Option("--text", help=f"calibration text; up to --tokens (or {OWN_TOKENS}), the model adds its own"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=FEWEST, help=f"tokens to read; up to {TOKENS} of the text by default", show_default=False),
    ] = None,
    group_size: GroupSize = GSRQConfig.group_size,
    recipe: Annotated[str, typer.Option(help="gsrq or gsrq-paper")] = "gsrq",
    uniform: Uniform = False,
    seed: Seed = 0,
    json_only: Json = False,
) -> None:
    """Learn a model's codebooks, measure them on held-out text, and write them to a file or a folder."""
    allocation = "uniform" if uniform else None
    config = config_of(bits=bits, group_size=group_size, recipe=recipe, allocation=allocation)
    if output.suffix != ".safetensors" and output.is_file():
        raise typer.BadParameter(f"{output} is a file; name one that ends in .safetensors, or a folder")
    llm, tokenizer = load_model(model)
    words = read(text)  # without --text, used only for measuring
    ids = token_ids(tokenizer, words)
    if text is not None and tokens is None:  # hold out a window for measuring, if enough tokens remain for learning
        tokens = min(TOKENS, max(OWN_TOKENS, ids.numel() - WINDOW))
    unread = ids if text is None else ids[tokens:]
    data = None if text is None else [ids]
    books = calibrate(llm, config, data, tokenizer=tokenizer, tokens=tokens, seed=seed)
    if len(books):
        _measure(llm, config, books, unread, text.name if text else "the Python language reference")
    if output.suffix == ".safetensors":
        books.save(output)
    else:
        books.save_pretrained(output)
    facts = {"file": str(output), "layers": len(books), **books.metadata}
    print(json.dumps(facts) if json_only else f"{books.describe()}\nwritten to {output}")


def _measure(llm: Any, config: GSRQConfig, books: Codebooks, ids: Tensor, name: str) -> None:
    """Measure these codebooks on a held-out window of text, and add the result to their metadata."""
    if ids.numel() < WINDOW:
        console.print(f"Not measured: the text has fewer than {WINDOW} tokens besides those that were read.")
        return
    try:
        found = measures.quality(llm, [ids[:WINDOW]], {"": (config, books)})[""]
    except ValueError as error:  # a model that is decoded on every read
        console.print(f"Not measured: {error}")
        return
    known = ("kl", "kl_low", "kl_high", "ppl", "ppl_full")
    books.metadata["measured"] = {"text": name, "tokens": WINDOW, **{x: getattr(found, x) for x in known}}
