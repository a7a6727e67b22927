"""The REST front end on a UNIX socket."""

from __future__ import annotations

from cloudvmm.http.error import ApiServerSocketFailed, ApiSocketInUse, HttpServerError, NotAListener
from cloudvmm.http.server import HttpServer, start_http_fd_thread, start_http_path_thread

__all__ = [
    "ApiServerSocketFailed",
    "ApiSocketInUse",
    "HttpServer",
    "HttpServerError",
    "NotAListener",
    "start_http_fd_thread",
    "start_http_path_thread",
]
