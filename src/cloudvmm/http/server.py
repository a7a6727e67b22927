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
from typing import Final

from cloudvmm.api import ApiSender, EventFd
from cloudvmm.errors import error_code
from cloudvmm.events.hub import EventHub
from cloudvmm.http.connection import Connection
from cloudvmm.http.error import ApiServerSocketFailed, TooManyConnections
from cloudvmm.http.exchange import Log, ignore
from cloudvmm.http.listener import Listener
from cloudvmm.wire.response import server_full

MAX_CONNECTIONS: Final = 10
MAX_STREAMS: Final = 256
CLOSE_DEADLINE_S: Final = 5.0

_CUT_DEADLINE_S: Final = 1.0
_DEPARTURE_S: Final = 0.1
_PAUSE_MS: Final = 50
_DRAIN_BYTES: Final = 16384
_SERVER_FULL: Final = server_full(code=error_code(TooManyConnections()))


class HttpServer:
    """A running REST server. Owns `listener`, and clones of `api_evt` and `api_sender`.

    `events` is what `vm.events` streams; without it there is no such path. `log` must not block.

    :raises ApiServerSocketFailed: the operating system gives no descriptor or thread; `listener` is then
        still the caller's.
    """

    def __init__(
        self,
        listener: Listener,
        api_evt: EventFd,
        api_sender: ApiSender,
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_streams: int = MAX_STREAMS,
        events: EventHub | None = None,
        log: Log = ignore,
    ) -> None:
        self._listener = listener
        self._api_sender = api_sender.clone()
        self._max_connections = max_connections
        self._max_streams = max_streams
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
                self._api_evt = api_evt.clone()
                undo.callback(self._api_evt.close)
                self._wake = EventFd()
                undo.callback(self._wake.close)
                self._thread = threading.Thread(target=self._accept_all, name="http-server", daemon=True)
                self._thread.start()
            except (OSError, RuntimeError) as error:
                raise ApiServerSocketFailed from error
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
        self._api_evt.close()
        return is_clean

    def _end_connections(self, deadline_s: float) -> bool:
        deadline = time.monotonic() + deadline_s
        with self._changed:
            for connection in (*self._connections, *self._streams):
                connection.end_input()
            connections = [*self._departed, *self._connections, *self._streams]
        late = [one for one in connections if not one.join(max(0.0, deadline - time.monotonic()))]
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
        connection = Connection(
            client,
            self._api_evt,
            self._api_sender,
            on_end=self._forget,
            on_stream=self._take_stream,
            events=self._events,
            log=self._log,
        )
        if not self._take_place(connection):
            _turn_away(client)
            return
        try:
            connection.start()
        except RuntimeError:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

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


def _is_any_gone(connections: set[Connection]) -> bool:
    poller = select.poll()
    for connection in connections:
        poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(0))


def _turn_away(client: socket.socket) -> None:
    with client, contextlib.suppress(OSError):
        client.setblocking(False)
        client.send(_SERVER_FULL)
        # Closing over bytes that were not read would reach the client as a reset instead of as our answer.
        client.recv(_DRAIN_BYTES)


def start_http_path_thread(
    path: str,
    api_evt: EventFd,
    api_sender: ApiSender,
    *,
    max_connections: int = MAX_CONNECTIONS,
    max_streams: int = MAX_STREAMS,
    events: EventHub | None = None,
    log: Log = ignore,
    is_beside: bool = False,
) -> HttpServer:
    """Serve on a new UNIX socket at `path`, mode 0600; with `is_beside` beside it, for `take_place`.

    :raises HttpServerError: another instance serves there, or the socket cannot be made.
    """
    listener = Listener.beside(path) if is_beside else Listener.at_path(path)
    try:
        return HttpServer(
            listener,
            api_evt,
            api_sender,
            max_connections=max_connections,
            max_streams=max_streams,
            events=events,
            log=log,
        )
    except BaseException:
        listener.close(remove_socket=True)
        raise


def start_http_fd_thread(
    fd: int,
    api_evt: EventFd,
    api_sender: ApiSender,
    *,
    max_connections: int = MAX_CONNECTIONS,
    max_streams: int = MAX_STREAMS,
    events: EventHub | None = None,
    log: Log = ignore,
) -> HttpServer:
    """Serve on `fd`, a listening UNIX socket, which is the server's from here on.

    :raises HttpServerError: it is something else, or cannot be served; it is then still the caller's.
    """
    listener = Listener.from_fd(fd)
    try:
        return HttpServer(
            listener,
            api_evt,
            api_sender,
            max_connections=max_connections,
            max_streams=max_streams,
            events=events,
            log=log,
        )
    except BaseException:
        listener.socket.detach()
        raise
