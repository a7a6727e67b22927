"""What resizes asked of a guest, and how far it has got: told as events that the reference does not have.

One for each VM that is booted. A reboot begins anew: the VM then is as its config says.
"""

from __future__ import annotations

import msgspec


class Part(msgspec.Struct, frozen=True):
    """What is resized: "vcpus", "ram", "balloon" or "zone", the latter with its id. Sizes are bytes."""

    name: str
    zone_id: str | None = None


VCPUS = Part("vcpus")
RAM = Part("ram")
BALLOON = Part("balloon")

Properties = dict[str, str]


class Progress:
    """Keeps, of each part that was asked for, what was asked and what was told last."""

    def __init__(self) -> None:
        self._asked: dict[Part, int] = {}
        self._told: dict[Part, int] = {}

    def ask(self, part: Part, asked: int, actual: int, *, is_for_reboot: bool = False) -> Properties:
        """The guest, which has `actual`, was asked for `asked`; return what is to be told of it.

        With `is_for_reboot` it was not asked: the next boot will have that size.
        """
        self._asked[part], self._told[part] = asked, actual
        if not is_for_reboot:
            return self._properties(part)
        del self._asked[part]
        return {**_named(part), "asked": str(asked), "actual": str(actual), "waits_for": "reboot"}

    def follow(self, part: Part, actual: int) -> Properties | None:
        """The guest has `actual` now; return what is to be told, None where it is nothing new, or unasked."""
        if part not in self._asked or self._told[part] == actual:
            return None
        self._told[part] = actual
        return self._properties(part)

    def refuse(self, part: Part) -> Properties | None:
        """The guest says no; return what is to be told, None where it was not asked, or has done all."""
        if part not in self._asked or self._asked[part] == self._told[part]:
            return None
        return self._properties(part)

    def _properties(self, part: Part) -> Properties:
        return {**_named(part), "asked": str(self._asked[part]), "actual": str(self._told[part])}


def _named(part: Part) -> Properties:
    return {"part": part.name} if part.zone_id is None else {"part": part.name, "id": part.zone_id}
