"""`cloudvmm upgrade`: a new manager and a new QEMU under a guest that goes on, at the same API socket."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.attack import spend
from support.booted import MIB, Booted, booting, make_image, serving, vm_config
from support.deadline import GUEST_S, HOST_S
from support.namespace import ip, network_namespace, ping
from support.qemu import find_qemu
from support.server import Server
from support.traveller import begin_load, check_load, end_load
from support.vm import choose_engine
from support.vmm import Vmm
from support.wait import wait_until

HERE, GUEST = "10.98.0.1", "10.98.0.10"
SHARED = {"size": 256 * MIB, "shared": True}
LOST_S = 15.0  # that the guest, and whoever asks, may have to wait
LAST_MOMENT_S = 0.4


class Caller(threading.Thread):
    """Asks whoever is at `path` who he is, again and again, each time over a new connection."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.refused: list[OSError] = []
        self.longest_s = 0.0
        self._path = path
        self._end = threading.Event()

    def run(self) -> None:
        last_s = time.monotonic()
        while not self._end.wait(0.002):
            vmm = Vmm(self._path)
            try:
                vmm.connect().close()
                vmm.get("vmm.ping")
            except (ConnectionRefusedError, FileNotFoundError) as error:
                self.refused.append(error)
            except (OSError, EOFError):
                continue  # accepted by the one that was about to end
            finally:
                vmm.close()
            now_s = time.monotonic()
            self.longest_s, last_s = max(self.longest_s, now_s - last_s), now_s

    def finish(self) -> None:
        self._end.set()
        self.join(HOST_S)


@contextlib.contextmanager
def calling(path: str) -> Iterator[Caller]:
    caller = Caller(path)
    caller.start()
    try:
        yield caller
    finally:
        caller.finish()


def wait_in_place(server: Server) -> None:
    """Return once it is `server` that answers at its path."""

    def is_there() -> bool:
        vmm = Vmm(server.socket_path)
        try:
            return vmm.get("vmm.ping")["pid"] == server.pid
        except (OSError, EOFError):
            return False
        finally:
            vmm.close()

    wait_until(is_there, "the new one answers", timeout_s=GUEST_S)
    server.vmm.close()  # which may be connected to the one that was there before


def uptime(vm: Booted) -> float:
    return float(vm.run("cat /proc/uptime").split()[0])


@pytest.mark.qemu
@pytest.mark.root
@pytest.mark.parametrize("version", ["path", pytest.param("7.2", marks=pytest.mark.long)])
def test_guest_goes_on_under_a_new_manager_and_another_qemu(tmp_path: Path, version: str) -> None:
    disk, serial = make_image(tmp_path / "disk", 4 * MIB), tmp_path / "serial.socket"
    config = vm_config(
        memory=SHARED,
        disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}],
        net=[{"id": "n", "tap": "staying"}],
        serial={"mode": "Socket", "socket": str(serial)},
    )
    with network_namespace(), contextlib.ExitStack() as undo:
        ip("tuntap add name staying mode tap")
        ip(f"addr add {HERE}/24 dev staying")
        ip("link set staying up")
        old = undo.enter_context(booting(tmp_path / "old", config, "--qemu", find_qemu(version, tmp_path)))
        old.run(f"ifconfig eth0 {GUEST} netmask 255.255.255.0 up")
        begin_load(old)
        fail_to_upgrade(old, tmp_path / "failed")
        old_qemu = old.qemu_pid()
        earliest_s, before, latest_s = time.monotonic(), uptime(old), time.monotonic()
        with calling(old.server.socket_path) as caller:
            new = undo.enter_context(serving(tmp_path / "new", succeeds=old))
            wait_in_place(new.server)
            assert old.server.wait_end(timeout_s=GUEST_S) == 0

        assert caller.refused == []
        assert caller.longest_s < LOST_S
        assert new.qemu_pid() != old_qemu
        new.open_shell()
        new.wait_ready()
        since_s, after, until_s = time.monotonic(), uptime(new), time.monotonic()
        assert since_s - latest_s - LOST_S < after - before < until_s - earliest_s + 1
        check_load(new)
        ping(GUEST)
        told = new.vmm.get("vm.migration-progress")
        assert told["transferred_bytes"] < 4 * MIB
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(serial))
        end_load(new, disk)
        new.vmm.put("vm.delete")
        assert not serial.exists()
        assert sorted(os.listdir(old.server.folder)) == ["api", "api.lock"]


def fail_to_upgrade(old: Booted, folder: Path) -> None:
    """Try with a QEMU that does not start; all is as it was."""
    before = sorted(os.listdir(old.server.folder))
    with serving(folder, "--qemu", "/bin/false", succeeds=old) as new:
        new.server.expected_status = 1
        assert new.server.wait_end(timeout_s=GUEST_S) == 1
        assert "The VM could not be taken over, and stays where it is" in new.server.stderr
    assert old.info()["state"] == "Running"
    assert old.vmm.get("vmm.ping")["pid"] == old.server.pid
    assert sorted(os.listdir(old.server.folder)) == before


class Fakes:
    """Servers on the fake engine, whose VM needs no time."""

    def __init__(self, folder: Path, undo: contextlib.ExitStack) -> None:
        self._folder = folder
        self._undo = undo
        self._flags = choose_engine("fake").flags

    def old(self, *, name: str = "old", **config: object) -> Server:
        server = self._start(name)
        server.wait_ready()
        payload = choose_engine("fake").payload(self._folder)
        server.vmm.put("vm.create", {"payload": payload, "console": {"mode": "Off"}, **config})
        server.vmm.put("vm.boot")
        return server

    def new(self, old: Server, *, name: str = "new") -> Server:
        return self._start(name, succeeds=old)

    def _start(self, name: str, *, succeeds: Server | None = None) -> Server:
        server = Server(self._folder / name, self._flags, succeeds=succeeds)
        self._undo.callback(server.check_end)
        return server


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Fakes]:
    with contextlib.ExitStack() as undo:
        yield Fakes(tmp_path, undo)


@pytest.mark.parametrize("state", ["Running", "Paused"])
def test_vm_is_as_it_was(fakes: Fakes, state: str) -> None:
    old = fakes.old(memory=SHARED)
    if state == "Paused":
        old.vmm.put("vm.pause")
    config = old.vmm.get("vm.info")["config"]

    new = fakes.new(old)

    wait_in_place(new)
    assert old.wait_end() == 0
    told = new.vmm.get("vm.info")
    assert (told["state"], told["config"]) == (state, config)
    wait_until(
        lambda: sorted(os.listdir(old.folder)) == ["api", "api.lock"], "the place is tidy", timeout_s=HOST_S
    )


def test_vm_whose_memory_is_not_shared_stays(fakes: Fakes) -> None:
    old = fakes.old()

    new = fakes.new(old)

    new.expected_status = 1
    assert new.wait_end() == 1
    assert "The VM could not be taken over, and stays where it is" in new.stderr
    assert "shared" in new.stderr
    assert old.vmm.get("vm.info")["state"] == "Running"
    assert sorted(os.listdir(old.folder)) == ["api", "api.lock"]


def test_path_where_nobody_serves_is_refused(fakes: Fakes, tmp_path: Path) -> None:
    old = fakes.old(memory=SHARED)
    old.terminate()
    old.wait_end()

    new = fakes.new(old)

    new.expected_status = 1
    assert new.wait_end() == 1
    assert "did not reach a server" in new.stderr


def test_next_upgrade_follows_the_last(fakes: Fakes, tmp_path: Path) -> None:
    old = fakes.old(memory=SHARED)
    second = fakes.new(old)
    wait_in_place(second)
    assert old.wait_end() == 0
    third = Server(tmp_path / "third", choose_engine("fake").flags, succeeds=old)
    try:
        wait_in_place(third)
        assert second.wait_end() == 0
        assert third.vmm.get("vm.info")["state"] == "Running"
    finally:
        third.check_end()
    assert os.listdir(old.folder) == ["api.lock"]


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_vm_is_not_lost_with_a_new_one_that_is_killed(fakes: Fakes, tmp_path: Path, count: int) -> None:
    """At any moment: the old one goes on at its socket, is told how to, or has given its VM away."""
    chance, old = random.Random(count), fakes.old(memory=SHARED)
    for number in range(count):
        new = fakes.new(old, name=f"new{number}")
        wait_until(lambda new=new: has_begun(new), "the new one has begun", timeout_s=HOST_S)
        spend(chance.uniform(0, LAST_MOMENT_S))
        new.kill()
        new.wait_end()
        for left in set(os.listdir(old.folder)) - {"api", "api.lock", "api.previous"}:
            (old.folder / left).unlink()  # whoever is killed cannot remove its sockets
        if not wait_settled(old):
            assert old.wait_end() == 0
            for left in ("api", "api.previous"):
                (old.folder / left).unlink(missing_ok=True)
            old = fakes.old(name=f"old{number}", memory=SHARED)


def has_begun(new: Server) -> bool:
    return f"api.{new.pid}" in os.listdir(Path(new.socket_path).parent)


def wait_settled(old: Server) -> bool:
    """Wait until `old` has its VM back and runs it; return False where it has ended instead."""
    previous = f"{old.socket_path}.previous"
    path = previous if os.path.exists(previous) else old.socket_path

    def is_settled() -> bool:
        if not old.is_running:
            return True
        with contextlib.suppress(OSError, EOFError), contextlib.closing(Vmm(path)) as vmm:
            return vmm.exchange("GET", "vm.counters").status == 200
        return False

    wait_until(is_settled, "the old one has its VM back, or has ended", timeout_s=HOST_S)
    if not old.is_running:
        return False
    with contextlib.closing(Vmm(path)) as vmm:
        if vmm.get("vm.info")["state"] == "Paused":
            assert "then call vm.resume" in old.stderr
            vmm.put("vm.resume")
        assert vmm.get("vm.info")["state"] == "Running"
    if path == previous:
        os.replace(previous, old.socket_path)
    return True
