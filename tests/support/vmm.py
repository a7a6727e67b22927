"""A server under test by the names of its commands, with what the test expects of each.

vmm.put("vm.create", config)
assert vmm.get("vm.info")["state"] == "Created"
assert vmm.put("vm.pause", expect=500)[-1] == "VM is not running"
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from support.rest import Reply, RestClient
from support.watch import CLOCK

TIMEOUT_S = 120.0
SUCCESS = (200, 204)

OnAnswer = Callable[[str, float], None]


class Vmm:
    """Keeps one connection. Not thread-safe: `second` is for what happens at the same time.

    `expect` is the status that the test counts on; without it any success will do. `on_answer` is told each
    command that was answered and the seconds it took.
    """

    def __init__(self, path: str, *, on_answer: OnAnswer | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._on_answer = on_answer
        self._client: RestClient | None = None

    def get(self, command: str, *, expect: int | None = None) -> Any:
        """Return what the answer's body says."""
        return self._call("GET", command, expect=expect)

    def put(
        self, command: str, data: Any = None, *, expect: int | None = None, fds: list[int] | None = None
    ) -> Any:
        """Send `data`, if any, as JSON; return what the answer's body says, None where it has none.

        For an expected error that is its chain: a list of sentences, outermost first.
        """
        return self._call("PUT", command, data, expect=expect, fds=fds)

    def exchange(self, method: str, command: str, data: Any = None, *, fds: list[int] | None = None) -> Reply:
        """Send a command and return the reply, whatever it is.

        :raises OSError: the connection broke, or no answer came in time.
        :raises EOFError: the server closed the connection instead of answering.
        """
        if self._client is None:
            self._client = self.connect()
        started = CLOCK.now_s()
        try:
            reply = self._client.ask(method, command, data, fds)
        except (OSError, EOFError):
            self.close()
            raise
        if self._on_answer is not None:
            self._on_answer(command, self._client.answered_at - started)
        return reply

    def connect(self) -> RestClient:
        """Return a further connection, for raw bytes; the caller closes it."""
        return RestClient(self.path, timeout_s=self.timeout_s)

    @contextlib.contextmanager
    def second(self) -> Iterator[Vmm]:
        """Give another client of the same server."""
        other = Vmm(self.path, on_answer=self._on_answer, timeout_s=self.timeout_s)
        try:
            yield other
        finally:
            other.close()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _call(
        self,
        method: str,
        command: str,
        data: Any = None,
        *,
        expect: int | None = None,
        fds: list[int] | None = None,
    ) -> Any:
        reply = self.exchange(method, command, data, fds=fds)
        is_expected = reply.status in SUCCESS if expect is None else reply.status == expect
        if not is_expected:
            wanted = "success" if expect is None else expect
            words = " <- ".join(error_words(reply))
            raise AssertionError(f"{method} {command}: {reply.status} instead of {wanted}: {words}")
        return msgspec.json.decode(reply.body) if reply.body else None


def error_words(reply: Reply) -> list[str]:
    """Return the error chain in `reply`, outermost first; its bytes as they are where it has none."""
    try:
        return reply.texts()
    except msgspec.DecodeError:
        return [repr(reply.body)]
