"""Places on the flat PCI bus of the machine.

Device number 0 is the host bridge and 1 the chipset (ISA, IDE, power management), so devices have 2 to 31,
or functions of one. Who gets which is decided above the engine; here it is only checked and written down.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.engine.base import SlotError, device_number, function_number, is_slot
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

    :raises InvalidSlot: a number that this machine does not give away, or a slot without function 0.
    :raises SlotInUse: two devices on one number.
    """
    taken: set[int] = set()
    for slot in slots.values():
        if not is_slot(slot, FIRST_SLOT, LAST_SLOT) or device_number(slot) not in slots.values():
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
    slot = slots[device_id]
    number, function = device_number(slot), function_number(slot)
    if function:
        return {"bus": BUS, "addr": f"0x{number:x}.{function}"}
    is_shared = sum(device_number(other) == number for other in slots.values()) > 1
    return {"bus": BUS, "addr": f"0x{number:x}", **({"multifunction": True} if is_shared else {})}
