"""Rules about forking, and what a clone's configuration is: that of its parent, but for what is one VM's own.

A clone has a folder. Whatever its parent has a path for, and cannot be there twice, is there in the clone's
folder for the clone, under a name that does not depend on the parent's. What a request overrides wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from cloudvmm.config.error import IdentifierNotUnique, ValidationError
from cloudvmm.config.operation import CloneConfig, VmForkData
from cloudvmm.config.vm import VmConfig

MAX_CLONES: Final = 1000
_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_CONSOLES: Final = ("serial", "console", "debug_console")
# What QEMU would not save, or what has a state of its own outside the VM.
_UNIQUE: Final = ("devices", "user_devices", "vdpa", "tpm", "ivshmem")


class InvalidCloneId(ValidationError):
    def __init__(self, clone_id: str) -> None:
        super().__init__(f"'{clone_id}' is no id for a clone: letters, digits, '_', '.' and '-' are")


class CloneCountMismatch(ValidationError):
    def __init__(self, count: int, clones: int) -> None:
        super().__init__(f"Number of clones described: {clones}. Expected: {count}")


class TooManyClones(ValidationError):
    def __init__(self, count: int) -> None:
        super().__init__(f"One fork makes at most {MAX_CLONES} clones, not {count}")


class NotTwice(ValidationError):
    """`what` of the VM that is to be forked cannot be a clone's, too."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"A VM with {what} cannot be forked{advice}")


def clones_of(data: VmForkData) -> list[CloneConfig]:
    """Return what is asked for of each clone.

    :raises ValidationError: it contradicts itself.
    """
    count = (data.count or 1) if data.clones is None else len(data.clones)
    if count > MAX_CLONES:
        raise TooManyClones(count)
    if data.clones is None:
        return [CloneConfig() for _ in range(count)]
    if (data.count is not None and data.count != len(data.clones)) or not data.clones:
        raise CloneCountMismatch(data.count or 1, len(data.clones))
    for members in ("id", "api_socket"):
        seen: set[str] = set()
        for value in (getattr(clone, members) for clone in data.clones):
            if value is not None and value in seen:
                raise IdentifierNotUnique(value)
            seen.add(value)
    for clone in data.clones:
        if clone.id is not None and _ID.fullmatch(clone.id) is None:
            raise InvalidCloneId(clone.id)
    return data.clones


def check_forkable(parent: VmConfig) -> None:
    """:raises NotTwice: `parent` has what no clone can have, whatever is overridden."""
    for member in _UNIQUE:
        if getattr(parent, member):
            raise NotTwice(f"'{member}'")
    memory = parent.memory
    if memory.hugepages or any(zone.hugepages for zone in memory.zones or ()):
        raise NotTwice("memory of huge pages")
    if any(zone.file is not None for zone in memory.zones or ()):
        raise NotTwice("a memory zone that has a file")


def clone_patch(parent: VmConfig, folder: str, overlays: Mapping[str, str]) -> dict[str, Any]:
    """Return what is other in a clone than in `parent`, in the form of overrides.

    `overlays` are paths of images by the ids of disks that the guest can write, in `folder`.
    """
    patch: dict[str, Any] = {}
    if overlays:
        patch["disks"] = [
            {"id": disk_id, "path": path, "image_type": "Qcow2", "backing_files": True}
            for disk_id, path in overlays.items()
        ]
    if parent.net:
        patch["net"] = [_other_net(net.id, has_user=net.user is not None) for net in parent.net]
    if parent.vsock is not None:
        patch["vsock"] = {"socket": f"{folder}/vsock.sock"}
    for name in _CONSOLES:
        changes = _other_console(getattr(parent, name).mode.value, f"{folder}/{name.replace('_', '-')}")
        if changes:
            patch[name] = changes
    return patch


def check_clone(clone: VmConfig, parent: VmConfig) -> None:
    """:raises NotTwice: `clone` has what its parent has still, which cannot be there twice."""
    for net in clone.net or ():
        if net.fds is not None:
            raise NotTwice(f"the network device '{net.id}' on descriptors", _OVERRIDE)
    shared = {socket for socket in _sockets(parent) if socket in set(_sockets(clone))}
    for socket in sorted(shared):
        raise NotTwice(f"a device at the socket '{socket}'", _OVERRIDE)
    files = {pmem.file for pmem in parent.pmem or () if not pmem.discard_writes}
    for pmem in clone.pmem or ():
        if pmem.file in files and not pmem.discard_writes:
            raise NotTwice(f"the persistent memory '{pmem.id}' that is written", _OVERRIDE)


_OVERRIDE: Final = ": override where the clone has it"


def _other_net(net_id: str | None, *, has_user: bool) -> dict[str, Any]:
    """An address is the host's once, as is a port it forwards. The guest has its old MAC until it reboots."""
    patch: dict[str, Any] = {"id": net_id, **dict.fromkeys(("tap", "ip", "mask", "mac", "host_mac"))}
    return patch | ({"user": {"forwards": []}} if has_user else {})


def _other_console(mode: str, path: str) -> dict[str, Any]:
    match mode:
        case "File":
            return {"file": f"{path}.log"}
        case "Socket":
            return {"socket": f"{path}.sock"}
        case "Tty":  # the process has one terminal
            return {"mode": "Null"}
        case "Pty":
            return {"file": None}
        case _:
            return {}


def _sockets(vm_config: VmConfig) -> list[str]:
    """Return the sockets of back ends, each of which serves one VM."""
    found = [
        *(disk.vhost_socket for disk in vm_config.disks or () if disk.vhost_user),
        *(net.vhost_socket for net in vm_config.net or () if net.vhost_user),
        *(fs.socket for fs in vm_config.fs or ()),
        *(device.socket for device in vm_config.generic_vhost_user or ()),
        None if vm_config.vsock is None else vm_config.vsock.socket,
    ]
    return [socket for socket in found if socket is not None]
