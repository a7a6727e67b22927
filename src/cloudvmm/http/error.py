"""Errors of the REST front end.

HttpServerError                the server cannot start
├── ApiSocketInUse             another instance holds the socket's lock
├── ApiServerSocketFailed      the socket cannot be made
└── NotAListener               the descriptor handed in cannot be served
HttpError                      why a request is answered with an error; outermost in the answer's chain
├── BadRequest                 (HTTP 400)
├── DeserializeFailed          the body is not what the command wants (HTTP 400)
├── NotFound                   (HTTP 404)
├── TooManyRequests            (HTTP 429)
├── InternalServerError        (HTTP 500)
└── ApiFailed                  the command's own answer, which is the cause; its status is in `status.py`
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


class DeserializeFailed(HttpError):
    """Failed to deserialize JSON"""


class NotFound(HttpError):
    """Not Found"""


class TooManyRequests(HttpError):
    """Too Many Requests"""


class InternalServerError(HttpError):
    """Internal Server Error"""


class ApiFailed(HttpError):
    """Error from API"""
