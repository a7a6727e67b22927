"""A sign of life on a terminal while a command takes long: what is being done, how far it is, for how long.

Only on standard error, only where that is a terminal, only after a moment, and gone again at the end. The
drawing is rich's, which is imported in the thread that draws: a command that is quick never waits for it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

PATIENCE_S = 0.5
LOOK_S = 0.5


class Progress:
    """Shows `doing` for as long as the block lasts; shows nothing where nobody would see it.

    `look` is asked now and then how many percent are done, on another thread; None is not known, and an error
    of it is the end of the asking.
    """

    def __init__(
        self,
        doing: str | None,
        *,
        patience_s: float = PATIENCE_S,
        look: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._doing = doing
        self._patience_s = patience_s
        self._look = look
        self._end = threading.Event()
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
            self._end.set()
            if self._drawing is not None:
                self._drawing.stop()

    def _start(self) -> None:
        try:
            drawing = _draw(self._doing or "")
        except ImportError:
            return  # a courtesy, which no command may fail for
        with self._lock:
            if self._end.is_set():
                return
            drawing.start()
            self._drawing = drawing
        self._follow(drawing)

    def _follow(self, drawing: Any) -> None:
        """Show how far it is until the end, if that is to be had."""
        (task,) = drawing.task_ids
        while not self._end.is_set():
            try:
                percent = self._look()
            except Exception:
                return  # a courtesy too
            if percent is not None:
                drawing.update(task, total=100, completed=percent)
            self._end.wait(LOOK_S)


def _is_watched() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _draw(doing: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Drawing

    drawing = Drawing(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    drawing.add_task(doing, total=None)
    return drawing
