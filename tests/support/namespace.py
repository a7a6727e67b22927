"""Network namespaces and TAP interfaces of the tests' own, so that no test touches the machine's network."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.deadline import HOST_S
from support.wait import wait_until

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100

_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def network_namespace() -> Iterator[None]:
    """Put this thread, and every process that it starts, into a fresh network namespace.

    /sys goes on showing the old one, as it does for whoever enters a namespace by setns alone.
    """
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        pytest.skip("Needs root and /dev/net/tun, for a network namespace with a TAP interface")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_LIBC.unshare(CLONE_NEWNET))
        try:
            ip("link set lo up")
            _silence_ipv6()
            yield
        finally:
            _check(_LIBC.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


def _silence_ipv6() -> None:
    """Keep the kernel from sending what nobody asked for, which would disturb who counts packets."""
    for scope in ("all", "default"):
        switch = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        if switch.exists():
            switch.write_text("1")


def run(command: str) -> str:
    """Run the words of `command`; return what it prints."""
    return subprocess.run(command.split(), check=True, capture_output=True, text=True, timeout=HOST_S).stdout


def ip(command: str) -> str:
    """Run `ip` with the words of `command`; return what it prints."""
    return run(f"ip {command}")


def open_tap(name: str, *, queues: int = 1, has_header: bool = True) -> list[int]:
    """Return descriptors of a new TAP interface's queues; the caller closes them."""
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if has_header else 0)
    flags |= IFF_MULTI_QUEUE if queues > 1 else 0
    fds = []
    for _ in range(queues):
        fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        fcntl.ioctl(fds[-1], TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return fds


def ping(address: str, *, count: int = 3) -> None:
    """Send `count` ICMP echo requests and fail unless each is answered in time."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.settimeout(HOST_S)
        raw.connect((address, 0))
        for sequence in range(count):
            raw.send(_echo_request(sequence))
            while not _is_reply(raw.recv(2048), sequence):
                pass


def _echo_request(sequence: int) -> bytes:
    packet = struct.pack("!BBHHH", 8, 0, 0, 0xC10D, sequence) + b"cloudvmm"
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return packet[:2] + struct.pack("!H", ~total & 0xFFFF) + packet[4:]


def _is_reply(packet: bytes, sequence: int) -> bool:
    kind, _, _, identifier, number = struct.unpack_from("!BBHHH", packet, 20)
    return kind == 0 and identifier == 0xC10D and number == sequence


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Host:
    """A network namespace beside this thread's own: processes started within `entered` live there."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Put this thread there for as long as it lasts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_LIBC.setns(there, CLONE_NEWNET))
            try:
                yield
            finally:
                _check(_LIBC.setns(before, CLONE_NEWNET))
        finally:
            os.close(there)
            os.close(before)


@contextlib.contextmanager
def other_host() -> Iterator[Host]:
    """Give another network namespace, with nothing in it but its loopback."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        own = os.readlink("/proc/thread-self/ns/net")
        namespace = f"/proc/{holder.pid}/ns/net"
        wait_until(lambda: os.readlink(namespace) != own, "another network namespace", timeout_s=HOST_S)
        host = Host(holder.pid)
        with host.entered():
            ip("link set lo up")
            _silence_ipv6()
        yield host
    finally:
        holder.kill()
        holder.wait()
