"""One connection's way to the service, which another thread can cut.

The same steps as `api.send_request`, for a caller that passes descriptors and that must be able to end
while the VMM thread is still busy with its request.
"""

from __future__ import annotations

import contextlib
import os
import threading

from cloudvmm.api.channel import ReplyChannel
from cloudvmm.api.ping import Ping, Pong
from cloudvmm.api.plumbing import ApiError, ResponsePayloadType, ResponseRecv
from cloudvmm.wire.response import response

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from cloudvmm.api.action import ApiRequest
    from cloudvmm.api.channel import ApiResponse
    from cloudvmm.api.data import ApiResponsePayload
    from cloudvmm.http.service import Service

    # Takes the name of a level (`error`, `warn`, `info`, `debug`, `trace`) and a text; must not block.
    Log: TypeAlias = Callable[[str, str], None]


def ignore(level: str, text: str) -> None:
    """Log to nobody."""


class Bell:
    """Wakes one thread. An eventfd: the thread that rings gives the interpreter up before it wakes the other.

    A queue's would wake it first. The woken thread would find the interpreter taken, and fall asleep again.

    :raises OSError: there is no descriptor.
    """

    __slots__ = ("_fd", "_lock")

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # once it is closed its number may be another descriptor's

    def wait(self) -> None:
        """Wait until it has been rung since the last wait, or a signal came to the thread."""
        with contextlib.suppress(InterruptedError):  # whoever waits looks again
            os.eventfd_read(self._fd)

    def ring(self) -> None:
        """Any thread may call this, also when it is closed."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Only where nobody waits. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class RungReply(ReplyChannel):
    """Rings `bell`, whose thread is the only one to receive, and just where that has begun to wait."""

    __slots__ = ("_bell", "_is_awaited", "_response")

    def __init__(self, bell: Bell) -> None:
        self._sent = False  # and no queue
        self._bell = bell
        self._is_awaited = False
        self._response: ApiResponse | None = None

    def send(self, response: ApiResponse) -> None:
        if not self._sent:
            self._sent = True
            self._response = response
            if self._is_awaited:
                self._bell.ring()

    def recv(self, timeout_s: float | None = None) -> ApiResponsePayload:
        """As `ReplyChannel.recv`, however long it takes."""
        assert timeout_s is None
        self._is_awaited = True  # before the look: a response that comes behind it is rung for
        while (response := self._response) is None:
            self._bell.wait()
        self._response = None  # it may be large, and the connection is kept
        if isinstance(response, ApiError):
            raise response
        return response


class Exchange:
    """`last_payload` is an answer that cannot change, and `last_response` the response that it became.

    `log` is told what goes wrong on the connection.
    """

    __slots__ = ("_bell", "_is_cut", "_reply", "last_payload", "last_response", "log", "service")

    def __init__(self, service: Service, log: Log = ignore) -> None:
        self.log = log
        self.service = service
        self._bell: Bell | None = None  # from the first call on: a stream needs none
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

    def close(self) -> None:
        """Only once its thread makes no more calls."""
        if self._bell is not None:
            self._bell.close()

    def _open_reply(self) -> ReplyChannel:
        reply = self._reply = self._make_reply()
        if self._is_cut:
            raise ResponseRecv
        return reply

    def _make_reply(self) -> ReplyChannel:
        if self._bell is None:
            try:
                self._bell = Bell()
            except OSError:  # there may be a descriptor later; who asks is answered without
                return ReplyChannel()
        return RungReply(self._bell)

    def cut(self) -> None:
        """Let the waiting caller go, and any later one, with `ResponseRecv`. Any thread may call this."""
        self._is_cut = True
        if (reply := self._reply) is not None:
            reply.send(ResponseRecv())
