"""What a machine stands on and is opened before QEMU starts: disk images, TAP queues, RAM, console streams.

All descriptors here are close-on-exec and handed to QEMU under the same numbers. They are made once for
each build, so that a machine built anew after a reset starts with fresh RAM, and everything is released by
one `close`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

import msgspec

from cloudvmm.config.disk import DiskConfig, ImageType, LockGranularity
from cloudvmm.config.net import NetConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, DeviceError, ImageLocked, MachineSpec
from cloudvmm.engine.qemu.image import DiskPathMissing, Image, open_image
from cloudvmm.engine.qemu.memory import Ram, open_ram, ram_of
from cloudvmm.engine.qemu.payload import is_elf
from cloudvmm.engine.qemu.slot import check_slots
from cloudvmm.engine.qemu.support import check_supported
from cloudvmm.engine.qemu.text import is_utf8
from cloudvmm.host.lock import LockConflict, LockError, lock_file, unlock_file
from cloudvmm.host.tap import TapError, interface_of, open_tap


class MissingDeviceId(DeviceError):
    """A device reached the engine without an id"""


class TapOpenError(DeviceError):
    """Cannot open tap interface"""


class FdNotUsable(DeviceError):
    def __init__(self, device_id: str, fd: int) -> None:
        super().__init__(f"File descriptor {fd} of {device_id} cannot be used")


class ImageLockError(DeviceError):
    """A disk image could not be locked"""


class RngSourceError(DeviceError):
    """The entropy source could not be opened"""


class DiskResource(msgspec.Struct, kw_only=True):
    """An open disk image and how much of it is locked."""

    disk_id: str
    image: Image
    granularity: LockGranularity

    def lock(self) -> None:
        """Lock the chain; see `Resources.lock_images`."""
        for image in self.image.chain():
            _lock(image, self.granularity)

    def release(self) -> None:
        """Unlock the chain, for QEMU too, which may hold it open still, and close it. Idempotent."""
        for image in self.image.chain():
            if image.fd >= 0:
                # A file system that is gone unlocks nothing; its image is closed all the same.
                with suppress(OSError):
                    unlock_file(image.fd)
        self.close()

    def close(self) -> None:
        """Close the chain; its locks last for as long as QEMU holds it. Idempotent."""
        self.image.close()


class NetResource(msgspec.Struct, kw_only=True):
    """`fds` are queues of a TAP, one for each pair; `interface` is its name if it lies in our namespace."""

    net_id: str
    fds: list[int]
    interface: str | None

    def close(self) -> None:
        """Close the queues; idempotent."""
        while self.fds:
            os.close(self.fds.pop())


class Resources(msgspec.Struct, kw_only=True):
    """Everything opened for one machine. Owns every descriptor in it."""

    ram: Ram
    ram_fd: int | None = None
    disks: list[DiskResource] = msgspec.field(default_factory=list)
    nets: list[NetResource] = msgspec.field(default_factory=list)
    serial_fd: int | None = None
    console_fd: int | None = None
    debug_console_fd: int | None = None
    rng_path: str = "/dev/urandom"
    rng_fd: int | None = None
    firmware_is_elf: bool = False

    @property
    def inherited_fds(self) -> list[int]:
        """Descriptors that the QEMU process must have under the same numbers."""
        singles = (self.ram_fd, self.serial_fd, self.console_fd, self.debug_console_fd, self.rng_fd)
        images = (image.fd for disk in self.disks for image in disk.image.chain() if image.fd >= 0)
        queues = (fd for net in self.nets for fd in net.fds)
        return [*(fd for fd in singles if fd is not None), *images, *queues]

    @property
    def tap_names(self) -> dict[str, str]:
        """Device id to interface name, for every network device whose interface we can see."""
        return {net.net_id: net.interface for net in self.nets if net.interface is not None}

    @property
    def image_types(self) -> dict[str, ImageType]:
        """Device id to what the image was found to be."""
        return {disk.disk_id: disk.image.image_type for disk in self.disks}

    def lock_images(self) -> None:
        """Lock every image on the descriptor that QEMU uses, so that the locks last as long as QEMU does.

        Writable images are locked for writing, read-only ones and backing files for reading. Idempotent.

        :raises ImageLocked: another process holds an image; those locked so far are released by
            `release_images`.
        :raises ImageLockError: the file system cannot lock.
        """
        for disk in self.disks:
            disk.lock()

    def release_images(self) -> None:
        """Close every image, which ends its lock; what was found out about it stays. Idempotent."""
        for disk in self.disks:
            disk.close()

    def close(self) -> None:
        """Close everything; idempotent. A QEMU that still runs keeps its own copies."""
        self.release_images()
        for net in self.nets:
            net.close()
        for name in ("ram_fd", "serial_fd", "console_fd", "debug_console_fd", "rng_fd"):
            fd = getattr(self, name)
            if fd is not None:
                setattr(self, name, None)
                os.close(fd)


def acquire(spec: MachineSpec, undo: ExitStack) -> Resources:
    """Open what `spec` names. `undo` closes it all; nothing stays open after a failure once `undo` has run.

    :raises NotSupportedYet: the configuration asks for what this engine cannot give.
    :raises DeviceError: an image, an interface or a descriptor cannot be had; the cause tells why.
    :raises SlotError: the slots in `spec` do not fit this machine.
    :raises EngineError: the memory configuration is not valid, or there is no such memory.
    """
    vm_config = spec.vm_config
    check_supported(vm_config)
    check_slots(spec.slots)
    resources = Resources(ram=ram_of(vm_config.memory))
    undo.callback(resources.close)
    resources.ram_fd = open_ram(resources.ram)
    resources.rng_path, resources.rng_fd = _check_rng(vm_config.rng.src)
    resources.firmware_is_elf = _firmware_is_elf(vm_config)
    for disk in vm_config.disks or []:
        resources.disks.append(open_disk(disk))
    for net in vm_config.net or []:
        resources.nets.append(open_net(net))
    resources.serial_fd = _duplicate_stream(spec.serial)
    resources.console_fd = _duplicate_stream(spec.console)
    resources.debug_console_fd = _duplicate_stream(spec.debug_console)
    return resources


def open_disk(disk: DiskConfig) -> DiskResource:
    """Open the image of `disk` and what it stands on; nothing is locked yet. The caller owns the result.

    :raises DeviceError: it cannot be had, or is not what `disk` says.
    """
    if disk.id is None:
        raise MissingDeviceId
    if disk.path is None:
        raise DiskPathMissing
    image = open_image(
        disk.path,
        readonly=disk.readonly,
        direct=disk.direct,
        image_type=disk.image_type,
        backing_files=disk.backing_files,
    )
    return DiskResource(disk_id=disk.id, image=image, granularity=disk.lock_granularity)


def open_net(net: NetConfig) -> NetResource:
    """Attach to the TAP of `net`, create it, or duplicate what is passed. The caller owns the result.

    :raises DeviceError: it cannot be had.
    """
    if net.id is None:
        raise MissingDeviceId
    if net.fds:
        return _duplicate_queues(net.id, net.fds)
    try:
        tap = open_tap(
            net.tap,
            queue_pairs=net.num_queues // 2,
            ip=net.ip,
            mask=net.mask,
            mac=net.host_mac,
            mtu=net.mtu,
        )
    except TapError as error:
        raise TapOpenError from error
    return NetResource(net_id=net.id, fds=tap.fds, interface=tap.name)


def _duplicate_queues(net_id: str, fds: list[int]) -> NetResource:
    with ExitStack() as undo:
        queues: list[int] = []
        for fd in fds:
            try:
                queues.append(os.dup(fd))
            except OSError as error:
                raise FdNotUsable(net_id, fd) from error
            undo.callback(os.close, queues[-1])
            os.set_blocking(queues[-1], False)
        undo.pop_all()
    return NetResource(net_id=net_id, fds=queues, interface=interface_of(queues[0]))


def _duplicate_stream(sink: ConsoleSink) -> int | None:
    return None if sink.stream_fd is None else os.dup(sink.stream_fd)


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


def _lock(image: Image, granularity: LockGranularity) -> None:
    whole = granularity is LockGranularity.FULL
    size_bytes = None if whole else image.size_bytes
    try:
        lock_file(image.fd, path=image.path, write=not image.readonly, size_bytes=size_bytes)
    except LockConflict as error:
        raise ImageLocked from error
    except LockError as error:
        raise ImageLockError from error
