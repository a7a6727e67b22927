"""One client's connection, served by its own thread: receive, parse, carry out, answer, in order.

Descriptors travel beside the bytes. They belong to the request that is being received; whatever its
command does not take is closed once it is answered, refused or given up.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final

from cloudvmm.api import ApiSender, EventFd
from cloudvmm.http.descriptor import close_descriptors
from cloudvmm.http.error import DescriptorsLost
from cloudvmm.http.exchange import Exchange
from cloudvmm.http.route import answer
from cloudvmm.http.status import error_response
from cloudvmm.wire.http import Continue, Refusal, Request, RequestParser

MAX_DESCRIPTORS: Final = 253  # of a request; the kernel passes no more in one message

_READ_BYTES: Final = 16384
_FD_BYTES: Final = 4
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _FD_BYTES)


class Connection:
    """Owns `client`. Its thread ends with the client, with `end_input`, or with `cut`."""

    def __init__(
        self,
        client: socket.socket,
        api_evt: EventFd,
        api_sender: ApiSender,
        *,
        on_end: Callable[[Connection], None],
    ) -> None:
        self._client = client
        self._exchange = Exchange(api_evt, api_sender)
        self._on_end = on_end
        self._parser = RequestParser()
        self._fds: list[int] = []
        self._ending = threading.Event()
        # Never outlives the process: a thread whose client or VMM is stuck must not keep it from exiting.
        self._thread = threading.Thread(target=self._run, name="http-connection", daemon=True)

    def start(self) -> None:
        """:raises RuntimeError: the operating system gives no thread."""
        self._thread.start()

    def fileno(self) -> int:
        return self._client.fileno()

    def end_input(self) -> None:
        """Take no further request; the answer under way is still sent."""
        self._ending.set()
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RD)

    def cut(self) -> None:
        """End at once, whatever is under way."""
        self._ending.set()
        self._exchange.cut()
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Close what the thread owns. Only for a connection whose thread does not run."""
        close_descriptors(self._fds)
        self._client.close()

    def _run(self) -> None:
        try:
            # The client is gone, or no longer understood: the connection's loss alone.
            with contextlib.suppress(OSError):
                self._serve_until_lost()
        finally:
            self._on_end(self)
            self.close()

    def _serve_until_lost(self) -> None:
        try:
            self._serve()
        except DescriptorsLost as error:
            # Which of them are missing is not told, so nothing that follows can be trusted.
            self._client.sendall(error_response(error))

    def _serve(self) -> None:
        feed, send = self._parser.feed, self._client.sendall
        while (piece := self._receive()) and not self._ending.is_set():
            for event in feed(piece):
                if not isinstance(event, Request):
                    self._send_interim(event)
                elif not self._ending.is_set():
                    send(self._answer(event))

    def _receive(self) -> bytes:
        """Wait for bytes; empty when the client has ended.

        :raises OSError: the connection is broken.
        :raises DescriptorsLost: the process may not open as many as came, or a request has too many.
        """
        piece, ancillary, flags, _ = self._client.recvmsg(
            _READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        if ancillary:
            self._keep_descriptors(ancillary)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_DESCRIPTORS:
            close_descriptors(self._fds)
            raise DescriptorsLost
        return piece

    def _keep_descriptors(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(content) - len(content) % _FD_BYTES
                self._fds.extend(memoryview(content)[:whole].cast("i"))

    def _answer(self, request: Request) -> bytes:
        try:
            return answer(request, self._fds, self._exchange)
        finally:
            if self._fds:
                close_descriptors(self._fds)

    def _send_interim(self, event: Continue | Refusal) -> None:
        if isinstance(event, Refusal):
            close_descriptors(self._fds)
        self._client.sendall(event.raw)
