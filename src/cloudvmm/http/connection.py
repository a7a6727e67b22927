"""One client's connection, served by its own thread: receive, parse, carry out, answer, in order.

A request for a stream is the last one: the connection is the stream from then on, and ends with it.

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
from cloudvmm.events.hub import EventHub
from cloudvmm.http.descriptor import close_descriptors
from cloudvmm.http.error import DescriptorsLost, HttpError, NotFound, TooManyStreams
from cloudvmm.http.exchange import Exchange, Log, ignore
from cloudvmm.http.route import answer, refuse
from cloudvmm.http.stream import Stream, first_wanted, is_stream
from cloudvmm.wire.http import Continue, Refusal, Request, RequestParser

MAX_DESCRIPTORS: Final = 253  # of a request; the kernel passes no more in one message

_READ_BYTES: Final = 16384
_FD_BYTES: Final = 4
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * _FD_BYTES)


class Connection:
    """Owns `client`. Its thread ends with the client, with `end_input`, or with `cut`.

    `events` is what a stream follows; without it there is none. `on_stream` is asked before the connection
    becomes one.
    """

    def __init__(
        self,
        client: socket.socket,
        api_evt: EventFd,
        api_sender: ApiSender,
        *,
        on_end: Callable[[Connection], None],
        on_stream: Callable[[Connection], bool],
        events: EventHub | None = None,
        log: Log = ignore,
    ) -> None:
        self._client = client
        self._exchange = Exchange(api_evt, api_sender, log)
        self._log = log
        self._on_end = on_end
        self._on_stream = on_stream
        self._events = events
        self._stream: Stream | None = None
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
        """Take no further request; the answer under way, or what has happened until now, is still sent."""
        self._ending.set()
        if (stream := self._stream) is not None:
            stream.wake()
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
            self._client.sendall(refuse(error, self._log))

    def _serve(self) -> None:
        feed, send = self._parser.feed, self._client.sendall
        while (piece := self._receive()) and not self._ending.is_set():
            for event in feed(piece):
                if not isinstance(event, Request):
                    self._send_interim(event)
                elif self._ending.is_set():
                    continue
                elif not is_stream(event.path):
                    send(self._answer(event))
                elif self._follow(event):
                    return

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

    def _follow(self, request: Request) -> bool:
        """Be the stream that `request` asks for until it ends; False where it was refused."""
        close_descriptors(self._fds)
        try:
            if self._events is None:
                raise NotFound
            first = first_wanted(request)
            stream = self._open_stream(self._events)
        except HttpError as error:
            self._client.sendall(refuse(error, self._log))
            return False
        stream.run(first)
        return True

    def _open_stream(self, events: EventHub) -> Stream:
        """:raises TooManyStreams: there is no descriptor for it, or no place."""
        try:
            stream = Stream(self._client, events, ending=self._ending)
        except OSError as error:
            raise TooManyStreams from error
        if not self._on_stream(self):
            stream.close()
            raise TooManyStreams
        self._stream = stream
        return stream

    def _send_interim(self, event: Continue | Refusal) -> None:
        if isinstance(event, Refusal):
            close_descriptors(self._fds)
        self._client.sendall(event.raw)
