"""Where a VMM waits for the one that sends. Every call blocks; a cut ends it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from cloudvmm.migration.address import Address, TcpAddress, UnixAddress
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import (
    LinkDown,
    LinkTimeout,
    ListenFailed,
    PeerRefused,
    ProtocolError,
    TlsFailed,
)
from cloudvmm.migration.link import Link, set_tcp_options, words_alone
from cloudvmm.migration.message import Hello, Refuse, Welcome, choose_version

if TYPE_CHECKING:
    from cloudvmm.migration.tls import Tls

_BACKLOG: Final = 128
HELLO_S: Final = 10.0
STATE_S: Final = 30.0


class Listener:
    """Owns the listening socket, and removes the file of a UNIX socket. With `tls` it takes nothing else."""

    def __init__(self, address: Address, cut: Cut, *, tls: Tls | None = None) -> None:
        """Bind and listen.

        :raises ListenFailed: the address cannot be had; a file that exists is left alone.
        """
        self._cut = cut
        self._tls = tls
        self._path: str | None = None
        if isinstance(address, UnixAddress):
            self._socket = _listen_unix(address)
            self._path = address.path
        else:
            self._socket = _listen_tcp(address)

    def accept_sender(self) -> Link:
        """Wait for whoever comes first, for ever, and return the connection; nothing is said yet.

        :raises TlsFailed: it is not who it must be.
        """
        return self._accept(deadline_s=None)

    def accept_states(
        self, token: str, control: Link | None, count: int, *, timeout_s: float = STATE_S
    ) -> list[Link]:
        """Wait for the `count` connections that say `token`, and return them by number.

        Strangers are sent away.

        :raises LinkTimeout: they did not come in time.
        :raises MigrationError: `control` ended meanwhile.
        """
        deadline_s = time.monotonic() + timeout_s
        links: dict[int, Link] = {}
        with contextlib.ExitStack() as undo:
            while len(links) < count:
                try:
                    link = self._accept(deadline_s=deadline_s, timeout_s=timeout_s, control=control)
                except TlsFailed:
                    continue
                callback = undo.callback(link.close)
                number = _number_of(link, token, deadline_s)
                if number is not None and number in range(count) and number not in links:
                    links[number] = link
                else:
                    callback()
            undo.pop_all()
        return [links[number] for number in range(count)]

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._cut.forget(self._socket)
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _accept(
        self, *, deadline_s: float | None, timeout_s: float = STATE_S, control: Link | None = None
    ) -> Link:
        while True:
            is_ready = self._cut.wait(
                self._socket,
                select.POLLIN,
                deadline_s=deadline_s,
                timeout_s=timeout_s,
                other_fd=control.fileno() if control is not None else None,
            )
            if not is_ready and control is not None:
                control.receive(Refuse)  # nothing else may come now; this raises, whatever it is
                raise ProtocolError("The other VMM sent something when it was not its turn")
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                raise ListenFailed("Error accepting a connection") from error
            sock.setblocking(True)
            if sock.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):  # gone already: the first read says so
                    set_tcp_options(sock)
            if self._tls is not None:
                sock = self._tls.protect(sock, self._cut)
            return Link(sock, self._cut)


def _number_of(link: Link, token: str, deadline_s: float) -> int | None:
    """Return the number of a connection for the state, None where it is a stranger's."""
    try:
        hello = link.receive(Hello, timeout_s=min(HELLO_S, max(0.0, deadline_s - time.monotonic())))
    except (LinkDown, LinkTimeout, PeerRefused, ProtocolError):
        return None
    return hello.number if hello.role == "state" and hello.token == token else None


def greet(link: Link) -> None:
    """Hear who connected, and agree on a version.

    :raises MigrationError: it is nobody who speaks the protocol, or no version of it that we know.
    """
    hello = link.receive(Hello, timeout_s=HELLO_S)
    if hello.role != "control":
        raise ProtocolError(f"The other VMM opened a connection for {hello.role[:40]!r} first")
    link.send(Welcome(version=choose_version(hello)))


def _listen_unix(address: UnixAddress) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fsencode(address.path))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except (OSError, ValueError) as error:
        sock.close()
        raise ListenFailed("Error binding to UNIX socket") from words_alone(error)
    return sock


def _listen_tcp(address: TcpAddress) -> socket.socket:
    what = "Error binding to TCP socket"
    try:
        found = socket.getaddrinfo(
            address.host.encode(), address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError) as error:
        raise ListenFailed(what) from words_alone(error)
    failure: Exception = OSError(0, "the name has no address")
    for family, kind, protocol, _, target in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(target)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise ListenFailed(what) from words_alone(failure)
