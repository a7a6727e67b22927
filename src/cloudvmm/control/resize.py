"""Sizes that change: the steps of `vm.resize`, `vm.resize-zone` and `vm.resize-disk`.

Reference: lifecycle.md section 10.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty
from cloudvmm.config.operation import VmResizeData, VmResizeDiskData, VmResizeZoneData
from cloudvmm.config.vm import VmConfig
from cloudvmm.control import edit
from cloudvmm.control.holding import Holding
from cloudvmm.control.worker import Steps
from cloudvmm.events.hub import EventHub


class Resize:
    """`holding` is the state that the steps work on."""

    def __init__(self, events: EventHub, holding: Holding) -> None:
        self._events = events
        self._holding = holding

    def resize(self, sizes: VmResizeData) -> Steps:
        return self._edit_cold(edit.with_sizes, sizes)

    def resize_zone(self, zone_size: VmResizeZoneData) -> Steps:
        return self._edit_cold(edit.with_zone_size, zone_size)

    def resize_disk(self, _: VmResizeDiskData) -> Steps:
        yield from ()
        self._holding.created_config()
        if self._holding.vm is None:
            raise api_error.ResizeDisk
        raise api_error.ResizeDisk from api_error.NotImplementedYet()

    def _edit_cold(self, change: Callable[[VmConfig, Any], VmConfig], data: Any) -> Steps:
        vm_config = self._holding.created_config()
        if self._holding.vm is not None:
            raise api_error.NotImplementedYet(
                "Resizing a booted VM comes with a later release; resize it before vm.boot"
            )
        self._holding.vm_config = yield partial(change, vm_config, data)
        return Empty()
