"""A command's data into its body and descriptors, and a reply's body into the value it stands for.

What a server says may be older or newer than these types. Unknown members are passed over, and members that
older releases do not send have a default here. Values that no type of ours has are an `AnswerNotUnderstood`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec

from cloudvmm.api import data as api_data
from cloudvmm.api.data import (
    AddressRange,
    DeviceNode,
    DeviceTree,
    PciBarResource,
    PciDeviceInfo,
    VmCounters,
    VmForkResponse,
    VmInfo,
    VmMigrationProgress,
    VmmJobs,
    VmmPingResponse,
    VmSnapshotProgress,
    VmState,
)
from cloudvmm.client.error import AnswerNotUnderstood
from cloudvmm.config import form
from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.error import DecodeError
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import (
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
    VmReceiveMigrationData,
)
from cloudvmm.config.vm import VmConfig

S = TypeVar("S", bound=msgspec.Struct)

_replace = msgspec.structs.replace


class _Ping(msgspec.Struct):
    """Only `version` is older than 2023."""

    version: str
    build_version: str = ""
    pid: int = 0
    features: list[str] = msgspec.field(default_factory=list)


class _Node(msgspec.Struct):
    id: str
    resources: list[Any] = msgspec.field(default_factory=list)
    parent: str | None = None
    children: list[str] = msgspec.field(default_factory=list)
    pci_bdf: str | None = None


class _Info(msgspec.Struct):
    config: msgspec.Raw
    state: VmState
    memory_actual_size: int
    device_tree: dict[str, _Node] | None = None


def encode(data: object) -> tuple[bytes | None, tuple[int, ...]]:
    """Return the body for `data`, and the descriptors to pass with it, in the order that servers expect.

    `data` is left as it is, and the descriptors stay the caller's.

    :raises ValueError: `data` lacks a descriptor, has one that cannot be passed, or is nothing that a command
        takes.
    """
    if data is None:
        return None, ()
    if not isinstance(data, msgspec.Struct):
        raise ValueError(f"A command takes an object of cloudvmm.config, not a {type(data).__name__}")
    bare, fds = _detach(data)
    return form.encode(bare), tuple(fds)


def decode(command: str, answer: str, body: bytes) -> Any:
    """Return the value of a successful reply to `command`, which answers with an `answer`.

    :raises AnswerNotUnderstood: the body is something else.
    """
    with _understood(command, body):
        return _DECODERS[answer](body)


def decode_as(command: str, answer: str, body: bytes) -> Any:
    """Return the value of a successful reply to `command`, which is of the type `answer` of `api.data`.

    :raises AnswerNotUnderstood: the body is something else.
    """
    with _understood(command, body):
        return form.decoder(getattr(api_data, answer)).decode(body)


@contextlib.contextmanager
def _understood(command: str, body: bytes) -> Iterator[None]:
    try:
        yield
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, DecodeError) as error:
        raise AnswerNotUnderstood(command, body) from error


def _detach(data: msgspec.Struct) -> tuple[msgspec.Struct, list[int]]:
    """Return a copy of `data` without its descriptors, and these."""
    match data:
        case NetConfig(fds=fds):
            return (_replace(data, fds=None), _passable(fds)) if fds else (data, [])
        case DeviceConfig(fd=int(fd)):
            return _replace(data, fd=None), _passable([fd])
        case VmConfig():
            return _without_descriptors(data), []
        case RestoreConfig() | VmReceiveMigrationData():
            nets, net_fds = _detach_nets(data.net_fds) if data.net_fds else (data.net_fds, [])
            vfio, vfio_fds = _detach_vfio(data.vfio_fds, data.iommufd_fd)
            return _replace(data, net_fds=nets, vfio_fds=vfio, iommufd_fd=None), net_fds + vfio_fds
        case _:
            return data, []


def _without_descriptors(vm_config: VmConfig) -> VmConfig:
    """A config that was read from a server has `INVALID_FD` in places: that is dropped without a word."""
    held = [fd for net in vm_config.net or () for fd in net.fds or ()]
    held += [device.fd for device in vm_config.devices or () if device.fd is not None]
    if vm_config.platform is not None and vm_config.platform.iommufd_fd is not None:
        held.append(vm_config.platform.iommufd_fd)
    if any(fd != form.INVALID_FD for fd in held):
        raise ValueError("vm.create passes no file descriptors; add the device with a command of its own")
    if not held:
        return vm_config
    return _replace(
        vm_config,
        net=vm_config.net and [_replace(net, fds=None) for net in vm_config.net],
        devices=vm_config.devices and [_replace(device, fd=None) for device in vm_config.devices],
        platform=vm_config.platform and _replace(vm_config.platform, iommufd_fd=None),
    )


def _detach_nets(
    nets: list[RestoredNetConfig] | None,
) -> tuple[list[RestoredNetConfig] | None, list[int]]:
    if nets is None:
        return None, []
    fds: list[int] = []
    for net in nets:
        own = net.fds or []
        if net.num_fds not in (0, len(own)):
            raise ValueError(f"{net.id} wants {net.num_fds} file descriptors and has {len(own)}")
        fds += own
    bare = [RestoredNetConfig(id=net.id, num_fds=len(net.fds or ())) for net in nets]
    return bare, _passable(fds)


def _detach_vfio(
    devices: list[RestoredVfioConfig] | None, iommufd: int | None
) -> tuple[list[RestoredVfioConfig] | None, list[int]]:
    if devices is None:
        if iommufd is not None:
            raise ValueError("An iommufd is passed along with vfio_fds only")
        return None, []
    missing = [device.id for device in devices if device.fd is None]
    if missing or iommufd is None:
        raise ValueError(f"No file descriptor for {', '.join(missing) or 'the iommufd'}")
    fds = [device.fd for device in devices if device.fd is not None]
    return [RestoredVfioConfig(id=device.id) for device in devices], _passable([*fds, iommufd])


def _passable(fds: list[int]) -> list[int]:
    for fd in fds:
        if fd < 0:
            raise ValueError(f"{fd} is not a file descriptor")
    return list(fds)


# Made here, under the import's lock: msgspec describes a type to itself on first use and is not safe then.
_ping_decoder = msgspec.json.Decoder(_Ping)
_info_decoder = msgspec.json.Decoder(_Info)
_device_decoder = msgspec.json.Decoder(PciDeviceInfo)
_counters_decoder = msgspec.json.Decoder(VmCounters)
_migration_decoder = msgspec.json.Decoder(VmMigrationProgress)
_snapshot_decoder = msgspec.json.Decoder(VmSnapshotProgress)
_fork_decoder = msgspec.json.Decoder(VmForkResponse)
_jobs_decoder = msgspec.json.Decoder(VmmJobs)


def _decode_ping(body: bytes) -> VmmPingResponse:
    ping = _ping_decoder.decode(body)
    return VmmPingResponse(
        build_version=ping.build_version, version=ping.version, pid=ping.pid, features=ping.features
    )


def _decode_info(body: bytes) -> VmInfo:
    info = _info_decoder.decode(body)
    return VmInfo(
        # The numbers of descriptors are the server's and mean nothing here; their count stays.
        config=form.decode_saved(bytes(info.config), VmConfig),
        state=info.state,
        memory_actual_size=info.memory_actual_size,
        device_tree=None if info.device_tree is None else _device_tree(info.device_tree),
    )


def _device_tree(nodes: dict[str, _Node]) -> DeviceTree:
    return {
        name: DeviceNode(
            id=node.id,
            resources=[_resource(entry) for entry in node.resources],
            parent=node.parent,
            children=node.children,
            pci_bdf=node.pci_bdf,
        )
        for name, node in nodes.items()
    }


def _resource(entry: Any) -> Any:
    """Give the kinds of resource that have a type that type; leave others as they came."""
    if not isinstance(entry, dict):
        return entry
    return {kind: _resource_value(kind, value) for kind, value in entry.items()}


def _resource_value(kind: str, value: Any) -> Any:
    match value:
        case {
            "index": int(index),
            "base": int(base),
            "size": int(size),
            "type_": "Io" | "Mmio32" | "Mmio64" as type_,
            "prefetchable": bool(prefetchable),
        } if kind == "PciBar":
            return PciBarResource(index=index, base=base, size=size, type_=type_, prefetchable=prefetchable)
        case {"base": int(base), "size": int(size)} if kind != "PciBar":
            return AddressRange(base=base, size=size)
        case _:
            return value


def _decode_device(body: bytes) -> PciDeviceInfo | None:
    return _device_decoder.decode(body) if body else None


_DECODERS: Final[dict[str, Callable[[bytes], Any]]] = {
    "nothing": lambda _: None,
    "ping": _decode_ping,
    "info": _decode_info,
    "counters": _counters_decoder.decode,
    "migration-progress": _migration_decoder.decode,
    "snapshot-progress": _snapshot_decoder.decode,
    "device": _decode_device,
    "fork": _fork_decoder.decode,
    "jobs": _jobs_decoder.decode,
}
