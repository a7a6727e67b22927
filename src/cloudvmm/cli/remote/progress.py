"""A sign of life on a terminal while a command takes long: what is being done, and for how long already.

Only on standard error, only where that is a terminal, only after a moment, and gone again at the end. The
drawing is rich's, which is imported in the thread that draws: a command that is quick never waits for it.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any

PATIENCE_S = 0.5


class Progress:
    """Shows `doing` for as long as the block lasts; shows nothing where nobody would see it."""

    def __init__(self, doing: str | None, *, patience_s: float = PATIENCE_S) -> None:
        self._doing = doing
        self._patience_s = patience_s
        self._is_over = False
        self._lock = threading.Lock()
        self._drawing: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        if self._doing is not None and _is_watched():
            self._timer = threading.Timer(self._patience_s, self._start)
            self._timer.daemon = True  # an import of rich that is under way delays nobody
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        with self._lock:
            self._is_over = True
            if self._drawing is not None:
                self._drawing.stop()

    def _start(self) -> None:
        try:
            drawing = _draw(self._doing or "")
        except ImportError:
            return  # a courtesy, which no command may fail for
        with self._lock:
            if not self._is_over:
                drawing.start()
                self._drawing = drawing


def _is_watched() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _draw(doing: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Drawing

    drawing = Drawing(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    drawing.add_task(doing, total=None)
    return drawing
