"""What control refuses by itself, before it asks the engine; each is the cause of a manager's error.

VmError (api.error)
├── RamRefused       the cause of a `MemoryManager`
├── InvalidNumaNodes
├── PayloadFileError the cause is the operating system's
├── VcpusRefused     the cause of a `CpuManager`, beside `VcpuRemovalPending`
├── DeviceRefused    the cause of a `DeviceManager`, beside `UnknownDeviceId`
└── StateRefused     the cause of a failed restore or migration

Texts are Cloud Hypervisor's (reference: rest.md section 9, config.md section 13).
"""

from __future__ import annotations

from cloudvmm.api.error import VmError


class RamRefused(VmError):
    """Root of what is wrong with RAM, at boot or with a new size."""


class MissingMemoryZones(RamRefused):
    """No memory zones found"""


class InvalidMemoryParameters(RamRefused):
    """Memory configuration is not valid"""


class InvalidSharedMemoryZoneWithHostNuma(RamRefused):
    """Invalid to try applying a NUMA policy to a memory zone that is memory mapped with MAP_SHARED"""


class InvalidHotplugMethodWithMemoryZones(RamRefused):
    """Invalid hotplug method associated with memory zones resizing capability"""


class InvalidHotplugSize(RamRefused):
    """Invalid size for resizing. Can be anything except 0"""


class DuplicateZoneId(RamRefused):
    """Memory zone identifier is not unique"""


class DirectoryAsBackingFileForMemory(RamRefused):
    """Using a directory as a backing file for memory is not supported"""


class GetFileSystemBlockSize(RamRefused):
    """Failed to stat filesystem"""


class MisalignedMemorySize(RamRefused):
    """Memory size is misaligned with default page size or its hugepage size"""


class InvalidResizeWithMemoryZones(RamRefused):
    """Impossible to resize guest memory if it is backed by user defined memory regions"""


class InvalidResizeBelowBootSize(RamRefused):
    def __init__(self, desired_bytes: int, boot_bytes: int) -> None:
        super().__init__(
            f"Invalid resize request: desired_size = {desired_bytes} below boot size = {boot_bytes}"
        )


class NoSlotAvailable(RamRefused):
    """No ACPI slot available"""


class InvalidSize(RamRefused):
    """The requested hotplug memory addition is not a valid size"""


class InsufficientHotplugRam(RamRefused):
    """Not enough space in the hotplug RAM region"""


class MissingVirtioMemHandler(RamRefused):
    """No virtio-mem resizing handler found"""


class VirtioMemResizeFail(RamRefused):
    """Failed to virtio-mem resize"""


class ResizeError(RamRefused):
    """Resize invalid argument"""


class ZoneSizeRefused(RamRefused):
    """The innermost cause of a `VirtioMemResizeFail`."""

    def __init__(self, why: str) -> None:
        super().__init__(f"Failed to update virtio configuration: ResizeError({why})")


class PayloadFileError(VmError):
    """Root of what is said of a file that the guest is to start from."""


class KernelFile(PayloadFileError):
    """Cannot open kernel file"""


class InitramfsFile(PayloadFileError):
    """Cannot open initramfs file"""


class FirmwareFile(PayloadFileError):
    """Error manipulating firmware file"""


class InvalidNumaNodes(VmError):
    """Invalid NUMA configuration"""


class VcpusRefused(VmError):
    """Root of what is wrong with a number of vCPUs."""


class MaximumVcpusExceeded(VcpusRefused):
    def __init__(self, vcpus: int, limit: int) -> None:
        super().__init__(f"Maximum number of vCPUs {vcpus} exceeds host limit {limit}")


class DesiredVcpuCountIsZero(VcpusRefused):
    """Requested zero vCPUs"""


class DesiredVcpuCountExceedsMax(VcpusRefused):
    """Requested vCPUs exceed maximum"""


class DeviceRefused(VmError):
    """Root of what is wrong with a device, at boot, added or removed."""


class NoDiskPath(DeviceRefused):
    """No disk path was specified when one was expected"""


class PmemFileOpen(DeviceRefused):
    """Cannot open persistent memory file"""


class PmemWithDirectorySizeMissing(DeviceRefused):
    """Trying to use a directory for pmem but no size specified"""


class PmemSizeNotAligned(DeviceRefused):
    """Trying to use a size that is not multiple of 2MiB"""


class CreateVirtioMem(DeviceRefused):
    """Cannot create virtio-mem device"""


class ZoneHotplugSizeNotAligned(DeviceRefused):
    def __init__(self, alignment_bytes: int) -> None:
        super().__init__(f"Virtio-mem size is not aligned with {alignment_bytes}")


class IdInDeviceTree(DeviceRefused):
    """The id is not in the config any more, but the guest has not let go of that device."""

    def __init__(self, device_id: str) -> None:
        super().__init__(f"Invalid identifier as it is not unique: {device_id}")


class InvalidIommuHotplug(DeviceRefused):
    """Cannot hotplug device behind vIOMMU"""


class InvalidIommuRemove(DeviceRefused):
    def __init__(self, bdf: str) -> None:
        super().__init__(f"Cannot remove device from behind vIOMMU: bdf={bdf}")


class UserDeviceSocketInUse(DeviceRefused):
    def __init__(self, socket: str) -> None:
        super().__init__(f'VFIO-user socket path already in use: "{socket}"')


class MissingNode(DeviceRefused):
    """Could not find the node in the device tree"""


class RemovalNotAllowed(DeviceRefused):
    def __init__(self, kind: str) -> None:
        super().__init__(f"Not allowed to remove this type of device from the VM: {kind}")


class SharedSlot(DeviceRefused):
    def __init__(self, bdf: str) -> None:
        super().__init__(f"Cannot remove a device that shares its PCI slot with others: bdf={bdf}")


class ReservePciDeviceId(DeviceRefused):
    """Could not reserve the PCI device ID"""


class AllocatePciDeviceId(DeviceRefused):
    """Failed to find an available PCI device ID"""


class NoFreeSlot(DeviceRefused):
    """Could not find an available device slot on the PCI bus"""


class SlotTaken(DeviceRefused):
    def __init__(self, slot: int) -> None:
        super().__init__(f"Valid PCI device identifier but already used: {slot}")


class MissingVirtioBalloon(DeviceRefused):
    """Missing virtio-balloon, can't proceed as expected"""


class VirtioBalloonResize(DeviceRefused):
    """Failed to resize virtio-balloon"""


class DiskResize(DeviceRefused):
    """Disk resize error"""


class DiskSizeNotAligned(DeviceRefused):
    """Disk image size is not a multiple of 512"""


class StateRefused(VmError):
    """Root of what is wrong with a VM that was saved or is received."""


class BadSlots(StateRefused):
    """The saved state gives devices PCI slots that they cannot have"""


class UnknownDevices(StateRefused):
    def __init__(self, ids: list[str]) -> None:
        names = ", ".join(ids)
        super().__init__(f"The configuration has devices that the saved state lacks: {names}")


class OtherVcpus(StateRefused):
    def __init__(self, saved: int, wanted: int) -> None:
        super().__init__(
            f"The state is that of a guest with {saved} vCPUs, and the configuration has {wanted}"
        )


class BadRecord(StateRefused):
    """What the VMM knew about the VM is not complete"""
