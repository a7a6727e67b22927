"""QEMU's picture of the PCI bus, as BARs."""

from __future__ import annotations

from cloudvmm.engine.base import PciBar
from cloudvmm.engine.qemu.pci import placed_bars


def known(qdev_id: str) -> str | None:
    return qdev_id.removeprefix("d") if qdev_id.startswith("d") else None


def device(qdev_id, *regions, **members):
    return {"bus": 0, "slot": 2, "function": 0, "qdev_id": qdev_id, "regions": list(regions), **members}


MEMORY_64 = {
    "bar": 4,
    "type": "memory",
    "address": 0x1_0000_0000,
    "size": 0x4000,
    "prefetch": True,
    "mem_type_64": True,
}
MEMORY_32 = {"bar": 1, "type": "memory", "address": 0x2000_0000, "size": 4096, "prefetch": False}
PORTS = {"bar": 0, "type": "io", "address": 0xC000, "size": 64}
UNPLACED = {"bar": 2, "type": "memory", "address": -1, "size": 4096, "prefetch": False}


def test_kinds_of_bars():
    buses = [{"bus": 0, "devices": [device("d0", PORTS, MEMORY_32, MEMORY_64)]}]

    assert placed_bars(buses, known) == {
        "0": [
            PciBar(index=0, base=0xC000, size=64, kind="Io", prefetchable=False),
            PciBar(index=1, base=0x2000_0000, size=4096, kind="Mmio32", prefetchable=False),
            PciBar(index=4, base=0x1_0000_0000, size=0x4000, kind="Mmio64", prefetchable=True),
        ]
    }


def test_bars_are_no_smaller_than_their_register_can_say():
    buses = [{"devices": [device("d0", PORTS | {"size": 2}, MEMORY_32 | {"size": 2})]}]

    assert [bar.size for bar in placed_bars(buses, known)["0"]] == [4, 16]


def test_bars_that_the_guest_has_not_placed_are_left_out():
    assert placed_bars([{"bus": 0, "devices": [device("d0", UNPLACED)]}], known) == {"0": []}


def test_devices_of_the_machine_itself_are_left_out():
    assert placed_bars([{"bus": 0, "devices": [device("", PORTS)]}], known) == {}


def test_devices_below_a_bridge_are_found():
    bridge = {"bus": {"number": 0, "secondary": 1}, "devices": [device("d7", MEMORY_32)]}
    buses = [{"bus": 0, "devices": [device("", pci_bridge=bridge), device("", pci_bridge={"bus": {}})]}]

    assert list(placed_bars(buses, known)) == ["7"]
