"""VMMs beside this one, in this process: how a fork has them made, and what it asks of them."""

from __future__ import annotations

from typing import Protocol

import msgspec

from cloudvmm.api import error as api_error
from cloudvmm.api.action import ApiRequest
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.record import VmRecord
from cloudvmm.engine.base import Base


class CloneData(msgspec.Struct, frozen=True, kw_only=True):
    """`base` is lent until the answer. `record` is what its parent knew of itself besides `vm_config`."""

    vm_config: VmConfig
    record: VmRecord
    base: Base


class BeginVm(ApiRequest):
    """Hold a VM that begins at a base, paused. Needs N. No front end has it: a VMM of this process asks."""

    name = "vm.begin"
    body = CloneData
    error = api_error.VmRestoreError


class Sibling(Protocol):
    """A VMM beside this one, which somebody else ends in the end. Any thread."""

    def begin(self, data: CloneData) -> ReplyChannel:
        """Ask it to hold a clone; the answer comes over the channel.

        :raises ApiError: it has ended.
        """

    def resume(self) -> ReplyChannel:
        """Ask it to let its guest run; as `begin`."""

    def close(self) -> None:
        """Blocking. Delete what it holds and end it; wait until nothing of it is left. Idempotent."""


class Siblings(Protocol):
    """Makes VMMs. Any thread."""

    def add(self, api_socket: str, name: str) -> Sibling:
        """Blocking. Start a VMM that holds nothing and is served at `api_socket`; it is for the clone `name`.

        :raises VmmError: it cannot be, or the process is about to end.
        :raises OSError: the host gives no descriptor or thread.
        """
