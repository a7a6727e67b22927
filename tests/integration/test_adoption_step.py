"""Managers killed at each step of each command: the next one finishes it or takes it back, and says which.

Where `test_adoption_kill.py` strikes at random moments of what a real guest is asked for, here each moment at
which something outside the manager changes is met once. The VM is a bare one, whose guest nobody waits for.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.departure import Departures
from support.device.fs import virtiofsd_program
from support.latency import ADOPTION, LatencyLog
from support.stepwise import MIB, Case, SteppedArrival, Stepwise

pytestmark = [pytest.mark.qemu, pytest.mark.root]

VCPUS = {"cpus": {"boot_vcpus": 1, "max_vcpus": 4}}
MODULES = {"memory": {"size": 128 * MIB, "shared": True, "hotplug_size": 256 * MIB}}
ZONE = {"id": "z", "size": 64 * MIB, "shared": True, "hotplug_size": 128 * MIB}
ZONES = {"memory": {"size": 0, "hotplug_method": "VirtioMem", "zones": [ZONE]}}
BALLOON = {"balloon": {"size": 0}}
DISK = {"id": "more", "path": "HOME/extra", "image_type": "Raw"}
NET = {"id": "net", "tap": "INTERFACE", "mac": "2e:00:00:00:00:01"}
FS = {"id": "fs", "tag": "t", "shared_dir": "HOME/shared"}
PMEM = {"id": "pmem", "file": "HOME/pmem"}
VSOCK = {"id": "vsock", "cid": 3, "socket": "HOME/vsock"}
SAVED = {"source_url": "file://HOME/saved"}
SIZES = {"desired_vcpus": 2, "desired_ram": 256 * MIB, "desired_balloon": 16 * MIB}

# vm.fork is not here: a VM that outlives its manager refuses it.
CASES = (
    Case("create", "vm.create", "none"),
    Case("boot", "vm.boot", "created"),
    Case("pause", "vm.pause", "running"),
    Case("resume", "vm.resume", "paused"),
    Case("reboot", "vm.reboot", "running"),
    Case("shutdown", "vm.shutdown", "running"),
    Case("delete", "vm.delete", "running"),
    Case("NMI", "vm.nmi", "paused", is_vague=True),
    Case("power button", "vm.power-button", "paused", is_vague=True),
    Case("add disk", "vm.add-disk", "running", DISK),
    Case("add net", "vm.add-net", "running", NET),
    Case("add fs", "vm.add-fs", "running", FS),
    Case("add pmem", "vm.add-pmem", "running", PMEM, MODULES),
    Case("add vsock", "vm.add-vsock", "running", VSOCK),
    Case("remove disk", "vm.remove-device", "running", {"id": "more"}, {"disks": [DISK]}),
    Case("remove net", "vm.remove-device", "running", {"id": "net"}, {"net": [NET]}),
    Case("remove fs", "vm.remove-device", "running", {"id": "fs"}, {"fs": [FS]}),
    Case("remove vsock", "vm.remove-device", "running", {"id": "vsock"}, {"vsock": VSOCK}),
    Case("more vCPUs", "vm.resize", "running", {"desired_vcpus": 4}, VCPUS),
    Case("more RAM", "vm.resize", "running", {"desired_ram": 256 * MIB}, MODULES),
    Case("balloon", "vm.resize", "running", {"desired_balloon": 16 * MIB}, BALLOON),
    Case("all sizes", "vm.resize", "running", SIZES, {**VCPUS, **MODULES, **BALLOON}),
    Case("zone", "vm.resize-zone", "running", {"id": "z", "desired_ram": 128 * MIB}, ZONES),
    Case("disk size", "vm.resize-disk", "running", {"id": "d0", "desired_size": MIB}),
    Case("snapshot", "vm.snapshot", "paused", {"destination_url": "file://HOME/target"}),
    Case("coredump", "vm.coredump", "running", {"destination_url": "file://HOME/target/core"}),
    Case("restore", "vm.restore", "none", SAVED),
    Case("restore and run", "vm.restore", "none", {**SAVED, "resume": True}),
)
ARRIVAL = Case("arrival", "vm.receive-migration", "none", {"receiver_url": "unix:HOME/way"})


@pytest.fixture(autouse=True)
def helper_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a virtiofsd found, where one is needed."""
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.name.endswith(" fs"):
        folder = os.path.dirname(virtiofsd_program())
        monkeypatch.setenv("PATH", f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{folder}")


def report(stepwise: Stepwise, latency: LatencyLog) -> None:
    for seconds in stepwise.adoptions_s:
        latency.record("qemu", ADOPTION, seconds)


@pytest.mark.parametrize(
    ("name", "step"), [("more RAM", "behind device_add"), ("restore and run", "before cont")]
)
def test_kill_at_a_step_is_made_good(name: str, step: str, tmp_path: Path, latency: LatencyLog) -> None:
    (case,) = (case for case in CASES if case.name == name)
    with Stepwise.rehearsed(tmp_path, case) as stepwise:
        assert stepwise.strike(1 + stepwise.steps.index(step))
    report(stepwise, latency)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kill_at_each_step_is_made_good(case: Case, tmp_path: Path, latency: LatencyLog) -> None:
    with Stepwise.rehearsed(tmp_path, case) as stepwise:
        stepwise.strike_each()
    report(stepwise, latency)
    assert stepwise.kills > len(stepwise.steps) // 2  # what is done behind the answer may be counted, or not


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_vm_that_arrives_is_in_one_place_whenever_its_new_manager_is_killed(
    tmp_path: Path, latency: LatencyLog
) -> None:
    with SteppedArrival.rehearsed(tmp_path, ARRIVAL) as arrival:
        arrival.strike_each()
    report(arrival, latency)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_vm_that_leaves_is_in_one_place_whenever_its_old_manager_is_killed(
    tmp_path: Path, latency: LatencyLog
) -> None:
    departures = Departures(tmp_path)
    step = 1
    while departures.strike(step):
        step += 1
    for seconds in departures.adoptions_s:
        latency.record("qemu", ADOPTION, seconds)
    print(*sorted(departures.outcomes), sep="\n")
    assert {told.partition(":")[0] for told in departures.outcomes} >= {"rolled back", "unknown"}
