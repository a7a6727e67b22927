"""One connection's way to the VMM thread, which another thread can cut.

The same steps as `api.send_request`, for a caller that passes descriptors and that must be able to end
while the VMM thread is still busy with its request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloudvmm.api import (
    ApiRequest,
    ApiResponsePayload,
    ApiSender,
    EventFd,
    EventFdWrite,
    ReplyChannel,
    ResponsePayloadType,
    ResponseRecv,
)

# Takes the name of a level (`error`, `warn`, `info`, `debug`, `trace`) and a text; must not block.
Log = Callable[[str, str], None]


def ignore(level: str, text: str) -> None:
    """Log to nobody."""


class Exchange:
    """`last_payload` is an answer that cannot change, and `last_response` the response that it became.

    `log` is told what goes wrong on the connection.
    """

    __slots__ = ("_api_evt", "_api_sender", "_is_cut", "_reply", "last_payload", "last_response", "log")

    def __init__(self, api_evt: EventFd, api_sender: ApiSender, log: Log = ignore) -> None:
        self.log = log
        self._api_evt = api_evt
        self._api_sender = api_sender
        self._reply: ReplyChannel | None = None
        self._is_cut = False
        self.last_payload: ApiResponsePayload | None = None
        self.last_response = b""

    def call(self, command: type[ApiRequest], data: Any, fds: list[int]) -> ApiResponsePayload:
        """Send a command and wait for its answer, however long that takes.

        `fds` are the descriptors that `data` holds. Once the request is queued they are the VMM thread's,
        and the list is empty.

        :raises ApiError: the command failed, or the VMM thread has ended.
        """
        reply = self._reply = ReplyChannel()
        if self._is_cut:
            raise ResponseRecv
        self._api_sender.send(command(data, reply))
        fds.clear()
        try:
            self._api_evt.write()
        except OSError as failure:
            raise EventFdWrite from failure
        payload = reply.recv()
        if not isinstance(payload, command.answer):
            raise ResponsePayloadType
        return payload

    def cut(self) -> None:
        """Let the waiting caller go, and any later one, with `ResponseRecv`. Any thread may call this."""
        self._is_cut = True
        if (reply := self._reply) is not None:
            reply.send(ResponseRecv())
