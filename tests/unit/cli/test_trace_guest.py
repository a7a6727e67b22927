"""What a serial port tells of a guest's way."""

from __future__ import annotations

import pytest

from cloudvmm.cli.trace.file import TraceFile
from cloudvmm.cli.trace.guest import GuestMarks, GuestWatch
from support.deadline import HOST_S
from support.trace import Trace
from support.wait import wait_until

MS = 1_000_000
STAMPED = [
    (b"[    0.000000] Linux version 6.1\r", 350),  # was kept until there was a console
    (b"[    0.200000] printk: console [ttyS0] enabled\r", 350),
    (b"[    0.300000] pci 0000:00:00.0\r", 412),
    (b"[    0.500000] Run /init as init process\r", 603),
]
READY = (b"cloudvmm-guest ready uptime=0.75\r", 860)


def marks_of(lines, *, run_ms=100):
    marks = GuestMarks(run_ms * MS)
    for line, at_ms in lines:
        marks.take(line, at_ms * MS)
    return [(name, begun_ns // MS, ended_ns // MS) for name, begun_ns, ended_ns in marks.spans()]


@pytest.mark.parametrize(
    ("lines", "spans"),
    [
        (
            [*STAMPED, READY],
            [
                ("guest boots", 100, 860),
                ("firmware", 100, 103),
                ("kernel", 103, 603),
                ("init", 603, 860),
            ],
        ),
        ([READY], [("guest boots", 100, 860), ("firmware", 100, 110), ("kernel and init", 110, 860)]),
        (STAMPED, [("firmware", 100, 103), ("kernel", 103, 603)]),
        (STAMPED[:2], [("firmware", 100, 150)]),
        ([(b"SeaBIOS (version 1.16)", 200)], []),
    ],
)
def test_pieces_follow_each_other(lines, spans):
    assert marks_of(lines) == spans


def test_kernel_does_not_begin_before_the_guest_runs():
    assert marks_of([(b"cloudvmm-guest ready uptime=9.00", 860)])[1] == ("firmware", 100, 100)


def test_only_what_comes_after_the_boot_counts(tmp_path):
    path, serial = tmp_path / "trace", tmp_path / "serial"
    serial.write_bytes(b"cloudvmm-guest ready uptime=0.01\n")
    trace = TraceFile(str(path))
    watch = GuestWatch(trace, str(serial))
    watch.start()
    with serial.open("ab") as file:
        file.write(b"cloudvmm-guest ready upti")
        file.flush()
        file.write(b"me=0.00\n")
    wait_until(lambda: b"guest boots" in path.read_bytes(), "the guest is ready", timeout_s=HOST_S)
    trace.close()
    assert {span.row for span in Trace(path).spans} == {"guest"}


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_serial_port_that_cannot_be_read_is_not_told_of(make, tmp_path):
    make(tmp_path / "serial")
    trace = TraceFile(str(tmp_path / "trace"))
    watch = GuestWatch(trace, str(tmp_path / "serial"))
    watch.start()
    trace.close()
    assert Trace(tmp_path / "trace").spans == []
