"""TLS on a connection between two VMMs: each shows a certificate, and both trust the same authority.

What reads and writes a link, engines included, wants a plain socket. So a thread passes on what comes and
goes between the connection and one end of a socket pair, whose other end stands for it. `ssl` is large and is
imported where it is wanted.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import LinkTimeout, MigrationError, TlsFailed

if TYPE_CHECKING:
    import ssl

HANDSHAKE_S: Final = 30.0
_CHUNK_BYTES: Final = 256 << 10


class TlsFailure(MigrationError):
    """The text is the TLS library's reason."""


class Tls:
    """What a side of a migration needs: made of the folder `tls_dir`, for one side."""

    def __init__(self, tls_dir: str, *, is_server: bool) -> None:
        """Blocking: it reads the files.

        :raises TlsFailed: they are no certificates and keys.
        """
        import ssl

        folder = tls_dir.rstrip("/")
        name = "server" if is_server else "client"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(f"{folder}/ca-cert.pem")
            context.load_cert_chain(
                f"{folder}/{name}-cert.pem", f"{folder}/{name}-key.pem", password=_no_password
            )
        except (OSError, ValueError) as error:
            raise TlsFailed from _words(error)
        self._context = context
        self._is_server = is_server

    def protect(self, sock: socket.socket, cut: Cut, *, peer: str | None = None) -> socket.socket:
        """Shake hands over `sock` and return the socket that stands for it from now on; takes `sock`, always.

        `peer` is the host whose name or address the other side's certificate must have. What the other side
        thinks of ours is told with the first thing read.

        :raises TlsFailed: the other side is not who it must be, or speaks no TLS.
        :raises Cancelled: it is cut.
        """
        tls = None
        try:
            sock.setblocking(False)
            tls = self._context.wrap_socket(
                sock, server_side=self._is_server, server_hostname=peer, do_handshake_on_connect=False
            )
            _shake_hands(tls, cut)
        except (OSError, ValueError, LinkTimeout) as error:
            (tls or sock).close()
            raise TlsFailed from _words(error)
        except BaseException:
            (tls or sock).close()
            raise
        ours, relayed = socket.socketpair()
        threading.Thread(target=_Relay(tls, relayed).run, name="migration-tls", daemon=True).start()
        return ours


def _no_password() -> str:
    """Never ask at the terminal for what a key is encrypted with."""
    raise ValueError("The private key is encrypted")


def _shake_hands(tls: ssl.SSLSocket, cut: Cut) -> None:
    import ssl

    deadline_s = time.monotonic() + HANDSHAKE_S
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            cut.wait(tls, select.POLLIN, deadline_s=deadline_s, timeout_s=HANDSHAKE_S)
        except ssl.SSLWantWriteError:
            cut.wait(tls, select.POLLOUT, deadline_s=deadline_s, timeout_s=HANDSHAKE_S)
        else:
            return


class _Relay:
    """Passes bytes on between `tls` and `plain` until either ends, then closes both."""

    def __init__(self, tls: ssl.SSLSocket, plain: socket.socket) -> None:
        self._tls = tls
        self._plain = plain
        self._out = self._in = memoryview(b"")
        self._plain_at_end = self._tls_at_end = False
        self._is_deaf = False  # nobody reads at the other end of `plain`, but there may be words left to send
        plain.setblocking(False)

    def run(self) -> None:
        with self._tls, self._plain, contextlib.suppress(OSError):
            while not (self._tls_at_end and not self._in) and not (self._plain_at_end and not self._out):
                if not self._move():
                    self._wait()
            if self._plain_at_end:
                self._tls.unwrap()  # says good-bye; where it would wait for the other's it raises

    def _move(self) -> bool:
        """Move what can be moved without waiting; return whether there was anything."""
        moved = False
        if not self._out and not self._plain_at_end:
            data = _received(self._plain)
            self._plain_at_end = data == b""
            self._out = memoryview(data or b"")
            moved = data is not None
        if self._out:
            sent = _sent(self._tls, self._out)
            self._out = self._out[sent:]
            moved = moved or sent > 0
        if self._is_reading:
            data = _received(self._tls)
            self._tls_at_end = data == b""
            self._in = memoryview(data or b"")
            moved = moved or data is not None
        if self._in:
            try:
                sent = _sent(self._plain, self._in)
            except OSError:
                self._is_deaf, sent = True, len(self._in)
            self._in = self._in[sent:]
            moved = moved or sent > 0
        return moved

    @property
    def _is_reading(self) -> bool:
        return not self._in and not self._tls_at_end and not self._is_deaf

    def _wait(self) -> None:
        poll = select.poll()
        for sock, reads, writes in (
            (self._tls, self._is_reading, self._out),
            (self._plain, not self._out and not self._plain_at_end, self._in),
        ):
            events = (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)
            if events:  # without any, poll would tell of a hang-up over and over
                poll.register(sock, events)
        poll.poll()


def _received(sock: socket.socket) -> bytes | None:
    """Return what is there, nothing at the end, None where there is nothing yet."""
    import ssl

    try:
        return sock.recv(_CHUNK_BYTES)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None


def _sent(sock: socket.socket, data: memoryview) -> int:
    import ssl

    try:
        return sock.send(data)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return 0


def _words(error: Exception) -> Exception:
    """The reason without the numbers and places of the library's source that come with it."""
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsFailure(f"The certificate is not accepted: {error.verify_message}")
    if isinstance(error, ssl.SSLError) and error.reason:
        return TlsFailure(error.reason.replace("_", " ").capitalize())
    return OSError(error.errno, error.strerror) if isinstance(error, OSError) and error.strerror else error
