"""One connection's way to the service, which another thread can cut.

The same steps as `api.send_request`, for a caller that passes descriptors and that must be able to end
while the VMM thread is still busy with its request.
"""

from __future__ import annotations

from cloudvmm.api.channel import ReplyChannel
from cloudvmm.api.ping import Ping, Pong
from cloudvmm.api.plumbing import ResponsePayloadType, ResponseRecv
from cloudvmm.wire.response import response

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from cloudvmm.api.action import ApiRequest
    from cloudvmm.api.data import ApiResponsePayload
    from cloudvmm.http.service import Service

    # Takes the name of a level (`error`, `warn`, `info`, `debug`, `trace`) and a text; must not block.
    Log: TypeAlias = Callable[[str, str], None]


def ignore(level: str, text: str) -> None:
    """Log to nobody."""


class Exchange:
    """`last_payload` is an answer that cannot change, and `last_response` the response that it became.

    `log` is told what goes wrong on the connection.
    """

    __slots__ = ("_is_cut", "_reply", "last_payload", "last_response", "log", "service")

    def __init__(self, service: Service, log: Log = ignore) -> None:
        self.log = log
        self.service = service
        self._reply: ReplyChannel | None = None
        self._is_cut = False
        self.last_payload: ApiResponsePayload | None = None
        self.last_response = b""

    def call(self, command: type[ApiRequest], data: Any, fds: list[int]) -> ApiResponsePayload:
        """Send a command and wait for its answer, however long that takes.

        `fds` are the descriptors that `data` holds. Once the request is taken they are the service's, and the
        list is empty.

        :raises ApiError: the command failed, or the VMM thread has ended.
        """
        reply = self._open_reply()
        self.service.ask(command(data, reply), fds)
        payload = reply.recv()
        if not isinstance(payload, command.answer):
            raise ResponsePayloadType
        return payload

    def ping(self) -> bytes:
        """Ask the VMM thread who it is; return the whole response.

        :raises ApiError: the VMM thread has ended.
        """
        reply = self._open_reply()
        self.service.ask(Ping(reply), [])
        pong = reply.recv()
        if not isinstance(pong, Pong):
            raise ResponsePayloadType
        # The VMM thread gives the same object for as long as it says the same.
        if pong is not self.last_payload:
            self.last_payload, self.last_response = pong, response(200, pong.json)
        return self.last_response

    def _open_reply(self) -> ReplyChannel:
        reply = self._reply = ReplyChannel()
        if self._is_cut:
            raise ResponseRecv
        return reply

    def cut(self) -> None:
        """Let the waiting caller go, and any later one, with `ResponseRecv`. Any thread may call this."""
        self._is_cut = True
        if (reply := self._reply) is not None:
            reply.send(ResponseRecv())
