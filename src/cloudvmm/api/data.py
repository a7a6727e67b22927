"""What commands answer with."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from cloudvmm.config.vm import VmConfig

VmCounters = dict[str, dict[str, int]]


class VmState(enum.Enum):
    CREATED = "Created"
    RUNNING = "Running"
    SHUTDOWN = "Shutdown"
    PAUSED = "Paused"
    BREAK_POINT = "BreakPoint"


class VmmPingResponse(msgspec.Struct, frozen=True, kw_only=True):
    build_version: str
    version: str
    pid: int
    features: list[str]


class PciBarResource(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    base: int
    size: int
    type_: Literal["Io", "Mmio32", "Mmio64"]
    prefetchable: bool


class AddressRange(msgspec.Struct, frozen=True, kw_only=True):
    base: int
    size: int


Resource = dict[str, PciBarResource | AddressRange | int | str]


class DeviceNode(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`resources` and `children` are always written; `parent` and `pci_bdf` only where they are set."""

    id: str
    resources: list[Resource]
    parent: str | None = None
    children: list[str]
    pci_bdf: str | None = None


DeviceTree = dict[str, DeviceNode]


class VmInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`device_tree` is there only while a VM object exists; `memory_actual_size` is bytes."""

    config: VmConfig
    state: VmState
    memory_actual_size: int
    device_tree: DeviceTree | None = None


class PciDeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    bdf: str


class Empty(msgspec.Struct, frozen=True):
    """Done, and nothing to say."""


class VmActionPayload(msgspec.Struct, frozen=True):
    """JSON bytes that an action on the VM answered with, if any."""

    body: bytes | None = None


ApiResponsePayload = Empty | VmInfo | VmmPingResponse | VmActionPayload
