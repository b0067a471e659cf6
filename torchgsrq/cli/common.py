"""What all commands share: the application, options, reading texts."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.logging import RichHandler

from torchgsrq.codec import Codebooks
from torchgsrq.config import GSRQConfig
from torchgsrq.learning.disk import cached_codebooks
from torchgsrq.measure.embedded import document
from torchgsrq.models import inspect_layers

LONG = 131072  # tokens, where window and codebooks weigh little
WIDTH = 80  # columns of what commands print, in a log file too
HELP = "An LLM's KV cache in few bits: a demo, codebooks, and what they cost and save."


class _Commands(typer.core.TyperGroup):
    """The boundary of errors: what a user can mend is one line, with `--verbose` a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            if ctx.params.get("verbose"):
                raise
            print(f"Error: {error} (torchgsrq --verbose shows where)", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands, add_completion=False, no_args_is_help=True, help=HELP, pretty_exceptions_show_locals=False
)
console = Console(stderr=True)
Model = Annotated[str | None, typer.Option("--model", help="hub ID or folder; the embedded model by default")]
TextFile = Annotated[Path | None, typer.Option("--text", help="a text file; the Python language reference by default")]
Bits = Annotated[list[float] | None, typer.Option("--bits", help="bits per element, 1 by default; may be repeated")]
Json = Annotated[bool, typer.Option("--json", help="print JSON only, for a program")]
Seed = Annotated[int, typer.Option("--seed")]
GroupSize = Annotated[int, typer.Option("--group-size", help="elements that share a code, a multiple of 8")]
Books = Annotated[
    Path | None, typer.Option("--codebooks", help="a file or folder of codebooks; else cached or calibrated")
]
Uniform = Annotated[bool, typer.Option("--uniform", help="the same bits for all heads")]


@app.callback()
def _main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log more")] = False) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    logging.getLogger("torchgsrq").setLevel(level)
    logging.getLogger("torchgsrq").handlers = [handler]


def read(text: Path | None) -> str:
    """A text file, or the Python language reference."""
    if text is None:
        return document()
    if not text.is_file():
        raise typer.BadParameter(f"{text} is no file", param_hint="--text")
    return text.read_text()


def config_of(**fields: Any) -> GSRQConfig:
    """A config, of which a bad field is an error of the command line."""
    try:
        return GSRQConfig(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def books_at(path: Path) -> Codebooks:
    """The codebooks of a file, or of a folder that `calibrate` wrote."""
    try:
        return Codebooks.load(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--codebooks") from error


def rates_of(bits: list[float] | None, path: Path | None) -> list[float]:
    """The rates that were asked for; else that of the given codebooks, or 1 bit."""
    return bits or [books_at(path).metadata.get("config", {}).get("bits", 1.0) if path else 1.0]


def with_books(llm: Any, configs: list[GSRQConfig], path: Path | None) -> list[tuple[GSRQConfig, Codebooks]]:
    """Each config and its codebooks: those of the disk cache; or the given ones, with what they are made for."""
    if path is None:
        return list(zip(configs, cached_codebooks(llm, inspect_layers(llm), configs), strict=True))
    books, found = books_at(path), []
    made = books.metadata.get("config", {})
    for config in configs:
        if made.get("bits", config.bits) != config.bits:
            raise typer.BadParameter(f"the codebooks at {path} are of {made['bits']:g} bits", param_hint="--bits")
        found.append((dataclasses.replace(config, **made), books))
    return found


def mib(nbytes: int) -> str:
    """Bytes, to read."""
    return f"{nbytes / 2**20:.1f} MiB"


def bar(share: float, width: int) -> str:
    """A bar as long as a share of the width, in eighths of a column; of ``#`` where the output has no blocks."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return "#" * round(eighths / 8) or "|"
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8] or "▏"
