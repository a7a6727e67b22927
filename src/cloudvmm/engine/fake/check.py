"""What a real engine would stumble over, looked at without running anything.

Checked: files that must be there and can be opened as wanted, types of images, and PCI slots. Not checked:
TAP devices, vhost-user and vsock sockets, VFIO and vDPA devices, and whether a payload can be run. Images are
not locked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from cloudvmm.config.device import PmemConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import (
    DeviceError,
    EngineError,
    EngineInfo,
    PayloadError,
    SlotError,
    device_number,
    is_slot,
)
from cloudvmm.engine.image import DiskOpenError, check_type, detect, open_image_file


def check_slots(slots: Mapping[str, int], info: EngineInfo) -> None:
    """:raises SlotError: two devices want one slot, or a slot is not the engine's to give."""
    owners: dict[int, str] = {}
    for device_id, slot in slots.items():
        if not is_slot(slot, info.first_slot, info.last_slot):
            known = f"{info.first_slot} to {info.last_slot}"
            raise SlotError(f"The device {device_id} wants PCI slot {slot}; there are {known}")
        if device_number(slot) not in slots.values():
            raise SlotError(f"The device {device_id} shares a PCI slot that has no function 0")
        if slot in owners:
            raise SlotError(f"The devices {owners[slot]} and {device_id} both want PCI slot {slot}")
        owners[slot] = device_id


def check_devices(vm_config: VmConfig) -> dict[str, ImageType]:
    """Return what each disk image was found to be, per disk id.

    :raises DeviceError: as `check_device`.
    """
    found: dict[str, ImageType] = {}
    for device in (*(vm_config.disks or ()), *(vm_config.pmem or ())):
        image_type = check_device(device)
        if device.id is not None and image_type is not None:
            found[device.id] = image_type
    return found


def check_device(device: PciDevice) -> ImageType | None:
    """Return what the image of a disk was found to be, None for what has none.

    :raises DeviceError: a file behind a disk or a pmem device cannot be opened as wanted, or is another
        type of image than it was said to be.
    """
    if isinstance(device, DiskConfig) and device.path is not None:
        image_type = _image_type(device.path, readonly=device.readonly)
        check_type(device.image_type, image_type)
        return image_type
    if isinstance(device, PmemConfig):
        # In a folder it is a file without a name, which the kernel makes for writing only.
        extra = os.O_TMPFILE if os.path.isdir(device.file) else 0
        what = f"The pmem file {device.file}"
        _open_once(device.file, what, readonly=device.discard_writes, error_type=DeviceError, extra=extra)
    return None


def _image_type(path: str, *, readonly: bool) -> ImageType:
    fd = open_image_file(path, readonly=readonly)
    try:
        return detect(fd, os.lseek(fd, 0, os.SEEK_END))
    except OSError as error:
        raise DiskOpenError from error
    finally:
        os.close(fd)


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


def _open_once(path: str, what: str, *, readonly: bool, error_type: type[EngineError], extra: int = 0) -> int:
    """Open `path` with the flags `extra` and let it go again; return its size, 0 for what has none."""
    access = os.O_RDONLY if readonly else os.O_RDWR
    try:
        fd = os.open(path, access | extra | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # a path with a NUL in it is a ValueError
        raise error_type(f"{what} cannot be opened") from error
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise error_type(f"{what} is neither a file nor a disk") from error
    finally:
        os.close(fd)
