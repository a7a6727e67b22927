"""Forks on the fake engine: what a clone has of its own, what is refused, what is left of a failure."""

from __future__ import annotations

import os

import msgspec
import pytest

import cloudvmm
from cloudvmm import client
from cloudvmm.api import VmState
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, SerialConfig
from cloudvmm.config.device import DeviceConfig, PmemConfig, TpmConfig, VsockConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.fork import NotTwice, check_clone, check_forkable
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.operation import CloneConfig, VmForkData
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineError
from cloudvmm.engine.fake import Fail, FakeEngine
from cloudvmm.engine.fake.machine import FakeMachine
from cloudvmm.engine.fake.state import FakeBase
from support.leak import Holdings
from support.wait import wait_until

DEADLINE_S = 10.0


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "forks"
    folder.mkdir()
    return folder


@pytest.fixture
def vm_config(tmp_path):
    for name in ("disk", "read"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(MIB)
    (tmp_path / "kernel").write_bytes(b"a kernel")
    return VmConfig(
        memory=MemoryConfig(size=128 * MIB),
        payload=PayloadConfig(kernel=str(tmp_path / "kernel")),
        disks=[
            DiskConfig(id="disk", path=str(tmp_path / "disk"), image_type=ImageType.RAW),
            DiskConfig(id="read", path=str(tmp_path / "read"), image_type=ImageType.RAW, readonly=True),
        ],
        net=[NetConfig(id="net", tap="own", mac="2e:89:a8:e4:3b:01")],
        platform=PlatformConfig(vmgenid="auto"),
        vsock=VsockConfig(id="vsock", cid=3, socket=str(tmp_path / "vsock")),
        serial=SerialConfig(mode=ConsoleOutputMode.FILE, file=str(tmp_path / "serial")),
        console=ConsoleConfig(mode=ConsoleOutputMode.PTY),
    )


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def vmm(engine, vm_config):
    before = Holdings()
    with cloudvmm.Vmm(engine) as vmm:
        vmm.vm_create(vm_config)
        vmm.vm_boot()
        yield vmm
    before.assert_nothing_added()


def to(folder, **members):
    return VmForkData(directory=str(folder), **members)


def config_of(clone):
    with client.Client(clone.api_socket) as own:
        return own.vm_info().config


def state_of(clone):
    with client.Client(clone.api_socket) as own:
        return own.vm_info().state


def refusal(vmm, data):
    with pytest.raises(client.ServerError) as caught:
        vmm.vm_fork(data)
    return caught.value


def test_clones_have_what_is_a_vms_own(vmm, vm_config, folder):
    told = vmm.vm_fork(to(folder, count=2))
    assert [clone.id for clone in told.clones] == ["clone-0", "clone-1"]
    parent = vmm.vm_info().config
    configs = [parent, *map(config_of, told.clones)]
    assert len({config.disks[0].path for config in configs} | {vm_config.disks[0].path}) == 4
    assert {config.disks[1].path for config in configs} == {vm_config.disks[1].path}
    assert len({config.net[0].mac for config in configs}) == 3
    assert len({config.platform.vmgenid for config in configs}) == 3
    assert "auto" not in {config.platform.vmgenid for config in configs}
    assert len({config.net[0].tap for config in configs[1:]} | {"own"}) <= 3
    assert len({config.vsock.socket for config in configs}) == 3
    assert len({config.serial.file for config in configs}) == 3
    assert len({config.console.file for config in configs}) == 3
    assert parent.disks[0].path == told.disks["disk"]
    assert {state_of(clone) for clone in told.clones} == {VmState.RUNNING}


def test_clones_stay_paused_where_they_are_to_and_names_go_on(vmm, folder):
    vmm.vm_fork(to(folder))
    (clone,) = vmm.vm_fork(to(folder, resume=False)).clones
    assert clone.id == "clone-1"
    assert state_of(clone) is VmState.PAUSED


def test_clone_has_what_is_overridden(vmm, folder, tmp_path):
    mine = tmp_path / "mine.raw"
    with mine.open("wb") as file:
        file.truncate(MIB)
    overrides = {
        "disks": [{"id": "disk", "path": str(mine), "image_type": "Raw", "backing_files": False}],
        "net": [{"id": "net", "mac": "2e:89:a8:e4:3b:02", "tap": "mine"}],
        "console": {"mode": "Off"},
    }
    described = CloneConfig(id="c", api_socket=str(tmp_path / "c.sock"), overrides=overrides)
    (clone,) = vmm.vm_fork(to(folder, clones=[described])).clones
    assert (clone.id, clone.api_socket) == ("c", str(tmp_path / "c.sock"))
    config = config_of(clone)
    assert (config.disks[0].path, config.net[0].mac, config.net[0].tap) == (
        str(mine),
        "2e:89:a8:e4:3b:02",
        "mine",
    )
    assert config.console.mode is ConsoleOutputMode.OFF
    assert "disk0.qcow2" not in os.listdir(clone.directory)


def test_paused_vm_is_forked_and_stays_paused(vmm, folder):
    vmm.vm_pause()
    (clone,) = vmm.vm_fork(to(folder)).clones
    assert state_of(clone) is VmState.RUNNING
    assert vmm.vm_info().state is VmState.PAUSED


def test_clone_is_forked_too_and_each_ends_alone(engine, vmm, folder):
    (first,) = vmm.vm_fork(to(folder)).clones
    with client.Client(first.api_socket) as own:
        (second,) = own.vm_fork(to(folder)).clones
        own.vmm_shutdown()
    wait_until(lambda: not os.path.exists(first.api_socket), "the socket goes", timeout_s=DEADLINE_S)
    assert state_of(second) is VmState.RUNNING
    assert vmm.vm_info().state is VmState.RUNNING


@pytest.mark.parametrize("which", range(3))
def test_whatever_clone_fails_nothing_is_left_and_the_vm_is_as_before(engine, vmm, folder, which):
    before = vmm.vm_info().config
    engine.faults.set("build", Fail(EngineError, "A fault"), times=1)
    failure = refusal(vmm, to(folder, count=3))
    assert failure.chain[-1] == "A fault"
    assert failure.chain[1:3] == ("The VM could not be forked", "Cannot fork VM")
    assert os.listdir(folder) == []
    assert vmm.vm_info().config == before
    assert len(vmm.vm_fork(to(folder, count=2)).clones) == 2


def test_no_clone_has_run_where_another_fails(engine, vmm, folder, monkeypatch):
    ran = []
    resume = FakeMachine.resume
    monkeypatch.setattr(FakeMachine, "resume", lambda machine: (ran.append(machine), resume(machine)))
    engine.faults.set("build", Fail(EngineError, "A fault"), times=1)
    refusal(vmm, to(folder, count=3))
    assert ran == []
    vmm.vm_fork(to(folder, count=2))
    assert len(ran) == 2


def test_clone_that_does_not_resume_is_told_and_nothing_is_left(engine, vmm, folder):
    before = vmm.vm_info().config
    engine.faults.set("resume", Fail(EngineError, "A fault"), times=1)
    chain = refusal(vmm, to(folder, count=2)).chain
    assert chain[1:3] == ("The VM could not be forked", "Cannot fork VM")
    assert chain[-1] == "A fault"
    assert os.listdir(folder) == []
    assert vmm.vm_info().config == before


def test_base_is_closed_where_no_clone_came_to_begin(vmm, folder, monkeypatch):
    closed = []
    before = vmm.vm_info().config
    monkeypatch.setattr(FakeBase, "close", lambda base: closed.append(base))
    monkeypatch.setattr("cloudvmm.control.fork.encode_record", lambda vm: msgspec.Raw(b"none"))
    refusal(vmm, to(folder))
    assert len(closed) == 1
    assert os.listdir(folder) == []
    assert vmm.vm_info().config == before


def test_disk_that_did_not_go_back_is_told_where_it_is(engine, vmm, vm_config, folder, tmp_path, monkeypatch):
    def take_back(machine, base):
        os.unlink(folder / "disk0-0.qcow2")
        raise EngineError("A fault of the other disk")

    vmm.vm_delete()
    other = tmp_path / "other"
    other.write_bytes(bytes(MIB))
    vm_config.disks.append(DiskConfig(id="other", path=str(other), image_type=ImageType.RAW))
    vmm.vm_create(vm_config)
    vmm.vm_boot()
    monkeypatch.setattr(FakeMachine, "take_back", take_back)
    engine.faults.set("build", Fail(EngineError, "A fault"), times=1)
    refusal(vmm, to(folder))
    paths = {disk.id: disk.path for disk in vmm.vm_info().config.disks}
    assert paths["disk"] == vm_config.disks[0].path
    assert paths["other"] == str(folder / "disk1-0.qcow2")


def test_machine_that_cannot_be_forked_says_so_and_nothing_is_left(engine, vmm, folder):
    before = vmm.vm_info().config
    engine.faults.set("fork", Fail(EngineError, "A fault"), times=1)
    assert refusal(vmm, to(folder)).chain[-1] == "A fault"
    assert os.listdir(folder) == []
    assert vmm.vm_info().config == before


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"clones": []}, "Number of clones described: 0"),
        ({"count": 1001}, "at most 1000 clones, not 1001"),
        ({"count": 2, "clones": [CloneConfig()]}, "Number of clones described: 1. Expected: 2"),
        ({"clones": [CloneConfig(id="a"), CloneConfig(id="a")]}, "Identifier a is not unique"),
        ({"clones": [CloneConfig(id="../a")]}, "'../a' is no id for a clone"),
        ({"clones": [CloneConfig(overrides={"memory": {}})]}, "'memory' of a saved VM cannot be overridden"),
        ({"clones": [CloneConfig(overrides={"net": [{"id": "no", "tap": "t"}]})]}, "no device 'no'"),
        ({"clones": [CloneConfig(overrides={"rng": {"src": 1}})]}, "src"),
    ],
)
def test_bad_request_changes_nothing(vmm, folder, members, words):
    failure = refusal(vmm, to(folder, **members))
    assert failure.status in (400, 409)
    assert words in failure.chain[-1]
    assert os.listdir(folder) == []


def test_folder_that_is_missing_is_told(vmm, tmp_path):
    assert "There is no directory" in refusal(vmm, to(tmp_path / "missing")).chain[-1]


def test_socket_that_cannot_be_had_is_told_with_whose_it_is(vmm, folder, tmp_path):
    described = CloneConfig(id="c", api_socket=f"{tmp_path}/missing/c.sock")
    chain = refusal(vmm, to(folder, clones=[CloneConfig(id="b"), described])).chain
    assert chain[1:4] == ("The VM could not be forked", "Cannot fork VM", "The clone c could not be made")
    assert os.listdir(folder) == []


def test_folder_that_is_taken_stays(vmm, folder):
    (folder / "c").mkdir()
    (folder / "c" / "mine").touch()
    refusal(vmm, to(folder, clones=[CloneConfig(id="c")]))
    assert os.listdir(folder / "c") == ["mine"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"devices": [DeviceConfig(path="/d")]}, "'devices'"),
        ({"tpm": TpmConfig(socket="/s")}, "'tpm'"),
        ({"memory": MemoryConfig(size=128 * MIB, hugepages=True)}, "huge pages"),
        (
            {"memory": MemoryConfig(size=0, zones=[MemoryZoneConfig(id="z", size=MIB, file="/f")])},
            "has a file",
        ),
        ({"pmem": [PmemConfig(file="/f")]}, "persistent memory"),
        ({"net": [NetConfig(id="n", fds=[5])]}, "the network device 'n' on descriptors"),
        ({"disks": [DiskConfig(id="d", vhost_user=True, vhost_socket="/s")]}, "the socket '/s'"),
    ],
)
def test_what_cannot_be_there_twice_is_refused(vm_config, members, words):
    vm_config.vsock = None
    for member, value in members.items():
        setattr(vm_config, member, value)
    with pytest.raises(NotTwice, match=words):
        check_forkable(vm_config)
        check_clone(vm_config, vm_config)


def test_vm_that_does_not_run_is_not_forked(engine, vm_config, folder):
    with cloudvmm.Vmm(engine) as vmm:
        assert refusal(vmm, to(folder)).chain[-1] == "VM is not running"
        vmm.vm_create(vm_config)
        assert refusal(vmm, to(folder)).chain[-1] == "VM is not running"
