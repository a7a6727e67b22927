"""Which paths of the host a VM's configuration names, and for what: what Landlock leaves to the VMM.

Reference: config.md section 15. What is ours alone is here too. Whether there is anything at a path is for
whoever makes a rule of it to see.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator

from cloudvmm.config.console import ConsoleOutputMode
from cloudvmm.config.vm import VmConfig


class Use(enum.Enum):
    """What is done to a path, or beneath it."""

    READ = "read"
    CHANGE = "read, write, make and remove"
    SOCKET = "make and remove sockets in the folder"


Named = tuple[str, Use]


def named_paths(vm: VmConfig) -> Iterator[Named]:
    """Yield every path that `vm` names but in its `landlock_rules`, and those that kinds of devices need."""
    for path, use in (*_of_memory(vm), *_of_payload(vm), *_of_devices(vm), *_of_consoles(vm)):
        if path is not None:
            yield path, use


def _of_memory(vm: VmConfig) -> Iterator[tuple[str | None, Use]]:
    for zone in vm.memory.zones or ():
        yield zone.file, Use.CHANGE
    for pmem in vm.pmem or ():
        yield pmem.file, Use.READ if pmem.discard_writes else Use.CHANGE
    if vm.ivshmem is not None:
        yield vm.ivshmem.path, Use.CHANGE


def _of_payload(vm: VmConfig) -> Iterator[tuple[str | None, Use]]:
    payload = vm.payload
    if payload is None:
        return
    for path in (payload.firmware, payload.kernel, payload.initramfs, payload.igvm):
        yield path, Use.READ
    items = None if payload.fw_cfg_config is None else payload.fw_cfg_config.items
    for item in () if items is None else items.item_list:
        yield item.file, Use.READ


def _of_devices(vm: VmConfig) -> Iterator[tuple[str | None, Use]]:
    yield vm.rng.src, Use.READ
    for disk in vm.disks or ():
        yield disk.path, Use.CHANGE
    for fs in vm.fs or ():
        yield from ((fs.socket, Use.CHANGE), (fs.shared_dir, Use.CHANGE))
    for device in (*(vm.generic_vhost_user or ()), *(vm.user_devices or ())):
        yield device.socket, Use.CHANGE
    for vdpa in vm.vdpa or ():
        yield vdpa.path, Use.CHANGE
    if vm.tpm is not None:
        yield from ((vm.tpm.socket, Use.CHANGE), (vm.tpm.state_dir, Use.CHANGE))
    if vm.vsock is not None:
        yield os.path.dirname(os.path.abspath(vm.vsock.socket)), Use.SOCKET
    if vm.net:
        yield "/dev/net/tun", Use.CHANGE


def _of_consoles(vm: VmConfig) -> Iterator[tuple[str | None, Use]]:
    for console in (vm.serial, vm.console, vm.debug_console):
        match console.mode:
            case ConsoleOutputMode.PTY:
                yield from (("/dev/pts", Use.CHANGE), ("/dev/ptmx", Use.CHANGE))
            case ConsoleOutputMode.FILE:
                yield console.file, Use.CHANGE
            case _:
                pass
    if vm.serial.mode is ConsoleOutputMode.SOCKET and vm.serial.socket:
        yield os.path.dirname(os.path.abspath(vm.serial.socket)), Use.SOCKET
