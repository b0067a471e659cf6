"""``python -m torchgsrq``."""

from torchgsrq.cli import app

app()
