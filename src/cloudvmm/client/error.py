"""What can go wrong between this program and a server.

ClientError                 root; `may_have_run` says whether the command can have been carried out
├── ConnectionFailed        the request did not reach a server: it has not run
├── NoAnswer                the request was sent and nothing came back: it may or may not have run
└── BadReply                what came back is not HTTP: the request may or may not have run

What a server answers instead of success is in `failure.py`.
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
