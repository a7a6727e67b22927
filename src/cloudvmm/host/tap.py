"""TAP interfaces: attach to one or create it, and set what the configuration says.

By ioctl on purpose: a netlink library costs 20 MiB and 200 ms to import, more than the whole server has,
for six calls that have not changed in decades.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from typing import Final

import msgspec

from cloudvmm.host.error import HostError

_TUN_DEVICE: Final = "/dev/net/tun"
_KERNEL_CHOOSES: Final = "vmtap%d"
_MAX_NAME_BYTES: Final = 15

_TUNSETIFF: Final = 0x400454CA
_TUNGETIFF: Final = 0x800454D2
_TUNGETDEVNETNS: Final = 0x54E3
_TUNGETVNETHDRSZ: Final = 0x800454D7
_TUNSETVNETHDRSZ: Final = 0x400454D8
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_MULTI_QUEUE: Final = 0x0100

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_SIOCSIFHWADDR: Final = 0x8924
_SIOCGIFHWADDR: Final = 0x8927
_SIOCGIFINDEX: Final = 0x8933
_IFF_UP: Final = 0x1
_ARPHRD_ETHER: Final = 1
_REQUEST_BYTES: Final = 40  # struct ifreq


class TapError(HostError):
    """Root of what goes wrong with a TAP interface"""


class InvalidTapName(TapError):
    def __init__(self, name: str) -> None:
        super().__init__(f"Interface name {name} is not valid: it has at most {_MAX_NAME_BYTES} bytes")


class OpenTun(TapError):
    """Couldn't open /dev/net/tun"""


class ConfigureTap(TapError):
    """Unable to configure tap interface"""


class TapSettingError(TapError):
    def __init__(self, name: str, setting: str) -> None:
        super().__init__(f"Setting the {setting} of the tap interface {name} failed")


class InvalidNetmask(TapError):
    """Invalid netmask"""


class QueueMismatch(TapError):
    def __init__(self, name: str, *, multi_queue: bool) -> None:
        has, asked = ("several queues", "one") if multi_queue else ("one queue", "several")
        super().__init__(f"The existing tap interface {name} was made for {has}, and {asked} asked for")


class Tap(msgspec.Struct, kw_only=True):
    """Open queues of one interface, non-blocking and close-on-exec; the owner closes them.

    An interface that was created goes away with the last of its descriptors, one that existed stays.
    """

    name: str
    fds: list[int]
    created: bool

    def close(self) -> None:
        """Close every queue; idempotent."""
        while self.fds:
            os.close(self.fds.pop())


def open_tap(
    name: str | None,
    *,
    queue_pairs: int = 1,
    ip: str | None = None,
    mask: str | None = None,
    mac: str | None = None,
    mtu: int | None = None,
) -> Tap:
    """Attach to the interface `name` or create it, and bring it up; None lets the kernel choose a name.

    `mac` and `mtu` are set on the host's side of an existing interface too, its addresses are left alone.

    :raises TapError: the kernel refused, or an existing interface does not fit `queue_pairs`.
    """
    _check_name(name)
    existed = name is not None and _exists(name)
    tap = Tap(name=name or _KERNEL_CHOOSES, fds=[], created=not existed)
    try:
        for _ in range(queue_pairs):
            fd, tap.name = _attach(tap.name, multi_queue=queue_pairs > 1)
            tap.fds.append(fd)
        if tap.created and ip is not None:
            _set_address(tap.name, ip, mask)
        _set_link(tap.name, mac=mac, mtu=mtu)
    except BaseException:
        tap.close()
        raise
    return tap


def interface_of(fd: int) -> str | None:
    """Return the name, in this network namespace, of the interface whose queue `fd` is; None where it has
    none.
    """
    request = bytearray(_REQUEST_BYTES)
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
        namespace = fcntl.ioctl(fd, _TUNGETDEVNETNS)
    except OSError:
        return None
    try:
        ours = os.stat("/proc/thread-self/ns/net")
        return _name_in(request) if os.fstat(namespace).st_ino == ours.st_ino else None
    finally:
        os.close(namespace)


class HeaderSize:
    """The size of the header before each frame of the interface whose queue `fd`, lent, is."""

    def __init__(self, fd: int) -> None:
        """:raises OSError: it is no queue of a TAP interface."""
        self._fd = fd
        self._size = bytes(fcntl.ioctl(fd, _TUNGETVNETHDRSZ, bytes(4)))

    def keep(self) -> None:
        """Have it be what it was, where somebody has changed it."""
        if bytes(fcntl.ioctl(self._fd, _TUNGETVNETHDRSZ, bytes(4))) != self._size:
            fcntl.ioctl(self._fd, _TUNSETVNETHDRSZ, self._size)


def _check_name(name: str | None) -> None:
    if name is None:
        return
    if not name or len(name.encode()) > _MAX_NAME_BYTES or "/" in name or "\0" in name:
        raise InvalidTapName(name)


def _exists(name: str) -> bool:
    """Look for an interface in our network namespace. /sys may show another one's: that it was mounted in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCGIFINDEX, _request(name))
        except OSError:
            return False
    return True


def _attach(name: str, *, multi_queue: bool) -> tuple[int, str]:
    """Open one queue; return its descriptor and the interface's name."""
    try:
        return _open_queue(name, multi_queue=multi_queue)
    except OSError as error:
        if error.errno == errno.EINVAL and _can_attach(name, multi_queue=not multi_queue):
            raise QueueMismatch(name, multi_queue=not multi_queue) from error
        raise ConfigureTap from _named(error, name)


def _can_attach(name: str, *, multi_queue: bool) -> bool:
    try:
        fd, _ = _open_queue(name, multi_queue=multi_queue)
    except OSError:
        return False
    os.close(fd)
    return True


def _open_queue(name: str, *, multi_queue: bool) -> tuple[int, str]:
    """:raises OSError: the kernel refused to attach."""
    try:
        fd = os.open(_TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OpenTun from error
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multi_queue else 0)
    request = _request(name, struct.pack("H", flags))
    try:
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError:
        os.close(fd)
        raise
    return fd, _name_in(request)


def _set_link(name: str, *, mac: str | None, mtu: int | None) -> None:
    """Set what differs from the wish; so an unprivileged user can attach to an interface that is ready."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mac is not None:
            wanted = struct.pack("H", _ARPHRD_ETHER) + bytes.fromhex(mac.replace(":", ""))
            _set(control, name, "MAC address", get=_SIOCGIFHWADDR, put=_SIOCSIFHWADDR, wanted=wanted)
        if mtu is not None:
            wanted = struct.pack("i", mtu)
            _set(control, name, "MTU", get=_SIOCGIFMTU, put=_SIOCSIFMTU, wanted=wanted)
        (flags,) = struct.unpack_from("H", _ask(control, name, "state", _SIOCGIFFLAGS), 16)
        wanted = struct.pack("H", flags | _IFF_UP)
        _set(control, name, "state", get=_SIOCGIFFLAGS, put=_SIOCSIFFLAGS, wanted=wanted)


def _set(control: socket.socket, name: str, setting: str, *, get: int, put: int, wanted: bytes) -> None:
    if _ask(control, name, setting, get)[16 : 16 + len(wanted)] != wanted:
        _ask(control, name, setting, put, wanted)


def _set_address(name: str, ip: str, mask: str | None) -> None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        address = socket.inet_pton(family, ip)
        netmask = None if mask is None else socket.inet_pton(family, mask)
    except OSError as error:
        raise TapSettingError(name, "IP address or netmask") from error
    with socket.socket(family, socket.SOCK_DGRAM) as control:
        if family is socket.AF_INET6:
            _set_ipv6(control, name, address, _prefix_length(netmask))
            return
        _ask(control, name, "IP address", _SIOCSIFADDR, _ipv4(address))
        if netmask is not None:
            _ask(control, name, "netmask", _SIOCSIFNETMASK, _ipv4(netmask))


def _ipv4(address: bytes) -> bytes:
    return struct.pack("HH4s8x", socket.AF_INET, 0, address)


def _set_ipv6(control: socket.socket, name: str, address: bytes, prefix_length: int) -> None:
    (index,) = struct.unpack_from("i", _ask(control, name, "IP address", _SIOCGIFINDEX), 16)
    request = struct.pack("16sIi", address, prefix_length, index)  # struct in6_ifreq
    try:
        fcntl.ioctl(control, _SIOCSIFADDR, request)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise TapSettingError(name, "IP address") from error


def _prefix_length(mask: bytes | None) -> int:
    if mask is None:
        return 128
    bits = f"{int.from_bytes(mask):0128b}"
    length = bits.count("1")
    if "1" in bits[length:]:
        raise InvalidNetmask
    return length


def _ask(control: socket.socket, name: str, setting: str, number: int, payload: bytes = b"") -> bytearray:
    request = _request(name, payload)
    try:
        fcntl.ioctl(control, number, request)
    except OSError as error:
        raise TapSettingError(name, setting) from error
    return request


def _request(name: str, payload: bytes = b"") -> bytearray:
    return bytearray(struct.pack("16s24s", name.encode(), payload))


def _name_in(request: bytearray) -> str:
    return bytes(request[:16]).split(b"\0", 1)[0].decode()


def _named(error: OSError, name: str) -> OSError:
    return OSError(error.errno, error.strerror, name)
