"""One guest under load goes every way that there is between two servers, and has all that it had.

test_migration_hosts.py has the same many times over, with a network.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, make_image, vm_config
from support.certificate import Authority
from support.deadline import GUEST_S
from support.proxy import Proxy
from support.traveller import HOST, Traveller, receiving, tcp_url
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

SLOW = 10 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def disk(folder: Path) -> Path:
    return make_image(folder / "disk", 4 * MIB)


@pytest.fixture(scope="module")
def traveller(folder: Path, disk: Path) -> Iterator[Traveller]:
    config = vm_config(
        memory={"size": 256 * MIB, "shared": True},
        disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}],
    )
    with contextlib.ExitStack() as undo:
        traveller = Traveller(folder, config, undo)
        traveller.load()
        yield traveller
        traveller.rest(disk)


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder / "ca", HOST)


def wait_for_passes(source: Booted) -> dict[str, Any]:
    def progress() -> dict[str, Any] | None:
        told: dict[str, Any] = source.vmm.get("vm.migration-progress")
        is_far = told.get("iteration", 0) >= 2 and told.get("dirty_bytes_per_s", 0) > 0
        return told if is_far else None

    return wait_until(progress, "the third pass over the memory", timeout_s=GUEST_S)


def test_memory_is_copied_over_a_unix_socket(traveller: Traveller, tmp_path: Path) -> None:
    told = traveller.move(f"unix:{tmp_path}/way")

    assert told["phase"] == "Finished"
    assert told["transferred_bytes"] > 16 * MIB
    assert 0 < told["downtime_ms"] < told["elapsed_ms"]
    traveller.check()


def held_memories(pid: int) -> int:
    """Return how many descriptors of a guest's memory the process has: one would outlive the VM."""
    folder = Path(f"/proc/{pid}/fd")
    return sum("cloudvmm-ram" in os.readlink(folder / name) for name in os.listdir(folder))


def test_memory_is_handed_over_and_not_copied(traveller: Traveller, tmp_path: Path) -> None:
    told = traveller.move(f"unix:{tmp_path}/way", local=True)

    assert told["transferred_bytes"] < 4 * MIB
    assert held_memories(traveller.place.server.pid) == 1
    traveller.check()


def test_all_goes_over_tls_and_several_connections(traveller: Traveller, authority: Authority) -> None:
    tls = {"tls_dir": authority.tls_dir}
    told = traveller.move(tcp_url(), tls, **tls, connections=3)

    assert told["transferred_bytes"] > 16 * MIB
    traveller.check()


def test_guest_that_writes_faster_than_the_link_carries(traveller: Traveller) -> None:
    """It is called off, given up after its time, and in the end stopped after its time."""
    url = tcp_url()
    source, target = traveller.place, traveller.next_place()
    traveller.flood()
    with Proxy(HOST, int(url.rpartition(":")[2]), bytes_per_s=SLOW) as link:
        arrive = receiving(target, url, {}, expect=500)
        source.vmm.put("vm.send-migration", {"destination_url": link.url, "downtime_ms": 1}, expect=204)
        told = wait_for_passes(source)
        assert (told["role"], told["phase"]) == ("Sender", "Sending")
        assert told["expected_downtime_ms"] > 1
        received = target.vmm.get("vm.migration-progress")
        assert (received["role"], received["phase"]) == ("Receiver", "Receiving")
        assert received["transferred_bytes"] > 0
        source.vmm.put("vm.cancel-migration", expect=204)
        assert arrive()
        source.events.wait("vm/migration-failed", timeout_s=GUEST_S)
        assert source.vmm.get("vm.migration-progress")["phase"] == "Cancelled"
        target.events.wait("vm/migration-receive-failed", timeout_s=GUEST_S)
        target.vmm.get("vm.info", expect=404)

        arrive = receiving(target, url, {}, expect=500)
        limits = {"downtime_ms": 1, "timeout_s": 1}
        source.vmm.put("vm.send-migration", {"destination_url": link.url, **limits}, expect=204)
        assert arrive()
        source.events.wait("vm/migration-failed", count=2, timeout_s=GUEST_S)
        assert "The migration did not come to its end within 1 s" in source.server.stderr
        assert source.info()["state"] == "Running"

        told = traveller.move(
            url, to=target, at=link.url, downtime_ms=1, timeout_s=2, timeout_strategy="Ignore"
        )
        assert told["elapsed_ms"] > 2000
    traveller.calm()
    traveller.check()


FAULTS = {
    "cut": lambda target, link: link.cut(),
    "kill the manager": lambda target, link: target.server.kill(),
    "kill QEMU": lambda target, link: [os.kill(target.qemu_pid(), signal.SIGKILL)],
    "call off there": lambda target, link: target.vmm.put("vm.cancel-migration", expect=204),
}


def has_qemu(server: Booted) -> bool:
    return any("qemu-system" in child.command for child in server.server.children())


@pytest.mark.parametrize("fault", FAULTS)
def test_guest_goes_on_where_the_way_or_the_destination_fails(traveller: Traveller, fault: str) -> None:
    """At a random moment while the memory is on its way: the link is too slow for it to be through."""
    source, target = traveller.place, traveller.next_place()
    url = tcp_url()
    failures = source.events.names().count("vm/migration-failed")
    with Proxy(HOST, int(url.rpartition(":")[2]), bytes_per_s=SLOW) as link:
        receiving(target, url, {}, expect=500)
        source.vmm.put("vm.send-migration", {"destination_url": link.url}, expect=204)
        wait_until(lambda: has_qemu(target), "the destination's QEMU", timeout_s=GUEST_S)
        threading.Event().wait(random.uniform(0.0, 1.0))

        FAULTS[fault](target, link)

        source.events.wait("vm/migration-failed", count=failures + 1, timeout_s=GUEST_S)
        if target.server.is_running:
            target.events.wait("vm/migration-receive-failed", timeout_s=GUEST_S)
            assert not has_qemu(target)
            target.vmm.get("vm.info", expect=404)
    wait_until(lambda: source.info()["state"] == "Running", "the guest runs on", timeout_s=GUEST_S)
    traveller.check()
