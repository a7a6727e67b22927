"""The PCI bus as a guest sees it, and as `vm.info` tells it, in one form."""

from __future__ import annotations

from typing import Any

import msgspec

from support.booted import Booted

IORESOURCE_IO, IORESOURCE_PREFETCH, IORESOURCE_MEM_64 = 0x100, 0x2000, 0x100000  # of Linux
COMMAND_IO, COMMAND_MEMORY = 1, 2
BARS = 6
BOARD = {"0000:00:00.0", "0000:00:01.0", "0000:00:01.1", "0000:00:01.3"}  # docs/compatibility.md

# For each device address, the command register's lower byte, vendor, device, and the type of the virtio
# device on it; then its BARs.
SCRIPT = """
cd /sys/bus/pci/devices
for d in *; do
    echo $d $(xxd -s 4 -l 1 -p $d/config) $(cat $d/vendor $d/device $d/virtio*/device 2>/dev/null)
    head -n 6 $d/resource
done
"""


class Bar(msgspec.Struct, frozen=True):
    index: int
    base: int
    size: int
    kind: str
    prefetchable: bool


class PciFunction(msgspec.Struct, frozen=True):
    """`virtio` is the type of the virtio device that its driver has found, None where there is none.

    `bars` are those that the guest has placed and turned on: QEMU knows no other.
    """

    vendor: int
    device: int
    virtio: int | None
    bars: tuple[Bar, ...]


def guest_functions(vm: Booted) -> dict[str, PciFunction]:
    """Return everything on the guest's PCI buses by its address."""
    lines = vm.run(SCRIPT).splitlines()
    found = {}
    for start in range(0, len(lines), 1 + BARS):
        address, command, vendor, device, *virtio = lines[start].split()
        ranges = [[int(word, 16) for word in line.split()] for line in lines[start + 1 : start + 1 + BARS]]
        found[address] = PciFunction(
            vendor=int(vendor, 16),
            device=int(device, 16),
            virtio=int(virtio[0], 16) if virtio else None,
            bars=tuple(
                Bar(index, first, last - first + 1, _kind(flags), bool(flags & IORESOURCE_PREFETCH))
                for index, (first, last, flags) in enumerate(ranges)
                if last and int(command, 16) & (COMMAND_IO if flags & IORESOURCE_IO else COMMAND_MEMORY)
            ),
        )
    return found


def told_nodes(vm: Booted) -> dict[str, dict[str, Any]]:
    """Return the PCI nodes of the device tree by their address."""
    nodes = [node for node in vm.info()["device_tree"].values() if "pci_bdf" in node]
    found = {node["pci_bdf"]: node for node in nodes}
    assert len(found) == len(nodes)
    return found


def told_bars(node: dict[str, Any]) -> tuple[Bar, ...]:
    bars = (resource["PciBar"] for resource in node["resources"])
    return tuple(
        Bar(bar["index"], bar["base"], bar["size"], bar["type_"], bar["prefetchable"]) for bar in bars
    )


def _kind(flags: int) -> str:
    if flags & IORESOURCE_IO:
        return "Io"
    return "Mmio64" if flags & IORESOURCE_MEM_64 else "Mmio32"
