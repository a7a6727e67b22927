"""All streams of one guest: which packet and which socket belongs to which, and who speaks next.

The muxer never waits. `take` is given the guest's packets, `handle` what the poller has seen of the sockets,
and `next_packet` writes what there is to say to the guest, in turns. Sockets are polled by edges: a stream
remembers that there was something, so that a guest that takes nothing costs nothing.
"""

from __future__ import annotations

import collections
import errno
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

from cloudvmm.vsock.caller import Caller, NoPort
from cloudvmm.vsock.packet import (
    HEADER,
    HOST_CID,
    PAYLOAD_LIMIT,
    STREAM,
    Header,
    Operation,
    cut,
    write_header,
)
from cloudvmm.vsock.stream import Stream

STREAM_LIMIT: Final = 1023
RETRY_S: Final = 0.01

_RESET_LIMIT: Final = 256
_ACCEPT_LIMIT: Final = 128  # in one pass; the poller tells of the others again
_CONNECT_S: Final = 2.0
_FIRST_PORT: Final = 1 << 30
_EVENTS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET

_Key = tuple[int, int]


class _Wanted:
    """A stream that the guest asks for, while the program of the host has no place for it in its queue."""

    __slots__ = ("deadline", "header", "host")

    def __init__(self, host: socket.socket, header: Header) -> None:
        self.host = host
        self.header = header
        self.deadline = time.monotonic() + _CONNECT_S


class Muxer:
    """Owns `listener` and every stream. `poller` is lent; `path` is that of the listener.

    Streams are known by the port of the host and that of the guest.
    """

    def __init__(
        self, poller: select.epoll, listener: socket.socket, *, cid: int, path: str, limit: int = STREAM_LIMIT
    ) -> None:
        listener.setblocking(False)
        self._poller = poller
        self._listener = listener
        self._cid = cid
        self._path = path
        self._limit = limit
        self._is_accepting = False
        self._last_port = _FIRST_PORT - 1
        self._streams: dict[_Key, Stream] = {}
        self._by_fd: dict[int, Stream | Caller] = {}
        self._wanted: dict[_Key, _Wanted] = {}
        self._speakers: collections.deque[Stream] = collections.deque()
        self._queued: set[int] = set()  # id() of each of the speakers
        self._resets: collections.deque[_Key] = collections.deque()

    @property
    def has_news(self) -> bool:
        """Whether somebody may have something to say to the guest."""
        return bool(self._resets or self._speakers)

    @property
    def is_clogged(self) -> bool:
        """Whether the guest must take what there is for it before any more of its packets are looked at."""
        return len(self._resets) >= _RESET_LIMIT

    @property
    def retries(self) -> bool:
        """Whether `retry` is to be called in `RETRY_S`."""
        return bool(self._wanted)

    def start(self) -> None:
        """Accept programs of the host. Idempotent."""
        if not self._is_accepting:
            self._poller.register(self._listener, select.EPOLLIN)
            self._is_accepting = True

    def stop(self) -> None:
        """Let programs of the host wait; the streams stay. Idempotent."""
        if self._is_accepting:
            self._poller.unregister(self._listener)
            self._is_accepting = False

    def clear(self) -> None:
        """End every stream without a word to the guest, whose driver has forgotten them."""
        for stream in list(self._streams.values()):
            self._forget(stream)
        for wanted in self._wanted.values():
            wanted.host.close()
        self._wanted.clear()
        self._resets.clear()
        self._speakers.clear()
        self._queued.clear()

    def close(self) -> None:
        """Close everything. Idempotent."""
        self.clear()
        for each in self._by_fd.values():
            each.close()
        self._by_fd.clear()
        self._listener.close()

    def handle(self, events: Sequence[tuple[int, int]]) -> None:
        """Do what the events of the poller ask for; those of others are passed over."""
        for fd, mask in events:
            found = self._by_fd.get(fd)
            if isinstance(found, Caller):
                self._listen_to(found, has_ended=bool(mask & (select.EPOLLRDHUP | select.EPOLLHUP)))
            elif found is not None:
                found.look(
                    readable=bool(mask & (select.EPOLLIN | select.EPOLLRDHUP)),
                    writable=bool(mask & select.EPOLLOUT),
                    hung_up=bool(mask & (select.EPOLLHUP | select.EPOLLERR)),
                )
                self._settle(found)
        # At the end: a descriptor that was closed above may come back as another's.
        if self._is_accepting and any(fd == self._listener.fileno() for fd, _ in events):
            self._accept()

    def take(self, header: Header, payload: Sequence[memoryview]) -> None:
        """Do what a packet of the guest asks for. The payload is only lent."""
        if header.source_cid != self._cid or header.target_cid != HOST_CID:
            return
        key = (header.target_port, header.source_port)
        stream = self._streams.get(key)
        if header.kind != STREAM:
            if header.operation != Operation.RESET:
                self._resets.append(key)
        elif stream is not None:
            stream.take(header, payload)
            self._settle(stream)
        elif header.operation == Operation.RESET:
            self._give_up(key)
        elif header.operation == Operation.REQUEST:
            self._connect(key, header)
        else:
            self._resets.append(key)

    def retry(self) -> None:
        """Try again to connect to programs whose queue was full."""
        for key, wanted in list(self._wanted.items()):
            if time.monotonic() > wanted.deadline:
                self._give_up(key)
                self._resets.append(key)
            else:
                self._try(key, wanted)

    def next_packet(self, pieces: Sequence[memoryview]) -> int:
        """Write the next packet into `pieces`; return its size, header and all; 0: there is none.

        They have room for a header and more.
        """
        if self._resets:
            header: Header | None = self._reset_header(self._resets.popleft())
        else:
            header = self._next_of_streams(pieces)
        if header is None:
            return 0
        write_header(pieces, header)
        return HEADER.size + header.size

    def _next_of_streams(self, pieces: Sequence[memoryview]) -> Header | None:
        room = cut(pieces, HEADER.size, PAYLOAD_LIMIT)
        while self._speakers:
            stream = self._speakers.popleft()
            self._queued.discard(id(stream))
            header = stream.next(room)
            self._settle(stream)
            if header is not None:
                return header
        return None

    def _reset_header(self, key: _Key) -> Header:
        host_port, guest_port = key
        return Header(HOST_CID, self._cid, host_port, guest_port, 0, STREAM, Operation.RESET, 0, 0, 0)

    def _settle(self, stream: Stream) -> None:
        """Let it speak if it has something to say; forget it where it is over."""
        if stream.is_finished:
            self._forget(stream)
        elif stream.is_over:
            self._streams.pop((stream.host_port, stream.guest_port), None)  # what is unsent goes on
        elif stream.has_news and id(stream) not in self._queued:
            self._queued.add(id(stream))
            self._speakers.append(stream)

    def _forget(self, stream: Stream) -> None:
        key = (stream.host_port, stream.guest_port)
        if self._streams.get(key) is stream:
            del self._streams[key]
        self._by_fd.pop(stream.host.fileno(), None)
        stream.close()

    def _accept(self) -> None:
        for _ in range(_ACCEPT_LIMIT):
            try:
                host, _ = self._listener.accept()
            except OSError:  # nobody, any more; or no descriptor is left, and the next event tries again
                return
            host.setblocking(False)
            if self._is_full:
                host.close()
                continue
            caller = Caller(host)
            self._by_fd[host.fileno()] = caller
            self._poller.register(host, _EVENTS)

    @property
    def _is_full(self) -> bool:
        return max(len(self._by_fd), len(self._streams)) + len(self._wanted) >= self._limit

    def _listen_to(self, caller: Caller, *, has_ended: bool) -> None:
        try:
            guest_port = caller.read_port(has_ended=has_ended)
        except NoPort:
            del self._by_fd[caller.host.fileno()]
            caller.close()
            return
        if guest_port is not None:
            key = (self._free_port(), guest_port)
            self._begin(key, caller.host, is_ours=True)

    def _free_port(self) -> int:
        taken = {host_port for host_port, _ in self._streams}
        while True:
            self._last_port = (self._last_port + 1) & ~(1 << 31) | _FIRST_PORT
            if self._last_port not in taken:
                return self._last_port

    def _connect(self, key: _Key, header: Header) -> None:
        if key in self._wanted:
            return
        if self._is_full:
            self._resets.append(key)
            return
        host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._wanted[key] = _Wanted(host, header)
        self._try(key, self._wanted[key])

    def _try(self, key: _Key, wanted: _Wanted) -> None:
        try:
            wanted.host.connect(f"{self._path}_{key[0]}")
        except OSError as error:
            if error.errno != errno.EAGAIN:  # its queue is full
                self._give_up(key)
                self._resets.append(key)
            return
        del self._wanted[key]
        self._poller.register(wanted.host, _EVENTS)
        self._begin(key, wanted.host, is_ours=False).learn_credit(wanted.header)

    def _give_up(self, key: _Key) -> None:
        if (wanted := self._wanted.pop(key, None)) is not None:
            wanted.host.close()

    def _begin(self, key: _Key, host: socket.socket, *, is_ours: bool) -> Stream:
        host_port, guest_port = key
        stream = Stream(
            host, guest_cid=self._cid, host_port=host_port, guest_port=guest_port, is_ours=is_ours
        )
        self._streams[key] = stream
        self._by_fd[host.fileno()] = stream
        self._settle(stream)
        return stream
