"""Slots where a guest may eject what nobody asks back.

Whenever a device comes or is to go, QEMU tells the guest anew of every removal that is under way. Linux
queues each telling, and carries out what is left of them once the device is gone: then whatever was put into
its slot meanwhile is ejected. So a slot that may have such is `unsettled`, until the guest has let go of a
device that it was asked for later: in practice it does one thing after the other.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


class Ejections(msgspec.Struct, kw_only=True):
    """What the guest was told, in order. It is changed by its methods alone, under the lock of its owner.

    `turn` counts what it was told. By their turns: `unseen` are devices that came, and that the guest has not
    been seen to take up; `asked` are those that are to go; `unsettled` are slots that were left. Of those
    that are `repeated` the guest may have been told more than once that they are to go.
    """

    turn: int = 0
    unseen: dict[str, int] = msgspec.field(default_factory=dict)
    asked: dict[str, int] = msgspec.field(default_factory=dict)
    repeated: set[str] = msgspec.field(default_factory=set)
    unsettled: dict[int, int] = msgspec.field(default_factory=dict)

    def plug(self, device_id: str) -> None:
        """The guest is about to be told of a new device."""
        self.turn += 1
        self.repeated.update(self.asked)
        self.unseen[device_id] = self.turn

    def drop(self, device_id: str) -> None:
        """The device never came."""
        self.unseen.pop(device_id, None)
        self.retract(device_id)

    def note_seen(self, device_id: str) -> None:
        """The guest has taken the device up."""
        self.unseen.pop(device_id, None)

    def ask(self, device_id: str) -> bool:
        """The guest is about to be asked to let go of a device; return whether for the first time."""
        is_first = device_id not in self.asked
        if self.asked or self.unseen:
            self.repeated.update(self.asked, [device_id])
        self.turn += 1
        self.asked.setdefault(device_id, self.turn)
        return is_first

    def retract(self, device_id: str) -> None:
        """The guest was not asked, and the device stays."""
        self.asked.pop(device_id, None)
        self.repeated.discard(device_id)

    def leave(self, device_id: str, slot: int | None) -> None:
        """The device is gone, from `slot` where it had one."""
        self.unseen.pop(device_id, None)
        asked = self.asked.pop(device_id, 0)
        if slot not in self.unsettled:  # or what is left over from before was carried out, and not this
            self.unseen = _since(asked, self.unseen)
            self.unsettled = _since(asked, self.unsettled)
        if device_id in self.repeated:
            self.repeated.discard(device_id)
            if slot is not None:
                self.unsettled[slot] = self.turn

    def copy(self) -> Ejections:
        return Ejections(
            turn=self.turn,
            unseen=dict(self.unseen),
            asked=dict(self.asked),
            repeated=set(self.repeated),
            unsettled=dict(self.unsettled),
        )


def _since(turn: int, told: dict[T, int]) -> dict[T, int]:
    """Leave out what the guest was told before `turn`, and has done with."""
    return {what: at for what, at in told.items() if at >= turn}
