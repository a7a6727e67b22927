"""`--trace` with a real guest: what a boot is made of, in QEMU and in the guest."""

from __future__ import annotations

import pytest

from support.booted import default_guest
from support.deadline import BOOT_S
from support.server import Server
from support.trace import Trace
from support.wait import wait_until

pytestmark = pytest.mark.qemu

READY = b"cloudvmm-guest ready"
OF_A_BUILD = {
    "check the config",
    "look at the kernel",
    "open images, RAM and devices",
    "write the command line",
    "start QEMU",
}


def config(serial):
    guest = default_guest()
    return {
        "payload": {
            "kernel": guest.kernel,
            "initramfs": guest.initramfs,
            "cmdline": "console=ttyS0 panic=-1",
        },
        "memory": {"size": 256 << 20},
        "serial": {"mode": "File", "file": str(serial)},
        "console": {"mode": "Null"},
    }


def test_boot_is_made_of_its_pieces(tmp_path):
    serial, path = tmp_path / "serial", tmp_path / "trace.json"
    server = Server(tmp_path / "server", ["--accel", "tcg", "--trace", str(path)])
    server.wait_ready()
    server.vmm.put("vm.create", config(serial))
    server.vmm.put("vm.boot")
    wait_until(lambda: READY in serial.read_bytes(), "the guest is ready", timeout_s=BOOT_S)
    wait_until(lambda: b"guest boots" in path.read_bytes(), "its way is told", timeout_s=BOOT_S)
    server.vmm.put("vmm.shutdown")
    server.check_end()

    trace = Trace(path)
    assert trace.tangled() == []
    boot, build, run = map(trace.one, ("PUT vm.boot", "build", "boot"))
    assert boot.holds(build)
    assert boot.holds(run)
    assert {span.name for span in trace.inside(build)} >= OF_A_BUILD
    assert {span.name for span in trace.inside(trace.one("start QEMU"))} == {"spawn", "QMP handshake"}
    for parent in (build, trace.one("start QEMU"), run):
        assert sum(span.took_us for span in trace.inside(parent)) <= parent.took_us + 1

    whole = trace.one("guest boots")
    pieces = [trace.one(name) for name in ("firmware", "kernel", "init")]
    assert all(span.row == "guest" for span in (whole, *pieces))
    assert run.begun_us < whole.begun_us <= run.ended_us
    assert sum(piece.took_us for piece in pieces) == pytest.approx(whole.took_us, abs=1)
    assert all(piece.took_us > 0 for piece in pieces)
