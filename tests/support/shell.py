"""A shell on a terminal of its own, at which a test types."""

from __future__ import annotations

import os
import pty
import select
import signal
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

PROMPT = "READY>"


class Shell:
    """Runs `argv`, whose start-up file must set PROMPT; ends it on leaving."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._seen = b""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            try:
                os.execvpe(argv[0], list(argv), dict(env))
            finally:
                os._exit(127)

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def line_after(self, mark: str, *, timeout_s: float = 30) -> str:
        """Return the rest of the next line of output that has `mark`."""
        deadline = time.monotonic() + timeout_s
        while True:
            _, found, rest = self._seen.partition(mark.encode())
            line, end, self_rest = rest.partition(b"\r\n")
            if found and end:
                self._seen = self_rest
                return line.decode(errors="replace")
            self._read(deadline, mark)

    def wait_for(self, text: str, *, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while text.encode() not in self._seen:
            self._read(deadline, text)
        self._seen = self._seen.partition(text.encode())[2]

    def _read(self, deadline: float, wanted: str) -> None:
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {wanted!r} in {self._seen!r}"
        self._seen += os.read(self._fd, 65536)
