"""One client's connection, served by its own thread: receive, parse, carry out, answer, in order.

A request for a stream is the last one: the connection is the stream from then on, and ends with it.

A client may be silent between requests for as long as it likes. One that has begun a request and does not end
it in time, or does not take its answer, loses its connection: there are few of them.

Descriptors travel beside the bytes. They belong to the request that is being received; whatever its
command does not take is closed once it is answered, refused or given up.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

from cloudvmm import http
from cloudvmm.host.rights import close_descriptors, receive_with_fds
from cloudvmm.http.exchange import Exchange, ignore
from cloudvmm.http.path import is_stream
from cloudvmm.http.prompt import answer
from cloudvmm.wire.http import Refusal, Request, RequestParser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from cloudvmm.events.hub import EventHub
    from cloudvmm.http.exchange import Log
    from cloudvmm.http.service import Service
    from cloudvmm.http.stream import Stream
    from cloudvmm.wire.http import Continue

MAX_DESCRIPTORS: Final = 253  # of a request; the kernel passes no more in one message

REQUEST_S: Final = 60.0
"""From the first piece of a request to its end; and for how long a client may take nothing of an answer."""

_READ_BYTES: Final = 16384
_TIMEVAL: Final = struct.Struct("@ll")


class Connection:
    """Owns `client`. Its thread ends with the client, with `end_input`, or with `cut`.

    `events` is what a stream follows; without it there is none. `on_stream` is asked before the connection
    becomes one.
    """

    def __init__(
        self,
        client: socket.socket,
        service: Service,
        *,
        on_end: Callable[[Connection], None],
        on_stream: Callable[[Connection], bool],
        events: EventHub | None = None,
        request_s: float = REQUEST_S,
        log: Log = ignore,
    ) -> None:
        self._client = client
        self._request_s = request_s
        self._began_at: float | None = None  # the request that has come in part
        self._exchange = Exchange(service, log)
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
        # The kernel's time-outs: those of Python cost a system call with each piece.
        timeval = _TIMEVAL.pack(int(self._request_s), int(self._request_s % 1 * 1_000_000))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._client.setsockopt(socket.SOL_SOCKET, option, timeval)
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
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._exchange.cut()  # what its thread says then goes nowhere, however quick it is

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
        self._exchange.close()
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
        except (http.error.DescriptorsLost, http.error.RequestTooSlow) as error:
            # Which of them are missing is not told, or where the next request begins: nothing that follows
            # can be trusted.
            self._client.sendall(self._refusal(error))

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
            self._check_pace()

    def _check_pace(self) -> None:
        """:raises RequestTooSlow: a request has begun and should have ended."""
        if self._parser.is_between_requests:
            self._began_at = None
        elif self._began_at is None:
            self._began_at = time.monotonic()
        elif time.monotonic() > self._began_at + self._request_s:
            raise http.error.RequestTooSlow(self._request_s)

    def _receive(self) -> bytes:
        """Wait for bytes; empty when the client has ended.

        :raises OSError: the connection is broken.
        :raises DescriptorsLost: the process may not open as many as came, or a request has too many.
        :raises RequestTooSlow: nothing came for long, in the middle of a request.
        """
        while True:
            try:
                piece, fds, is_cut = receive_with_fds(self._client, _READ_BYTES, most_fds=MAX_DESCRIPTORS)
                break
            except BlockingIOError:
                self._check_pace()
        self._fds += fds
        if is_cut or len(self._fds) > MAX_DESCRIPTORS:
            close_descriptors(self._fds)
            raise http.error.DescriptorsLost
        return piece

    def _answer(self, request: Request) -> bytes:
        try:
            return answer(request, self._fds, self._exchange)
        finally:
            if self._fds:
                close_descriptors(self._fds)

    def _refusal(self, error: http.error.HttpError) -> bytes:
        from cloudvmm.http.route import refuse

        return refuse(error, self._log)

    def _follow(self, request: Request) -> bool:
        """Be the stream that `request` asks for until it ends; False where it was refused."""
        from cloudvmm.http.stream import first_wanted

        close_descriptors(self._fds)
        try:
            if self._events is None:
                raise http.error.NotFound
            first = first_wanted(request)
            stream = self._open_stream(self._events)
        except http.error.HttpError as error:
            self._client.sendall(self._refusal(error))
            return False
        stream.run(first)
        return True

    def _open_stream(self, events: EventHub) -> Stream:
        """:raises TooManyStreams: there is no descriptor for it, or no place."""
        from cloudvmm.http.stream import Stream

        try:
            stream = Stream(self._client, events, ending=self._ending)
        except OSError as error:
            raise http.error.TooManyStreams from error
        if not self._on_stream(self):
            stream.close()
            raise http.error.TooManyStreams
        self._stream = stream
        return stream

    def _send_interim(self, event: Continue | Refusal) -> None:
        if isinstance(event, Refusal):
            close_descriptors(self._fds)
        self._client.sendall(event.raw)
