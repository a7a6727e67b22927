"""Requests over the API socket: carried out by the client's transport, worded as the reference does."""

from __future__ import annotations

import sys

from cloudvmm.cli.remote.error import (
    HttpApiClient,
    MissingProtocol,
    NotOpened,
    RemoteError,
    SendingDescriptors,
    ServerResponse,
    SocketFailed,
)
from cloudvmm.cli.remote.request import Request
from cloudvmm.client.error import BadReply, ClientError, ConnectionFailed, NoAnswer
from cloudvmm.client.reply import Reply
from cloudvmm.client.transport import Stream, UnixTransport

_SUCCESS = (100, 200, 204)
_NO_BODY = (100, 204)
_LOOK_S = 5.0


class RestApi:
    """The server at `path`, over one connection. `timeout_s` bounds each request; None is no limit."""

    def __init__(self, path: str, *, timeout_s: float | None) -> None:
        self._transport = UnixTransport(path, timeout_s=timeout_s)

    def connect(self) -> None:
        """Connect ahead of `call`.

        :raises NotOpened: there is no server.
        """
        try:
            self._transport.connect()
        except ConnectionFailed as error:
            raise _not_opened(error) from error

    def call(self, request: Request) -> bytes | None:
        """Send `request` and return the body of the answer, None where it has none.

        :raises HttpApiClient: the server refused, or there is no answer.
        """
        try:
            reply = self._transport.request(request.method, request.command, request.body, request.fds)
        except ClientError as error:
            raise HttpApiClient from _reworded(error, has_fds=bool(request.fds))
        return _content(reply)

    def percent_of(self, command: str) -> float | None:
        """Ask how far the server is with `command`; None where it does not know. Any thread.

        :raises ClientError: there is no answer, or no such question.
        """
        from cloudvmm.client.client import read_reply
        from cloudvmm.client.table import VMM_JOBS

        reply = self._transport.request("GET", VMM_JOBS.name, timeout_s=_LOOK_S)
        jobs = read_reply(VMM_JOBS, reply).jobs
        return next((job.percent for job in jobs if job.command == command and job.percent is not None), None)

    def follow(self, target: str) -> Stream:
        """Open the stream of events, over a connection of its own; the caller closes it.

        :raises NotOpened: there is no server.
        :raises HttpApiClient: the server refused, or there is no answer.
        """
        try:
            answer = self._transport.open_stream(target)
        except ConnectionFailed as error:
            raise _not_opened(error) from error
        except ClientError as error:
            raise HttpApiClient from _reworded(error, has_fds=False)
        if isinstance(answer, Stream):
            return answer
        _content(answer)
        raise HttpApiClient from MissingProtocol("The server has no such stream")

    def close(self) -> None:
        self._transport.close()


def print_body(body: bytes | None) -> None:
    """Print what the server said and a line's end; of an answer without a body nothing."""
    if body is None:
        return
    sys.stdout.buffer.write(body + b"\n")
    sys.stdout.buffer.flush()


def _content(reply: Reply) -> bytes | None:
    if reply.status not in _SUCCESS:
        raise HttpApiClient from ServerResponse(reply.status, reply.body.decode(errors="replace"))
    has_body = "content-length" in reply.headers and reply.status not in _NO_BODY
    return reply.body if has_body else None


def _reworded(error: ClientError, *, has_fds: bool) -> RemoteError:
    failure: RemoteError
    match error:
        case BadReply():
            failure = MissingProtocol()
        case NoAnswer() if error.__cause__ is None:  # the server closed without a word
            failure = MissingProtocol()
        case ConnectionFailed() if has_fds:
            failure = SendingDescriptors()
        case _:
            failure = SocketFailed()
    failure.__cause__ = error
    return failure


def _not_opened(error: ConnectionFailed) -> NotOpened:
    cause = error.__cause__
    reason = str(cause or error)
    if isinstance(cause, OSError) and cause.strerror:
        reason = f"{cause.strerror} (os error {cause.errno})"
    return NotOpened(f"Error opening HTTP socket: {reason}")
