"""What a saved machine says of itself decides whether it is taken, before anything is started."""

from __future__ import annotations

import msgspec
import pytest

from cloudvmm.config.memory import MemoryConfig
from cloudvmm.engine.base import MachineGone, StateError
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import RamBacking, rams_of
from cloudvmm.engine.qemu.snapshot import MACHINE_FILE, SavedMachine, SavedPiece, load_memory

RAM_BYTES = 1 << 20
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
        is_ram_apart=True,
        pieces=[SavedPiece("engine-ram-0", "ram0", RAM_BYTES)],
    )


def load(folder, machine, memory, *, check=lambda: None):
    (folder / MACHINE_FILE).write_bytes(msgspec.json.encode(machine))
    load_memory({"ram0": memory}, str(folder), FACTS, check=check)


def test_memory_is_filled_and_its_holes_stay(tmp_path, saved, memory):
    load(tmp_path, saved, memory)
    with open(memory.fd, "rb", closefd=False) as file:
        file.seek(0)
        assert file.read() == bytes(4096) + b"here".ljust(RAM_BYTES - 4096, b"\0")


@pytest.mark.parametrize("qemu", [(7, 2, 0), (10, 0, 2)])
def test_state_of_this_qemu_or_an_older_one_is_taken(tmp_path, saved, memory, qemu):
    load(tmp_path, msgspec.structs.replace(saved, qemu=qemu), memory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qemu": (10, 1, 0)}, "QEMU 10.1.0 saved the state, and QEMU 10.0.2 is older"),
        ({"accelerator": "tcg"}, "guest under TCG, and this one would run under KVM"),
        ({"format": 2}, "format 2, and this release reads 1"),
        ({"pieces": []}, "other RAM"),
        ({"is_ram_apart": False}, "other RAM"),
        ({"pieces": [SavedPiece("engine-ram-0", "ram1", RAM_BYTES)]}, "other RAM"),
        ({"pieces": [SavedPiece("engine-ram-1", "ram0", RAM_BYTES)]}, "cannot be read"),
    ],
)
def test_state_that_cannot_fit_is_refused_with_the_reason(tmp_path, saved, memory, change, words):
    with pytest.raises(StateError, match=words):
        load(tmp_path, msgspec.structs.replace(saved, **change), memory)


def test_piece_that_was_cut_is_told(tmp_path, saved, memory):
    (tmp_path / "engine-ram-0").write_bytes(b"here")
    with pytest.raises(StateError, match="engine-ram-0 has not"):
        load(tmp_path, saved, memory)


def test_copying_can_be_ended(tmp_path, saved, memory):
    def end():
        raise MachineGone("The start of QEMU was aborted")

    with pytest.raises(MachineGone):
        load(tmp_path, saved, memory, check=end)
