"""The REST front end on a UNIX socket."""

from __future__ import annotations

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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudvmm.http import error as error
    from cloudvmm.http.error import ApiServerSocketFailed, ApiSocketInUse, HttpServerError, NotAListener
else:

    def __getattr__(name: str) -> object:
        # `http.error` is there when one is raised or caught: a start needs none of these classes.
        if name != "error" and name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        error = importlib.import_module("cloudvmm.http.error")
        return error if name == "error" else getattr(error, name)
