"""What other machines begin with, taken from one that may run: its memory in files of ours, its disks frozen.

The memory is copied while the guest runs, then once more while it stands still, which costs what memory costs
and no more. All that could be refused is refused before anything is touched, and the disks are switched last.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

from cloudvmm.config.disk import DiskConfig
from cloudvmm.engine.base import FrozenDisk, NotForkable
from cloudvmm.engine.qemu.debugger import DebugWatch
from cloudvmm.engine.qemu.extent import OnCopied
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.hotplug import Hotplug
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.overlay import Freeze
from cloudvmm.engine.qemu.qmp import QmpClient
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.saved import MemoryBase
from cloudvmm.engine.qemu.snapshot import RAM_FILE, Saver
from cloudvmm.engine.qemu.twin import Twin, seal

# An older one does not have its images back before its guest runs, and may damage what is mapped privately.
_GIVES_IMAGES_BACK: Final = (10, 0, 0)
_STOP_TIMEOUT_S: Final = 60.0


class MemoryNotTaken(NotForkable):
    """The host does not give the memory for a copy of the guest's"""


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
    with contextlib.ExitStack() as undo:
        files = _Files()
        undo.callback(files.close)
        freeze = Freeze(overlays, disks, control=control, hotplug=hotplug, resources=resources)
        undo.callback(freeze.undo)
        files.take(saver.memories_apart(), check)
        with _standing_still(control, saver, debugger) as stood:
            saver.write_into(files.made, files.copy, lambda _: check())
            frozen = freeze.switch()
            undo.callback(freeze.rejoin)
        sealed = files.seal()
        undo.pop_all()
    images = {
        each.disk_id: FrozenDisk(path=each.base_path, image_type=each.base_type, size_bytes=each.size_bytes)
        for each in frozen
    }
    return MemoryBase(sealed, images, stood(), rejoin=freeze.rejoin)


def _check(overlays: Mapping[str, str], resources: Resources, facts: QemuFacts) -> None:
    if facts.version < _GIVES_IMAGES_BACK:
        raise NotForkable(f"QEMU {facts.version_text} has no means for it, and 10.0 is the first that has")
    if resources.maps_memory:
        raise NotForkable("The VM has a vhost-user or vfio-user device, whose back end cannot be there twice")
    for memory in resources.memories.values():
        if memory.ram.has_base:
            raise NotForkable(
                "The VM has memory of others below its own, as clones have and what was restored on demand:"
                " snapshot it, and restore that with memory_restore_mode Copy"
            )
        if memory.ram.hugepages:
            raise NotForkable("Memory of huge pages cannot be shared by clones")
        if memory.ram.file is not None:
            raise NotForkable(f"The memory zone {memory.ram.zone_id} has a file of its own")
    written = {disk.device_id for disk in resources.disks if not disk.image.readonly}
    if written != overlays.keys():
        names = ", ".join(sorted(written ^ overlays.keys()))
        raise NotForkable(f"The disks that can be written have changed meanwhile: {names}")


@contextlib.contextmanager
def _standing_still(control: QmpClient, saver: Saver, debugger: DebugWatch) -> Iterator[Callable[[], float]]:
    """Have the guest stand still inside, and then run if it did. What is given tells for how long it did."""
    was_running = control.execute("query-status")["running"]
    began = ended = time.monotonic()
    try:
        if was_running:
            debugger.want(is_to_run=False)
            control.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        yield lambda: ended - began
    finally:  # also where it did not stand still in time: it may later
        if was_running:
            debugger.want(is_to_run=True)
            control.execute("cont")
            ended = time.monotonic()
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
                twin.copy(check)
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
