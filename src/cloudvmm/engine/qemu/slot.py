"""Places on the flat PCI bus of the machine.

Device number 0 is the host bridge and 1 the chipset (ISA, IDE, power management), so devices have 2 to 31.
Who gets which number is decided above the engine; here it is only checked and written down.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.engine.base import SlotError
from cloudvmm.engine.qemu.parts import Properties

BUS: Final = "pci.0"
FIRST_SLOT: Final = 2
LAST_SLOT: Final = 31


class NoSlot(SlotError):
    """Could not find an available device slot on the PCI bus"""


class InvalidSlot(SlotError):
    def __init__(self, slot: int) -> None:
        super().__init__(f"Invalid PCI device identifier provided: {slot}")


class SlotInUse(SlotError):
    def __init__(self, slot: int) -> None:
        super().__init__(f"Valid PCI device identifier but already used: {slot}")


def check_slots(slots: dict[str, int]) -> None:
    """Raise what is wrong with `slots` as a whole.

    :raises InvalidSlot: a number that this machine does not give away.
    :raises SlotInUse: two devices on one number.
    """
    taken: set[int] = set()
    for slot in slots.values():
        if not FIRST_SLOT <= slot <= LAST_SLOT:
            raise InvalidSlot(slot)
        if slot in taken:
            raise SlotInUse(slot)
        taken.add(slot)


def place(slots: dict[str, int], device_id: str) -> Properties:
    """Return the properties that put `device_id` on its slot.

    :raises NoSlot: `slots` has none for it.
    """
    if device_id not in slots:
        raise NoSlot
    return {"bus": BUS, "addr": f"0x{slots[device_id]:x}"}
