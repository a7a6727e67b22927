"""A guest goes on at its destination before all of its memory is there, and has all that it had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.host import userfault
from support.booted import MIB, Booted, make_image, vm_config
from support.certificate import Authority
from support.deadline import GUEST_S
from support.proxy import Proxy
from support.traveller import HOST, Traveller, receiving, tcp_url
from support.wait import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(userfault.refusal() is not None, reason="The kernel refuses userfaultfd"),
]

POSTCOPY = {"memory_mode": "Postcopy"}
SLOW = 10 * MIB
LOSSES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("postcopy")


@pytest.fixture(scope="module")
def traveller(folder: Path) -> Iterator[Traveller]:
    disk = make_image(folder / "disk", 4 * MIB)
    config = vm_config(disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}])
    with contextlib.ExitStack() as undo:
        traveller = Traveller(folder, config, undo)
        traveller.load()
        yield traveller
        traveller.rest(disk)


def test_guest_goes_on_before_its_memory_is_there(traveller: Traveller) -> None:
    source = traveller.place
    traveller.flood()
    told = traveller.move(tcp_url(), POSTCOPY, **POSTCOPY, downtime_ms=1)
    traveller.calm()

    assert told["phase"] == "Finished"
    assert told["transferred_bytes"] > 16 * MIB
    assert 0 < told["downtime_ms"] < told["elapsed_ms"]
    names = source.events.names()
    assert names.index("vm/postcopy-migration-completed") < names.index("vm/migration-finished")
    traveller.check()

    told = traveller.move(tcp_url())
    assert told["phase"] == "Finished"
    traveller.check()


def test_memory_that_follows_is_encrypted_as_all_else_is(traveller: Traveller, tmp_path: Path) -> None:
    tls = {"tls_dir": Authority(tmp_path / "ca", HOST).tls_dir}
    traveller.flood()
    told = traveller.move(tcp_url(), {**POSTCOPY, **tls}, **POSTCOPY, **tls, downtime_ms=1)
    traveller.calm()

    assert told["phase"] == "Finished"
    traveller.check()


def begin(traveller: Traveller, link: Proxy, url: str, *, expect: int = 204) -> tuple[Booted, Any]:
    """Move over `link` and return where to, and what waits for its answer, once the guest runs there."""
    source, target = traveller.place, traveller.next_place()
    arrive = receiving(target, url, POSTCOPY, expect=expect)
    early = {"timeout_s": 1, "timeout_strategy": "Ignore"}
    source.vmm.put("vm.send-migration", {"destination_url": link.url, **POSTCOPY, **early}, expect=204)
    for place in (source, target):
        wait_until(
            lambda place=place: place.vmm.get("vm.migration-progress")["phase"] == "Postcopy",
            "the guest runs there",
            timeout_s=GUEST_S,
        )
    return target, arrive


@pytest.mark.long
def test_lost_connection_is_made_anew_and_nothing_calls_it_off(traveller: Traveller) -> None:
    url = tcp_url()
    source = traveller.place
    with Proxy(HOST, int(url.rpartition(":")[2]), bytes_per_s=SLOW) as link:
        target, arrive = begin(traveller, link, url)
        assert target.info()["state"] == "Running"
        for place in (source, target):
            assert "cannot be cancelled any more" in place.vmm.put("vm.cancel-migration", expect=500)[-1]

        for _ in range(LOSSES):
            before = link.count
            link.cut()
            wait_until(lambda before=before: link.count > before, "another connection", timeout_s=GUEST_S)

        arrive()
        source.server.wait_end(timeout_s=GUEST_S)
        assert source.server.stderr.count("is tried again") >= LOSSES
    traveller.place = target
    target.open_shell()
    target.wait_ready()
    traveller.check()


@pytest.mark.long
def test_guest_of_which_a_half_dies_does_not_go_on_where_it_came_from(tmp_path: Path) -> None:
    url = tcp_url()
    disk = make_image(tmp_path / "disk", 4 * MIB)
    config = vm_config(disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}])
    with contextlib.ExitStack() as undo:
        traveller = Traveller(tmp_path, config, undo)
        traveller.load()
        source = traveller.place
        with Proxy(HOST, int(url.rpartition(":")[2]), bytes_per_s=SLOW) as link:
            target, _ = begin(traveller, link, url, expect=500)
            target.server.kill()
        source.events.wait("vm/migration-failed", timeout_s=2 * GUEST_S)  # it tries to connect until then
        assert source.info()["state"] == "Paused"
        assert "must not be resumed where it came from" in source.server.stderr
        assert "has gone on in the other VMM" in source.vmm.put("vm.resume", expect=500)[-1]
        source.vmm.put("vm.delete")
