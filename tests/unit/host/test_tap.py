"""TAP interfaces, in a network namespace of their own."""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloudvmm.host.tap import (
    ConfigureTap,
    HeaderSize,
    InvalidNetmask,
    InvalidTapName,
    QueueMismatch,
    TapSettingError,
    interface_of,
    open_tap,
)

CLONE_NEWNET = 0x4000_0000
TUNGETVNETHDRSZ, TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
TIMEOUT_S = 10

InNamespace = Callable[[Callable[[], Any]], Any]

pytestmark = pytest.mark.root


@pytest.fixture
def inside() -> Iterator[InNamespace]:
    """Run a function in a thread that has a fresh network namespace."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(enter_namespace).result(TIMEOUT_S)
        yield lambda work: thread.submit(work).result(TIMEOUT_S)


def enter_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        pytest.skip(f"No new network namespace: {os.strerror(ctypes.get_errno())}")


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def ip(*words: str) -> str:
    command = ["ip", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


def test_new_interface_has_what_was_asked_for_and_is_up(inside):
    tap = inside(
        lambda: open_tap("t0", ip="10.1.2.3", mask="255.255.255.0", mac="2e:00:00:00:00:07", mtu=1400)
    )
    shown = inside(lambda: ip("addr", "show", "t0"))
    tap.close()
    assert tap.created
    assert "10.1.2.3/24" in shown
    assert "2e:00:00:00:00:07" in shown
    assert "mtu 1400" in shown
    assert ",UP" in shown or "<UP" in shown


def test_new_interface_takes_an_ipv6_address(inside):
    tap = inside(lambda: open_tap("t0", ip="fd00::1", mask="ffff:ffff:ffff:ffff::"))
    shown = inside(lambda: ip("-6", "addr", "show", "t0"))
    tap.close()
    assert "fd00::1/64" in shown


def test_kernel_chooses_a_name_of_the_reference(inside):
    first = inside(lambda: open_tap(None))
    second = inside(lambda: open_tap(None))
    names = {first.name, second.name}
    first.close()
    second.close()
    assert names == {"vmtap0", "vmtap1"}


def test_created_interface_goes_away_with_its_last_queue(inside):
    tap = inside(lambda: open_tap("t0", queue_pairs=2))
    assert len(tap.fds) == 2
    os.close(tap.fds.pop())
    assert "t0" in inside(interfaces)
    tap.close()
    assert "t0" not in inside(interfaces)


def test_existing_interface_keeps_its_address_and_survives(inside):
    inside(lambda: ip("tuntap", "add", "t0", "mode", "tap"))
    inside(lambda: ip("addr", "add", "10.9.9.9/24", "dev", "t0"))
    tap = inside(lambda: open_tap("t0", ip="10.1.2.3", mask="255.255.255.0", mtu=1300))
    shown = inside(lambda: ip("addr", "show", "t0"))
    tap.close()
    assert not tap.created
    assert "10.9.9.9/24" in shown
    assert "10.1.2.3" not in shown
    assert "mtu 1300" in shown
    assert "t0" in inside(interfaces)


@pytest.mark.parametrize(("made_with", "queue_pairs"), [((), 2), (("multi_queue",), 1)])
def test_existing_interface_with_other_queues_is_refused(inside, made_with, queue_pairs):
    inside(lambda: ip("tuntap", "add", "t0", "mode", "tap", *made_with))
    with pytest.raises(QueueMismatch, match="t0"):
        inside(lambda: open_tap("t0", queue_pairs=queue_pairs))


def test_interface_that_is_no_tap_is_refused_with_its_name(inside):
    with pytest.raises(ConfigureTap) as caught:
        inside(lambda: open_tap("lo"))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.filename == "lo"


def test_interface_in_use_is_refused(inside):
    tap = inside(lambda: open_tap("t0"))
    with pytest.raises(ConfigureTap):
        inside(lambda: open_tap("t0"))
    tap.close()


def test_failure_leaves_neither_interface_nor_descriptor(inside):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidNetmask):
        inside(lambda: open_tap("t0", ip="fd00::1", mask="ffff:0:ffff::"))
    with pytest.raises(TapSettingError, match="IP address"):
        inside(lambda: open_tap("t1", ip="10.0.0.300", mask="255.0.0.0"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert inside(interfaces) == ["lo"]


@pytest.mark.parametrize("name", ["", "a-name-of-16-byte", "a/b", "a\0b"])
def test_impossible_name_is_refused(name):
    with pytest.raises(InvalidTapName):
        open_tap(name)


def test_interface_of_names_a_queue_in_our_namespace_only(inside):
    tap = inside(lambda: open_tap("t0"))
    assert inside(lambda: interface_of(tap.fds[0])) == "t0"
    assert interface_of(tap.fds[0]) is None
    tap.close()


def test_interface_of_anything_else_is_none():
    with open(os.devnull, "rb") as file:
        assert interface_of(file.fileno()) is None


def test_size_of_the_header_is_kept(inside):
    def work() -> tuple[int, int]:
        tap = open_tap("kept")
        try:
            size = HeaderSize(tap.fds[0])
            before = header_bytes(tap.fds[0])
            fcntl.ioctl(tap.fds[0], TUNSETVNETHDRSZ, struct.pack("i", before + 2))
            assert header_bytes(tap.fds[0]) == before + 2
            size.keep()
            return before, header_bytes(tap.fds[0])
        finally:
            tap.close()

    before, after = inside(work)
    assert before == after


def header_bytes(fd: int) -> int:
    return struct.unpack("i", fcntl.ioctl(fd, TUNGETVNETHDRSZ, bytes(4)))[0]


def test_queues_are_non_blocking_close_on_exec_and_speak_vnet_headers(inside):
    tap = inside(lambda: open_tap("t0"))
    (flags,) = struct.unpack_from("H", inside(lambda: fcntl.ioctl(tap.fds[0], 0x800454D2, bytes(40))), 16)
    assert not os.get_blocking(tap.fds[0])
    assert not os.get_inheritable(tap.fds[0])
    assert flags & 0x4000
    tap.close()
