"""Shared by all commands: the application, options, reading of texts."""

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

LONG = 131072  # tokens, a context at which window and codebooks are a small part
WIDTH = 80  # columns of printed output, also in a log file
HELP = "Quantized KV caches for LLMs: run a demo, learn codebooks, and measure quality and memory."


class _Commands(typer.core.TyperGroup):
    """Error handling: errors that a user can fix print one line, or a traceback with `--verbose`."""

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
Bits = Annotated[list[float] | None, typer.Option("--bits", help="bits per element, 1 by default; can be repeated")]
Json = Annotated[bool, typer.Option("--json", help="print only JSON")]
Seed = Annotated[int, typer.Option("--seed")]
GroupSize = Annotated[int, typer.Option("--group-size", help="elements that share a code, a multiple of 8")]
Books = Annotated[
    Path | None, typer.Option("--codebooks", help="codebook file or folder; by default cached or calibrated ones")
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
        raise typer.BadParameter(f"{text} is not a file", param_hint="--text")
    return text.read_text()


def config_of(**fields: Any) -> GSRQConfig:
    """A config; an invalid field is reported as a command-line error."""
    try:
        return GSRQConfig(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def books_at(path: Path) -> Codebooks:
    """The codebooks of a file, or of a folder written by `calibrate`."""
    try:
        return Codebooks.load(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--codebooks") from error


def rates_of(bits: list[float] | None, path: Path | None) -> list[float]:
    """The requested rates; by default that of the given codebooks, or 1 bit."""
    return bits or [books_at(path).metadata.get("config", {}).get("bits", 1.0) if path else 1.0]


def with_books(llm: Any, configs: list[GSRQConfig], path: Path | None) -> list[tuple[GSRQConfig, Codebooks]]:
    """Each config with its codebooks: those at ``path``, with the config that they were made for, or those of the disk
    cache."""
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
    """Format bytes as MiB."""
    return f"{nbytes / 2**20:.1f} MiB"


def bar(share: float, width: int) -> str:
    """A bar that fills a share of the width, in eighths of a column, or with ``#`` if the output is not UTF-8."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return "#" * round(eighths / 8) or "|"
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8] or "▏"
