"""The device: what the front end sets up, the guest's two rings, and the muxer, in one loop that waits once.

Each pass does a bounded amount of work, so that neither the guest nor a program of the host can keep the
front end from being heard.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
from typing import Final

from cloudvmm.vhost.error import RingBroken
from cloudvmm.vhost.ring import Ring
from cloudvmm.vhost.session import Session
from cloudvmm.vsock.muxer import RETRY_S, STREAM_LIMIT, Muxer
from cloudvmm.vsock.packet import HEADER, read_packet

_BUDGET: Final = 128  # buffers of one ring in one pass
_CONFIG: Final = struct.Struct("<Q")


class Device:
    """Owns the connection to the front end, the `listener` at `path`, and all streams."""

    def __init__(
        self,
        connection: socket.socket,
        listener: socket.socket,
        *,
        cid: int,
        path: str,
        limit: int = STREAM_LIMIT,
    ) -> None:
        self._poller = select.epoll()
        self._session = Session(connection, rings=2, config=_CONFIG.pack(cid))
        self._muxer = Muxer(self._poller, listener, cid=cid, path=path, limit=limit)
        self._to_guest, self._from_guest = self._session.rings
        self._kicks: dict[int, Ring] = {}
        self._is_running = False
        self._stopped_at: list[int] | None = None
        self._poller.register(connection, select.EPOLLIN)

    def run(self) -> None:
        """Serve until the front end leaves.

        :raises ProtocolBroken: it does not keep to the protocol.
        """
        has_more = False
        while True:
            events = self._poller.poll(self._timeout_s(has_more=has_more))
            if any(fd == self._session.fileno() for fd, _ in events) and not self._serve():
                return
            for fd, _ in events:
                if fd in self._kicks:
                    self._kicks[fd].hear_kick()
            self._muxer.handle(events)
            if self._muxer.retries:
                self._muxer.retry()
            has_more = self._is_running and self._pump()

    def close(self) -> None:
        """Close everything. Idempotent."""
        self._muxer.close()
        self._session.close()
        self._poller.close()

    def _timeout_s(self, *, has_more: bool) -> float:
        if has_more:
            return 0
        return RETRY_S if self._muxer.retries else -1

    def _serve(self) -> bool:
        """Do what the front end says; then watch the rings that there are."""
        for fd in self._kicks:
            self._poller.unregister(fd)
        self._kicks = {}
        if not self._session.serve():
            return False
        for ring in self._session.rings:
            if ring.kick_fd >= 0:
                self._kicks[ring.kick_fd] = ring
                self._poller.register(ring.kick_fd, select.EPOLLIN)
        self._follow()
        return True

    def _follow(self) -> None:
        """Start or stop with the rings.

        A guest that is paused goes on where its rings stopped, with its streams. A driver that begins anew
        begins its rings anew too, and knows of no stream.
        """
        is_running = all(ring.is_running for ring in self._session.rings)
        if is_running == self._is_running:
            return
        self._is_running = is_running
        indices = [ring.next_index for ring in self._session.rings]
        if not is_running:
            self._stopped_at = indices
            self._muxer.stop()
            return
        if indices != self._stopped_at:
            self._muxer.clear()
        self._to_guest.mute()
        self._muxer.start()

    def _pump(self) -> bool:
        """Move packets both ways; return whether there is more that need not be waited for."""
        try:
            has_more = self._take_from_guest()
            return self._give_to_guest() or has_more
        except RingBroken as error:
            with contextlib.suppress(OSError):  # a guest that does this for ever has filled the log
                print(f"The guest's driver breaks the rules: {error}", file=sys.stderr)
            self._follow()
            return False

    def _take_from_guest(self) -> bool:
        ring, muxer = self._from_guest, self._muxer
        ring.mute()
        taken = 0
        has_more = True
        while taken < _BUDGET and not muxer.is_clogged:
            chain = ring.take()
            if chain is None:
                has_more = False
                break
            packet = read_packet(chain.readable)
            if packet is not None:
                muxer.take(*packet)
            ring.give(chain, 0)
            taken += 1
        if taken:
            ring.notify()
        if muxer.is_clogged:
            return False  # until the guest takes what there is for it
        return has_more or ring.unmute()

    def _give_to_guest(self) -> bool:
        ring, muxer = self._to_guest, self._muxer
        given = 0
        while given < _BUDGET and muxer.has_news:
            chain = ring.take()
            if chain is None:
                break
            if sum(map(len, chain.writable)) <= HEADER.size:
                ring.mark_broken()
                raise RingBroken("A buffer for a packet has no room for one")
            written = muxer.next_packet(chain.writable)
            if not written:
                ring.put_back()
                break
            ring.give(chain, written)
            given += 1
        if given:
            ring.notify()
        if not muxer.has_news:
            ring.mute()
            return False
        return given == _BUDGET or ring.unmute()
