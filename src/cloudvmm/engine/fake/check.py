"""What a real engine would stumble over, looked at without running anything.

Checked: files that must be there and can be opened as wanted, and PCI slots. Not checked: TAP devices,
vhost-user and vsock sockets, VFIO and vDPA devices, and whether a payload can be run. Images are not locked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError, EngineError, EngineInfo, PayloadError, SlotError


def check_slots(slots: Mapping[str, int], info: EngineInfo) -> None:
    """:raises SlotError: two devices want one slot, or a slot is not the engine's to give."""
    owners: dict[int, str] = {}
    for device_id, slot in slots.items():
        if not info.first_slot <= slot <= info.last_slot:
            known = f"{info.first_slot} to {info.last_slot}"
            raise SlotError(f"The device {device_id} wants PCI slot {slot}; there are {known}")
        if slot in owners:
            raise SlotError(f"The devices {owners[slot]} and {device_id} both want PCI slot {slot}")
        owners[slot] = device_id


def check_devices(vm_config: VmConfig) -> None:
    """:raises DeviceError: a file behind a disk or a pmem device cannot be opened as wanted."""
    for disk in vm_config.disks or ():
        if disk.path is not None:
            _open_once(
                disk.path, f"The disk image {disk.path}", readonly=disk.readonly, error_type=DeviceError
            )
    for pmem in vm_config.pmem or ():
        what = f"The pmem file {pmem.file}"
        _open_once(pmem.file, what, readonly=pmem.discard_writes, error_type=DeviceError)


def check_payload(vm_config: VmConfig) -> None:
    """:raises PayloadError: there is no payload, or a part of it is missing, empty or not a file."""
    payload = vm_config.payload
    if payload is None or not (payload.kernel or payload.firmware or payload.igvm):
        raise PayloadError("The VM has neither kernel nor firmware")
    for name in ("kernel", "firmware", "igvm", "initramfs"):
        path = getattr(payload, name)
        if path is None:
            continue
        if _open_once(path, f"The {name} {path}", readonly=True, error_type=PayloadError) == 0:
            raise PayloadError(f"The {name} {path} is empty")


def _open_once(path: str, what: str, *, readonly: bool, error_type: type[EngineError]) -> int:
    """Open `path` and let it go again; return its size, 0 for what has none."""
    access = os.O_RDONLY if readonly else os.O_RDWR
    try:
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise error_type(f"{what} cannot be opened") from error
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise error_type(f"{what} is neither a file nor a disk") from error
    finally:
        os.close(fd)
