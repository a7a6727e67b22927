"""The server: one thread accepts, one thread per connection serves.

Threads, because a command blocks until the VMM thread has answered and no client may wait for another's;
few, because the number of connections is limited. Event streams have a limit of their own. Nothing that a
client does ends the accepting thread.

`close` is the only way to end: no new connection, no new request, then every answer under way is sent.
What is not done by the deadline is cut.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from cloudvmm import http
from cloudvmm.errors import error_code
from cloudvmm.host.eventfd import EventFd
from cloudvmm.host.rights import uid_of_peer
from cloudvmm.http.connection import REQUEST_S, Connection
from cloudvmm.http.exchange import ignore
from cloudvmm.http.listener import Listener
from cloudvmm.http.service import VmmService
from cloudvmm.wire.response import not_admitted, server_full

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any, Final

    from cloudvmm.api.channel import ApiSender
    from cloudvmm.events.hub import EventHub
    from cloudvmm.http.exchange import Log
    from cloudvmm.http.service import Service

MAX_CONNECTIONS: Final = 10
MAX_STREAMS: Final = 256
CLOSE_DEADLINE_S: Final = 5.0

_CUT_DEADLINE_S: Final = 1.0
_LAST_MOMENT_S: Final = 0.2
_DEPARTURE_S: Final = 0.1
_PAUSE_MS: Final = 50
_DRAIN_BYTES: Final = 16384


class HttpServer:
    """A running REST server. Owns `listener` and `service`.

    `events` is what `vm.events` streams; without it there is no such path. With `peers` others than these
    users are turned away, whatever the socket's mode lets them do. A request may take `request_s` to come,
    and as long may a client take nothing of its answer. `log` must not block.

    :raises ApiServerSocketFailed: the operating system gives no descriptor or thread; `listener` and
        `service` are then still the caller's.
    """

    def __init__(
        self,
        listener: Listener,
        service: Service,
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_streams: int = MAX_STREAMS,
        peers: Collection[int] | None = None,
        request_s: float = REQUEST_S,
        events: EventHub | None = None,
        log: Log = ignore,
    ) -> None:
        self._listener = listener
        self._service = service
        self._max_connections = max_connections
        self._max_streams = max_streams
        self._peers = peers
        self._request_s = request_s
        self._events = events
        self._log = log
        self._connections: set[Connection] = set()
        self._streams: set[Connection] = set()
        self._departed: list[Connection] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_clean = True
        self._closed = threading.Event()
        with contextlib.ExitStack() as undo:
            try:
                self._wake = EventFd()
                undo.callback(self._wake.close)
                self._thread = threading.Thread(target=self._accept_all, name="http-server", daemon=True)
                self._thread.start()
            except (OSError, RuntimeError) as error:
                raise http.error.ApiServerSocketFailed from error
            undo.pop_all()

    @property
    def connection_count(self) -> int:
        """How many connections there are, streams not counted."""
        with self._changed:
            return len(self._connections)

    @property
    def stream_count(self) -> int:
        with self._changed:
            return len(self._streams)

    def take_place(self, path: str) -> str:
        """As `Listener.take_place`, of a server that was started beside `path`."""
        return self._listener.take_place(path)

    def claim(self) -> bool:
        """As `Listener.claim`."""
        return self._listener.claim()

    def close(self, *, remove_socket: bool = False, deadline_s: float = CLOSE_DEADLINE_S) -> bool:
        """Stop serving; return whether every answer under way was sent within `deadline_s`.

        The socket's file is removed only if `remove_socket` says so, and only if the server made it.
        Not to be called from a connection's own thread. A second call does nothing but wait for the first,
        whose answer it returns.
        """
        with self._changed:
            is_first, self._is_closing = not self._is_closing, True
        if not is_first:
            self._closed.wait()
            return self._is_clean
        try:
            self._is_clean = self._end(deadline_s, remove_socket=remove_socket)
        finally:
            self._closed.set()
        return self._is_clean

    def _end(self, deadline_s: float, *, remove_socket: bool) -> bool:
        self._wake.write()
        self._thread.join()
        self._listener.stop()
        is_clean = self._end_connections(deadline_s)
        self._listener.close(remove_socket=remove_socket)
        self._wake.close()
        self._service.close()
        return is_clean

    def _end_connections(self, deadline_s: float) -> bool:
        deadline = time.monotonic() + deadline_s
        with self._changed:
            for connection in (*self._connections, *self._streams):
                connection.end_input()
            connections = [*self._departed, *self._connections, *self._streams]
        late = _join(connections, deadline)
        # Where the host stood still until the deadline, they need but a moment.
        late = _join(late, time.monotonic() + _LAST_MOMENT_S)
        with self._changed:
            for connection in (*self._connections, *self._streams):
                connection.cut()
        for connection in late:
            connection.join(_CUT_DEADLINE_S)
        return not late

    def _accept_all(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._listener.socket, select.POLLIN)
        while not self._is_closing:
            poller.poll()
            try:
                client, _ = self._listener.socket.accept()
            except BlockingIOError:
                continue
            except OSError:
                # Out of descriptors or memory: the client keeps its place in the queue until there is room.
                self._pause()
                continue
            self._admit(client)

    def _pause(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.poll(_PAUSE_MS)

    def _admit(self, client: socket.socket) -> None:
        if self._is_closing:
            client.close()
            return
        if not self._is_welcome(client):
            _turn_away(client, not_admitted(code=error_code(http.error.PeerNotAdmitted())))
            return
        connection = Connection(
            client,
            self._service,
            on_end=self._forget,
            on_stream=self._take_stream,
            events=self._events,
            request_s=self._request_s,
            log=self._log,
        )
        if not self._take_place(connection):
            _turn_away(client, server_full(code=error_code(http.error.TooManyConnections())))
            return
        try:
            connection.start()
        except RuntimeError:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

    def _is_welcome(self, client: socket.socket) -> bool:
        if self._peers is None:
            return True
        try:
            uid = uid_of_peer(client)
        except OSError:
            return False
        if uid not in self._peers:
            self._log("info", f"A client of user {uid} was turned away")
        return uid in self._peers

    def _take_place(self, connection: Connection) -> bool:
        with self._changed:
            if len(self._connections) >= self._max_connections and _is_any_gone(self._connections):
                # A client has left and its thread is about to notice; the next one need not suffer for that.
                self._changed.wait_for(self._has_room, _DEPARTURE_S)
            if not self._has_room():
                return False
            self._connections.add(connection)
            return True

    def _has_room(self) -> bool:
        return len(self._connections) < self._max_connections

    def _take_stream(self, connection: Connection) -> bool:
        """Count `connection` among the streams from here on; False where these are too many."""
        with self._changed:
            if len(self._streams) >= self._max_streams:
                return False
            self._connections.discard(connection)
            self._streams.add(connection)
            self._changed.notify_all()
            return True

    def _forget(self, connection: Connection) -> None:
        # Before the connection closes its socket, so that `close` never shuts down a reused descriptor.
        with self._changed:
            self._connections.discard(connection)
            self._streams.discard(connection)
            self._departed = [one for one in self._departed if one.is_alive]
            self._departed.append(connection)
            self._changed.notify_all()


def _join(connections: list[Connection], deadline: float) -> list[Connection]:
    """Wait for their threads; return those that have not ended."""
    return [one for one in connections if not one.join(max(0.0, deadline - time.monotonic()))]


def _is_any_gone(connections: set[Connection]) -> bool:
    poller = select.poll()
    for connection in connections:
        poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(0))


def _turn_away(client: socket.socket, answer: bytes) -> None:
    with client, contextlib.suppress(OSError):
        client.setblocking(False)
        client.send(answer)
        # Closing over bytes that were not read would reach the client as a reset instead of as our answer.
        client.recv(_DRAIN_BYTES)


def start_http_path_thread(
    path: str,
    api_evt: EventFd,
    api_sender: ApiSender,
    *,
    is_beside: bool = False,
    removes_lock: bool = False,
    **options: Any,
) -> HttpServer:
    """Serve on a new UNIX socket at `path`, mode 0600; with `is_beside` beside it, for `take_place`.

    `removes_lock` is `Listener`'s, `options` are those of `HttpServer`.

    :raises HttpServerError: another instance serves there, or the socket cannot be made.
    """
    listener = Listener.beside(path) if is_beside else Listener.at_path(path, removes_lock=removes_lock)
    return serve_on(listener, api_evt, api_sender, **options)


def serve_on(listener: Listener, api_evt: EventFd, api_sender: ApiSender, **options: Any) -> HttpServer:
    """Serve on `listener`, which is the server's from here on; it is closed where this fails.

    `options` are those of `HttpServer`.

    :raises HttpServerError: it cannot be served.
    """
    try:
        return _serve_vmm(listener, api_evt, api_sender, **options)
    except BaseException:
        listener.close(remove_socket=True)
        raise


def start_http_fd_thread(fd: int, api_evt: EventFd, api_sender: ApiSender, **options: Any) -> HttpServer:
    """Serve on `fd`, a listening UNIX socket, which is the server's from here on.

    `options` are those of `HttpServer`.

    :raises HttpServerError: it is something else, or cannot be served; it is then still the caller's.
    """
    listener = Listener.from_fd(fd)
    try:
        return _serve_vmm(listener, api_evt, api_sender, **options)
    except BaseException:
        listener.socket.detach()
        raise


def _serve_vmm(listener: Listener, api_evt: EventFd, api_sender: ApiSender, **options: Any) -> HttpServer:
    try:
        service = VmmService(api_evt, api_sender)
    except OSError as error:
        raise http.error.ApiServerSocketFailed from error
    try:
        return HttpServer(listener, service, **options)
    except BaseException:
        service.close()
        raise
