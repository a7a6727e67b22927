"""What can go wrong between this program and a server.

ClientError                 root; `may_have_run` says whether the command can have been carried out
├── ConnectionFailed        the request did not reach a server: it has not run
├── NoAnswer                the request was sent and nothing came back: it may or may not have run
├── BadReply                what came back is not HTTP: the request may or may not have run
├── AnswerNotUnderstood     the command has run, its answer is of a form that this release does not know
├── EventsLost              an event stream cannot go on without a gap
├── RemovalRefused          the guest was asked for a device, and keeps it
├── ResizeRefused           the guest was asked for another size, and keeps the one it has
└── ServerError             the server answers with an error: `failure.py`
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class ClientError(VmmError):
    """Root of what the client raises."""

    may_have_run = True


class ConnectionFailed(ClientError):
    """No server at `path` took the whole request, so the command has not run; the cause says why."""

    may_have_run = False

    def __init__(self, path: str) -> None:
        super().__init__(f"The request did not reach a server at {path}")
        self.path = path


class NoAnswer(ClientError):
    """The request was sent, then the connection was lost or the time was up."""

    def __init__(self, command: str) -> None:
        super().__init__(f"No answer to {command}; it may or may not have run")
        self.command = command


class BadReply(ClientError):
    """The server's bytes are not an HTTP response; the connection is of no further use."""


class AnswerNotUnderstood(ClientError):
    """`body` is what the server said; the cause tells where it is not as expected."""

    def __init__(self, command: str, body: bytes) -> None:
        super().__init__(f"The answer to {command} is of an unknown form")
        self.command = command
        self.body = body


class EventsLost(ClientError):
    """The server no longer has the events from `requested` to `first`; the stream goes on at `first`."""

    may_have_run = False

    def __init__(self, requested: int, first: int) -> None:
        super().__init__(f"Events from number {requested} on are lost; the next one is {first}")
        self.requested = requested
        self.first = first


class RemovalRefused(ClientError):
    """The guest was asked to let go of `device_id`, and said that it does not; the device is as before."""

    def __init__(self, device_id: str) -> None:
        super().__init__(f"The guest refuses to let go of the device {device_id}")
        self.device_id = device_id


class ResizeRefused(ClientError):
    """The guest was asked for `asked` of `what` and said that it does not; it has `actual`."""

    def __init__(self, what: str, *, asked: int, actual: int) -> None:
        super().__init__(f"The guest refuses a resize: it has {actual} {what}, and was asked for {asked}")
        self.asked = asked
        self.actual = actual
