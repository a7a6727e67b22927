"""What a saved machine says of itself, and whether another can go on from it. Nothing is opened but to read.

The file is `engine-machine`, one JSON object, in a snapshot's folder or in memory. `snapshot.py` writes and
reads the state itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from cloudvmm.config import form
from cloudvmm.config.cpu import CpusConfig
from cloudvmm.engine.base import Base, BeginsAt, FrozenDisk, SavedIn, StateError
from cloudvmm.engine.qcow2 import create_overlay
from cloudvmm.engine.qemu.cpu import cpu_arguments
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import Ram

MACHINE_FILE: Final = "engine-machine"
ARCHITECTURE: Final = "x86_64"

_FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 20


class OnDemandRefused(StateError):
    """On-demand restore failed"""


class SavedPiece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name` is the id of a piece of RAM or of a zone, `size` its bytes."""

    file: str
    name: str
    size: int


class SavedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What `engine-machine` holds. `pieces` are not in the stream where it `is_ram_apart`.

    `cpu` is what the guest knows of its vCPUs, see `cpu_model`; None where an early release wrote it.
    `has_vmgenid` says that it is told its generation.
    `checksums` are those of `checksum.py`, by the names of files.
    """

    format: int = _FORMAT
    architecture: str = ARCHITECTURE
    qemu: tuple[int, int, int]
    accelerator: str
    cpu: str | None = None
    has_vmgenid: bool = False
    is_ram_apart: bool
    pieces: list[SavedPiece]
    checksums: dict[str, int] = {}


class _Label(msgspec.Struct, frozen=True):
    format: int


def cpu_model(cpus: CpusConfig, facts: QemuFacts) -> str:
    """Return what QEMU is told of the vCPUs, except how many there are at first."""
    arguments = cpu_arguments(cpus, facts.accelerator, kvm_device=facts.kvm_device)
    model, count = (arguments[arguments.index(option) + 1] for option in ("-cpu", "-smp"))
    return f"{model},{count.partition(',')[2]}"


class MemoryBase(Base):
    """`files` are what would lie in a snapshot's folder, by name, as sealed descriptors that are ours.

    `disks` have an image below them that nobody writes any more, by their ids. `rejoin` makes that undone.
    """

    def __init__(
        self,
        files: dict[str, int],
        disks: dict[str, FrozenDisk],
        stood_still_s: float,
        *,
        rejoin: Callable[[], None],
    ) -> None:
        self.rejoin = rejoin
        self._files = files
        self._disks = disks
        self._stood_still_s = stood_still_s

    @property
    def stood_still_s(self) -> float:
        return self._stood_still_s

    def open(self, name: str) -> int:
        """Return a descriptor of its own of a file, for reading; the caller's.

        :raises OSError: there is no such file any more.
        """
        if name not in self._files:
            raise FileNotFoundError(name)
        return os.open(f"/proc/self/fd/{self._files[name]}", os.O_RDONLY | os.O_CLOEXEC)

    def make_overlay(self, disk_id: str, path: str) -> None:
        create_overlay(path, self._disks[disk_id])

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def open_saved(origin: SavedIn | BeginsAt, name: str) -> int:
    """Return a descriptor of the file `name` of a state, for reading; the caller's.

    :raises StateError: it cannot be had.
    """
    try:
        if isinstance(origin, SavedIn):
            return os.open(f"{origin.folder}/{os.path.basename(name)}", os.O_RDONLY | os.O_CLOEXEC)
        if isinstance(origin.base, MemoryBase):
            return origin.base.open(name)
    except (OSError, ValueError) as error:
        raise StateError("The state cannot be read") from error
    raise StateError("The state is that of another engine")


def read_machine(origin: SavedIn | BeginsAt) -> SavedMachine:
    """:raises StateError: it cannot be read, or is of a later release."""
    try:
        with open(open_saved(origin, MACHINE_FILE), "rb") as file:
            raw = file.read(_MAX_BYTES)
        found = form.decoder(_Label).decode(raw).format
        if found != _FORMAT:
            raise StateError(f"The state has the format {found}, and this release reads {_FORMAT}")
        machine: SavedMachine = form.decoder(SavedMachine).decode(raw)
    except form.MALFORMED as error:
        raise StateError("The state is damaged") from error
    except OSError as error:
        raise StateError("The state cannot be read") from error
    return machine


def check_machine(
    machine: SavedMachine,
    origin: SavedIn | BeginsAt,
    facts: QemuFacts,
    cpus: CpusConfig,
    rams: dict[str, Ram],
    *,
    has_vmgenid: bool,
) -> None:
    """Look whether a machine of `cpus` and `rams`, by their ids, can go on from what is in `origin`.

    `rams` are all pieces, those of zones too.

    :raises StateError: it cannot; the text tells why.
    """
    _check_origin(machine, facts)
    _check_cpu(machine.cpu, cpu_model(cpus, facts))
    if machine.has_vmgenid != has_vmgenid:
        preposition = "with" if machine.has_vmgenid else "without"
        raise StateError(f"The state is that of a machine {preposition} a VM generation id")
    apart = {name: ram.size for name, ram in rams.items() if ram.is_shared} if machine.is_ram_apart else {}
    if {piece.name: piece.size for piece in machine.pieces} != apart:
        raise StateError("The state is that of a machine with other RAM")
    for piece in machine.pieces:
        _check_piece(origin, piece)


def check_on_demand(machine: SavedMachine, facts: QemuFacts, rams: Iterable[tuple[str, Ram]]) -> None:
    """Look whether `rams`, by their ids, can stay in the files of `machine`.

    :raises OnDemandRefused: they cannot; the cause tells why.
    """
    apart = {piece.name for piece in machine.pieces}
    reason = None
    if not facts.spares_files:
        reason = f"QEMU {facts.version_text} could damage the snapshot, and 8.2 is the first that does not"
    for name, ram in rams:
        if name not in apart:
            reason = "The snapshot has the RAM in one stream with the rest, which must be read as a whole"
        elif ram.hugepages:
            reason = "A file cannot be mapped with huge pages"
        elif ram.file is not None:
            reason = f"The memory zone {ram.zone_id} has a file of its own"
    if reason is not None:
        raise OnDemandRefused from StateError(f"{reason}: restore it with memory_restore_mode Copy")


def _check_origin(machine: SavedMachine, facts: QemuFacts) -> None:
    if machine.architecture != ARCHITECTURE:
        raise StateError(
            f"The state is that of a guest on {machine.architecture}, and guests run on {ARCHITECTURE} here"
        )
    if machine.accelerator != facts.accelerator:
        raise StateError(
            f"The state is that of a guest under {machine.accelerator.upper()},"
            f" and this one would run under {facts.accelerator.upper()}"
        )
    if machine.qemu > facts.version:
        saved = ".".join(map(str, machine.qemu))
        raise StateError(f"QEMU {saved} saved the state, and QEMU {facts.version_text} is older")


def _check_piece(origin: SavedIn | BeginsAt, piece: SavedPiece) -> None:
    if isinstance(origin, BeginsAt):
        return  # nobody could change it
    try:
        found = os.stat(f"{origin.folder}/{os.path.basename(piece.file)}")
    except (OSError, ValueError) as error:
        raise StateError("The state cannot be read") from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != piece.size:
        raise StateError(f"The state is damaged: {piece.file} has not {piece.size} bytes")


def _check_cpu(saved: str | None, wanted: str) -> None:
    """A guest that finds itself on another model hangs, and QEMU says nothing."""
    if saved is None or saved == wanted:
        return
    before, now = saved.split(","), wanted.split(",")
    changes = [
        *(f"without {setting}" for setting in before if setting not in now),
        *(f"with {setting}" for setting in now if setting not in before),
    ]
    raise StateError(f"The state is that of a guest on another CPU; this one would be {', '.join(changes)}")
