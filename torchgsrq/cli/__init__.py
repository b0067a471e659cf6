"""The command line: ``torchgsrq demo | calibrate | evaluate | memory | recommend``."""

from torchgsrq.cli import demo, learn, measure, settings  # each adds its commands
from torchgsrq.cli.common import app

__all__ = ["app", "demo", "learn", "measure", "settings"]
