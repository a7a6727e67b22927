"""What a saved machine says of itself decides whether it is taken, before anything is started."""

from __future__ import annotations

import fcntl
import os

import msgspec
import pytest

from cloudvmm.config.cpu import CpuFeatures, CpusConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.engine.base import EngineError, MachineGone, Saved, SavedIn, StateError
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import RamBacking, memory_parts, rams_of
from cloudvmm.engine.qemu.saved import (
    MACHINE_FILE,
    OnDemandRefused,
    SavedMachine,
    SavedPiece,
    check_machine,
    check_on_demand,
    cpu_model,
    read_machine,
)
from cloudvmm.engine.qemu.snapshot import STATE_FILE, Saver, load_memory

RAM_BYTES = 1 << 20
CPUS = CpusConfig(boot_vcpus=1, max_vcpus=1)
FACTS = QemuFacts(binary="/usr/bin/qemu", version=(10, 0, 2), accelerator="kvm")


@pytest.fixture
def memory():
    backing = RamBacking(device_id="mem0", ram=rams_of(MemoryConfig(size=RAM_BYTES))[0])
    backing.open()
    yield backing
    backing.close()


@pytest.fixture
def saved(tmp_path):
    """A machine with one piece of RAM: "here" in its second page."""
    with (tmp_path / "engine-ram-0").open("wb") as file:
        file.truncate(RAM_BYTES)
        file.seek(4096)
        file.write(b"here")
    return SavedMachine(
        qemu=(10, 0, 2),
        accelerator="kvm",
        cpu=cpu_model(CPUS, FACTS),
        is_ram_apart=True,
        pieces=[SavedPiece("engine-ram-0", "ram0", RAM_BYTES)],
    )


def load(folder, machine, memory, *, check=lambda: None, **how):
    origin = SavedIn(str(folder), **how)
    load_memory(
        read(folder, machine, memory),
        {"ram0": memory},
        origin,
        is_on_demand=origin.is_on_demand,
        check=check,
    )


def read(folder, machine, memory, *, cpus=CPUS, has_vmgenid=False):
    (folder / MACHINE_FILE).write_bytes(msgspec.json.encode(machine))
    saved = read_machine(SavedIn(str(folder)))
    check_machine(saved, SavedIn(str(folder)), FACTS, cpus, {"ram0": memory.ram}, has_vmgenid=has_vmgenid)
    return saved


def test_memory_is_filled_and_its_holes_stay(tmp_path, saved, memory):
    load(tmp_path, saved, memory)
    with open(memory.fd, "rb", closefd=False) as file:
        file.seek(0)
        assert file.read() == bytes(4096) + b"here".ljust(RAM_BYTES - 4096, b"\0")


def test_memory_that_is_not_what_was_saved_is_refused_when_it_is_read(tmp_path, saved, memory):
    saved = msgspec.structs.replace(saved, checksums={"engine-ram-0": 7})
    with pytest.raises(
        StateError, match="^The state is damaged: the checksum of engine-ram-0 does not match$"
    ):
        load(tmp_path, saved, memory)
    load(tmp_path, saved, memory, is_on_demand=True)


@pytest.mark.parametrize("qemu", [(7, 2, 0), (10, 0, 2)])
def test_state_of_this_qemu_or_an_older_one_is_taken(tmp_path, saved, memory, qemu):
    load(tmp_path, msgspec.structs.replace(saved, qemu=qemu), memory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qemu": (10, 1, 0)}, "QEMU 10.1.0 saved the state, and QEMU 10.0.2 is older"),
        ({"accelerator": "tcg"}, "guest under TCG, and this one would run under KVM"),
        ({"format": 2}, "format 2, and this release reads 1"),
        ({"architecture": "aarch64"}, "guest on aarch64, and guests run on x86_64 here"),
        ({"has_vmgenid": True}, "a machine with a VM generation id"),
        ({"pieces": []}, "other RAM"),
        ({"is_ram_apart": False}, "other RAM"),
        ({"pieces": [SavedPiece("engine-ram-0", "ram1", RAM_BYTES)]}, "other RAM"),
        ({"pieces": [SavedPiece("engine-ram-1", "ram0", RAM_BYTES)]}, "cannot be read"),
    ],
)
def test_state_that_cannot_fit_is_refused_with_the_reason(tmp_path, saved, memory, change, words):
    with pytest.raises(StateError, match=words):
        load(tmp_path, msgspec.structs.replace(saved, **change), memory)


def test_state_without_a_vm_generation_id_gains_none(tmp_path, saved, memory):
    with pytest.raises(StateError, match="a machine without a VM generation id"):
        read(tmp_path, saved, memory, has_vmgenid=True)


def test_piece_that_was_cut_is_told(tmp_path, saved, memory):
    (tmp_path / "engine-ram-0").write_bytes(b"here")
    with pytest.raises(StateError, match="engine-ram-0 has not"):
        load(tmp_path, saved, memory)


def test_copying_can_be_ended(tmp_path, saved, memory):
    def end():
        raise MachineGone("The start of QEMU was aborted")

    with pytest.raises(MachineGone):
        load(tmp_path, saved, memory, check=end)


def test_guest_of_another_cpu_is_refused_with_what_differs(tmp_path, saved, memory):
    other = CpusConfig(boot_vcpus=1, max_vcpus=1, features=CpuFeatures(amx=True), nested=False)
    with pytest.raises(StateError, match=r"without amx-tile=off, .*with vmx=off, with svm=off$"):
        read(tmp_path, saved, memory, cpus=other)


def test_number_of_vcpus_is_not_the_cpu(tmp_path, saved, memory):
    saved = msgspec.structs.replace(saved, cpu=cpu_model(CpusConfig(boot_vcpus=1, max_vcpus=4), FACTS))
    assert read(tmp_path, saved, memory, cpus=CpusConfig(boot_vcpus=2, max_vcpus=4)) == saved


def test_room_for_more_vcpus_belongs_to_the_cpu(tmp_path, saved, memory):
    with pytest.raises(
        StateError, match=r"without cores=1, without maxcpus=1, with cores=2, with maxcpus=2$"
    ):
        read(tmp_path, saved, memory, cpus=CpusConfig(boot_vcpus=1, max_vcpus=2))


def test_memory_on_demand_stands_on_the_file_for_reading(tmp_path, saved, memory):
    load(tmp_path, saved, memory, is_on_demand=True)
    assert os.readlink(f"/proc/self/fd/{memory.fd}") == str(tmp_path / "engine-ram-0")
    assert fcntl.fcntl(memory.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert (memory.ram.is_shared, memory.ram.prefault) == (False, False)
    (backend,) = memory_parts(memory, vcpus=1).objects
    assert (backend["share"], backend["readonly"], backend["rom"]) == (False, True, "off")


def test_memory_that_is_copied_is_prefaulted_where_it_is_asked_for(tmp_path, saved, memory):
    load(tmp_path, saved, memory, has_prefault=True)
    (backend,) = memory_parts(memory, vcpus=1).objects
    assert (backend["share"], backend["prealloc"]) == (True, True)


@pytest.mark.parametrize(
    ("version", "change", "ram", "words"),
    [
        ((7, 2, 0), {}, {}, "QEMU 7.2.0 could damage the snapshot"),
        ((8, 1, 9), {}, {}, "8.2 is the first"),
        ((10, 0, 2), {"pieces": []}, {}, "in one stream"),
        ((10, 0, 2), {}, {"hugepages": True}, "huge pages"),
        ((10, 0, 2), {}, {"file": "/f", "shared": True}, "The memory zone mem0 has a file of its own"),
    ],
)
def test_memory_that_cannot_be_on_demand_is_refused(saved, memory, version, change, ram, words):
    machine = msgspec.structs.replace(saved, **change)
    facts = msgspec.structs.replace(FACTS, version=version)
    with pytest.raises(OnDemandRefused) as caught:
        check_on_demand(machine, facts, {"ram0": msgspec.structs.replace(memory.ram, **ram)}.items())
    assert words in str(caught.value.__cause__)
    assert str(caught.value.__cause__).endswith("restore it with memory_restore_mode Copy")


def test_memory_can_be_on_demand_from_8_2_on(saved, memory):
    facts = msgspec.structs.replace(FACTS, version=(8, 2, 0))
    check_on_demand(saved, facts, {"ram0": memory.ram}.items())


# Saving, with a QEMU that is played


class CalledOff(Exception):
    pass


class PlayedQemu:
    """Answers as a QEMU whose migration has one more look at it before it is done, or hears in time."""

    def __init__(self, folder, *, is_quick=False, refuses=None):
        self.commands = []
        self.status = None
        self._folder = folder
        self._is_quick = is_quick
        self._refuses = refuses

    def execute(self, command, arguments=None, **_):
        self.commands.append(command)
        if command == self._refuses:
            raise EngineError("No")
        if command == "migrate_cancel" and self.status == "active":
            self.status = "cancelled"
        answers = {"add-fd": {"fdset-id": 1}, "query-migrate": self._told()}
        return answers.get(command, {})

    def _told(self):
        told = {} if self.status is None else {"status": self.status}
        return told | ({"ram": {"total": RAM_BYTES, "remaining": 4096}} if self.status == "active" else {})

    def execute_until(self, command, arguments, *, check, **_):
        self.execute(command, arguments)
        self.status = "active"
        check()
        (self._folder / STATE_FILE).write_bytes(b"state")
        self.status = "completed"
        if self._is_quick:
            check()


class Played:
    def __init__(self, ram):
        self.memories = {"ram0": ram}


@pytest.fixture
def private():
    return RamBacking(device_id="mem0", ram=rams_of(MemoryConfig(size=RAM_BYTES, mergeable=True))[0])


def saver_of(qemu, memory):
    return Saver(qemu, Played(memory), FACTS, cpu="", has_ivshmem=False, has_vmgenid=False)


def test_saving_tells_how_far_qemu_is_with_its_stream(tmp_path, private):
    told = []
    saver_of(PlayedQemu(tmp_path), private).save(str(tmp_path), told.append)
    assert told == [Saved(RAM_BYTES - 4096, RAM_BYTES), Saved(RAM_BYTES, RAM_BYTES)]


def test_stream_that_is_called_off_is_cancelled_and_can_be_asked_for_again(tmp_path, private):
    def call_off(saved):
        if saved.bytes < saved.total_bytes:
            raise CalledOff

    qemu = PlayedQemu(tmp_path)
    saver = saver_of(qemu, private)
    with pytest.raises(CalledOff):
        saver.save(str(tmp_path), call_off)
    assert (qemu.status, os.listdir(tmp_path)) == ("cancelled", [])
    saver.save(str(tmp_path), lambda _: None)
    assert qemu.commands.count("migrate") == 2


def test_state_that_was_given_before_qemu_heard_is_kept_for_the_next_time(tmp_path, private):
    """It gives it once."""

    def call_off(saved):
        if qemu.status == "completed":
            raise CalledOff

    qemu = PlayedQemu(tmp_path, is_quick=True)
    saver = saver_of(qemu, private)
    with pytest.raises(CalledOff):
        saver.save(str(tmp_path), call_off)
    assert os.listdir(tmp_path) == []
    saver.save(str(tmp_path), lambda _: None)
    assert (tmp_path / STATE_FILE).read_bytes() == b"state"
    assert qemu.commands.count("migrate") == 1


def test_migration_before_is_not_taken_for_the_one_that_was_refused(tmp_path, private):
    qemu = PlayedQemu(tmp_path, refuses="migrate")
    qemu.status = "completed"
    with pytest.raises(EngineError, match="No"):
        saver_of(qemu, private).save(str(tmp_path), lambda _: None)
    assert os.listdir(tmp_path) == []
