"""The client that blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cloudvmm.client.method import Methods
from cloudvmm.client.stream import EventStream, RemoteEvents
from cloudvmm.client.table import EVENTS
from cloudvmm.client.transport import DEFAULT_TIMEOUT_S, Stream, UnixTransport

if TYPE_CHECKING:
    from cloudvmm.client.reply import Reply
    from cloudvmm.client.table import Command

LONG_TIMEOUT_S: Final = 3600.0

T = TypeVar("T")


class Client(Methods):
    """Speaks to the server whose socket is at `path`; connects on first use, and again after a loss.

    A command has `timeout_s`, or `long_timeout_s` if it moves the guest's memory; None is no limit. Any
    number of threads may share a client: each command under way has a connection of its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        long_timeout_s: float | None = LONG_TIMEOUT_S,
    ) -> None:
        self.transport = UnixTransport(path, timeout_s=timeout_s)
        self._long_timeout_s = long_timeout_s

    @property
    def path(self) -> str:
        return self.transport.path

    def call(self, command: Command[T], data: object = None, *, timeout_s: float | None = None) -> T:
        body, fds = encode_data(data)
        if timeout_s is None and command.is_long:
            timeout_s = self._long_timeout_s
        reply = self.transport.request(command.method, command.name, body, fds, timeout_s=timeout_s)
        value: T = read_reply(command, reply)
        return value

    def events(self, from_number: int | None = None) -> EventStream:
        return RemoteEvents(self._open_stream, from_number)

    def close(self) -> None:
        """Close the connections that are kept. The client can be used again."""
        self.transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_stream(self, target: str) -> Stream:
        start = self.transport.open_stream(target)
        return start if isinstance(start, Stream) else refuse_stream(start)


def encode_data(data: object) -> tuple[bytes | None, tuple[int, ...]]:
    """Return the body for `data` and the descriptors to pass with it; see `codec.encode`."""
    if data is None:
        return None, ()
    from cloudvmm.client.codec import encode

    return encode(data)


def read_reply(command: Command[Any], reply: Reply) -> Any:
    """Return the value that `reply` holds.

    :raises ServerError: it is not a success.
    :raises AnswerNotUnderstood: it is, of an unknown form.
    """
    if reply.status not in (200, 204):
        from cloudvmm.client.chain import failure

        raise failure(command.name, reply)
    if command.answer == "nothing":
        return None
    from cloudvmm.client.codec import decode

    return decode(command.name, command.answer, reply.body)


def refuse_stream(reply: Reply) -> Any:
    """Raise what a server means that answers with `reply` instead of a stream."""
    from cloudvmm.client.chain import failure

    raise failure(EVENTS, reply)
