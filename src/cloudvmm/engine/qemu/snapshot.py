"""The state of a paused guest in files, and a machine that goes on from it.

`engine-state` is QEMU's migration stream, without the RAM that we share with it: each memfd, or shared file,
is a file of its own, `engine-ram-N`, with holes where the guest has none. `engine-machine` tells which is
which.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from cloudvmm.engine.base import EngineError, StateError
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.engine.qemu.zone import ZoneBacking

STATE_FILE: Final = "engine-state"
MACHINE_FILE: Final = "engine-machine"
RAM_FILE: Final = "engine-ram-"
INCOMING: Final = ("-incoming", "defer")

_FORMAT: Final = 1
_FD_NAME: Final = "saved"
_TIMEOUT_S: Final = 60.0
_BYTES_PER_S: Final = 20 * 1024 * 1024
_COPY_BYTES: Final = 64 * 1024 * 1024
# An older QEMU throws away what virtio-mem has given when it takes a state without shared RAM.
_KEEPS_ZONES: Final = (10, 0, 0)
_END: Final = {"completed", "failed", "cancelled"}


class NotSaved(EngineError):
    """The state could not be saved; the text is QEMU's own words."""


class NotRestorable(StateError):
    """QEMU could not go on from the state; the text is its own words."""


class SavedPiece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name` is the id of a piece of RAM or of a zone, `size` its bytes."""

    file: str
    name: str
    size: int


class SavedMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `engine-machine` holds. `pieces` are not in the stream: all RAM that is shared, or none."""

    format: int = _FORMAT
    qemu: str
    pieces: list[SavedPiece]


def save(
    control: QmpClient, memories: dict[str, RamBacking], folder: str, *, version: tuple[int, int, int]
) -> None:
    """Blocking. Write the state of a guest that stands still into `folder`; it stays there, and paused.

    Every file is new and synced; on failure none is left. `version` is that of QEMU.

    :raises NotSaved: QEMU refused, or the state is larger than the disk.
    """
    with contextlib.ExitStack() as undo:
        pieces = []
        has_zones = any(isinstance(memory, ZoneBacking) for memory in memories.values())
        apart = {} if has_zones and version < _KEEPS_ZONES else dict(_shared(memories))
        for number, (name, memory) in enumerate(apart.items()):
            file = f"{RAM_FILE}{number}"
            with _created(folder, file, undo) as fd:
                assert memory.fd is not None
                _copy(memory.fd, fd)
            pieces.append(SavedPiece(file, name, memory.ram.size))
        with _created(folder, STATE_FILE, undo) as fd:
            ram_bytes = sum(memory.ram.size for memory in memories.values())
            _migrate(control, "migrate", fd, is_ram_apart=bool(pieces), ram_bytes=ram_bytes)
        with _created(folder, MACHINE_FILE, undo) as fd:
            qemu = ".".join(map(str, version))
            _write(fd, msgspec.json.encode(SavedMachine(qemu=qemu, pieces=pieces)))
        undo.pop_all()


def load_memory(memories: dict[str, RamBacking], folder: str) -> None:
    """Blocking. Fill the memory of a machine that is about to be built with what was saved in `folder`.

    :raises StateError: it is not the memory of such a machine, or cannot be read.
    """
    machine = _read_machine(folder)
    shared = dict(_shared(memories))
    if machine.pieces and {(piece.name, piece.size) for piece in machine.pieces} != {
        (name, memory.ram.size) for name, memory in shared.items()
    }:
        raise StateError("The state is that of a machine with other RAM")
    for piece in machine.pieces:
        target = shared[piece.name].fd
        assert target is not None
        try:
            source = os.open(f"{folder}/{os.path.basename(piece.file)}", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise StateError("The state cannot be read") from error
        try:
            if os.fstat(source).st_size != piece.size:
                raise StateError(f"The state is damaged: {piece.file} has not {piece.size} bytes")
            _copy(source, target)
        except OSError as error:
            raise StateError("The state cannot be read") from error
        finally:
            os.close(source)


def load_state(control: QmpClient, folder: str, *, ram_bytes: int) -> None:
    """Blocking. Have a QEMU that was started with `INCOMING` take the state; its guest then stands paused.

    :raises StateError: it is not the state of such a machine.
    """
    try:
        fd = os.open(f"{folder}/{STATE_FILE}", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise StateError("The state cannot be read") from error
    try:
        is_ram_apart = bool(_read_machine(folder).pieces)
        _migrate(control, "migrate-incoming", fd, is_ram_apart=is_ram_apart, ram_bytes=ram_bytes)
    except NotSaved as error:
        raise NotRestorable(str(error)) from error
    finally:
        os.close(fd)


def _migrate(control: QmpClient, command: str, fd: int, *, is_ram_apart: bool, ram_bytes: int) -> None:
    timeout_s = _TIMEOUT_S + ram_bytes / _BYTES_PER_S
    capabilities = {"events": True, "x-ignore-shared": is_ram_apart}
    try:
        control.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": on} for name, on in capabilities.items()]},
        )
        control.execute("getfd", {"fdname": _FD_NAME}, fds=[fd])
        control.execute(command, {"uri": f"fd:{_FD_NAME}"})
        while control.wait_event("MIGRATION", timeout_s=timeout_s).data["status"] not in _END:
            pass
        info = control.execute("query-migrate")
    except QmpError as error:
        raise NotSaved(error.description) from error
    if info.get("status") != "completed":
        raise NotSaved(info.get("error-desc", "The migration failed"))


def _shared(memories: dict[str, RamBacking]) -> Iterator[tuple[str, RamBacking]]:
    """Yield the memories that are not in the stream."""
    for name, memory in memories.items():
        if memory.fd is not None and (memory.ram.file is None or memory.ram.shared):
            yield name, memory


def _read_machine(folder: str) -> SavedMachine:
    try:
        with open(f"{folder}/{MACHINE_FILE}", "rb") as file:
            machine = msgspec.json.decode(file.read(1 << 20), type=SavedMachine)
    except OSError as error:
        raise StateError("The state cannot be read") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError("The state is damaged") from error
    if machine.format != _FORMAT:
        raise StateError(f"The state has the format {machine.format}, and this release reads {_FORMAT}")
    return machine


@contextlib.contextmanager
def _created(folder: str, name: str, undo: contextlib.ExitStack) -> Iterator[int]:
    """Make a new file, give its descriptor, and sync it; `undo` removes it."""
    path = f"{folder}/{name}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotSaved("The state cannot be written") from error
    undo.callback(_remove, path)
    try:
        yield fd
        os.fsync(fd)
    except OSError as error:
        raise NotSaved("The state cannot be written") from error
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _write(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)


def _copy(source: int, target: int) -> None:
    """Copy what there is of `source` to the same place in `target`, whose holes stay holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in _extents(source, size):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            copied = os.sendfile(target, source, start, min(end - start, _COPY_BYTES))
            if copied == 0:
                raise OSError("The file became shorter")
            start += copied


def _extents(fd: int, size: int) -> Iterable[tuple[int, int]]:
    """Yield where the data of a file begins and ends."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
