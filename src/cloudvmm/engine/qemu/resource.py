"""What a machine stands on and is opened before QEMU starts: disk images, TAP queues, RAM, console streams.

All descriptors here are close-on-exec and handed to QEMU under the same numbers. They are made once for
each build, so that a machine built anew after a reset starts with fresh RAM, and everything is released by
one `close`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import msgspec

from cloudvmm.config.disk import ImageType
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError, EngineError, MachineSpec, StateError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.confinement import open_doorway, open_group
from cloudvmm.engine.qemu.console import open_stream
from cloudvmm.engine.qemu.disk import DiskBacking
from cloudvmm.engine.qemu.handover import Handover
from cloudvmm.engine.qemu.ivshmem import open_ivshmem
from cloudvmm.engine.qemu.kind import devices_of, open_backing
from cloudvmm.engine.qemu.mapped import MappedBacking
from cloudvmm.engine.qemu.memory import RamBacking, module_id
from cloudvmm.engine.qemu.net import NetBacking
from cloudvmm.engine.qemu.numa import Memory, memory_of
from cloudvmm.engine.qemu.payload import is_elf
from cloudvmm.engine.qemu.slot import check_slots
from cloudvmm.engine.qemu.support import check_supported
from cloudvmm.engine.qemu.text import is_utf8
from cloudvmm.engine.qemu.tpm import open_tpm
from cloudvmm.engine.qemu.vfio import open_iommufd
from cloudvmm.engine.qemu.zone import ZoneBacking, zones_of
from cloudvmm.host.cgroup import ControlGroup
from cloudvmm.host.doorway import Doorway
from cloudvmm.host.user import User

_SINGLE_FDS: Final = ("serial_fd", "console_fd", "debug_console_fd", "rng_fd", "iommufd_fd")


class RngSourceError(DeviceError):
    """The entropy source could not be opened"""


class Resources(msgspec.Struct, kw_only=True):
    """Everything opened for one machine, whose QEMU runs as `user`, as us if None. Owns every descriptor."""

    memory: Memory
    rams: dict[str, RamBacking] = msgspec.field(default_factory=dict)
    modules: list[RamBacking] = msgspec.field(default_factory=list)
    zones: dict[str, ZoneBacking] = msgspec.field(default_factory=dict)
    backings: dict[str, Backing] = msgspec.field(default_factory=dict)
    serial_fd: int | None = None
    console_fd: int | None = None
    debug_console_fd: int | None = None
    rng_path: str = "/dev/urandom"
    rng_fd: int | None = None
    iommufd_fd: int | None = None
    firmware_is_elf: bool = False
    user: User | None = None
    doorway: Doorway | None = None
    group: ControlGroup | None = None

    @property
    def inherited_fds(self) -> list[int]:
        """Descriptors that the QEMU process must have under the same numbers."""
        singles = (getattr(self, name) for name in _SINGLE_FDS)
        return [
            *(fd for fd in singles if fd is not None),
            *(fd for backing in self._all() for fd in backing.fds),
        ]

    def stay_ours(self) -> None:
        """Have the machine's QEMU run as us."""
        self.user = None
        if self.doorway is not None:
            self.doorway.reader = None

    @property
    def streams(self) -> tuple[int | None, int | None, int | None]:
        """What was opened for the serial port, the console and the debug port, if anything was."""
        return self.serial_fd, self.console_fd, self.debug_console_fd

    @property
    def reopened_fds(self) -> list[int]:
        """Those of the descriptors whose files QEMU opens once more, to map them or by a name of its own."""
        backings = [each for each in self._all() if isinstance(each, RamBacking | MappedBacking)]
        found = [fd for backing in backings for fd in backing.fds]
        return found if self.rng_fd is None else [*found, self.rng_fd]

    @property
    def private_fds(self) -> list[int]:
        """Whose files QEMU opens for writing although it writes to none of them: it maps them for itself."""
        mapped = (each for each in self.backings.values() if isinstance(each, MappedBacking))
        return [each.fd for each in mapped if not each.is_shared]

    @property
    def connected_paths(self) -> list[str]:
        """Where there are sockets that QEMU itself connects to."""
        paths = (getattr(backing, "path", None) for backing in self.backings.values())
        return [path for path in paths if path is not None]

    def module(self, number: int, size: int) -> RamBacking:
        """Return the memory of module `number`, of the same kind as the first piece of RAM; to be opened."""
        first = next(iter(self.memory.rams.values()))
        return RamBacking(device_id=module_id(number), ram=first.module(size))

    @property
    def memories(self) -> dict[str, RamBacking]:
        """The pieces of RAM, the modules and what virtio-mem gives, by their ids."""
        modules = {module_id(number): module for number, module in enumerate(self.modules)}
        return {**self.rams, **modules, **self.zones}

    @property
    def has_base(self) -> bool:
        """Whether RAM stands on what others stand on, too."""
        return any(memory.ram.has_base for memory in self.memories.values())

    @property
    def maps_memory(self) -> bool:
        """Whether a program beside QEMU maps the guest's memory."""
        return any(backing.maps_memory for backing in self.backings.values())

    @property
    def needs_network(self) -> bool:
        """Whether QEMU itself is to have the network."""
        return any(backing.needs_network for backing in self.backings.values())

    @property
    def interfaces(self) -> dict[str, str]:
        """Device id to interface name, for every network device whose interface we can see."""
        found = ((device_id, backing.interface) for device_id, backing in self.backings.items())
        return {device_id: interface for device_id, interface in found if interface is not None}

    @property
    def shareable_taps(self) -> dict[str, list[int]]:
        """Device id to TAP queues that another machine can have beside this one. Lent.

        A rate limit belongs to one machine, and goes with it.
        """
        nets = (backing for backing in self.backings.values() if isinstance(backing, NetBacking))
        return {net.device_id: net.queues for net in nets if net.limit is None}

    @property
    def disks(self) -> list[DiskBacking]:
        return [backing for backing in self.backings.values() if isinstance(backing, DiskBacking)]

    @property
    def image_types(self) -> dict[str, ImageType]:
        """Device id to what the image was found to be."""
        return {disk.device_id: disk.image.image_type for disk in self.disks}

    def hold(self, backing: Backing) -> None:
        """Own `backing` from now on."""
        self.backings[backing.device_id] = backing

    def lock_images(self) -> None:
        """Lock every image on the descriptor that QEMU uses. Idempotent.

        :raises ImageLocked: another process holds an image; those locked so far are released by
            `release_images`.
        :raises ImageLockError: the file system cannot lock.
        """
        for backing in self.backings.values():
            backing.lock()

    def release_images(self) -> None:
        """Close every image, which ends its lock; what was found out about it stays. Idempotent."""
        for disk in self.disks:
            disk.close()

    def close(self) -> None:
        """Close everything; idempotent. A QEMU that still runs keeps its own copies, unless it has a group:
        all that is in that is killed.
        """
        for backing in self._all():
            backing.close()
        if self.doorway is not None:
            self.doorway.close()
        for name in _SINGLE_FDS:
            fd = getattr(self, name)
            if fd is not None:
                setattr(self, name, None)
                os.close(fd)
        if self.group is not None:
            self.group.close()

    def _all(self) -> list[Backing]:
        return [*self.rams.values(), *self.modules, *self.zones.values(), *self.backings.values()]


def acquire(
    spec: MachineSpec,
    undo: ExitStack,
    *,
    attempt: Attempt | None = None,
    handover: Handover | None = None,
) -> Resources:
    """Open what `spec` names. `undo` closes it all; nothing stays open after a failure once `undo` has run.
    `attempt` may be aborted meanwhile. `handover` is what another machine has of it, and shares.

    :raises MachineGone: it was.
    :raises NotSupportedYet: the configuration asks for what this engine cannot give.
    :raises DeviceError: an image, an interface or a descriptor cannot be had; the cause tells why.
    :raises StateError: `handover` is that of another machine.
    :raises SlotError: the slots in `spec` do not fit this machine.
    :raises EngineError: the memory configuration is not valid, or there is no such memory; or no group.
    """
    attempt = attempt or Attempt()
    handover = handover or Handover()
    vm_config = spec.vm_config
    check_supported(vm_config)
    check_slots(spec.slots)
    resources = Resources(memory=memory_of(vm_config), user=attempt.user)
    undo.callback(resources.close)
    resources.group = attempt.group = open_group(attempt.policy, spec.state_dir)
    resources.rams = {
        name: RamBacking(device_id=ram.zone_id, ram=ram) for name, ram in resources.memory.rams.items()
    }
    resources.zones = zones_of(vm_config.memory)
    resources.modules = [resources.module(number, size) for number, size in enumerate(spec.modules)]
    _open_memories(resources.memories, handover.memory)
    resources.doorway = open_doorway(attempt.policy, spec.state_dir, attempt.user)
    resources.rng_path, resources.rng_fd = _check_rng(vm_config.rng.src)
    resources.iommufd_fd = open_iommufd(vm_config.platform)
    resources.firmware_is_elf = _firmware_is_elf(vm_config)
    for device in devices_of(vm_config):
        backing = open_backing(_on_queues(device, handover), attempt)
        resources.hold(backing)
        backing.check_in(vm_config)
    if vm_config.ivshmem is not None:
        resources.hold(open_ivshmem(vm_config.ivshmem))
    if vm_config.tpm is not None:
        resources.hold(open_tpm(vm_config.tpm, attempt))
    resources.serial_fd = open_stream(spec.serial, attempt.user)
    resources.console_fd = open_stream(spec.console, attempt.user)
    resources.debug_console_fd = open_stream(spec.debug_console, attempt.user)
    return resources


@contextmanager
def naming_system_errors() -> Iterator[None]:
    """Turn what the operating system refused, and nobody nearer had a name for, into an `EngineError`."""
    try:
        yield
    except OSError as error:
        raise EngineError("The host did not give what a machine needs") from error


def _open_memories(memories: dict[str, RamBacking], given: dict[str, int]) -> None:
    if not given.keys() <= memories.keys():
        raise StateError("The memory that was handed over is that of another machine")
    for name, memory in memories.items():
        if name in given:
            memory.adopt(given[name])
        else:
            memory.open()


def _on_queues(device: PciDevice, handover: Handover) -> PciDevice:
    """Have a network device whose queues were handed over stand on them, as on any that are passed."""
    queues = handover.taps.get(device.id or "")
    if queues is None or not isinstance(device, NetConfig):
        return device
    return msgspec.structs.replace(device, fds=queues)


def _firmware_is_elf(vm_config: VmConfig) -> bool:
    payload = vm_config.payload
    return payload is not None and payload.firmware is not None and is_elf(payload.firmware)


def _check_rng(path: str) -> tuple[str, int | None]:
    """Return `path` made absolute, having made sure that it can be read.

    Where its name is no UTF-8, QEMU opens it by a descriptor that it inherits, which then comes along.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise RngSourceError from error
    absolute = os.path.abspath(path)
    if is_utf8(absolute):
        os.close(fd)
        return absolute, None
    return f"/proc/self/fd/{fd}", fd
