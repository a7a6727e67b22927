"""Megabytes from the guest through each way out: whole where somebody takes it, its end where nobody does.

A boot sector counts on the serial port and on the debug port at the same time, so what arrives on one of them
tells how far the guest is. Neither waits for the other.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting
from support.deadline import BOOT_S, HOST_S
from support.machine_code import counted, counting_boot_sector
from support.vm import choose_engine
from support.wait import wait_until

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
RING_BYTES = MIB

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not SEABIOS.exists(), reason=f"needs {SEABIOS}, of the package seabios"),
]


@pytest.fixture(
    scope="module",
    params=[3 * MIB // 2, pytest.param(10 * MIB, marks=pytest.mark.long)],
    ids=lambda size: f"{size / MIB:g}MiB",
)
def text(request: pytest.FixtureRequest) -> bytes:
    """What the guest writes: more than is kept, whatever the kernel keeps besides."""
    return counted(request.param // 4)


def disk_that_counts(folder: Path, text: bytes) -> Path:
    disk = folder / "boot.raw"
    disk.write_bytes(counting_boot_sector(len(text) // 4).ljust(MIB, b"\0"))
    return disk


@contextlib.contextmanager
def counting(
    folder: Path, text: bytes, serial: dict[str, Any], debug_console: dict[str, Any]
) -> Iterator[Booted]:
    """Boot a guest that counts; return at once."""
    disk = disk_that_counts(folder, text)
    config = {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 64 * MIB},
        "payload": {"firmware": str(SEABIOS)},
        "disks": [{"path": str(disk), "image_type": "Raw"}],
        "console": {"mode": "Off"},
        "serial": serial,
        "debug_console": debug_console,
    }
    with booting(folder / "vm", config, shell=None) as vm:
        yield vm


def wait_counted(path: Path, text: bytes) -> None:
    wait_until(lambda: tail(path, 8) == text[-8:], f"the end in {path}", timeout_s=BOOT_S)
    assert own(path.read_bytes(), text) == text


def tail(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read()


def read_all(fd: int, size: int, *, timeout_s: float = BOOT_S) -> bytes:
    """Read until `size` bytes are there, or none come for `timeout_s`."""
    found = bytearray()
    while len(found) < size and select.select([fd], [], [], timeout_s)[0]:
        piece = os.read(fd, 65536)
        assert piece, f"The end after {len(found)} bytes"
        found += piece
    return bytes(found)


def own(found: bytes, text: bytes) -> bytes:
    """Cut off what the firmware has said before the guest counted."""
    return found[found.index(text[:256]) :]


def test_readers_that_begin_late_get_every_byte_of_what_is_kept_for_them(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "serial.sock"
    with (
        counting(tmp_path, text, {"mode": "Socket", "socket": str(path)}, {"mode": "Pty"}) as vm,
        contextlib.ExitStack() as ending,
    ):
        fd = os.open(vm.config()["debug_console"]["file"], os.O_RDONLY | os.O_NOCTTY)
        ending.callback(os.close, fd)
        client = ending.enter_context(socket.socket(socket.AF_UNIX))
        debug = read_all(fd, RING_BYTES // 2)
        client.connect(str(path))
        serial = bytearray()
        while not serial.endswith(text[-8:]) or not debug.endswith(text[-8:]):
            readable, _, _ = select.select([fd, client], [], [], HOST_S)
            assert readable, f"Silence after {len(serial)} and {len(debug)} bytes"
            if client in readable:
                serial += client.recv(65536)
            if fd in readable:
                debug += os.read(fd, 65536)
        assert own(bytes(serial), text) == own(debug, text) == text


def test_socket_without_a_client_keeps_the_last_mebibyte_and_holds_nothing_up(
    tmp_path: Path, text: bytes
) -> None:
    path, debug = tmp_path / "serial.sock", tmp_path / "debug"
    with (
        counting(
            tmp_path, text, {"mode": "Socket", "socket": str(path)}, {"mode": "File", "file": str(debug)}
        ),
        socket.socket(socket.AF_UNIX) as client,
    ):
        wait_counted(debug, text)
        client.connect(str(path))
        assert read_all(client.fileno(), RING_BYTES, timeout_s=HOST_S) == text[-RING_BYTES:]
        assert not select.select([client], [], [], 0.2)[0]


def test_pty_without_a_reader_keeps_its_start_and_the_last_mebibyte_and_holds_nothing_up(
    tmp_path: Path, text: bytes
) -> None:
    serial = tmp_path / "serial"
    with counting(tmp_path, text, {"mode": "File", "file": str(serial)}, {"mode": "Pty"}) as vm:
        wait_counted(serial, text)
        fd = os.open(vm.config()["debug_console"]["file"], os.O_RDONLY | os.O_NOCTTY)
        try:
            kept = b""
            while not kept.endswith(text[-8:]):
                kept += read_all(fd, 1)
        finally:
            os.close(fd)
    assert kept[-RING_BYTES:] == text[-RING_BYTES:]
    start = own(kept[:-RING_BYTES], text)
    assert text.startswith(start)
    assert len(start) <= RING_BYTES // 8


def test_pipe_as_the_terminal_gets_every_byte(tmp_path: Path, text: bytes) -> None:
    disk = disk_that_counts(tmp_path, text)
    words = [
        sys.executable,
        "-m",
        "cloudvmm.cli.main",
        *choose_engine("qemu").flags,
        "--firmware",
        str(SEABIOS),
    ]
    words += ["--disk", f"path={disk},image_type=raw", "--serial", "tty", "--console", "off"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            found = b""
            while not found.endswith(text[-8:]):
                found += read_all(process.stdout.fileno(), 1)
        finally:
            process.terminate()
            process.wait(HOST_S)
    assert own(found, text) == text
