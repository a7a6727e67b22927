"""Names, PCI slots and MAC addresses for the devices of a VM (reference: lifecycle.md section 7).

One counter numbers all generated ids; a name already taken is skipped and the counter still advances.
Slots asked for by `pci_device_id` are reserved first, then devices take the lowest free one in creation
order. What a VM has from its boot on and finds no slot shares one, as a further function of it: first with
devices that cannot be removed. No device of a shared slot can be, since a slot is ejected as a whole.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Container, Iterator
from typing import Final

import msgspec

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    IvshmemConfig,
    PmemConfig,
    RngConfig,
    RtcConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.ram import ram_of
from cloudvmm.control.slot import Names, Slots
from cloudvmm.engine.base import device_number

WATCHDOG_ID: Final = "__watchdog"
PVPANIC_ID: Final = "__pvpanic"
IOMMU_ID: Final = "__iommu"
SERIAL_ID: Final = "__serial"
DEBUG_CONSOLE_ID: Final = "__debug_console"
IOAPIC_ID: Final = "__ioapic"
PVMEMCONTROL_ID: Final = "__pvmemcontrol"
VIRTIO_PCI_PREFIX: Final = "_virtio-pci-"

FIXED_IDS: Final[dict[type[PciDevice], str]] = {
    ConsoleConfig: "__console",
    RngConfig: "__rng",
    BalloonConfig: "__balloon",
    RtcConfig: "__rtc",
    IvshmemConfig: "__ivshmem",
}
PREFIXES: Final[dict[type[PciDevice], str]] = {
    DiskConfig: "_disk",
    NetConfig: "_net",
    GenericVhostUserConfig: "_generic_vhost_user",
    FsConfig: "_fs",
    PmemConfig: "_pmem",
    VsockConfig: "_vsock",
    VdpaConfig: "_vdpa",
    DeviceConfig: "_vfio",
    UserDeviceConfig: "_vfio_user",
}
# A vDPA device is what its hardware is; only the kernel's driver could tell, and most are network devices.
REMOVABLE: Final = frozenset({"net", "block", "pmem", "fs", "vsock", "vdpa", "vfio", "vfio-user"})
PLAIN: Final = "plain"  # a PCI device that the reference neither unplugs nor has a word for
KINDS: Final[dict[type[PciDevice], str]] = {
    DiskConfig: "block",
    NetConfig: "net",
    FsConfig: "fs",
    PmemConfig: "pmem",
    VsockConfig: "vsock",
    VdpaConfig: "vdpa",
    DeviceConfig: "vfio",
    UserDeviceConfig: "vfio-user",
    ConsoleConfig: "console",
    RngConfig: "rng",
    BalloonConfig: "balloon",
    RtcConfig: "rtc",
    IvshmemConfig: PLAIN,
}
# By the number that the virtio specification gives a type of device.
VIRTIO_KINDS: Final[dict[int, str]] = {
    1: "net",
    2: "block",
    3: "console",
    4: "rng",
    5: "balloon",
    9: "9p",
    16: "gpu",
    17: "rtc",
    18: "input",
    19: "vsock",
    23: "iommu",
    24: "mem",
    26: "fs",
    27: "pmem",
    35: "watchdog",
}


class Numbered(msgspec.Struct, frozen=True, kw_only=True):
    """One PCI device: `kind` is the reference's word for its type, `slot` what the user asked for."""

    device_id: str
    kind: str
    slot: int | None = None
    is_virtio: bool = True
    is_trapped: bool = False


class Numbering(msgspec.Struct, kw_only=True):
    """Who has which name and slot in one VM object. It changes as devices come and go.

    `slots` is in creation order and holds every PCI device that the guest has not let go of. `virtio` are the
    ids that a virtio-pci wrapper goes with. `trapped` are behind the vIOMMU where nothing can be removed.
    `given_ids` are those that the user gave at boot: they are never generated.
    """

    slots: dict[str, int]
    virtio: list[str]
    kinds: dict[str, str]
    trapped: set[str]
    given_ids: set[str]
    counter: int
    first_slot: int
    last_slot: int

    def generate_id(self, device: PciDevice, known_ids: Collection[str]) -> str:
        """Return the id of a device that is added, generated where it has none: then the counter advances."""
        if device.id is not None:
            return device.id
        names = Names(self.given_ids.union(known_ids), self.counter)
        name = names.generate(PREFIXES[type(device)])
        self.counter = names.counter
        return name

    def find_slot(self, device_id: str, wanted: int | None, *, last: Container[int] = ()) -> int:
        """Return the slot for a device that is added, one of `last` where no other is free.

        It is not taken yet.

        :raises AllocatePciDeviceId: there is none, or the one wished for is taken.
        """
        slots = Slots(self.first_slot, self.last_slot, self.slots)
        return slots.allocate(device_id, wanted, last=last)

    def take(self, device: PciDevice, device_id: str, slot: int) -> None:
        """Note a device that was added."""
        self.slots[device_id] = slot
        self.kinds[device_id] = kind_of(device)
        if is_virtio(device):
            self.virtio.append(device_id)

    def shares_slot(self, device_id: str) -> bool:
        """Say whether other devices are functions of the same slot."""
        number = device_number(self.slots[device_id])
        return sum(device_number(slot) == number for slot in self.slots.values()) > 1

    def release(self, device_id: str) -> int | None:
        """Forget a device that is gone; return the slot that it had, None where it is not known."""
        slot = self.slots.pop(device_id, None)
        if slot is not None:
            self.kinds.pop(device_id, None)
            self.trapped.discard(device_id)
            if device_id in self.virtio:
                self.virtio.remove(device_id)
        return slot


def generate_mac() -> str:
    """Return a random, locally administered unicast address; the first byte is Cloud Hypervisor's 0x2e."""
    return "2e:" + ":".join(f"{byte:02x}" for byte in os.urandom(5))


def number_devices(vm_config: VmConfig, used_ids: set[str], first_slot: int, last_slot: int) -> Numbering:
    """Fill in ids and MACs in `vm_config` (changed in place) and give every PCI device its slot.

    :raises AllocatePciDeviceId: more devices than functions of all slots.
    :raises ReservePciDeviceId: two devices ask for one slot, or one asks for a slot of the machine.
    """
    names = Names(set(used_ids))
    slots = Slots(first_slot, last_slot)
    for net in vm_config.net or []:
        net.mac = net.mac or generate_mac()
    created = list(_created(vm_config, names))
    for device in created:
        if device.slot is not None:
            slots.reserve(device.device_id, device.slot)
    for device in created:
        if device.slot is None and slots.has_free:
            slots.allocate(device.device_id)
    placed = [device for device in created if device.device_id in slots.taken]
    hosts = [slots.taken[device.device_id] for device in sorted(placed, key=_is_removable)]
    for device in created:
        if device.device_id not in slots.taken:
            slots.share(device.device_id, hosts)
    return Numbering(
        slots={device.device_id: slots.taken[device.device_id] for device in created},
        virtio=[device.device_id for device in created if device.is_virtio],
        kinds={device.device_id: device.kind for device in created},
        trapped={device.device_id for device in created if device.is_trapped},
        given_ids=set(used_ids),
        counter=names.counter,
        first_slot=first_slot,
        last_slot=last_slot,
    )


def device_ids(vm_config: VmConfig, used_ids: set[str]) -> list[str]:
    """Return the ids of all PCI devices in creation order; those without one get one in a copy only."""
    return [device.device_id for device in _created(copy.deepcopy(vm_config), Names(set(used_ids)))]


def kind_of(device: PciDevice) -> str:
    """Return the reference's word for the type of `device`."""
    if isinstance(device, GenericVhostUserConfig):  # it is what its back end says
        return VIRTIO_KINDS.get(device.device_type, "UNKNOWN")
    return KINDS[type(device)]


def is_virtio(device: PciDevice) -> bool:
    return not isinstance(device, DeviceConfig | UserDeviceConfig | IvshmemConfig)


def is_on_iommu_segment(device: PciDevice, vm_config: VmConfig) -> bool:
    platform = vm_config.platform
    return platform is not None and device.pci_segment in (platform.iommu_segments or ())


def _created(vm_config: VmConfig, names: Names) -> Iterator[Numbered]:
    """Give every PCI device in the reference's creation order, with the id that it has from now on."""
    for device in _in_order(vm_config):
        if isinstance(device, Numbered):
            yield device
            continue
        fixed_id = FIXED_IDS.get(type(device))
        if fixed_id is None and device.id is None:
            device.id = names.generate(PREFIXES[type(device)])
        # The reference keeps fixed names to itself: the config shows an id only where the user gave one.
        yield Numbered(
            device_id=device.id or fixed_id or "",
            kind=kind_of(device),
            slot=device.pci_device_id,
            is_virtio=is_virtio(device),
            is_trapped=device.iommu and not is_on_iommu_segment(device, vm_config),
        )


def _in_order(vm: VmConfig) -> Iterator[PciDevice | Numbered]:
    if vm.console.mode is not ConsoleOutputMode.OFF:
        yield vm.console
    yield from vm.disks or ()
    yield from vm.net or ()
    yield vm.rng
    yield from vm.generic_vhost_user or ()
    yield from vm.fs or ()
    yield from vm.pmem or ()
    yield from _present(vm.vsock)
    for zone_id in ram_of(vm.memory).zones:
        yield Numbered(device_id=zone_id, kind="mem")
    yield from _present(vm.balloon)
    if vm.watchdog:
        # A plain PCI device here: QEMU has no virtio watchdog.
        yield Numbered(device_id=WATCHDOG_ID, kind="watchdog", is_virtio=False)
    yield from vm.vdpa or ()
    yield from _present(vm.rtc)
    yield from vm.devices or ()
    yield from vm.user_devices or ()
    if vm.iommu:
        yield Numbered(device_id=IOMMU_ID, kind="iommu")
    if vm.pvmemcontrol is not None:
        yield Numbered(device_id=PVMEMCONTROL_ID, kind=PLAIN, is_virtio=False)
    if vm.pvpanic:
        yield Numbered(device_id=PVPANIC_ID, kind=PLAIN, is_virtio=False)
    yield from _present(vm.ivshmem)


def _is_removable(device: Numbered) -> bool:
    return device.kind in REMOVABLE


def _present(device: PciDevice | None) -> tuple[PciDevice, ...]:
    return () if device is None else (device,)
