"""Slots where a guest may eject what nobody asks back.

Whenever a device comes or is to go, QEMU tells the guest anew of every removal that is under way. Linux
queues each telling, and carries out what is left of them once the device is gone: then whatever was put into
its slot meanwhile is ejected. So a slot that may have such is `unsettled`, until the guest has let go of a
device that it was asked for later: it does one thing after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Ejections(msgspec.Struct, kw_only=True):
    """What was asked of the guest, in order. It is changed by its methods alone, under the lock of its owner.

    `turn` counts what was asked; `asked` has the turn of each device that is to go, `repeated` those that the
    guest may have been told of more than once. `unseen` are devices that came, and that the guest has not
    been seen to take up. `unsettled` has the turn at which each slot was left.
    """

    turn: int = 0
    asked: dict[str, int] = msgspec.field(default_factory=dict)
    repeated: set[str] = msgspec.field(default_factory=set)
    unseen: set[str] = msgspec.field(default_factory=set)
    unsettled: dict[int, int] = msgspec.field(default_factory=dict)

    def plug(self, device_id: str) -> None:
        """The guest is about to be told of a new device."""
        self.repeated.update(self.asked)
        self.unseen.add(device_id)

    def note_seen(self, device_ids: Iterable[str]) -> None:
        """The guest has taken up these devices."""
        self.unseen.difference_update(device_ids)

    def ask(self, device_id: str) -> None:
        """The guest is about to be asked to let go of a device, for the first time or again."""
        if self.asked or self.unseen:
            self.repeated.update(self.asked, [device_id])
        self.turn += 1
        self.asked.setdefault(device_id, self.turn)

    def leave(self, device_id: str, slot: int | None) -> None:
        """The device is gone, from `slot` where it had one."""
        self.unseen.discard(device_id)
        asked = self.asked.pop(device_id, 0)
        self.unsettled = {number: turn for number, turn in self.unsettled.items() if turn >= asked}
        if device_id in self.repeated:
            self.repeated.discard(device_id)
            if slot is not None:
                self.unsettled[slot] = self.turn

    def copy(self) -> Ejections:
        return Ejections(
            turn=self.turn,
            asked=dict(self.asked),
            repeated=set(self.repeated),
            unseen=set(self.unseen),
            unsettled=dict(self.unsettled),
        )
