"""Snapshot, restore and migration over the REST interface of the real program.

On the fake engine; with QEMU: test_snapshot.py and test_migration.py.
"""

from __future__ import annotations

import os
import threading

import pytest

from support.wait import wait_until

SOON_S = 20.0


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    return folder


@pytest.fixture
def in_threads():
    """Start a call beside the test; it is waited for in the end."""
    threads: list[threading.Thread] = []

    def start(call) -> None:
        threads.append(threading.Thread(target=call))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(SOON_S)


def test_vm_moves_from_program_to_program(
    fake_engine, cloudvmm_server, vm_booted, tmp_path, in_threads, server
):
    destination = cloudvmm_server()
    url = f"unix:{tmp_path}/m"
    before = vm_booted.get("vm.info")
    with destination.vmm.second() as other:
        in_threads(lambda: other.put("vm.receive-migration", {"receiver_url": url}, expect=204))
        wait_until(lambda: os.path.exists(tmp_path / "m"), "the destination listens", timeout_s=SOON_S)
        assert destination.vmm.get("vmm.ping")["version"]

        vm_booted.put("vm.send-migration", {"destination_url": url}, expect=204)

        assert server.wait_end(timeout_s=SOON_S) == 0
        wait_until(
            lambda: destination.vmm.exchange("GET", "vm.info").status == 200,
            "the VM is there",
            timeout_s=SOON_S,
        )
        wait_until(
            lambda: destination.vmm.get("vm.info")["state"] == "Running", "the VM runs", timeout_s=SOON_S
        )
    assert destination.vmm.get("vm.info")["device_tree"].keys() == before["device_tree"].keys()


def test_snapshot_of_one_program_is_restored_by_another(fake_engine, cloudvmm_server, vm_booted, folder):
    before = vm_booted.get("vm.info")
    vm_booted.put("vm.pause")
    vm_booted.put("vm.snapshot", {"destination_url": f"file://{folder}"})
    vm_booted.put("vm.delete")
    other = cloudvmm_server().vmm

    other.put("vm.restore", {"source_url": f"file://{folder}", "resume": True})

    after = other.get("vm.info")
    assert after["state"] == "Running"
    assert after["device_tree"].keys() == before["device_tree"].keys()
    assert {node: found.get("pci_bdf") for node, found in after["device_tree"].items()} == {
        node: found.get("pci_bdf") for node, found in before["device_tree"].items()
    }
