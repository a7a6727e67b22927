"""vm.snapshot and vm.restore on the fake engine: what is kept, what is refused, what is left."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest

import support.wait
from cloudvmm import api
from cloudvmm.config.device import BalloonConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import MemoryRestoreMode, MemoryZoneUpdate, RestoredNetConfig
from cloudvmm.engine.base import EngineError, ImageLocked, Saved, StateError
from cloudvmm.engine.fake import Die, Fail, FakeEngine, Hang
from cloudvmm.errors import error_chain
from cloudvmm.snapshot.draft import Draft

from .conftest import DEADLINE_S, Caller, Gate

FILES = ["config.json", "engine-state.json", "state.json"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    return folder


@pytest.fixture
def paused(caller, vm_config, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(512))
    vm_config.disks = [DiskConfig(path=str(image))]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    caller(api.vm_pause)
    return caller


@pytest.fixture
def saved(paused, folder):
    paused(api.vm_snapshot, to(folder))
    return folder


def to(folder, **options) -> api.VmSnapshotConfig:
    return api.VmSnapshotConfig(destination_url=f"file://{folder}", **options)


def saved_in(folder, **options) -> api.RestoreConfig:
    return api.RestoreConfig(source_url=f"file://{folder}", **options)


def change_config(folder, change) -> None:
    path = folder / "config.json"
    config = msgspec.json.decode(path.read_bytes())
    change(config)
    path.write_bytes(msgspec.json.encode(config))


def test_snapshot_writes_config_state_and_the_engines_files(paused, folder):
    before = paused.settled_info()

    paused(api.vm_snapshot, to(folder))

    assert sorted(os.listdir(folder)) == FILES
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    assert (config["disks"][0]["id"], "device_tree" in config) == ("_disk0", False)
    assert paused(api.vm_info) == before
    assert paused.names()[-2:] == ["vm/snapshotting", "vm/snapshotted"]


@pytest.fixture
def gate(paused):
    gate = Gate(paused.engine.last_machine, "save", lambda _, on_saved: on_saved(Saved(1, 3)))
    yield gate
    gate.open()


def test_progress_is_told_while_the_engine_saves_and_afterwards(paused, folder, gate):
    assert paused.refusal(api.vm_snapshot_progress)[-1] == "No snapshot is being taken"
    answer = paused.beside(api.vm_snapshot, to(folder))
    gate.await_begin()
    told = paused(api.vm_snapshot_progress)
    assert (told.phase, told.saved_bytes, told.total_bytes) == (api.SnapshotPhase.SAVING, 1, 3)
    gate.open()
    assert answer.result() is None
    told = paused(api.vm_snapshot_progress)
    assert told.phase is api.SnapshotPhase.FINISHED
    assert told.saved_bytes == told.total_bytes > 3


def test_snapshot_is_a_job_that_tells_how_far_it_is_and_can_be_called_off(paused, folder, gate):
    answer = paused.beside(api.vm_snapshot, to(folder))
    gate.await_begin()
    (job,) = paused(api.vmm_jobs).jobs
    assert (job.command, job.state, job.can_cancel) == ("vm.snapshot", api.JobState.RUNNING, True)
    assert (job.done_bytes, job.total_bytes, job.percent) == (1, 3, 33.3)

    paused(api.vmm_cancel_job, api.VmmCancelJobData(id=job.id))

    gate.open()
    assert error_chain(answer.result())[-1] == "The snapshot was cancelled"
    assert paused(api.vmm_jobs).jobs == []
    assert paused.refusal(api.vmm_cancel_job, api.VmmCancelJobData(id=job.id))[-1] == (
        f"There is no job {job.id}"
    )


def test_snapshot_that_is_called_off_leaves_nothing_and_the_vm_as_it_was(paused, folder, gate):
    before = paused.settled_info()
    answer = paused.beside(api.vm_snapshot, to(folder))
    gate.await_begin()

    paused(api.vm_cancel_snapshot)

    gate.open()
    assert error_chain(answer.result()) == [
        "The VM could not be snapshotted",
        "Cannot snapshot VM",
        "Failed to snapshot migratable component",
        "The snapshot was cancelled",
    ]
    assert os.listdir(folder) == []
    assert paused(api.vm_info) == before
    assert paused.names()[-1] == "vm/snapshotting"
    assert paused(api.vm_snapshot_progress).phase is api.SnapshotPhase.CANCELLED
    paused(api.vm_snapshot, to(folder))
    assert sorted(os.listdir(folder)) == FILES


def test_there_is_nothing_to_call_off_before_and_after(paused, folder):
    words = ["Error cancelling the snapshot", "No snapshot is being taken"]
    assert paused.refusal(api.vm_cancel_snapshot) == words
    paused(api.vm_snapshot, to(folder))
    assert paused.refusal(api.vm_cancel_snapshot) == words


def test_snapshot_that_gets_its_names_cannot_be_called_off_any_more(paused, folder, monkeypatch):
    refusals = []
    publish = Draft.publish

    def publish_late(draft, *arguments):
        refusals.append(paused.refusal(api.vm_cancel_snapshot)[-1])
        publish(draft, *arguments)

    monkeypatch.setattr(Draft, "publish", publish_late)
    paused(api.vm_snapshot, to(folder))
    assert refusals == ["The snapshot is all but there and cannot be cancelled any more"]


def test_snapshot_that_failed_says_so(paused, folder):
    paused.engine.faults.set("save", Fail(EngineError), times=1)
    assert paused.refusal(api.vm_snapshot, to(folder))
    assert paused(api.vm_snapshot_progress).phase is api.SnapshotPhase.FAILED


def test_snapshot_of_a_running_vm_names_the_state(booted, folder):
    assert booted.refusal(api.vm_snapshot, to(folder)) == [
        "The VM could not be snapshotted",
        "Cannot snapshot VM",
        "Failed to snapshot migratable component",
        "Trying to snapshot while VM is running",
    ]
    assert booted.names()[-1] == "vm/snapshotting"
    assert os.listdir(folder) == []


def test_snapshot_needs_a_vm(caller, folder):
    assert caller.refusal(api.vm_snapshot, to(folder)) == [
        "The VM could not be snapshotted",
        "VM is not running",
    ]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("file:///nope", 'Destination is not a directory: "/nope"'),
        ("file://", 'Destination is not a directory: ""'),
        ('file:///a"b', 'Destination is not a directory: "/a\\"b"'),
        ("/tmp", "Could not extract path from URL: /tmp"),
        ("http://x", "Could not extract path from URL: http://x"),
    ],
)
def test_snapshot_to_what_is_no_folder_is_refused(paused, url, text):
    assert paused.refusal(api.vm_snapshot, api.VmSnapshotConfig(destination_url=url)) == [
        "The VM could not be snapshotted",
        "Cannot send VM snapshot",
        "Failed to send migratable component snapshot",
        text,
    ]
    assert paused(api.vm_info).state is api.VmState.PAUSED


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "Error creating VM config snapshot file"),
        ("state.json", "Error creating VM state snapshot file"),
        ("engine-state.json", "Error creating the engine's snapshot file engine-state.json"),
    ],
)
def test_snapshot_touches_no_file_that_exists(paused, folder, name, text):
    (folder / name).write_text("mine")

    assert paused.refusal(api.vm_snapshot, to(folder))[1:] == [
        "Cannot send VM snapshot",
        "Failed to send migratable component snapshot",
        text,
        "File exists (os error 17)",
    ]
    assert (os.listdir(folder), (folder / name).read_text()) == ([name], "mine")


def test_snapshot_that_the_engine_cannot_write_leaves_no_file_and_the_vm_paused(paused, folder, engine):
    engine.faults.set("save", Fail(EngineError, "The disk is full"))

    assert paused.refusal(api.vm_snapshot, to(folder))[1:] == [
        "Cannot snapshot VM",
        "Failed to snapshot migratable component",
        "The disk is full",
    ]
    assert os.listdir(folder) == []
    assert paused(api.vm_info).state is api.VmState.PAUSED
    engine.faults.clear()
    paused(api.vm_snapshot, to(folder))
    paused(api.vm_resume)


def test_restore_gives_the_same_vm_paused(paused, other, folder, engine):
    paused(api.vm_snapshot, to(folder))
    before = paused.settled_info()
    tick = engine.last_machine.guest.tick

    other(api.vm_restore, saved_in(folder))

    info = other(api.vm_info)
    assert (info.state, info.config, info.device_tree.keys()) == (
        api.VmState.PAUSED,
        before.config,
        before.device_tree.keys(),
    )
    assert info.device_tree["_virtio-pci-_disk0"].pci_bdf == before.device_tree["_virtio-pci-_disk0"].pci_bdf
    assert other.engine.last_machine.guest.tick == tick
    assert other.names() == ["vm/restoring", "vm/restored"]


def test_restore_with_resume_ends_running(saved, other):
    other(api.vm_restore, saved_in(saved, resume=True))

    assert other(api.vm_info).state is api.VmState.RUNNING
    assert other.engine.last_machine.guest.is_awake
    assert other.names() == ["vm/restoring", "vm/restored", "vm/resuming", "vm/resumed"]


def test_one_snapshot_is_restored_many_times(saved, other):
    for _ in range(3):
        other(api.vm_restore, saved_in(saved))
        other(api.vm_delete)
    assert sorted(os.listdir(saved)) == FILES


def test_numbering_goes_on_after_a_restore(saved, other, tmp_path):
    other(api.vm_restore, saved_in(saved))
    again = tmp_path / "again"
    again.mkdir()

    other(api.vm_snapshot, to(again))

    state = msgspec.json.decode((again / "state.json").read_bytes())["state"]
    assert state["vm"]["counter"] == 1
    assert state["vm"]["slots"]["_disk0"] == 1


@pytest.mark.parametrize("command", [api.vm_boot, api.vm_reboot])
def test_restored_vm_is_a_vm_like_any_other(saved, other, command):
    other(api.vm_restore, saved_in(saved, resume=True))
    if command is api.vm_boot:
        other(api.vm_shutdown)

    other(command)

    assert other(api.vm_info).config.disks[0].id == "_disk0"
    assert other(api.vm_info).state is api.VmState.RUNNING


def test_restore_needs_nothing_held(paused, saved, caller):
    assert caller.refusal(api.vm_restore, saved_in(saved)) == [
        "The VM could not be restored",
        "VM is already created",
    ]


def test_config_edited_by_hand_is_restored(saved, other, tmp_path):
    moved = tmp_path / "moved"
    (tmp_path / "disk").rename(moved)
    change_config(saved, lambda config: config["disks"][0].update(path=str(moved)))

    other(api.vm_restore, saved_in(saved))

    assert other(api.vm_info).config.disks[0].path == str(moved)


def test_overrides_are_restored_and_the_snapshot_stays_as_it_is(saved, other, tmp_path):
    moved = tmp_path / "moved"
    (tmp_path / "disk").rename(moved)
    before = (saved / "config.json").read_bytes()

    other(api.vm_restore, saved_in(saved, overrides={"disks": [{"id": "_disk0", "path": str(moved)}]}))

    assert other(api.vm_info).config.disks[0].path == str(moved)
    assert (saved / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "chain"),
    [
        (
            {"disks": [{"id": "nobody", "path": "/d"}]},
            [
                "Failed to validate config",
                "The saved VM has no device 'nobody' in 'disks' that could be overridden",
            ],
        ),
        ({"memory": {}}, ["Failed to validate config", "'memory' of a saved VM cannot be overridden"]),
        ({"disks": [{"id": "_disk0", "path": 1}]}, ["Cannot restore VM"]),
    ],
)
def test_overrides_that_cannot_be_are_refused_and_nothing_is_held(saved, other, overrides, chain):
    refusal = other.refusal(api.vm_restore, saved_in(saved, overrides=overrides))

    assert refusal[1 : len(chain) + 1] == chain
    assert other.refusal(api.vm_info)[-1] == "VM is not created"
    assert other.names() == []


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("file:///nope", 'Destination is not a directory: "/nope"'),
        ("/nope", "Could not extract path from URL: /nope"),
    ],
)
def test_restore_from_what_is_no_folder_is_refused(other, url, text):
    assert other.refusal(api.vm_restore, api.RestoreConfig(source_url=url)) == [
        "The VM could not be restored",
        "Cannot restore VM",
        "Failed to send migratable component snapshot",
        text,
    ]


@pytest.mark.parametrize(("name", "what"), [("config.json", "config"), ("state.json", "state")])
def test_restore_without_a_file_names_it(saved, other, name, what):
    (saved / name).unlink()

    assert other.refusal(api.vm_restore, saved_in(saved)) == [
        "The VM could not be restored",
        "Cannot restore VM",
        "Failed to receive migratable component snapshot",
        f'Error opening VM {what} snapshot file "{saved}/{name}"',
        "No such file or directory (os error 2)",
    ]
    assert other.refusal(api.vm_info)[-1] == "VM is not created"
    assert other.names() == []


def test_restore_of_a_config_that_is_none_says_so(saved, other):
    (saved / "config.json").write_text("{")

    assert other.refusal(api.vm_restore, saved_in(saved))[1:4] == [
        "Cannot restore VM",
        "Failed to receive migratable component snapshot",
        "Error deserialising VM config snapshot",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"format":1', "The snapshot is damaged: state.json is not JSON"),
        (b'{"format":1,"checksum":1,"state":{}}', "the checksum of state.json does not match"),
        (b'{"format":3}', "has format 3, this release reads 2"),
        (b'{"snapshots":{},"snapshot_data":null}', "was not written by cloudvmm"),
        (b"[]", "was not written by cloudvmm"),
    ],
)
def test_restore_of_a_state_that_does_not_fit_says_why(saved, other, content, text):
    (saved / "state.json").write_bytes(content)

    chain = other.refusal(api.vm_restore, saved_in(saved))

    assert chain[2:4] == [
        "Failed to receive migratable component snapshot",
        "Error deserialising VM state snapshot",
    ]
    assert text in chain[4]
    assert other.refusal(api.vm_info)[-1] == "VM is not created"


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_restore_of_damaged_engine_files_is_refused(saved, other, damage):
    path = saved / "engine-state.json"
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(raw[:-1] if damage == "shorter" else b"x" + raw[1:])

    assert "The snapshot is damaged: " in other.refusal(api.vm_restore, saved_in(saved))[3]
    assert other.refusal(api.vm_info)[-1] == "VM is not created"


def test_restore_of_another_engines_snapshot_is_refused(saved, other, monkeypatch):
    info = msgspec.structs.replace(other.engine.info, name="other")
    monkeypatch.setattr(FakeEngine, "info", property(lambda _: info))

    text = "The snapshot was taken with the engine fake and cannot be restored by other"
    assert other.refusal(api.vm_restore, saved_in(saved))[-1] == text


def test_restore_on_demand_is_a_copy_on_the_fake_and_nothing_waits_for_it(saved, other, tmp_path):
    again = tmp_path / "again"
    again.mkdir()

    other(api.vm_restore, saved_in(saved, memory_restore_mode=MemoryRestoreMode.ON_DEMAND))
    other(api.vm_snapshot, to(again))

    assert sorted(os.listdir(again)) == FILES


def test_rule_that_is_broken_is_a_validation_error_and_nothing_is_held(saved, other):
    data = saved_in(saved, prefault=True, memory_restore_mode=MemoryRestoreMode.ON_DEMAND)

    assert other.refusal(api.vm_restore, data)[1:] == [
        "Failed to validate config",
        "'prefault' cannot be combined with 'memory_restore_mode=ondemand'",
    ]
    assert other.names() == []


def test_config_that_breaks_a_rule_is_refused_and_nothing_is_held(saved, other):
    change_config(saved, lambda config: config.update(payload={}))

    assert other.refusal(api.vm_restore, saved_in(saved))[1] == "Failed to validate config"
    assert other.refusal(api.vm_info)[-1] == "VM is not created"
    assert other.names()[-1] == "vm/deleted"


def test_device_that_the_state_lacks_is_refused(saved, other, tmp_path):
    (tmp_path / "more").write_bytes(bytes(512))
    change_config(saved, lambda c: c["disks"].append({"path": str(tmp_path / "more"), "id": "mine"}))

    assert other.refusal(api.vm_restore, saved_in(saved))[1:] == [
        "Cannot restore VM",
        "Failed to restore migratable component",
        "The configuration has devices that the saved state lacks: mine",
    ]


def test_other_number_of_vcpus_is_refused(saved, other):
    change_config(saved, lambda config: config["cpus"].update(boot_vcpus=2, max_vcpus=2))

    assert other.refusal(api.vm_restore, saved_in(saved))[1:] == [
        "Cannot restore VM",
        "Failed to restore migratable component",
        "The state is that of a guest with 1 vCPUs, and the configuration has 2",
    ]


def test_state_of_another_machine_is_refused(saved, other):
    change_config(saved, lambda config: config["memory"].update(size=1 << 30))

    assert other.refusal(api.vm_restore, saved_in(saved))[1:] == [
        "Cannot restore VM",
        "Failed to restore migratable component",
        "The state is that of a machine with less RAM",
    ]


def test_ram_that_was_resized_goes_on_as_it_was(caller, vm_config, folder, other, monkeypatch):
    """Modules stay, and the last size is for the next boot."""
    vm_config.memory.hotplug_size = 1 << 30
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    for size in (640 << 20, 896 << 20, 256 << 20):
        caller(api.vm_resize, api.VmResizeData(desired_ram=size))
    caller(api.vm_pause)
    caller(api.vm_snapshot, to(folder))

    specs, build = [], other.engine.build
    monkeypatch.setattr(other.engine, "build", lambda spec: specs.append(spec) or build(spec))
    other(api.vm_restore, saved_in(folder))
    assert (specs[0].vm_config.memory.size, specs[0].modules) == (512 << 20, (128 << 20, 256 << 20))
    assert other(api.vm_info).config.memory.size == 256 << 20
    other(api.vm_resize, api.VmResizeData(desired_ram=1 << 30))
    other(api.vm_resume)
    other(api.vm_reboot)
    assert (specs[1].vm_config.memory.size, specs[1].modules) == (1 << 30, ())


@pytest.mark.parametrize(
    ("operation", "fault", "text"),
    [
        ("build", Fail(StateError, "No"), "Cannot restore VM"),
        ("build", Fail(ImageLocked), "Error locking disk images: Another instance likely holds a lock"),
        ("build", Fail(EngineError, "No"), "Error from device manager"),
        ("resume", Fail(EngineError, "No"), "Cannot resume VM"),
    ],
)
def test_restore_that_fails_late_ends_with_nothing(saved, other, operation, fault, text):
    other.engine.faults.set(operation, fault)

    assert other.refusal(api.vm_restore, saved_in(saved, resume=True))[1] == text
    assert other.refusal(api.vm_info)[-1] == "VM is not created"
    assert other.names()[-1] == "vm/deleted"
    other.engine.faults.clear()
    other(api.vm_restore, saved_in(saved))


def test_missing_disk_is_refused_and_nothing_is_held(saved, other, tmp_path):
    (tmp_path / "disk").unlink()

    assert other.refusal(api.vm_restore, saved_in(saved))[1] == "Error from device manager"
    assert other.refusal(api.vm_info)[-1] == "VM is not created"


ZONE = MemoryZoneUpdate(id="z0", host_numa_node=1)


@pytest.mark.parametrize(
    ("zones", "text"),
    [
        (None, "No zones specified in original config"),
        ([{"id": "z1", "size": 1 << 20}], 'Zone ID "z0" wasn\'t contained in original config'),
        (
            [{"id": "z0", "size": 1 << 20, "shared": True, "file": "/f"}],
            'Zone with ID "z0" is a shared zone backed by a regular file and thus cannot be bound to a node',
        ),
    ],
)
def test_zone_update_that_does_not_fit_is_refused_before_anything_is_held(saved, other, zones, text):
    change_config(saved, lambda config: config["memory"].update(zones=zones))

    assert other.refusal(api.vm_restore, saved_in(saved, zone_updates=[ZONE]))[1:] == [
        "Error applying memory zone updates",
        text,
    ]
    assert other.names() == []


def test_zone_update_binds_the_zone_to_its_node(caller, vm_config, folder, other):
    vm_config.memory = MemoryConfig(size=0, zones=[MemoryZoneConfig(id="z0", size=1 << 28)])
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    caller(api.vm_pause)
    caller(api.vm_snapshot, to(folder))

    other(api.vm_restore, saved_in(folder, zone_updates=[ZONE]))

    assert other(api.vm_info).config.memory.zones[0].host_numa_node == 1


@pytest.fixture
def saved_with_fds(caller, vm_config, folder):
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(2)]
    vm_config.cpus.boot_vcpus = vm_config.cpus.max_vcpus = 2
    vm_config.net = [NetConfig(id="n0", fds=fds, num_queues=4)]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    caller(api.vm_pause)
    caller(api.vm_snapshot, to(folder))
    return folder


def net_fds(count: int) -> list[RestoredNetConfig]:
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
    return [RestoredNetConfig(id="n0", num_fds=count, fds=fds)]


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_restore_takes_new_descriptors(saved_with_fds, other):
    nets = net_fds(2)
    fds = list(nets[0].fds)

    other(api.vm_restore, saved_in(saved_with_fds, net_fds=nets))

    assert other(api.vm_info).config.net[0].fds == fds
    assert all(map(is_open, fds))
    other(api.vm_delete)
    assert not any(map(is_open, fds))


def test_restore_that_fails_closes_its_descriptors_once(saved_with_fds, other):
    nets = net_fds(2)
    fds = list(nets[0].fds)
    other.engine.faults.set("build", Fail(EngineError, "No"))

    other.refusal(api.vm_restore, saved_in(saved_with_fds, net_fds=nets))

    assert not any(map(is_open, fds))


def test_restore_without_the_descriptors_is_refused(saved_with_fds, other):
    assert other.refusal(api.vm_restore, saved_in(saved_with_fds))[1:] == [
        "Failed to validate config",
        "Net id n0 is associated with FDs and is required",
    ]


def test_restore_with_descriptors_that_nothing_needs_warns_and_closes_them(saved, other):
    nets = net_fds(1)
    fds = list(nets[0].fds)

    other(api.vm_restore, saved_in(saved, net_fds=nets))

    assert other.logged[0] == "warn: Ignoring unused 'net_fds' for VM restore."
    assert not any(map(is_open, fds))


# What changed while the VM ran


@pytest.fixture
def roomy(caller, vm_config, tmp_path):
    """A running VM with a disk, a balloon, and room for vCPUs, RAM and disks."""
    for name in ("disk", "second", "third"):
        (tmp_path / name).write_bytes(bytes(512))
    vm_config.disks = [DiskConfig(path=str(tmp_path / "disk"))]
    vm_config.cpus.boot_vcpus, vm_config.cpus.max_vcpus = 2, 4
    vm_config.memory.hotplug_size = 1 << 30
    vm_config.balloon = BalloonConfig(size=0)
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    return caller


def move(source: Caller, destination: Caller, folder, **options) -> None:
    source(api.vm_pause)
    source(api.vm_snapshot, to(folder))
    destination(api.vm_restore, saved_in(folder, **options))


def test_device_added_before_is_there_and_the_next_has_the_next_number(roomy, other, folder, tmp_path):
    roomy(api.vm_add_disk, DiskConfig(path=str(tmp_path / "second")))

    move(roomy, other, folder)

    assert [disk.id for disk in other(api.vm_info).config.disks] == ["_disk0", "_disk1"]
    added = msgspec.json.decode(other(api.vm_add_disk, DiskConfig(path=str(tmp_path / "third"))))
    assert added["id"] == "_disk2"
    assert other(api.vm_info).device_tree["_virtio-pci-_disk2"].pci_bdf == added["bdf"]
    assert "_disk1" in msgspec.json.decode(other(api.vm_counters))


def test_device_that_the_guest_holds_on_to_stays_until_it_lets_go(roomy, other, folder):
    roomy.engine.last_machine.guest.refuse("device")
    roomy(api.vm_remove_device, api.VmRemoveDeviceData(id="_disk0"))

    move(roomy, other, folder)

    assert not other(api.vm_info).config.disks
    assert "_disk0" in other(api.vm_info).device_tree
    other(api.vm_resume)
    other.wait_for_event("vm/device-removed")
    assert "_disk0" not in other(api.vm_info).device_tree


def test_removed_device_s_number_is_not_given_again(roomy, other, folder, tmp_path):
    roomy(api.vm_add_disk, DiskConfig(path=str(tmp_path / "second")))
    roomy(api.vm_remove_device, api.VmRemoveDeviceData(id="_disk1"))
    roomy.wait_for_event("vm/device-removed")

    move(roomy, other, folder)

    added = msgspec.json.decode(other(api.vm_add_disk, DiskConfig(path=str(tmp_path / "third"))))
    assert added["id"] == "_disk2"


def test_sizes_go_on_where_they_were(roomy, other, folder):
    roomy(api.vm_resize, api.VmResizeData(desired_vcpus=3, desired_ram=(512 + 128) << 20))
    roomy(api.vm_resize, api.VmResizeData(desired_balloon=64 << 20))

    move(roomy, other, folder)

    info = other(api.vm_info)
    assert (info.config.cpus.boot_vcpus, info.config.memory.size) == (3, 640 << 20)
    assert info.memory_actual_size == roomy(api.vm_info).memory_actual_size
    other(api.vm_resize, api.VmResizeData(desired_vcpus=4, desired_ram=(512 + 256) << 20))
    too_much = other.refusal(api.vm_resize, api.VmResizeData(desired_ram=4 << 30))
    assert too_much[-1] == "Not enough space in the hotplug RAM region"


def test_vcpu_that_the_guest_holds_on_to_is_still_pending(roomy, other, folder):
    roomy.engine.last_machine.guest.refuse("vcpus")
    roomy(api.vm_resize, api.VmResizeData(desired_vcpus=1))

    move(roomy, other, folder)

    assert other.refusal(api.vm_resize, api.VmResizeData(desired_vcpus=3))[-2:] == [
        "Error from CPU manager",
        "Still pending removed vCPU",
    ]
    other(api.vm_resume)
    support.wait.wait_until(
        lambda: can_resize(other, 3), "the guest has let go of its vCPU", timeout_s=DEADLINE_S
    )


def can_resize(caller: Caller, vcpus: int) -> bool:
    try:
        caller(api.vm_resize, api.VmResizeData(desired_vcpus=vcpus))
    except api.ApiError:
        return False
    return True


# Overtaken by the end


def test_end_of_the_vmm_during_a_snapshot_leaves_no_file(paused, folder, engine):
    engine.faults.set("save", Hang())
    answer = paused.beside(api.vm_snapshot, to(folder))
    paused.wait_for_event("vm/snapshotting")

    paused(api.vmm_shutdown)

    assert isinstance(answer.result(), api.VmSnapshotError)
    assert paused.vmm.join(DEADLINE_S)
    assert (paused.vmm.failure, os.listdir(folder)) == (None, [])


@pytest.mark.parametrize("operation", ["build", "resume"])
def test_end_of_the_vmm_during_a_restore_leaves_nothing(saved, other, operation):
    other.engine.faults.set(operation, Hang())
    answer = other.beside(api.vm_restore, saved_in(saved, resume=True))
    other.wait_for_event("vm/restoring" if operation == "build" else "vm/resuming")

    other(api.vmm_shutdown)

    assert isinstance(answer.result(), api.VmRestoreError)
    assert other.vmm.join(DEADLINE_S)
    assert other.vmm.failure is None
    assert sorted(os.listdir(saved)) == FILES


def test_machine_that_dies_during_a_snapshot_leaves_no_file(paused, folder, engine):
    engine.faults.set("save", Die("struck down"))

    assert paused.refusal(api.vm_snapshot, to(folder))[-1] == "The machine is gone"
    assert paused.vmm.join(DEADLINE_S)
    assert os.listdir(folder) == []


# Disks in a snapshot


@pytest.fixture
def new_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def frozen(paused, folder, new_images):
    """A snapshot with its disk, whose VM is gone."""
    paused(api.vm_snapshot, to(folder, overlay_directory=str(new_images)))
    paused(api.vm_delete)
    return folder


def paths(caller) -> list[str]:
    return [disk.path for disk in caller(api.vm_info).config.disks]


def test_disks_of_a_snapshot_are_frozen_and_the_vm_goes_on_in_others(paused, folder, new_images):
    (before,) = paths(paused)
    paused(api.vm_snapshot, to(folder, overlay_directory=str(new_images)))

    (disk,) = paused(api.vm_info).config.disks
    assert (disk.path, disk.image_type, disk.backing_files) == (
        f"{new_images}/disk0-0.qcow2",
        ImageType.QCOW2,
        True,
    )
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    assert config["disks"][0]["path"] == before
    assert msgspec.json.decode((folder / "state.json").read_bytes())["format"] == 2
    paused(api.vm_resume)
    paused(api.vm_reboot)


def test_second_snapshot_with_disks_stands_on_the_first_ones(paused, folder, new_images, tmp_path):
    paused(api.vm_snapshot, to(folder, overlay_directory=str(new_images)))
    second = tmp_path / "second"
    second.mkdir()
    paused(api.vm_snapshot, to(second, overlay_directory=str(new_images)))
    assert paths(paused) == [f"{new_images}/disk0-1.qcow2"]


@pytest.mark.parametrize("operation", ["save", "freeze_disks"])
def test_snapshot_with_disks_that_fails_changes_nothing(paused, folder, new_images, operation):
    before = paused.settled_info()
    paused.engine.faults.set(operation, Fail(EngineError, "Full"), times=1)
    assert paused.refusal(api.vm_snapshot, to(folder, overlay_directory=str(new_images)))[-1] == "Full"
    assert (os.listdir(folder), os.listdir(new_images)) == ([], [])
    assert paused(api.vm_info) == before
    paused(api.vm_snapshot, to(folder, overlay_directory=str(new_images)))


def test_vm_whose_disks_are_frozen_says_so_though_the_snapshot_failed(
    paused, folder, new_images, monkeypatch
):
    def taken(*_):
        raise OSError(errno.EEXIST, "File exists")

    monkeypatch.setattr("cloudvmm.snapshot.draft._give_name", taken)
    assert paused.refusal(api.vm_snapshot, to(folder, overlay_directory=str(new_images)))
    assert os.listdir(folder) == []
    assert paths(paused) == [f"{new_images}/disk0-0.qcow2"]


@pytest.mark.parametrize("directory", ["/nope", "", "a\0b"])
def test_disks_need_a_directory(paused, folder, directory):
    words = paused.refusal(api.vm_snapshot, to(folder, overlay_directory=directory))
    assert words[-1] == f"There is no directory {directory!r} for new disk images"
    assert os.listdir(folder) == []


def test_snapshot_with_disks_is_restored_into_new_images(frozen, new_images, other):
    other(api.vm_restore, saved_in(frozen, overlay_directory=str(new_images)))
    assert paths(other) == [f"{new_images}/disk0-1.qcow2"]


def test_snapshot_with_disks_is_restored_onto_nothing_that_belongs_to_it(frozen, other):
    assert other.refusal(api.vm_restore, saved_in(frozen))[1:] == [
        "Cannot restore VM",
        "Failed to restore migratable component",
        "The snapshot stands on images that must stay as they are, of the disks _disk0:"
        " give an overlay_directory, or override their paths",
    ]
    assert other.refusal(api.vm_info)[-1] == "VM is not created"


def test_snapshot_with_disks_is_restored_onto_other_images(frozen, other, tmp_path):
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(512))
    overrides = {"disks": [{"id": "_disk0", "path": str(copy)}]}
    other(api.vm_restore, saved_in(frozen, overrides=overrides))
    assert paths(other) == [str(copy)]


def test_directory_that_is_for_nothing_is_told_of(saved, paused, new_images, other):
    other(api.vm_restore, saved_in(saved, overlay_directory=str(new_images)))
    assert "warn: Ignoring unused 'overlay_directory' for VM restore." in other.logged
    assert os.listdir(new_images) == []


def test_restore_that_fails_leaves_no_new_image(frozen, new_images, other):
    before = os.listdir(new_images)
    other.engine.faults.set("build", Fail(StateError), times=1)
    assert other.refusal(api.vm_restore, saved_in(frozen, overlay_directory=str(new_images)))
    assert os.listdir(new_images) == before
