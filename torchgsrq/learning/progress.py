"""Progress bars, shown if the caller of `calibrate` requests them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

_shown = contextvars.ContextVar("shown", default=True)


@contextlib.contextmanager
def showing(progress: bool) -> Iterator[None]:
    """Show or hide progress bars within this context."""
    token = _shown.set(progress)
    try:
        yield
    finally:
        _shown.reset(token)


def bar(items: Iterable[Any] | None = None, what: str = "", total: int | None = None) -> Any:
    """A progress bar over items, or one that is updated manually."""
    return tqdm(items, desc=what, total=total, disable=not _shown.get())
