"""Guest RAM: a memfd that QEMU inherits and shares with us, or private memory where KSM is to merge it.

A shared memfd lets a snapshot, a local migration or a clone hand the RAM over instead of copying it. The
kernel's KSM passes shared pages by, so that `mergeable` RAM is private and anonymous.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

import msgspec

from cloudvmm.config.memory import DEFAULT_ZONE_ID, HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.engine.base import DeviceError, RamError
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.parts import Parts, Properties, opened
from cloudvmm.host.lock import LockConflict, LockError, lock_file

RAM_ID: Final = "ram0"
HOTPLUG_SLOTS: Final = 8
ROOM_BYTES: Final = 64 << 30  # it costs addresses, no memory

_MODULE: Final = "module"  # no id of a device of ours begins so
_RAM_ABOVE_4_GIB: Final = 0xE000_0000  # from this size on the machine type puts a part of it there
_PAGE_BYTES: Final = 8192  # QEMU counts RAM in steps of 8 KiB
_BLOCK_BYTES: Final = 512
_MAX_PREALLOC_THREADS: Final = 16
_HUGEPAGES_FOLDER: Final = "/sys/kernel/mm/hugepages"
_READ_ALONE: Final[Properties] = {"readonly": True, "rom": "off"}  # what the guest writes stays in memory


class MemoryConfigError(RamError):
    """Root of what is wrong with the memory configuration of a machine"""


class RamParametersInvalid(MemoryConfigError):
    """Memory configuration is not valid"""


class RamMissing(MemoryConfigError):
    """No memory zones found"""


class RamMisaligned(MemoryConfigError):
    """Memory size is misaligned with default page size or its hugepage size"""


class RamNotAvailable(MemoryConfigError):
    """Guest memory could not be made"""


class TooFewHugepages(RamNotAvailable):
    def __init__(self, *, needed: int, available: int, page_bytes: int) -> None:
        super().__init__(
            f"Guest memory needs {needed} huge pages of {page_bytes // 1024} KiB,"
            f" and the host has {available} to give"
        )


class RamFileTooShort(RamNotAvailable):
    def __init__(self, path: str, size: int) -> None:
        super().__init__(f"The file {path} behind guest memory is shorter than {size} bytes")


class RamFileTaken(RamNotAvailable):
    def __init__(self, path: str) -> None:
        super().__init__(f"The file {path} is the memory of another VM")


class NoRoomForMemory(DeviceError):
    """The VM has no room for more memory: boot it with memory.hotplug_size or with a pmem device"""


class Ram(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of RAM: all of it, or a zone. Sizes are bytes.

    `file` is what it stands on in the place of a memfd, written to where it is `shared`; a folder gives a
    nameless file in it. `host_node` is the host's NUMA node that the pages come from. Where it `has_base` it
    stands on a file that others stand on, too, and what the guest writes stays QEMU's own.
    """

    zone_id: str
    size: int
    mergeable: bool
    hugepages: bool
    hugepage_size: int | None
    prefault: bool
    reserve: bool
    hotplug_size: int
    file: str | None = None
    shared: bool = False
    host_node: int | None = None
    has_base: bool = False

    @property
    def is_private(self) -> bool:
        """Whether it is QEMU's own, for KSM to merge."""
        return self.mergeable and not self.hugepages and self.file is None

    @property
    def is_shared(self) -> bool:
        """Whether what the guest writes is seen by whoever else maps what it stands on."""
        return not self.is_private and not self.has_base and (self.file is None or self.shared)

    @property
    def spares_file(self) -> bool:
        """Whether it stands on a file of the user that is to stay as it is."""
        return self.file is not None and not self.is_shared

    def resized(self, size: int) -> Ram:
        """Return memory of the same kind with `size` bytes, none of which is made before it is used."""
        return msgspec.structs.replace(self, size=size, prefault=False, reserve=False, file=None)

    def module(self, size: int) -> Ram:
        """Return memory of the same kind with `size` bytes, which is made as this one is."""
        return msgspec.structs.replace(self, size=size, hotplug_size=0, file=None)


def rams_of(memory: MemoryConfig) -> list[Ram]:
    """Return the pieces that `memory` describes: one, or one for each zone.

    :raises MemoryConfigError: it contradicts itself.
    """
    zones = memory.zones or []
    if memory.size and zones:
        raise RamParametersInvalid
    if not memory.size and not zones:
        raise RamMissing
    _check_hotplug(memory)
    if not zones:
        return [_ram(DEFAULT_ZONE_ID, memory)]
    return [
        msgspec.structs.replace(
            _ram(zone.id, zone), file=zone.file, shared=zone.shared, host_node=zone.host_numa_node
        )
        for zone in zones
    ]


def merged(rams: list[Ram]) -> list[Ram]:
    """Return `rams` as one piece where nothing but their names sets them apart."""
    first = rams[0]
    names_aside = {
        msgspec.structs.replace(ram, zone_id="", size=0, hotplug_size=0, shared=False) for ram in rams
    }
    if len(names_aside) > 1 or first.file is not None or first.host_node is not None:
        return rams
    sums = (sum(ram.size for ram in rams), sum(ram.hotplug_size for ram in rams))
    return [msgspec.structs.replace(first, size=sums[0], hotplug_size=sums[1])]


def _ram(zone_id: str, source: MemoryConfig | MemoryZoneConfig) -> Ram:
    return Ram(
        zone_id=zone_id,
        size=source.size,
        mergeable=source.mergeable,
        hugepages=source.hugepages,
        hugepage_size=source.hugepage_size,
        prefault=source.prefault,
        reserve=source.reserve,
        hotplug_size=source.hotplug_size or 0,
    )


def _check_hotplug(memory: MemoryConfig) -> None:
    if memory.hotplugged_size and memory.hotplug_method is HotplugMethod.ACPI:
        raise RamParametersInvalid
    if (memory.hotplugged_size or 0) > (memory.hotplug_size or 0):
        raise RamParametersInvalid


class RamBacking(Backing, kw_only=True):
    """The memfd or the file that a piece of RAM stands on; private RAM stands on nothing of ours."""

    ram: Ram
    fd: int | None = None
    is_adopted: bool = False

    @property
    def fds(self) -> list[int]:
        return [] if self.fd is None else [self.fd]

    @property
    def held_bytes(self) -> int:
        """How much of it the guest has: at most, where QEMU alone knows what was written to it."""
        if self.ram.has_base or self.fd is None:
            return self.ram.size
        return os.fstat(self.fd).st_blocks * _BLOCK_BYTES

    def move(self, find: Callable[[int], int]) -> None:
        self.fd = None if self.fd is None else find(self.fd)

    def open(self) -> None:
        """:raises MemoryConfigError: the kernel has no such pages, or not enough; the file cannot be had."""
        self.fd = open_ram(self.ram)

    def stand_on(self, base_fd: int) -> None:
        """Begin with what the file of `base_fd` holds, which is open for reading and ours from now on."""
        self.close()
        self.fd = base_fd
        # To prefault it would be to take a copy of all.
        self.ram = msgspec.structs.replace(self.ram, has_base=True, prefault=False)

    def adopt(self, fd: int) -> None:
        """Stand on what `fd`, which is lent, refers to: another machine's guest has its memory there."""
        self.fd = os.dup(fd)
        self.is_adopted = True
        self.ram = msgspec.structs.replace(self.ram, prefault=False)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def open_ram(ram: Ram) -> int | None:
    """Return a fresh memfd of the size of `ram`, or its file, owned by the caller; None where it is private.

    :raises RamMisaligned: the size is not a multiple of the page size in use.
    :raises RamNotAvailable: the kernel has no such pages, or not enough; the file cannot be had.
    """
    if ram.file is not None:
        return _open_file(ram.file, ram)
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if ram.hugepages:
        flags |= os.MFD_HUGETLB
        if ram.hugepage_size:
            flags |= (ram.hugepage_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
    elif ram.size % _PAGE_BYTES:
        raise RamMisaligned
    if ram.is_private:
        return None
    try:
        fd = os.memfd_create("cloudvmm-ram", flags)
    except OSError as error:
        raise RamNotAvailable from error
    try:
        page_bytes = os.fstat(fd).st_blksize
        if ram.size % max(page_bytes, _PAGE_BYTES):
            raise RamMisaligned
        if ram.hugepages:
            _check_hugepages(ram.size, page_bytes)
        os.ftruncate(fd, ram.size)
    except OSError as error:
        os.close(fd)
        raise RamNotAvailable from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_file(path: str, ram: Ram) -> int:
    """Empty a file that the guest writes: what it wrote before a reboot would keep it from booting."""
    try:
        if os.path.isdir(path):
            fd = os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            os.ftruncate(fd, ram.size)
            return fd
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise RamNotAvailable from error
    if os.fstat(fd).st_size < ram.size:
        os.close(fd)
        raise RamFileTooShort(path, ram.size)
    if ram.shared:
        _lock(fd, path)
        with contextlib.suppress(OSError):
            size = os.fstat(fd).st_size
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
    return fd


def _lock(fd: int, path: str) -> None:
    """Take the file for as long as this opening of it lives, as QEMU's does; close `fd` where it is taken."""
    try:
        lock_file(fd, path=path, write=True)
    except LockConflict as error:
        os.close(fd)
        raise RamFileTaken(path) from error
    except LockError:
        pass  # its file system knows no locks


def _check_hugepages(size: int, page_bytes: int) -> None:
    """Raise where the host lacks the pages now: a guest that touched one too many would end by SIGBUS."""
    folder = f"{_HUGEPAGES_FOLDER}/hugepages-{page_bytes // 1024}kB"
    free, reserved = _count_of(folder, "free_hugepages"), _count_of(folder, "resv_hugepages")
    more = _count_of(folder, "nr_overcommit_hugepages") - _count_of(folder, "surplus_hugepages")
    available = max(0, free - reserved + max(0, more))
    if size // page_bytes > available:
        raise TooFewHugepages(needed=size // page_bytes, available=available, page_bytes=page_bytes)


def _count_of(folder: str, name: str) -> int:
    with open(f"{folder}/{name}", encoding="ascii") as file:
        return int(file.read())


def memory_parts(backing: RamBacking, *, name: str = RAM_ID, vcpus: int, spares_files: bool = True) -> Parts:
    """Describe a piece of RAM as the object `name`; whether QEMU `spares_files`, `QemuFacts` knows."""
    backend = ram_backend(backing.ram, fd=backing.fd)
    if backing.ram.spares_file and spares_files:
        backend |= _READ_ALONE
    return Parts(objects=[_made(backing.ram, backend, name, vcpus)])


def _made(ram: Ram, backend: Properties, name: str, vcpus: int) -> Properties:
    backend = backend | {"id": name}
    if ram.prefault:
        backend |= {"prealloc": True, "prealloc-threads": max(1, min(vcpus, _MAX_PREALLOC_THREADS))}
    if ram.hugepages and not ram.reserve and not ram.prefault:
        backend["reserve"] = False
    return backend


def ram_backend(ram: Ram, *, fd: int | None) -> Properties:
    """Describe the back end of `ram`; `fd` is what it stands on.

    A base is mapped from a descriptor for reading: see `QemuFacts.spares_files`.
    """
    backend: Properties = {"id": RAM_ID, "size": ram.size}
    if ram.host_node is not None:
        backend |= {"host-nodes": [ram.host_node], "policy": "bind"}
    if fd is None:
        return {"qom-type": "memory-backend-ram", **backend, "share": False, "merge": True}
    return {
        "qom-type": "memory-backend-file",
        **backend,
        "mem-path": opened(fd),
        "share": ram.is_shared,
        "merge": False,
        **(_READ_ALONE if ram.has_base else {}),
    }


def module_id(number: int) -> str:
    """Return the id that the memory of a module has among the pieces of RAM."""
    return f"{_MODULE}.{number}"


def module_name(number: int) -> str:
    """Return what QEMU calls the device of a memory module."""
    return f"{_MODULE}{number}"


def module_number(qemu_id: str) -> int | None:
    """Return the number of the memory module whose device QEMU calls `qemu_id`, None where it is none."""
    prefix, number = qemu_id[: len(_MODULE)], qemu_id[len(_MODULE) :]
    return int(number) if prefix == _MODULE and number.isdecimal() else None


def module_parts(backing: RamBacking, number: int, *, vcpus: int) -> Parts:
    """Describe the memory module `number`.

    Huge pages are reserved when it is made: where the host has too few, that fails.
    """
    backend = ram_backend(backing.ram, fd=backing.fd)
    memory = _made(backing.ram, backend, module_id(number), vcpus)
    device = {"driver": "pc-dimm", "id": module_name(number), "memdev": memory["id"]}
    return Parts(objects=[memory], devices=[device])


def memory_arguments(size: int, *, hotplug_size: int, pmem_bytes: int, phys_bits: int) -> list[str]:
    """Return the option for the size of the RAM, with the room that memory devices need.

    `hotplug_size` is for RAM that may be plugged, by ACPI or virtio-mem, `pmem_bytes` for what is there from
    the start. What else may come later has `ROOM_BYTES` more, where there is room at all. A Linux guest with
    room above 4 GiB sets 64 MiB of its RAM aside (its SWIOTLB). One whose RAM reaches there does so anyway;
    a smaller one has no room unless it asks.
    """
    asked = hotplug_size + pmem_bytes
    if not asked and size < _RAM_ABOVE_4_GIB:
        return ["-m", f"size={size}B"]
    room = asked + min(ROOM_BYTES, (1 << phys_bits) // 4)
    slots = f",slots={HOTPLUG_SLOTS}" if hotplug_size else ""
    return ["-m", f"size={size}B{slots},maxmem={size + room}B"]


def is_about_room(description: str) -> bool:
    """Say whether QEMU's words are about a machine without room for memory devices."""
    return "the maxmem option" in description
