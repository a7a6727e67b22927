"""The state of a paused guest in files, and a machine that goes on from it.

`engine-state` is QEMU's migration stream, without the RAM that we share with it: each memfd, or shared file,
is a file of its own, `engine-ram-N`, with holes where the guest has none. `engine-machine` tells which is
which; `saved.py` has that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import msgspec

from cloudvmm.engine.base import BeginsAt, EngineError, EngineTimeout, OnSaved, Saved, SavedIn, StateError
from cloudvmm.engine.qemu.checksum import Checksum
from cloudvmm.engine.qemu.extent import OnCopied, copy_file, copy_from_huge_pages, copy_to_huge_pages
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.migration import ENDED, set_capabilities
from cloudvmm.engine.qemu.migration_watch import MAX_BYTES_PER_S
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.room import check_disk
from cloudvmm.engine.qemu.saved import (
    MACHINE_FILE,
    SavedMachine,
    SavedPiece,
    open_saved,
    read_machine,
)
from cloudvmm.engine.qemu.zone import ZoneBacking

STATE_FILE: Final = "engine-state"
RAM_FILE: Final = "engine-ram-"
INCOMING: Final = ("-incoming", "defer")

_FD_NAME: Final = "saved"
_TIMEOUT_S: Final = 60.0
_BYTES_PER_S: Final = 20 * 1024 * 1024
# An older QEMU throws away what virtio-mem has given when it takes a state without shared RAM.
_KEEPS_ZONES: Final = (10, 0, 0)
# A newer QEMU takes no descriptor of a file by its name, an older one no set of descriptors as a file.
_OPENS_SETS: Final = (9, 1, 0)
# An older QEMU has its images inactive from when it has given its state until its guest runs again.
_ACTIVATES: Final = (10, 0, 0)
_DOWNTIME_MS: Final = 50  # of a guest that runs on at first
_GIVING: Final = "finish-migrate"
_LOOK_S: Final = 0.001
_ANSWER_S: Final = 1.0
_CALLED_OFF_S: Final = 30.0


MakeFile = Callable[[str], contextlib.AbstractContextManager[int]]
CopyMemory = Callable[[RamBacking, int, OnCopied], int | None]


class NotSaved(EngineError):
    """The state could not be saved; the text is QEMU's own words."""


class StateSpent(EngineError):
    """QEMU gives a state once: resume the VM, which has not run since, before it is saved or sent again"""


class ImagesInactive(EngineError):
    """The VM was saved or sent and has not run since: resume it before a disk gets a new size"""


class ImagesStayInactive(EngineError):
    def __init__(self, version: str) -> None:
        super().__init__(
            f"QEMU {version} cannot freeze the disks of a VM that was saved, and 10.0 is the first that can"
        )


class NotRestorable(StateError):
    """QEMU could not go on from the state; the text is its own words."""


class Saver:
    """Saves one machine, as often as is asked. `control` and `resources` are lent. For one thread.

    `cpu` is the model that the guest knows, `has_vmgenid` says that it knows a generation. `has_ivshmem` says
    that all RAM must be in the stream: QEMU would look for the memory of ivshmem where it lay in the guest
    before it has put it there.

    QEMU gives the state of a guest that stands still once. So what was written stays open, to be copied where
    the guest has neither run nor changed when it is saved again.
    """

    def __init__(
        self,
        control: QmpClient,
        resources: Resources,
        facts: QemuFacts,
        *,
        cpu: str,
        has_ivshmem: bool,
        has_vmgenid: bool,
    ) -> None:
        self._control = control
        self._resources = resources
        self._facts = facts
        self._cpu = cpu
        self._has_ivshmem = has_ivshmem
        self._has_vmgenid = has_vmgenid
        self._written: dict[str, int] = {}
        self._is_spent = False

    def save(self, folder: str, tell: OnSaved) -> None:
        """Blocking. Write the state of a guest that stands still into `folder`; it stays there, and paused.

        Every file is new and synced; on failure none is left. `tell` is told how far it is; what it raises
        calls it off.

        :raises NotSaved: QEMU refused, or the state is larger than the disk.
        :raises TooLittleDisk: the memory alone is larger than what is left of the disk.
        :raises StateSpent: QEMU gives its state only when the guest has run again.
        """
        if not self._written:
            self.check_unspent()
        check_disk(folder, sum(memory.held_bytes for memory in self.memories_apart().values()))
        with contextlib.ExitStack() as undo:
            self.write_into(partial(_created, folder, undo=undo), copy_memory, tell)
            undo.pop_all()

    def write_into(self, made: MakeFile, copy: CopyMemory, tell: OnSaved) -> None:
        """Blocking. Write the state of a guest that stands still into the files that `made` gives.

        One whose memory is not apart may run at first, and stands still afterwards. `copy` is what copies a
        memory to its file. Otherwise as `save`.
        """
        if self._written:
            self._copy_all(made, tell)
        else:
            self.check_unspent()
            self._write_all(made, copy, tell)

    def memories_apart(self) -> dict[str, RamBacking]:
        """Return the memory that another machine can be given as it is, by its ids."""
        return dict(_shared(self._resources.memories)) if self._can_be_apart() else {}

    def check_unspent(self) -> None:
        """:raises StateSpent: QEMU gives its state only when the guest has run again."""
        if self._is_spent:
            raise StateSpent

    @property
    def is_spent(self) -> bool:
        """Whether QEMU gives its state only when the guest has run again."""
        return self._is_spent

    def check_images(self) -> None:
        """:raises ImagesInactive: QEMU would end itself if an image were changed now."""
        if self._is_spent and self._facts.version < _ACTIVATES:
            raise ImagesInactive

    def check_freezes(self) -> None:
        """:raises ImagesStayInactive: QEMU has its images inactive once it has given its state."""
        if self._facts.version < _ACTIVATES:
            raise ImagesStayInactive(self._facts.version_text)

    def note_change(self) -> None:
        """The state of the guest is about to be another than what was written."""
        while self._written:
            os.close(self._written.popitem()[1])

    def note_sent(self) -> None:
        """QEMU has given its state to another machine, and the guest stands still."""
        self.note_change()
        self._is_spent = True

    def note_run(self) -> None:
        """The guest runs."""
        self.note_change()
        self._is_spent = False

    def check_blockers(self) -> None:
        """:raises NotSaved: a device has a state that QEMU cannot give; the text has every reason."""
        reasons = self._control.execute("query-migrate").get("blocked-reasons", ())
        if reasons:
            raise NotSaved("; ".join(reason.rstrip(".") for reason in reasons))

    def _copy_all(self, made: MakeFile, tell: OnSaved) -> None:
        done_bytes, total_bytes = 0, sum(os.fstat(fd).st_size for fd in self._written.values())
        for name, source in self._written.items():
            with made(name) as fd:
                copy_file(source, fd, check=_behind(tell, done_bytes, total_bytes))
            done_bytes += os.fstat(source).st_size
        tell(Saved(total_bytes, total_bytes))

    def _write_all(self, made: MakeFile, copy: CopyMemory, tell: OnSaved) -> None:
        self.check_blockers()
        with contextlib.ExitStack() as undo:
            fds: dict[str, int] = {}

            @contextlib.contextmanager
            def file(name: str) -> Iterator[int]:
                with made(name) as fd:
                    yield fd
                    fds[name] = os.dup(fd)
                    undo.callback(os.close, fds[name])

            total_bytes = sum(memory.ram.size for memory in self._resources.memories.values())
            self._write_files(file, copy, tell, total_bytes)
            undo.pop_all()
        self._written = fds
        tell(Saved(total_bytes, total_bytes))

    def _write_files(self, file: MakeFile, copy: CopyMemory, tell: OnSaved, total_bytes: int) -> None:
        version = self._facts.version
        is_ram_apart = self._can_be_apart()
        done_bytes, pieces, checksums = 0, [], {}
        for number, (name, memory) in enumerate(self.memories_apart().items()):
            with file(f"{RAM_FILE}{number}") as fd:
                checksum = copy(memory, fd, _behind(tell, done_bytes, total_bytes))
                if checksum is not None:
                    checksums[f"{RAM_FILE}{number}"] = checksum
            done_bytes += memory.ram.size
            pieces.append(SavedPiece(f"{RAM_FILE}{number}", name, memory.ram.size))
        machine = SavedMachine(
            qemu=version,
            accelerator=self._facts.accelerator,
            cpu=self._cpu,
            has_vmgenid=self._has_vmgenid,
            is_ram_apart=is_ram_apart,
            pieces=pieces,
            checksums=checksums,
        )
        with file(MACHINE_FILE) as fd:
            _write(fd, msgspec.json.encode(machine))
        with file(STATE_FILE) as fd:
            look = partial(self._look, tell, done_bytes, total_bytes)
            self._migrate(fd, is_ram_apart=is_ram_apart, check=look)

    def _look(self, tell: OnSaved, done_bytes: int, total_bytes: int) -> None:
        """Tell how far QEMU is with the RAM that is in its stream; `done_bytes` are behind beside that."""
        left_bytes = total_bytes - done_bytes
        if left_bytes:
            with contextlib.suppress(EngineTimeout):  # it answers nobody while it writes the last part
                ram = self._control.execute("query-migrate", timeout_s=_ANSWER_S).get("ram", {})
                left_bytes = min(left_bytes, ram.get("remaining", left_bytes))
        tell(Saved(total_bytes - left_bytes, total_bytes))

    def _can_be_apart(self) -> bool:
        """Say whether our files hold all of the RAM that is shared.

        Where the guest was restored on demand QEMU alone has what was written since: it is to give all.
        """
        memories = self._resources.memories.values()
        has_zones = any(isinstance(memory, ZoneBacking) for memory in memories)
        if self._has_ivshmem or any(memory.ram.has_base for memory in memories):
            return False
        return not has_zones or self._facts.version >= _KEEPS_ZONES

    def _migrate(self, fd: int, *, is_ram_apart: bool, check: Callable[[], None]) -> None:
        ram_bytes = sum(memory.ram.size for memory in self._resources.memories.values())
        is_under_way = False

        def look() -> None:
            nonlocal is_under_way
            is_under_way = True
            check()

        try:
            with _reopened(fd, os.O_WRONLY) as stream:
                _migrate(
                    self._control,
                    "migrate",
                    stream,
                    version=self._facts.version,
                    is_ram_apart=is_ram_apart,
                    ram_bytes=ram_bytes,
                    check=look,
                )
        except Exception:
            if not self._has_completed() or not is_under_way:  # then it was one before
                raise
        self._is_spent = True
        if self._facts.version >= _ACTIVATES:
            with contextlib.suppress(QmpError):  # as when the guest runs: nobody else was given the images
                self._control.execute("blockdev-set-active", {"active": True})

    def _has_completed(self) -> bool:
        """Call off what QEMU does and wait until it does nothing; say whether it had come to its end."""
        deadline_s = time.monotonic() + _CALLED_OFF_S
        try:
            self._control.execute("migrate_cancel")
            while True:
                status = self._control.execute("query-migrate").get("status")
                if status is None or status in ENDED or time.monotonic() > deadline_s:
                    return bool(status == "completed")
                with contextlib.suppress(EngineTimeout):
                    self._control.wait_event("MIGRATION", timeout_s=_ANSWER_S)
        except EngineError:
            return False


def _behind(tell: OnSaved, done_bytes: int, total_bytes: int) -> OnCopied:
    return lambda copied_bytes: tell(Saved(done_bytes + copied_bytes, total_bytes))


def copy_memory(memory: RamBacking, fd: int, check: OnCopied) -> int:
    """Blocking. Copy the memory of a guest that stands still to the file of `fd`; return its checksum.

    :raises OSError: the system refused.
    """
    assert memory.fd is not None
    with Checksum(memory.fd) as checksum:
        (copy_from_huge_pages if memory.ram.hugepages else copy_file)(memory.fd, fd, check=check)
        os.fsync(fd)
        return checksum.value()


def let_run(control: QmpClient) -> None:
    """Blocking. Have the guest run. QEMU says that it has given its state a moment before it lets it.

    :raises QmpError: it refuses.
    """
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            control.execute("cont")
        except QmpError:
            if time.monotonic() > deadline_s or control.execute("query-status")["status"] != _GIVING:
                raise
        else:
            return
        time.sleep(_LOOK_S)


def load_memory(
    machine: SavedMachine,
    memories: dict[str, RamBacking],
    origin: SavedIn | BeginsAt,
    *,
    is_on_demand: bool,
    check: Callable[[], None],
) -> None:
    """Blocking. Fill the memory of a machine that is about to be built with what `check_machine` found good.

    RAM that `is_on_demand` is not read, but stands on the files; what virtio-mem gives is read all the same,
    since QEMU could give nothing of it back to the file. What `check` raises ends it.

    :raises StateError: it cannot be read, or what is read is not what was saved.
    """
    has_prefault = isinstance(origin, SavedIn) and origin.has_prefault
    for memory in memories.values():
        if has_prefault and not isinstance(memory, ZoneBacking):
            memory.ram = msgspec.structs.replace(memory.ram, prefault=True)
    for piece in machine.pieces:
        memory = memories[piece.name]
        source = open_saved(origin, piece.file)
        try:
            if is_on_demand and not isinstance(memory, ZoneBacking):
                memory.stand_on(source)
            else:
                _fill(memory, source, piece.file, machine.checksums.get(piece.file), check)
        except OSError as error:
            raise StateError("The state cannot be read") from error


def _fill(memory: RamBacking, source: int, name: str, wanted: int | None, check: Callable[[], None]) -> None:
    assert memory.fd is not None
    copy = copy_to_huge_pages if memory.ram.hugepages else copy_file
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, source)
        checksum = None if wanted is None else undo.enter_context(Checksum(source))
        copy(source, memory.fd, check=lambda _: check())
        if checksum is not None and checksum.value() != wanted:
            raise StateError(f"The state is damaged: the checksum of {name} does not match")


def load_state(control: QmpClient, origin: SavedIn | BeginsAt, facts: QemuFacts, *, ram_bytes: int) -> None:
    """Blocking. Have a QEMU that was started with `INCOMING` take the state; its guest then stands paused.

    :raises StateError: it is not the state of such a machine.
    """
    fd = open_saved(origin, STATE_FILE)
    try:
        is_ram_apart = read_machine(origin).is_ram_apart
        _migrate(
            control,
            "migrate-incoming",
            fd,
            version=facts.version,
            is_ram_apart=is_ram_apart,
            ram_bytes=ram_bytes,
        )
    except NotSaved as error:
        raise NotRestorable(str(error)) from error.__cause__  # the same words
    finally:
        os.close(fd)


def _migrate(
    control: QmpClient,
    command: str,
    fd: int,
    *,
    version: tuple[int, int, int],
    is_ram_apart: bool,
    ram_bytes: int,
    check: Callable[[], None] | None = None,
) -> None:
    timeout_s = _TIMEOUT_S + ram_bytes / _BYTES_PER_S
    capabilities = {"events": True, "x-ignore-shared": is_ram_apart, "postcopy-ram": False}
    try:
        set_capabilities(control, capabilities)
        if not is_ram_apart:
            limits = {"max-bandwidth": MAX_BYTES_PER_S, "downtime-limit": _DOWNTIME_MS}
            control.execute("migrate-set-parameters", limits)
        with _given(control, fd, version) as uri:
            ended = control.execute_until(
                command,
                {"uri": uri},
                event="MIGRATION",
                timeout_s=timeout_s,
                is_last=lambda event: event.data["status"] in ENDED,
                check=check,
            )
        if ended.data["status"] == "completed":
            return
        info = control.execute("query-migrate")
    except QmpError as error:
        raise NotSaved(error.description) from error.__cause__
    raise NotSaved(info.get("error-desc", "The migration failed"))


@contextlib.contextmanager
def _given(control: QmpClient, fd: int, version: tuple[int, int, int]) -> Iterator[str]:
    """Give QEMU `fd`, which must be for the one thing that it is used for, and yield how to call it."""
    if version < _OPENS_SETS:
        control.execute("getfd", {"fdname": _FD_NAME}, fds=[fd])
        yield f"fd:{_FD_NAME}"
        return
    number = control.execute("add-fd", fds=[fd])["fdset-id"]
    try:
        yield f"file:/dev/fdset/{number}"
    finally:
        with contextlib.suppress(EngineError):
            control.execute("remove-fd", {"fdset-id": number})


@contextlib.contextmanager
def _reopened(fd: int, access: int) -> Iterator[int]:
    """Open the file of `fd` once more, at its beginning."""
    again = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    try:
        yield again
    finally:
        os.close(again)


def _shared(memories: dict[str, RamBacking]) -> Iterator[tuple[str, RamBacking]]:
    """Yield the memories that are not in the stream."""
    for name, memory in memories.items():
        if memory.ram.is_shared:
            yield name, memory


@contextlib.contextmanager
def _created(folder: str, name: str, *, undo: contextlib.ExitStack) -> Iterator[int]:
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
