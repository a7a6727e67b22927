"""One connection between two VMMs. Every call blocks, each with a deadline, until it is done or cut."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final, TypeVar

from cloudvmm import __version__
from cloudvmm.migration.address import Address, UnixAddress
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import (
    Cancelled,
    ConnectFailed,
    LinkDown,
    LinkTimeout,
    PeerRefused,
    ProtocolError,
)
from cloudvmm.migration.message import (
    HEAD,
    MAX_REASONS,
    VERSION,
    Hello,
    Message,
    Refuse,
    Role,
    decode_body,
    decode_head,
    encode_message,
    readable,
)

if TYPE_CHECKING:
    from cloudvmm.migration.tls import Tls

CONNECT_S: Final = 30.0
LISTEN_S: Final = 0.5
_LISTEN_LOOK_S: Final = 0.01
MESSAGE_S: Final = 30.0
PROGRAM: Final = f"cloudvmm {__version__}"
_CHUNK_BYTES: Final = 1 << 20
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

M = TypeVar("M", bound=Message)


class Link:
    """Owns its socket. One thread at a time uses it; the cut may come from any, and ends every wait."""

    def __init__(self, sock: socket.socket, cut: Cut) -> None:
        self._socket = sock
        self._cut = cut

    def fileno(self) -> int:
        return self._socket.fileno()

    def lend(self) -> int:
        """Return the descriptor, a blocking stream socket, for an engine to send or receive the state over.

        From here on a cut shuts it down: an engine waits as it likes.
        """
        self._cut.covers(self._socket)
        return self._socket.fileno()

    def send(self, message: Message, *, timeout_s: float = MESSAGE_S) -> None:
        """Block until the system has taken `message`.

        :raises LinkDown: the other side is gone.
        :raises LinkTimeout: it takes nothing.
        """
        left = memoryview(encode_message(message))
        deadline_s = time.monotonic() + timeout_s
        while left:
            self._cut.wait(self._socket, select.POLLOUT, deadline_s=deadline_s, timeout_s=timeout_s)
            try:
                left = left[self._socket.send(left[:_CHUNK_BYTES], _FLAGS) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkDown from words_alone(error)

    def receive(self, kind: type[M], *, timeout_s: float | None = MESSAGE_S) -> M:
        """Block until a message of `kind` came; None waits for it for ever.

        :raises PeerRefused: the other side ended it, with its reasons.
        :raises ProtocolError: another message came, or something that is none.
        :raises LinkDown: the other side is gone.
        :raises LinkTimeout: it says nothing, or says it too slowly.
        """
        found, length = decode_head(self._read(HEAD.size, timeout_s))
        message = decode_body(found, self._read(length, timeout_s))
        if isinstance(message, Refuse):
            raise PeerRefused([readable(reason) for reason in message.reasons[:MAX_REASONS]])
        if not isinstance(message, kind):
            raise ProtocolError(f"The other VMM sent {found.__name__} instead of {kind.__name__}")
        return message

    def pending_refusal(self, *, timeout_s: float) -> PeerRefused | None:
        """Return the other side's reasons for having ended it, if they come within `timeout_s`."""
        try:
            self.receive(Refuse, timeout_s=timeout_s)
        except PeerRefused as refused:
            return refused
        except (Cancelled, LinkDown, LinkTimeout, ProtocolError):
            pass
        return None

    def send_last(self, message: Message) -> None:
        """Send what ends it, also after a cut. Never blocks: what is not taken at once is lost."""
        with contextlib.suppress(OSError):
            self._socket.send(encode_message(message), _FLAGS)

    def close(self) -> None:
        self._cut.forget(self._socket)
        self._socket.close()

    def _read(self, size: int, timeout_s: float | None) -> bytes:
        """Read exactly `size` bytes and not one more: what follows may be the engine's."""
        read = bytearray()
        within_s = MESSAGE_S if timeout_s is None else timeout_s
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while len(read) < size:
            self._cut.wait(self._socket, select.POLLIN, deadline_s=deadline_s, timeout_s=within_s)
            try:
                chunk = self._socket.recv(min(size - len(read), _CHUNK_BYTES), _FLAGS)
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkDown from words_alone(error)
            if not chunk:
                raise LinkDown
            read += chunk
            if deadline_s is None:  # who has begun to speak is not waited for any longer
                deadline_s = time.monotonic() + within_s
        return bytes(read)


def connect(
    address: Address, role: Role, cut: Cut, *, token: str = "", number: int = 0, tls: Tls | None = None
) -> Link:
    """Connect to a listening VMM, over `tls` if there is any, and say hello.

    :raises ConnectFailed: nobody listens there, or nobody answers.
    :raises TlsFailed: who answers is not who it must be.
    :raises Cancelled: it is cut.
    """
    sock = _connect_unix(address, cut) if isinstance(address, UnixAddress) else _connect_tcp(address, cut)
    if tls is not None and not isinstance(address, UnixAddress):
        sock = tls.protect(sock, cut, peer=address.host)
    link = Link(sock, cut)
    try:
        link.send(Hello(program=PROGRAM, versions=[VERSION], role=role, token=token, number=number))
    except BaseException:
        link.close()
        raise
    return link


def set_tcp_options(sock: socket.socket) -> None:
    """Send small messages at once, and notice within two or three minutes that the other host is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000)


def _connect_unix(address: UnixAddress, cut: Cut) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect_when_listening(sock, os.fsencode(address.path), cut)
    except (OSError, ValueError) as error:
        sock.close()
        raise ConnectFailed("Error connecting to UNIX socket") from words_alone(error)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_when_listening(sock: socket.socket, path: bytes, cut: Cut) -> None:
    """Wait a little for who has made the file at `path`, for all to see, and is about to listen there.

    A host that stands still takes nothing of that.

    :raises OSError: nobody does. :raises Cancelled: it is cut.
    """
    looks = math.ceil(LISTEN_S / _LISTEN_LOOK_S)
    while True:
        looks -= 1
        try:
            _connect_socket(sock, path, cut)
        except ConnectionRefusedError:
            if cut.is_cut:
                raise Cancelled from None
            if looks < 0:
                raise
            time.sleep(_LISTEN_LOOK_S)
        else:
            return


def _connect_tcp(address: Address, cut: Cut) -> socket.socket:
    assert not isinstance(address, UnixAddress)
    failure: Exception = OSError(0, "the name has no address")
    try:
        # As bytes: a name that is text would have its encoding for foreign alphabets loaded.
        found = socket.getaddrinfo(address.host.encode(), address.port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ConnectFailed("Error connecting to TCP socket") from words_alone(error)
    for family, kind, protocol, _, target in found:
        sock = socket.socket(family, kind, protocol)
        try:
            _connect_socket(sock, target, cut)
            set_tcp_options(sock)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConnectFailed("Error connecting to TCP socket") from words_alone(failure)


def _connect_socket(sock: socket.socket, target: object, cut: Cut) -> None:
    """:raises OSError: nobody listens at `target`; or, for a UNIX socket, too many wait there already."""
    sock.setblocking(False)
    number = sock.connect_ex(target)  # type: ignore[arg-type]
    if number == errno.EINPROGRESS and sock.family != socket.AF_UNIX:
        deadline_s = time.monotonic() + CONNECT_S
        cut.wait(sock, select.POLLOUT, deadline_s=deadline_s, timeout_s=CONNECT_S)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number != 0:
        raise OSError(number, os.strerror(number))
    sock.setblocking(True)


def words_alone(error: Exception) -> Exception:
    """The system's words without the file's name, as the reference's chain has them."""
    return OSError(error.errno, error.strerror) if isinstance(error, OSError) and error.strerror else error
