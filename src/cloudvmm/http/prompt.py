"""The way from a request to the bytes of its answer begins here: `vmm.ping` is answered at once.

Whoever starts a VMM asks for it first, and again until there is an answer. It needs nothing of what all other
requests need, which `route.py` loads when the first of them comes.
"""

from __future__ import annotations

from cloudvmm.api.plumbing import ApiError
from cloudvmm.http.path import PING_PATH
from cloudvmm.wire.response import response

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudvmm.http.exchange import Exchange, Log
    from cloudvmm.wire.http import Request


def answer(request: Request, fds: list[int], exchange: Exchange) -> bytes:
    """Carry out `request` and return the response, whatever happens.

    Blocks until the VMM thread has answered. Descriptors that the command takes are removed from
    `fds`; the others stay the caller's.
    """
    if request.path == PING_PATH and request.method == "GET" and exchange.service.is_vmm:
        try:
            return exchange.ping()
        except ApiError as error:
            from cloudvmm.http.route import refuse_command

            return refuse_command(error, exchange.log)
    try:
        from cloudvmm.http import route
    except (OSError, ImportError) as error:  # no descriptor to read it with: there may be one later
        return _not_loaded(error, exchange.log)
    return route.answer(request, fds, exchange)


def _not_loaded(error: Exception, log: Log) -> bytes:
    """Lay out, by hand, what `route.refuse` would: nothing of what that needs is there."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    log("error", f"What answers requests could not be loaded: {error}")
    return response(500, b'["Internal Server Error","%s"]' % reason.encode(), code="InternalServerError")
