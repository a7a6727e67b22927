"""What other machines begin with, taken from one that may run: its memory in files of ours, its disks frozen.

The memory is copied while the guest runs, then once more while it stands still, which costs what memory costs
and no more. Where QEMU alone has what was written to it, as on memory that others stand on, too, it gives all
with the rest of the state, and most of that while the guest runs.

All that could be refused is refused before anything is touched, and the disks are switched last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from cloudvmm.config.disk import DiskConfig
from cloudvmm.engine.base import NotForkable
from cloudvmm.engine.qemu.debugger import DebugWatch
from cloudvmm.engine.qemu.extent import OnCopied
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.hotplug import Hotplug
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.overlay import Freeze
from cloudvmm.engine.qemu.qmp import QmpClient
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.saved import MemoryBase
from cloudvmm.engine.qemu.snapshot import RAM_FILE, Saver, let_run
from cloudvmm.engine.qemu.twin import Twin, seal
from cloudvmm.host.room import free_memory

# An older one does not have its images back before its guest runs, and may damage what is mapped privately.
_GIVES_IMAGES_BACK: Final = (10, 0, 0)
_STOP_TIMEOUT_S: Final = 60.0
_PATIENCE_S: Final = 10.0


class MemoryNotTaken(NotForkable):
    """The host does not give the memory for a copy of the guest's"""


class TooLittleMemory(NotForkable):
    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        needed_mib, free_mib = needed_bytes >> 20, free_bytes >> 20
        super().__init__(
            f"A copy of the guest's memory takes {needed_mib} MiB, and the host has {free_mib} MiB to give"
        )


def fork_guest(
    overlays: Mapping[str, str],
    disks: Mapping[str, DiskConfig],
    *,
    control: QmpClient,
    resources: Resources,
    hotplug: Hotplug,
    saver: Saver,
    facts: QemuFacts,
    debugger: DebugWatch,
    check: Callable[[], None],
) -> MemoryBase:
    """Blocking. As `Machine.fork` says. `disks` are the configurations of the machine's, by their ids.

    What `check` raises ends the copying.
    """
    _check(overlays, resources, facts)
    saver.check_blockers()
    memories = saver.memories_apart()
    group = None if resources.group is None else resources.group.path
    _check_room(memories or resources.memories, group)
    with contextlib.ExitStack() as undo:
        files = _Files()
        undo.callback(files.close)
        freeze = Freeze(overlays, disks, control=control, hotplug=hotplug, resources=resources)
        undo.callback(freeze.undo)
        files.take(memories, check)
        with _standing_still(control, saver, debugger, is_late=not memories) as stand:
            saver.write_into(files.made, files.copy, lambda _: stand.look(check))
            stand.note_written()
            freeze.switch()
            undo.callback(freeze.rejoin)
        sealed = files.seal()
        undo.pop_all()
    return MemoryBase(sealed, freeze.bases, stand.length_s, rejoin=freeze.rejoin)


def _check(overlays: Mapping[str, str], resources: Resources, facts: QemuFacts) -> None:
    if facts.version < _GIVES_IMAGES_BACK:
        raise NotForkable(f"QEMU {facts.version_text} has no means for it, and 10.0 is the first that has")
    if resources.maps_memory:
        raise NotForkable("The VM has a vhost-user or vfio-user device, whose back end cannot be there twice")
    for memory in resources.memories.values():
        if memory.ram.hugepages:
            raise NotForkable("Memory of huge pages cannot be shared by clones")
        if memory.ram.file is not None:
            raise NotForkable(f"The memory zone {memory.ram.zone_id} has a file of its own")
    written = {disk.device_id for disk in resources.disks if not disk.image.readonly}
    if written != overlays.keys():
        names = ", ".join(sorted(written ^ overlays.keys()))
        raise NotForkable(f"The disks that can be written have changed meanwhile: {names}")


def _check_room(memories: Mapping[str, RamBacking], group: str | None = None) -> None:
    """:raises TooLittleMemory: who takes so much would have the kernel end somebody."""
    needed_bytes = sum(memory.held_bytes for memory in memories.values())
    free_bytes = free_memory(group=group)  # QEMU's, which may be another than ours
    if free_bytes is not None and needed_bytes > free_bytes:
        raise TooLittleMemory(needed_bytes, free_bytes)


class _Stand:
    """For how long the guest stands still. Where it `is_late` QEMU stops it, when little memory is left."""

    def __init__(self, control: QmpClient, *, is_late: bool) -> None:
        self._control = control
        self._is_late = is_late
        self._is_stopped = not is_late
        self._began = self._ended = time.monotonic()

    def look(self, check: Callable[[], None]) -> None:
        """Called now and then while QEMU writes. A guest that writes faster than that is stopped."""
        check()
        if not self._is_stopped and time.monotonic() > self._began + _PATIENCE_S:
            self._is_stopped = True
            self._control.execute("stop", timeout_s=_STOP_TIMEOUT_S)

    def note_written(self) -> None:
        if self._is_late:
            downtime_ms = self._control.execute("query-migrate").get("downtime", 0)
            self._began = time.monotonic() - downtime_ms / 1000

    def note_end(self) -> None:
        self._ended = time.monotonic()

    @property
    def length_s(self) -> float:
        return self._ended - self._began


@contextlib.contextmanager
def _standing_still(
    control: QmpClient, saver: Saver, debugger: DebugWatch, *, is_late: bool = False
) -> Iterator[_Stand]:
    """Have the guest stand still inside, and then run if it did.

    Where it `is_late` it runs on at first: QEMU stops it, and it stands still once its state is written.
    """
    was_running = control.execute("query-status")["running"]
    stand = _Stand(control, is_late=is_late and was_running)
    try:
        if was_running:
            debugger.want(is_to_run=False)
            if not is_late:
                control.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        yield stand
    finally:  # also where it did not stand still in time: it may later
        if was_running:
            debugger.want(is_to_run=True)
            let_run(control)
            stand.note_end()
            saver.note_run()


class _Files:
    """The files of a state, in memory. Their descriptors are ours until `seal` gives them away."""

    def __init__(self) -> None:
        self._twins: dict[str, Twin] = {}
        self._fds: dict[str, int] = {}

    def take(self, memories: Mapping[str, RamBacking], check: Callable[[], None]) -> None:
        """Blocking. Copy the memory of a guest that may run.

        :raises MemoryNotTaken: the host does not give as much.
        """
        try:
            for number, memory in enumerate(memories.values()):
                assert memory.fd is not None
                twin = self._twins[f"{RAM_FILE}{number}"] = Twin(memory.fd, memory.ram.size)
                twin.fill(check)
        except OSError as error:
            raise MemoryNotTaken from error

    @contextlib.contextmanager
    def made(self, name: str) -> Iterator[int]:
        """Give the descriptor of the file `name`, which is lent."""
        try:
            if name in self._twins:
                yield self._twins[name].fd
                return
            self._fds[name] = os.memfd_create("cloudvmm-base", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            yield self._fds[name]
        except OSError as error:
            raise MemoryNotTaken from error

    def copy(self, memory: RamBacking, fd: int, check: OnCopied) -> None:
        """Blocking. Copy the memory of a guest that stands still; nobody could damage the copy."""
        next(twin for twin in self._twins.values() if twin.fd == fd).copy(partial(check, 0))

    def seal(self) -> dict[str, int]:
        """Let nobody change the files any more; return their descriptors, which are the caller's.

        :raises MemoryNotTaken: the kernel refuses; they are ours still.
        """
        try:
            for fd in self._fds.values():
                seal(fd)
            for name, twin in self._twins.items():
                self._fds[name] = twin.seal()
        except OSError as error:
            raise MemoryNotTaken from error
        self._twins.clear()
        fds, self._fds = self._fds, {}
        return fds

    def close(self) -> None:
        while self._twins:
            self._twins.popitem()[1].close()
        while self._fds:
            os.close(self._fds.popitem()[1])
