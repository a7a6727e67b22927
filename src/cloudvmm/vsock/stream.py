"""One stream between a program of the host, on a UNIX socket, and one of the guest: its state and its credit.

A stream never waits. `take` is given what the guest sends, `look` what the socket has become, and `next`
gives what there is to say to the guest, one packet at a time. Bytes are kept in one place alone, `_unsent`,
for a host program that reads slowly; credit bounds them. What the guest does not read stays in the socket.

Either direction ends by itself, as with TCP: a program that sends no more may go on receiving. When the guest
has closed its socket it is answered with a reset at once, and what it sent before still goes to the host.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Final

from cloudvmm.vsock.packet import (
    HOST_CID,
    NO_MORE_RECEIVING,
    NO_MORE_SENDING,
    STREAM,
    Header,
    Operation,
    cut,
)

BUFFER_BYTES: Final = 256 * 1024
_TELL_BYTES: Final = BUFFER_BYTES // 2
_MODULO: Final = 0xFFFFFFFF
_BOTH: Final = NO_MORE_RECEIVING | NO_MORE_SENDING


class Stream:
    """Owns `host`, which does not block. `is_ours` says that the host began it."""

    def __init__(
        self, host: socket.socket, *, guest_cid: int, host_port: int, guest_port: int, is_ours: bool
    ) -> None:
        self.host = host
        self.host_port = host_port
        self.guest_port = guest_port
        self.is_over = False  # for the guest: no packet belongs to it any more
        self._guest_cid = guest_cid
        self._is_ours = is_ours
        self._is_open = not is_ours
        # What is to be said:
        self._begins = True
        self._resets = False
        self._asks_credit = False
        self._tells_credit = False
        # What was said by either side, in flags of SHUTDOWN:
        self._guest_ended = 0
        self._host_ended = 0
        self._host_told = 0
        # The socket:
        self._unsent = bytearray()
        self._is_readable = True  # what came before anybody looked
        self._is_hung_up = False
        # Credit, all modulo 2**32:
        self._forwarded = 0
        self._forwarded_told = 0
        self._sent = 0
        self._guest_buffer = 0
        self._guest_forwarded = 0

    @property
    def has_news(self) -> bool:
        """Whether there is something to say to the guest."""
        if self.is_over:
            return False
        return (
            self._begins
            or self._resets
            or self._tells_credit
            or self._host_ended != self._host_told
            or self._may_read
        )

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to be done for either side; the socket can be closed."""
        return self.is_over and not self._unsent

    def take(self, header: Header, payload: Sequence[memoryview]) -> None:
        """Do what a packet of the guest says. The payload is only lent."""
        self.learn_credit(header)
        match header.operation:
            case Operation.RESPONSE if not self._is_open and not self._begins:
                self._is_open = True
                self._greet()
            case Operation.DATA if self._is_open and not self._guest_ended & NO_MORE_SENDING:
                self._take_data(payload, header.size)
            case Operation.SHUTDOWN if self._is_open:
                self._guest_ended |= header.flags & _BOTH
                self._end_by_guest()
            case Operation.CREDIT_REQUEST if self._is_open:
                self._tells_credit = True
            case Operation.CREDIT_UPDATE if self._is_open:
                pass
            case Operation.RESET:
                self._unsent.clear()
                self.is_over = True
            case _:
                self.reset()

    def learn_credit(self, header: Header) -> None:
        """Take note of how much the guest has room for, which each of its packets tells."""
        self._guest_buffer, self._guest_forwarded = header.buffer_size, header.forwarded
        if self._credit():
            self._asks_credit = False

    def look(self, *, readable: bool, writable: bool, hung_up: bool) -> None:
        """Take note of what the socket has become."""
        self._is_hung_up |= hung_up
        if readable or hung_up:
            self._is_readable = True
        if (writable or hung_up) and self._unsent:
            self._flush()
        if hung_up and not self._is_open:
            if self._begins:
                self.is_over = True  # the guest has not heard of it
            else:
                self.reset()
        if self._host_ended & NO_MORE_SENDING and self._is_hung_up:
            self._host_ended |= NO_MORE_RECEIVING

    def next(self, pieces: Sequence[memoryview]) -> Header | None:
        """Return the header of what is to be said next, its payload written into `pieces`; None: nothing."""
        if self.is_over:
            return None
        if self._begins and not self._resets:
            self._begins = False
            return self._header(Operation.REQUEST if self._is_ours else Operation.RESPONSE)
        if self._may_read and (found := self._read(pieces)) is not None:
            return found
        if self._resets:
            self.is_over = True
            return self._header(Operation.RESET)
        if self._host_ended != self._host_told:
            self._host_told = self._host_ended
            return self._header(Operation.SHUTDOWN, flags=self._host_ended)
        if self._tells_credit:
            return self._header(Operation.CREDIT_UPDATE)
        return None

    def reset(self) -> None:
        """End it in disorder, for both sides."""
        self._unsent.clear()
        self._resets = True

    def close(self) -> None:
        self.host.close()

    @property
    def _may_read(self) -> bool:
        if not self._is_readable or not self._is_open or self._begins or self._asks_credit or self._resets:
            return False
        return not (self._host_ended & NO_MORE_SENDING or self._guest_ended & NO_MORE_RECEIVING)

    def _credit(self) -> int:
        return max(0, self._guest_buffer - (self._sent - self._guest_forwarded & _MODULO))

    def _read(self, pieces: Sequence[memoryview]) -> Header | None:
        """Return the header of data from the socket, or of the question for room; None: there is neither."""
        credit = self._credit()
        if not credit:
            self._asks_credit = True  # once: the guest tells by itself when its program has read
            return self._header(Operation.CREDIT_REQUEST)
        room = cut(pieces, 0, credit)
        try:
            size = self.host.recvmsg_into(room)[0]
        except (BlockingIOError, InterruptedError):
            self._is_readable = False
            return None
        except OSError:  # the host program closed its socket without reading all that came
            size, self._is_hung_up = 0, True
        if not size:
            self._end_by_host()
            return None
        self._sent = self._sent + size & _MODULO
        return self._header(Operation.DATA, size=size)

    def _end_by_host(self) -> None:
        self._host_ended |= _BOTH if self._is_hung_up else NO_MORE_SENDING
        if self._guest_ended & NO_MORE_SENDING and not self._unsent:
            self._resets = True  # nothing can go either way

    def _end_by_guest(self) -> None:
        if self._guest_ended == _BOTH or (
            self._guest_ended & NO_MORE_SENDING and self._host_ended & NO_MORE_SENDING
        ):
            self._resets = True
        if self._guest_ended & NO_MORE_RECEIVING:
            self._shut(socket.SHUT_RD)  # the host program can write no more
        if self._guest_ended & NO_MORE_SENDING and not self._unsent:
            self._shut(socket.SHUT_WR)  # it reads the end

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):  # it has left
            self.host.shutdown(how)

    def _greet(self) -> None:
        words = b"OK %d\n" % self.host_port
        try:
            sent = self.host.send(words)
        except OSError:
            sent = 0
        if sent < len(words):  # into a socket that nothing was written to: the program has left
            self.reset()

    def _take_data(self, payload: Sequence[memoryview], size: int) -> None:
        if len(self._unsent) + size > BUFFER_BYTES:
            self.reset()  # the guest goes beyond its credit
            return
        if self._host_ended & NO_MORE_RECEIVING:
            self._forward(size)  # it was told, and sent this before it knew
            return
        sent = 0 if self._unsent else self._send(payload)
        for piece in cut(payload, sent, size - sent) if sent < size else ():
            self._unsent += piece
        if self._host_ended & NO_MORE_RECEIVING:
            self._drop_unsent()

    def _send(self, payload: Sequence[memoryview]) -> int:
        try:
            sent = self.host.sendmsg(payload)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._host_ended |= NO_MORE_RECEIVING
            return 0
        self._forward(sent)
        return sent

    def _flush(self) -> None:
        with memoryview(self._unsent) as whole:
            sent = self._send([whole])
        del self._unsent[:sent]
        if self._host_ended & NO_MORE_RECEIVING:
            self._drop_unsent()
        if not self._unsent and self._guest_ended & NO_MORE_SENDING:
            self._shut(socket.SHUT_WR)
            if self._host_ended & NO_MORE_SENDING:
                self._resets = True

    def _drop_unsent(self) -> None:
        """Nobody will read it: the guest is told that, and has its credit back."""
        self._forward(len(self._unsent))
        self._unsent.clear()

    def _forward(self, size: int) -> None:
        self._forwarded = self._forwarded + size & _MODULO
        if self._forwarded - self._forwarded_told & _MODULO >= _TELL_BYTES:
            self._tells_credit = True

    def _header(self, operation: int, *, size: int = 0, flags: int = 0) -> Header:
        self._tells_credit = False
        self._forwarded_told = self._forwarded
        return Header(
            HOST_CID,
            self._guest_cid,
            self.host_port,
            self.guest_port,
            size,
            STREAM,
            operation,
            flags,
            BUFFER_BYTES,
            self._forwarded,
        )
