"""`--gdb`: a real gdb stops a real guest, looks into it and lets it go on, and the VM's state says so."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.booted import Booted, serving, vm_config
from support.deadline import BOOT_S, GUEST_S
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

RESET_VECTOR = 0xFFF0
PLACE = "__x64_sys_sync"


class Gdb:
    """Runs gdb on the socket at `path`; what it is told to do ends by itself."""

    def __init__(self, path: Path) -> None:
        program = shutil.which("gdb")
        if program is None:
            pytest.skip("gdb is missing")
        self._start = [program, "-nx", "-batch", "-ex", "set confirm off", "-ex", f"target remote {path}"]

    def begin(self, *commands: str) -> subprocess.Popen[str]:
        words = [word for command in commands for word in ("-ex", command)]
        return subprocess.Popen(
            [*self._start, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *commands: str) -> str:
        return said_by(self.begin(*commands))


def said_by(gdb: subprocess.Popen[str]) -> str:
    with gdb:
        try:
            said, _ = gdb.communicate(timeout=BOOT_S)
        except subprocess.TimeoutExpired:
            gdb.kill()
            raise
    assert gdb.returncode == 0, said
    return said


def wait_for_state(vm: Booted, state: str) -> None:
    wait_until(lambda: vm.info()["state"] == state, f"the state {state}", timeout_s=GUEST_S)


def test_gdb_holds_a_guest_and_lets_it_go(tmp_path: Path) -> None:
    socket, at_breakpoint, go_on = tmp_path / "gdb", tmp_path / "hit", tmp_path / "go"
    gdb = Gdb(socket)
    with serving(tmp_path / "run", "--gdb", f"path={socket}") as vm:
        vm.vmm.put("vm.create", vm_config(gdb=True))
        vm.open_shell()
        vm.vmm.put("vm.boot", expect=204)
        assert vm.info()["state"] == "BreakPoint"
        assert vm.vmm.put("vm.pause", expect=500)[-1].endswith("InvalidStateTransition(BreakPoint, Paused)")

        assert f"= {RESET_VECTOR:#x}" in gdb.run("print /x $rip", "detach")
        wait_for_state(vm, "Running")
        vm.wait_ready()

        address = vm.run(f"grep ' {PLACE}$' /proc/kallsyms").split()[0]
        vm.run("(while :; do sync; usleep 50000; done) >/dev/null 2>&1 & echo $! >/tmp/busy")
        waiting = f"shell touch {at_breakpoint}; until [ -e {go_on} ]; do sleep 0.05; done"
        session = gdb.begin(f"hbreak *0x{address}", "continue", "print /x $rip", waiting, "delete", "detach")
        try:
            wait_until(
                lambda: at_breakpoint.exists() or session.poll() is not None, "a hit", timeout_s=GUEST_S
            )
            wait_for_state(vm, "BreakPoint")
        finally:
            go_on.touch()
        assert f"= 0x{address}" in said_by(session)
        wait_for_state(vm, "Running")
        vm.run("kill $(cat /tmp/busy)")

        vm.vmm.put("vm.pause", expect=204)
        gdb.run("detach")
        wait_for_state(vm, "Running")

        gdb.run("disconnect")  # which leaves it as it stands
        wait_for_state(vm, "BreakPoint")
        vm.vmm.put("vm.resume", expect=204)
        assert vm.run("echo on") == "on"

        vm.vmm.put("vm.reboot", expect=204)
        assert vm.info()["state"] == "BreakPoint"
        assert f"= {RESET_VECTOR:#x}" in gdb.run("print /x $rip", "detach")
        vm.wait_ready()
    assert not socket.exists()


def test_vmm_ends_while_its_guest_waits_for_a_debugger(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as vm:
        vm.vmm.put("vm.create", vm_config(gdb=True))
        vm.vmm.put("vm.boot", expect=204)
        assert (
            vm.vmm.put("vm.delete", expect=500)[-1] == "invalid VM state transition: BreakPoint to Shutdown"
        )


def test_socket_that_cannot_be_had_is_told_in_the_log(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    with serving(tmp_path / "run", "--gdb", f"path={taken}") as vm:
        assert "Failed to create a Unix domain socket listener" in vm.server.stderr
    assert taken.exists()
