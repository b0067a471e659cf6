"""Progress bars, shown or not as the caller of `calibrate` asked."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

_shown = contextvars.ContextVar("shown", default=True)


@contextlib.contextmanager
def showing(progress: bool) -> Iterator[None]:
    """Show bars in here, or none."""
    token = _shown.set(progress)
    try:
        yield
    finally:
        _shown.reset(token)


def bar(items: Iterable[Any] | None = None, what: str = "", total: int | None = None) -> Any:
    """A bar over items, or one to be moved by hand."""
    return tqdm(items, desc=what, total=total, disable=not _shown.get())
