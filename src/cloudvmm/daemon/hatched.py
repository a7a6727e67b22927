"""A VMM that a fork made in this process, as the one that it is of sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudvmm.api.action import VmResume
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.control.sibling import BeginVm, CloneData

if TYPE_CHECKING:
    from cloudvmm.daemon.vmm import Vmm


class Hatched:
    """A `control.sibling.Sibling`: one of the VMMs. `make` makes it, given what it is to do at its end."""

    def __init__(self, make: Callable[[Callable[[], None]], Vmm], on_end: Callable[[Hatched], None]) -> None:
        self.vmm = make(lambda: on_end(self))

    def begin(self, data: CloneData) -> ReplyChannel:
        return self.vmm.send(BeginVm, data)

    def resume(self) -> ReplyChannel:
        return self.vmm.send(VmResume, None)

    def close(self) -> None:
        self.vmm.close()
