"""The two things that devices share out among themselves: PCI slots and generated names."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from cloudvmm.control.error import AllocatePciDeviceId, NoFreeSlot, ReservePciDeviceId, SlotTaken
from cloudvmm.engine.base import PCI_FUNCTIONS, device_number, slot_of


class Slots:
    """The device numbers of bus 0 that devices may have, `first`..`last`; `taken` is copied.

    A device has one for itself, and function 0 there; `share` gives other functions.
    """

    def __init__(self, first: int, last: int, taken: Mapping[str, int] | None = None) -> None:
        self._range = range(first, last + 1)
        self.taken: dict[str, int] = dict(taken or {})

    def reserve(self, device_id: str, slot: int) -> None:
        """:raises ReservePciDeviceId: another device has it, or the machine itself."""
        if not self._is_free(slot):
            raise ReservePciDeviceId from SlotTaken(slot)
        self.taken[device_id] = slot

    def allocate(self, device_id: str, wanted: int | None = None, *, last: Container[int] = ()) -> int:
        """Give the slot that is wished for, or the lowest free one; one of `last` where no other is free.

        :raises AllocatePciDeviceId: all are taken, or the one wished for is.
        """
        if wanted is None:
            free = [slot for slot in self._range if self._is_free(slot)]
            if not free:
                raise AllocatePciDeviceId from NoFreeSlot()
            wanted = min(free, key=lambda slot: slot in last)
        elif not self._is_free(wanted):
            raise AllocatePciDeviceId from SlotTaken(wanted)
        self.taken[device_id] = wanted
        return wanted

    @property
    def has_free(self) -> bool:
        return any(map(self._is_free, self._range))

    def share(self, device_id: str, hosts: Iterable[int]) -> int:
        """Give the next function of one of `hosts`, device numbers that are taken.

        :raises AllocatePciDeviceId: they have no function left.
        """
        taken = set(self.taken.values())
        for host in hosts:
            for function in range(1, PCI_FUNCTIONS):
                slot = slot_of(host, function)
                if slot not in taken:
                    self.taken[device_id] = slot
                    return slot
        raise AllocatePciDeviceId from NoFreeSlot()

    def _is_free(self, slot: int) -> bool:
        return slot in self._range and all(device_number(each) != slot for each in self.taken.values())


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
