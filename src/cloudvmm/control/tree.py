"""The device tree of `vm.info` (reference: lifecycle.md section 6)."""

from __future__ import annotations

from cloudvmm.api.data import DeviceNode, DeviceTree, PciBarResource, Resource
from cloudvmm.config.console import ConsoleOutputMode
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.numbering import (
    DEBUG_CONSOLE_ID,
    IOAPIC_ID,
    SERIAL_ID,
    VIRTIO_PCI_PREFIX,
    Numbering,
)
from cloudvmm.engine.base import PciBar, device_number, function_number


def bdf_of(slot: int) -> str:
    """Return the address of `slot` on bus 0 of segment 0."""
    return f"0000:00:{device_number(slot):02x}.{function_number(slot)}"


def device_tree(vm_config: VmConfig, numbering: Numbering, bars: dict[str, list[PciBar]]) -> DeviceTree:
    """Describe every device of a built VM; `bars` per device id as the guest placed them."""
    tree: DeviceTree = {}
    _add_legacy(tree, IOAPIC_ID)
    if vm_config.serial.mode is not ConsoleOutputMode.OFF:
        _add_legacy(tree, SERIAL_ID)
    # As in the reference, no device where nothing would read it.
    if vm_config.debug_console.mode not in (ConsoleOutputMode.OFF, ConsoleOutputMode.NULL):
        _add_legacy(tree, DEBUG_CONSOLE_ID)
    for device_id, slot in numbering.slots.items():
        resources = [_resource(bar) for bar in bars.get(device_id, [])]
        if device_id in numbering.virtio:
            wrapper = VIRTIO_PCI_PREFIX + device_id
            tree[device_id] = DeviceNode(id=device_id, resources=[], parent=wrapper, children=[])
            tree[wrapper] = DeviceNode(
                id=wrapper, resources=resources, children=[device_id], pci_bdf=bdf_of(slot)
            )
        else:
            tree[device_id] = DeviceNode(id=device_id, resources=resources, children=[], pci_bdf=bdf_of(slot))
    return tree


def _add_legacy(tree: DeviceTree, device_id: str) -> None:
    tree[device_id] = DeviceNode(id=device_id, resources=[], children=[])


def _resource(bar: PciBar) -> Resource:
    return {
        "PciBar": PciBarResource(
            index=bar.index, base=bar.base, size=bar.size, type_=bar.kind, prefetchable=bar.prefetchable
        )
    }
