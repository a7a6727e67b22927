"""Names, PCI slots and MAC addresses for the devices of a VM (reference: lifecycle.md section 7).

One counter numbers all generated ids; a name already taken is skipped and the counter still advances.
Slots asked for by `pci_device_id` are reserved first, then devices take the lowest free one in creation
order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from cloudvmm.config.console import ConsoleOutputMode
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import VmmError

CONSOLE_ID = "__console"
RNG_ID = "__rng"
BALLOON_ID = "__balloon"
WATCHDOG_ID = "__watchdog"
RTC_ID = "__rtc"
PVPANIC_ID = "__pvpanic"
IVSHMEM_ID = "__ivshmem"
SERIAL_ID = "__serial"
DEBUG_CONSOLE_ID = "__debug_console"
IOAPIC_ID = "__ioapic"
VIRTIO_PCI_PREFIX = "_virtio-pci-"


class NoFreeSlot(VmmError):
    """Could not find an available device slot on the PCI bus"""


class SlotTaken(VmmError):
    def __init__(self, slot: int) -> None:
        super().__init__(f"Valid PCI device identifier but already used: {slot}")


class Slots:
    """The device numbers of bus 0 that devices may have, `first`..`last`."""

    def __init__(self, first: int, last: int) -> None:
        self._range = range(first, last + 1)
        self.taken: dict[str, int] = {}

    def reserve(self, device_id: str, slot: int) -> None:
        """:raises SlotTaken: another device has it, or the machine itself."""
        if slot not in self._range or slot in self.taken.values():
            raise SlotTaken(slot)
        self.taken[device_id] = slot

    def assign(self, device_id: str) -> int:
        """:raises NoFreeSlot: all are taken."""
        used = set(self.taken.values())
        for slot in self._range:
            if slot not in used:
                self.taken[device_id] = slot
                return slot
        raise NoFreeSlot

    def release(self, device_id: str) -> None:
        self.taken.pop(device_id, None)


class Names:
    """The id counter of one VM object."""

    def __init__(self, used: set[str], counter: int = 0) -> None:
        self.used = used
        self.counter = counter

    def generate(self, prefix: str) -> str:
        while True:
            name = f"{prefix}{self.counter}"
            self.counter += 1
            if name not in self.used:
                self.used.add(name)
                return name


class Numbering(msgspec.Struct, kw_only=True):
    """`slots` per device id in creation order; `virtio` are the ids that a virtio-pci wrapper goes with."""

    slots: dict[str, int]
    virtio: list[str]
    counter: int


def generate_mac() -> str:
    """Return a random, locally administered unicast address; the first byte is Cloud Hypervisor's 0x2e."""
    return "2e:" + ":".join(f"{byte:02x}" for byte in os.urandom(5))


def number_devices(vm_config: VmConfig, used_ids: set[str], first_slot: int, last_slot: int) -> Numbering:
    """Fill in ids and MACs in `vm_config` (changed in place) and give every PCI device its slot.

    :raises NoFreeSlot: more devices than slots.
    :raises SlotTaken: two devices ask for one slot, or one asks for a slot of the machine.
    """
    names = Names(set(used_ids))
    slots = Slots(first_slot, last_slot)
    for net in vm_config.net or []:
        net.mac = net.mac or generate_mac()
    created = list(_created(vm_config, names))
    for device_id, wanted, _ in created:
        if wanted is not None:
            slots.reserve(device_id, wanted)
    order = {}
    for device_id, wanted, _ in created:
        order[device_id] = wanted if wanted is not None else slots.assign(device_id)
    return Numbering(
        slots=order,
        virtio=[device_id for device_id, _, is_virtio in created if is_virtio],
        counter=names.counter,
    )


def _created(vm_config: VmConfig, names: Names) -> Iterator[tuple[str, int | None, bool]]:
    """Give (id, slot wished for, is virtio) in the reference's creation order."""
    if vm_config.console.mode is not ConsoleOutputMode.OFF:
        yield _single(vm_config.console, CONSOLE_ID)
    yield from _numbered(vm_config.disks, "_disk", names)
    yield from _numbered(vm_config.net, "_net", names)
    yield _single(vm_config.rng, RNG_ID)
    yield from _numbered(vm_config.generic_vhost_user, "_generic_vhost_user", names)
    yield from _numbered(vm_config.fs, "_fs", names)
    yield from _numbered(vm_config.pmem, "_pmem", names)
    if vm_config.vsock is not None:
        yield from _numbered([vm_config.vsock], "_vsock", names)
    if vm_config.balloon is not None:
        yield _single(vm_config.balloon, BALLOON_ID)
    if vm_config.watchdog:
        yield WATCHDOG_ID, None, False  # a plain PCI device here: QEMU has no virtio watchdog
    yield from _numbered(vm_config.vdpa, "_vdpa", names)
    if vm_config.rtc is not None:
        yield _single(vm_config.rtc, RTC_ID)
    yield from _plain(_numbered(vm_config.devices, "_vfio", names))
    yield from _plain(_numbered(vm_config.user_devices, "_vfio_user", names))
    if vm_config.pvpanic:
        yield PVPANIC_ID, None, False
    if vm_config.ivshmem is not None:
        yield from _plain([_single(vm_config.ivshmem, IVSHMEM_ID)])


def _numbered(
    devices: Sequence[PciDevice] | None, prefix: str, names: Names
) -> Iterator[tuple[str, int | None, bool]]:
    for device in devices or []:
        device.id = device.id or names.generate(prefix)
        yield device.id, device.pci_device_id, True


def _single(device: PciDevice, fixed_id: str) -> tuple[str, int | None, bool]:
    # The reference keeps these names to itself: the config shows an id only where the user gave one.
    return device.id or fixed_id, device.pci_device_id, True


def _plain(
    devices: Iterable[tuple[str, int | None, bool]],
) -> Iterator[tuple[str, int | None, bool]]:
    for device_id, wanted, _ in devices:
        yield device_id, wanted, False
