"""What a server answers instead of success.

ServerError                  `status`, `code`, `chain`; its causes are the server's, rebuilt
├── BadRequest               400: the request, its data or the config is wrong
├── NotFound                 404: there is no VM, no config or no such device
│   └── NotSupported         404: the server does not have this command at all
├── Conflict                 409: an identifier or a device is taken
├── TooManyRequests          429: an earlier resize still waits for the guest
├── InternalServerError      500: the command failed, or is not allowed in this state
└── ServerFull               503: the server has no room for a further connection or stream

The causes are exceptions of `cloudvmm.api.error`, `cloudvmm.config` and `cloudvmm.engine.base` wherever the
text or the code names one: `error.find(api.VmNotCreated)`, or `error.code == "VmNotCreated"`.
"""

from __future__ import annotations

from typing import TypeVar

from cloudvmm.client.error import ClientError

E = TypeVar("E", bound=BaseException)


class ServerError(ClientError):
    """A command's failure as the server tells it.

    `chain` is what its body says, outermost first; `code` is stable and for programs, empty where the server
    gives none and the text is not known. The text holds the whole chain, unlike that of other errors: the
    causes belong to another process, and this is the line that a log shows.
    """

    may_have_run = False

    def __init__(self, command: str, status: int, chain: tuple[str, ...] = (), code: str = "") -> None:
        super().__init__(": ".join((f"{command} failed with status {status}", *(chain[1:] or chain))))
        self.command = command
        self.status = status
        self.chain = chain
        self.code = code

    def find(self, kind: type[E]) -> E | None:
        """Return the first of the causes that is a `kind`, if any."""
        cause = self.__cause__
        while cause is not None:
            if isinstance(cause, kind):
                return cause
            cause = cause.__cause__
        return None


class BadRequest(ServerError):
    pass


class NotFound(ServerError):
    pass


class NotSupported(NotFound):
    pass


class Conflict(ServerError):
    pass


class TooManyRequests(ServerError):
    pass


class InternalServerError(ServerError):
    pass


class ServerFull(ServerError):
    pass


_BY_STATUS: dict[int, type[ServerError]] = {
    400: BadRequest,
    404: NotFound,
    409: Conflict,
    429: TooManyRequests,
    500: InternalServerError,
    503: ServerFull,
}
# What stands first in the chain of everything that reached the VMM.
FROM_API = "Error from API"


def server_error(command: str, status: int, chain: tuple[str, ...], code: str = "") -> ServerError:
    """Return the error of the right kind, without causes."""
    kind = _BY_STATUS.get(status, ServerError)
    if kind is NotFound and chain[:1] != (FROM_API,):
        kind = NotSupported
    return kind(command, status, chain, code)
