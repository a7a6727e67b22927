"""Errors of the REST front end.

HttpServerError                the server cannot start
├── ApiSocketInUse             another instance holds the socket's lock
├── ApiServerSocketFailed      the socket cannot be made
└── NotAListener               the descriptor handed in cannot be served
HttpError                      why a request is answered with an error; outermost in the answer's chain
├── BadRequest                 (HTTP 400)
│   ├── WrongMethod, BodyMissing, BodyNotTaken, WrongDescriptorCount
│   └── BadQuery, RequestTooSlow
├── DeserializeFailed          the body is not what the command wants (HTTP 400)
├── NotFound                   (HTTP 404)
├── TooManyRequests            (HTTP 429)
├── InternalServerError        (HTTP 500)
├── DescriptorsLost            what came with the request could not be taken in (HTTP 500)
├── TooManyStreams             (HTTP 503)
├── TooManyConnections         (HTTP 503, in a layout of its own)
├── PeerNotAdmitted            (HTTP 403, in the same)
└── ApiFailed                  the command's own answer, which is the cause; its status is in `status.py`

What the reference answers with the same words keeps them; the class tells programs which it was.
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class HttpServerError(VmmError):
    """Root of what keeps the server from starting; the cause tells what and why."""


class ApiSocketInUse(HttpServerError):
    def __init__(self, path: str) -> None:
        super().__init__(f'API socket "{path}" is already in use by another running instance')
        self.path = path


class ApiServerSocketFailed(HttpServerError):
    """Error creation API server's socket"""


class NotAListener(HttpServerError):
    def __init__(self, fd: int) -> None:
        super().__init__(f"File descriptor {fd} is not a listening UNIX stream socket")
        self.fd = fd


class HttpError(VmmError):
    """Root of what a request is answered with instead of success."""


class BadRequest(HttpError):
    """Bad Request"""


class WrongMethod(BadRequest):
    """Bad Request

    The path is there, but not with this method; PATCH and DELETE mostly get no body back.
    """


class RequestTooSlow(BadRequest):
    """A request that does not end in time; the connection is closed."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request did not end within {limit_s:g} s")


class BodyMissing(BadRequest):
    """Bad Request

    The command needs a JSON body; `vm.create` without one is answered without a body too.
    """


class BodyNotTaken(BadRequest):
    """Bad Request

    The command takes no body.
    """


class WrongDescriptorCount(BadRequest):
    """Bad Request

    The request's data wants another number of file descriptors than came with it.
    """


class BadQuery(BadRequest):
    """Bad Request

    `vm.events` takes `?from=NUMBER` and the header `Last-Event-ID: NUMBER`, and nothing else.
    """


class DeserializeFailed(HttpError):
    """Failed to deserialize JSON

    The second text of the body tells what and where.
    """


class NotFound(HttpError):
    """Not Found

    There is no such path.
    """


class TooManyRequests(HttpError):
    """Too Many Requests"""


class InternalServerError(HttpError):
    """Internal Server Error

    A mistake of cloudvmm's own; the log tells more.
    """


class DescriptorsLost(HttpError):
    """No room for the file descriptors that came with the request

    More than 253 came, or the process has too many files open; the connection ends.
    """


class TooManyStreams(HttpError):
    """Too many open event streams

    End one first.
    """


class TooManyConnections(HttpError):
    """Too many open connections

    Close one first, or start the server with a larger `--max-connections`.
    """


class PeerNotAdmitted(HttpError):
    """This user may not use the API

    `--api-socket-peers` names those who may, by their uids.
    """


class ApiFailed(HttpError):
    """Error from API"""
