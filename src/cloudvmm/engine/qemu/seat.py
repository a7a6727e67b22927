"""Where a device goes in its machine: what its description needs beside the device and its backing."""

from __future__ import annotations

import msgspec

from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.parts import Properties
from cloudvmm.engine.qemu.slot import place


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """`slots` are those of the whole machine, `facts` are about its QEMU.

    `first_fdset` and the numbers behind it are free. A firmware looks at what has a `boot_index`, lowest
    first; what is added later has none. `has_iommufd` says that VFIO devices go to the machine's iommufd.
    """

    slots: dict[str, int]
    facts: QemuFacts
    first_fdset: int = 1
    boot_index: int | None = None
    has_iommufd: bool = False

    def place(self, device_id: str) -> Properties:
        """Return the properties that put `device_id` on its slot.

        :raises NoSlot: it has none.
        """
        return place(self.slots, device_id)
