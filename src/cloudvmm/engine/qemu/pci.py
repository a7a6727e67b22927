"""QEMU's picture of the PCI bus, as the BARs of our devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cloudvmm.engine.base import PciBar

_UNPLACED = (-1, 2**64 - 1)
# A BAR has no bits for less; QEMU tells the size of what is behind it.
_SMALLEST_MEMORY_BYTES = 16
_SMALLEST_IO_BYTES = 4


def placed_bars(
    buses: Iterable[dict[str, Any]], device_id: Callable[[str], str | None]
) -> dict[str, list[PciBar]]:
    """Translate the answer to ``query-pci``: device id to the BARs that the guest has placed.

    `device_id` knows the API's id of a QEMU device; what has none is the machine's own and left out.
    """
    resources = {}
    for device in _devices(buses):
        name = device_id(device.get("qdev_id", ""))
        if name is not None:
            bars = (_bar(region) for region in device["regions"])
            resources[name] = [bar for bar in bars if bar is not None]
    return resources


def _devices(buses: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for bus in buses:
        for device in bus["devices"]:
            yield device
            yield from _devices([device["pci_bridge"]] if "devices" in device.get("pci_bridge", {}) else [])


def _bar(region: dict[str, Any]) -> PciBar | None:
    if region["address"] in _UNPLACED:
        return None
    if region["type"] == "io":
        return PciBar(
            index=region["bar"],
            base=region["address"],
            size=max(region["size"], _SMALLEST_IO_BYTES),
            kind="Io",
            prefetchable=False,
        )
    return PciBar(
        index=region["bar"],
        base=region["address"],
        size=max(region["size"], _SMALLEST_MEMORY_BYTES),
        kind="Mmio64" if region.get("mem_type_64") else "Mmio32",
        prefetchable=region.get("prefetch", False),
    )
