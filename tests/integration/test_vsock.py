"""The vsock device, between programs of the host and of a real guest. Its life is in the matrix of devices.

One guest serves most tests; each of them leaves its device as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, serving, vm_config
from support.caller import call, dial, listening_at, read_all, serve_at
from support.deadline import GUEST_S
from support.process import ProcessId, descendants_of
from support.shared import shared
from support.socat import payload_with_socat
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

STREAMS = 64
BULK_BYTES = 100 * MIB
BULK_S = 150.0
RSS_LIMIT_KIB = 32 * 1024
REASON = "Cannot create virtio-vsock backend"
BIND_REASON = "Error binding to the host-side Unix socket"
TAKEN = "Address already in use (os error 98)"


@pytest.fixture(scope="module", autouse=True)
def ours() -> None:
    """The back end is ours."""
    if shutil.which("vhost-device-vsock") is not None:
        pytest.skip("vhost-device-vsock is installed and serves; test_vsock_program.py is about that")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vsock")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return folder / "vsock"


@shared()
def shared_vm(folder: Path, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    config = vm_config(payload=payload_with_socat(folder), vsock=device(path))
    with booting(tmp_path_factory.mktemp("run"), config) as booted:
        yield booted


def device(path: Path, **members: Any) -> dict[str, Any]:
    return {"id": "sock", "cid": 42, "socket": str(path), **members}


def echo_at(vm: Booted, port: int) -> None:
    """Let a program of the guest listen at `port`, and send back what it is sent."""
    vm.run(f"(socat -t 30 VSOCK-LISTEN:{port},fork,backlog=128 PIPE >/dev/null 2>&1 &)")


def back_ends(vm: Booted) -> list[ProcessId]:
    return [each for each in descendants_of(vm.server.pid) if "cloudvmm.vsock" in each.command]


def remove(vm: Booted, device_id: str = "sock") -> None:
    before = vm.events.names().count("vm/device-removed")
    vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    vm.events.wait("vm/device-removed", count=before + 1, timeout_s=GUEST_S)


@pytest.fixture
def without(vm: Booted, path: Path) -> Iterator[Booted]:
    """The VM with its device removed, which it gets back."""
    remove(vm)
    yield vm
    if vm.config().get("vsock"):
        remove(vm)
    vm.vmm.put("vm.add-vsock", device(path), expect=200)


def test_guest_has_its_cid_and_the_host_a_port_of_its_own(vm, path):
    assert vm.config()["vsock"] == {"id": "sock", "pci_segment": 0, "cid": 42, "socket": str(path)}
    vm.run("(socat -u VSOCK-LISTEN:1500 SYSTEM:'echo $SOCAT_SOCKADDR >/tmp/cid' &)")
    with call(path, 1500) as stream:
        assert stream.port >= 1 << 30
        assert stream.ask(b"") == b""
    assert vm.run("cat /tmp/cid") == "42"


def test_snapshot_is_refused_once_in_the_words_of_qemu(vm, tmp_path):
    vm.vmm.put("vm.pause")
    *_, before, last = vm.vmm.put("vm.snapshot", {"destination_url": f"file://{tmp_path}"}, expect=500)
    assert "non-migratable device" in last
    assert last != before
    vm.vmm.put("vm.resume")


def test_host_sends_byte_for_byte(vm, path):
    vm.run("rm -f /tmp/sum; (socat -u -b 65536 VSOCK-LISTEN:2000 SYSTEM:'md5sum >/tmp/sum' &)")
    expected = hashlib.md5(usedforsecurity=False)
    with call(path, 2000, timeout_s=GUEST_S) as stream:
        stream.socket.settimeout(BULK_S)
        for _ in range(BULK_BYTES // MIB):
            data = os.urandom(MIB)
            stream.socket.sendall(data)
            expected.update(data)
        assert stream.ask(b"") == b""
    found = vm.run("until [ -s /tmp/sum ]; do usleep 20000; done; cut -c1-32 /tmp/sum")
    assert found == expected.hexdigest()


def test_guest_sends_byte_for_byte(vm, path):
    vm.run("head -c 1048576 /dev/urandom >/tmp/piece")
    piece = f"for i in $(seq {BULK_BYTES // MIB}); do cat /tmp/piece; done"
    with serve_at(path, 2001) as heard:
        vm.run(f"({piece}) | socat -u -b 65536 - VSOCK-CONNECT:2:2001", timeout_s=BULK_S)
        data = heard.get(timeout=GUEST_S)
    assert len(data) == BULK_BYTES
    expected = vm.run(f"({piece}) | md5sum | cut -c1-32", timeout_s=BULK_S)
    assert hashlib.md5(data, usedforsecurity=False).hexdigest() == expected


def test_many_streams_of_the_host_at_once(vm, path):
    echo_at(vm, 2002)
    with contextlib.ExitStack() as undo:
        streams = [undo.enter_context(call(path, 2002)) for _ in range(STREAMS)]
        assert len({stream.port for stream in streams}) == STREAMS
        said = [f"stream {number} ".encode() * 2000 for number in range(STREAMS)]
        heard: list[bytes] = [b""] * STREAMS

        def talk(number: int) -> None:
            heard[number] = streams[number].ask(said[number])

        threads = [threading.Thread(target=talk, args=(number,)) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUEST_S * 2)
        assert heard == said


def test_many_streams_of_the_guest_at_once(vm, path):
    def echo(connection: socket.socket) -> None:
        with connection:
            connection.sendall(read_all(connection))

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

    # The guest's kernel gives up after 2 s, in which an emulated guest on a busy host may not get that far.
    one = "socat -t 60 - VSOCK-CONNECT:2:2003,retry=30 </tmp/said | cmp - /tmp/said && echo same"
    with listening_at(path, 2003, backlog=4) as listener:
        listener.settimeout(None)  # one with a timeout is not woken by its end
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        vm.run("head -c 30000 /dev/urandom >/tmp/said")
        found = vm.run(f"for i in $(seq {STREAMS}); do ({one}) & done; wait", timeout_s=GUEST_S)
        listener.shutdown(socket.SHUT_RDWR)
        server.join(GUEST_S)
    assert found.split("\n") == ["same"] * STREAMS


def test_port_that_nobody_in_the_guest_listens_at_is_the_end(vm, path):
    connection, line = dial(path, 65000)
    connection.close()
    assert line == b""


@pytest.mark.parametrize(
    "make", [lambda place: None, lambda place: place.touch(), lambda place: dead_at(place)]
)
def test_port_that_nobody_on_the_host_serves_is_refused(vm, path, make):
    place = Path(f"{path}_2004")
    make(place)
    status, words = vm.shell.run("echo lost | socat - VSOCK-CONNECT:2:2004 2>&1", timeout_s=GUEST_S)
    place.unlink(missing_ok=True)
    assert (status, b"Connection reset by peer" in words) == (1, True)


def dead_at(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))


def test_host_that_hangs_up_is_the_end_for_the_guest(vm, path):
    vm.run("rm -f /tmp/heard; (socat -u VSOCK-LISTEN:2005 SYSTEM:'cat >/tmp/h; mv /tmp/h /tmp/heard' &)")
    with call(path, 2005) as stream:
        stream.socket.sendall(b"last words")
    assert vm.run("until [ -e /tmp/heard ]; do usleep 20000; done; cat /tmp/heard") == "last words"


def test_guest_that_is_killed_is_the_end_for_the_host(vm, path):
    vm.run("(socat -t 30 VSOCK-LISTEN:2006 PIPE & echo $! >/tmp/pid)")
    with call(path, 2006) as stream:
        stream.socket.sendall(b"x")
        assert stream.socket.recv(1) == b"x"
        vm.run("kill -9 $(cat /tmp/pid)")
        assert stream.socket.recv(1) == b""


def test_host_that_does_not_read_costs_no_memory_and_loses_nothing(vm, path):
    size = 4 * MIB
    (back_end,) = back_ends(vm)
    with listening_at(path, 2007) as listener:
        vm.run(f"(head -c {size} /dev/zero | socat -u -b 65536 - VSOCK-CONNECT:2:2007 &)")
        with listener.accept()[0] as connection:
            echo_at(vm, 2008)
            with call(path, 2008) as other:
                assert other.ask(b"goes past it") == b"goes past it"
            assert rss_kib(back_end.pid) < RSS_LIMIT_KIB
            assert len(read_all(connection)) == size


def rss_kib(pid: int) -> int:
    """Return the memory of a process that is its own alone; the guest's is shared."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def test_streams_live_through_a_pause(vm, path):
    echo_at(vm, 2009)
    with call(path, 2009) as stream:
        vm.vmm.put("vm.pause")
        stream.socket.sendall(b"sent meanwhile")
        vm.vmm.put("vm.resume")
        assert stream.ask(b"") == b"sent meanwhile"


def test_removal_ends_streams_socket_and_back_end(without, path):
    assert not path.exists()
    wait_until(lambda: back_ends(without) == [], "the back end is gone", timeout_s=GUEST_S)
    without.vmm.put("vm.add-vsock", device(path, id="other"), expect=200)
    echo_at(without, 2010)
    with call(path, 2010) as stream:
        remove(without, "other")
        assert stream.socket.recv(1) == b""
    assert without.config().get("vsock") is None


def test_second_device_is_refused_and_the_first_works_on(vm, path, folder):
    answer = vm.vmm.put("vm.add-vsock", device(folder / "second", id="second"), expect=500)
    assert answer[-1] == "Too many virtio-vsock devices"
    assert not (folder / "second").exists()
    echo_at(vm, 2011)
    with call(path, 2011) as stream:
        assert stream.ask(b"still here") == b"still here"


def live_at(place: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()
    return listener


BAD_PLACES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "file": ("place", lambda place: place.touch(), TAKEN),
    "folder": ("place", lambda place: place.mkdir(), TAKEN),
    "dangling link": ("place", lambda place: place.symlink_to("nowhere"), TAKEN),
    "dead socket": ("place", dead_at, TAKEN),
    "live socket": ("place", live_at, TAKEN),
    "no folder": ("none/place", lambda place: None, "No such file or directory (os error 2)"),
    "in a file": ("place/x", lambda place: place.parent.touch(), "Not a directory (os error 20)"),
    "long": ("p" * 120, lambda place: None, "AF_UNIX path too long"),
    "in /proc": ("/proc/place", lambda place: None, "No such file or directory (os error 2)"),
}


@pytest.mark.parametrize(("name", "make", "words"), BAD_PLACES.values(), ids=BAD_PLACES.keys())
def test_place_that_cannot_be_had_is_told_and_nothing_changes(without, tmp_path, name, make, words):
    place = tmp_path / name
    made = make(place)
    before = without.info()
    answer = without.vmm.put("vm.add-vsock", device(place), expect=500)
    assert answer[-3:] == [REASON, BIND_REASON, words]
    assert without.info() == before
    assert back_ends(without) == []
    if made is not None and isinstance(made, socket.socket):
        with socket.socket(socket.AF_UNIX) as client, made:
            client.connect(str(place))
    assert place.exists() or place.is_symlink() or made is None


def test_place_of_another_vm_is_told_and_that_one_works_on(vm, path, tmp_path):
    with serving(tmp_path / "other") as other:
        other.vmm.put("vm.create", vm_config(vsock=device(path)))
        answer = other.vmm.put("vm.boot", expect=500)
        assert answer[-3:] == [REASON, BIND_REASON, TAKEN]
        assert other.info()["state"] == "Created"
        assert back_ends(other) == []
    echo_at(vm, 2012)
    with call(path, 2012) as stream:
        assert stream.ask(b"mine") == b"mine"


def test_back_end_that_dies_takes_its_streams_and_nothing_else(vm, path):
    echo_at(vm, 2013)
    with call(path, 2013) as stream:
        (back_end,) = back_ends(vm)
        back_end.kill()
        assert stream.socket.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(path))
    vm.vmm.put("vm.pause")
    vm.vmm.put("vm.resume")
    assert vm.run("echo alive") == "alive"
    remove(vm)
    assert not path.exists()
    vm.vmm.put("vm.add-vsock", device(path), expect=200)
    echo_at(vm, 2014)
    with call(path, 2014) as stream:
        assert stream.ask(b"again") == b"again"


def test_mergeable_memory_is_refused_with_its_reason(tmp_path):
    with serving(tmp_path / "run") as booted:
        memory = {"size": 256 * MIB, "mergeable": True}
        booted.vmm.put("vm.create", vm_config(memory=memory, vsock=device(tmp_path / "vsock")))
        assert "needs shared memory" in booted.vmm.put("vm.boot", expect=500)[-1]
        assert not (tmp_path / "vsock").exists()
        assert back_ends(booted) == []


def test_deletion_takes_the_socket_along(tmp_path):
    path = tmp_path / "vsock"
    with serving(tmp_path / "run") as booted:
        booted.vmm.put("vm.create", vm_config(vsock=device(path)))
        booted.vmm.put("vm.boot")
        assert path.is_socket()
        assert path.stat().st_mode & 0o077 == 0
        booted.vmm.put("vm.delete")
        assert not path.exists()
        assert back_ends(booted) == []
