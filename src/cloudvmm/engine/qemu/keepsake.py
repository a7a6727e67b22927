"""What a machine leaves in its folder for whoever takes it over: what QEMU itself cannot be asked.

It is written anew, as a whole and by a rename, whenever it has changed. Descriptors are in it under the
numbers that they had in the process that wrote it, with what tells how to find them again in QEMU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from cloudvmm.config import form
from cloudvmm.config.disk import DiskConfig
from cloudvmm.engine.base import EngineError, NotSupportedYet
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.companion import Companion, ServedBacking
from cloudvmm.engine.qemu.confinement import Policy
from cloudvmm.engine.qemu.disk import DiskBacking
from cloudvmm.engine.qemu.ejection import Ejections
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.mapped import MappedBacking
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.net import NetBacking
from cloudvmm.engine.qemu.parts import Command
from cloudvmm.engine.qemu.tpm import TpmBacking
from cloudvmm.engine.qemu.user_net import UserNetBacking
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking
from cloudvmm.engine.qemu.vsock import VsockBacking
from cloudvmm.engine.qemu.zone import ZoneBacking
from cloudvmm.host.error import HostError
from cloudvmm.host.foreign import OpenFile, ProcessId, open_file
from cloudvmm.host.limit import Limit
from cloudvmm.host.own_folder import replace_file

FORMAT: Final = 1
NOTHING: Final = msgspec.Raw(b"null")
_FILE: Final = "machine"
# Whose state is all in their members; what others do is done in our own process.
KEPT: Final[dict[str, type[Backing]]] = {
    kind.__name__: kind
    for kind in (
        DiskBacking,
        NetBacking,
        RamBacking,
        ZoneBacking,
        MappedBacking,
        VhostUserBacking,
        VsockBacking,
        TpmBacking,
        UserNetBacking,
    )
}


class NotKept(NotSupportedYet):
    def __init__(self, what: str) -> None:
        super().__init__(f"Not supported by this release: {what}, for a VM that outlives its manager")


class KeepsakeInvalid(EngineError):
    """What the last manager left of the machine cannot be read"""


class KeptBacking(msgspec.Struct, frozen=True):
    """`value` is the backing of the class `kind`."""

    kind: str
    value: msgspec.Raw


class Place(msgspec.Struct, frozen=True):
    """How a descriptor is found in QEMU: by what it is, and in which set of descriptors, if in one."""

    file: OpenFile
    fdset: int | None = None


class KeptHotplug(msgspec.Struct, kw_only=True):
    """Under the names that `Hotplug` has for them."""

    slots: dict[str, int]
    remains: dict[str, list[Command]]
    doubtful: list[str]
    asked: list[str]
    dropped: list[Command]
    last_fdset: int
    fdsets: dict[str, dict[int, int]]
    has_network: bool
    ejections: Ejections = msgspec.field(default_factory=Ejections)


class KeptVcpus(msgspec.Struct, kw_only=True):
    """Under the names that `Vcpus` has for them."""

    target: int | None
    had: int
    untaken: list[str]
    told: int
    threads: dict[int, int]
    has_cookie: bool
    coming: str | None = None


class Coming(msgspec.Struct, kw_only=True):
    """A device whose addition has begun: `undo` takes back what may have been made, in this order."""

    device_id: str
    slot: int
    backing: KeptBacking
    places: dict[int, Place]
    remains: list[Command]
    fdsets: dict[int, int]
    undo: list[Command]
    disks: dict[str, msgspec.Raw]


class Keepsake(msgspec.Struct, kw_only=True):
    """All of it. `vm_config` is what the machine was built from; `kept` are descriptors that are not ours.

    `unmeasured` are the disks whose requests QEMU does not time yet: it is told when the guest is let run.
    QEMU is held to what `policy` says, whatever its next manager would have it held to.
    """

    format: int = FORMAT
    facts: QemuFacts
    policy: Policy
    has_doorway: bool
    vm_config: msgspec.Raw
    slots: dict[str, int]
    spec_modules: tuple[int, ...]
    ram_bytes: int
    monitors: tuple[OpenFile, OpenFile, OpenFile]
    kept: dict[int, OpenFile]
    places: dict[int, Place]
    rams: dict[str, KeptBacking]
    modules: list[KeptBacking]
    zones: dict[str, KeptBacking]
    backings: dict[str, KeptBacking]
    hotplug: KeptHotplug
    vcpus: KeptVcpus
    disks: dict[str, msgspec.Raw]
    taps: dict[str, tuple[str, dict[str, int] | None]]
    active: list[str]
    unmeasured: list[str] = []
    was_booted: bool = False
    is_spent: bool = False
    is_unlocked: bool = False
    heard_at: int = 0
    coming: Coming | None = None
    coming_module: KeptBacking | None = None


class KeptCompanion(msgspec.Struct, frozen=True):
    process_id: ProcessId
    name: str
    pid_file: str


def check_kept(backings: Iterable[Backing]) -> None:
    """:raises NotKept: one of `backings` would be lost with its manager."""
    for backing in backings:
        if type(backing).__name__ not in KEPT:
            raise NotKept(f"the device {backing.device_id}")


def keep(backing: Backing) -> KeptBacking:
    """Return `backing` as data. :raises NotKept: it would be lost with its manager."""
    check_kept([backing])
    return KeptBacking(type(backing).__name__, msgspec.Raw(msgspec.json.encode(backing, enc_hook=_encode)))


TakeCompanion = Callable[[KeptCompanion], Companion | None]


def no_companion(_: KeptCompanion) -> None:
    """The `TakeCompanion` of those who want none."""


def restore(kept: KeptBacking, take_companion: TakeCompanion = no_companion) -> Backing:
    """Return what `keep` was given; its descriptors have the numbers of before.

    :raises KeepsakeInvalid: it is none.
    """
    try:
        members = msgspec.json.decode(kept.value)
        helper = members.pop("companion", None)
        backing: Backing = form.decoder(KEPT[kept.kind], _decode).decode(msgspec.json.encode(members))
        if helper is not None and isinstance(backing, ServedBacking):
            known = form.decoder(KeptCompanion).decode(msgspec.json.encode(helper))
            backing.companion = take_companion(known)
    except (LookupError, TypeError, AttributeError, *form.MALFORMED, HostError) as error:
        raise KeepsakeInvalid from error
    return backing


def place_all(backings: Iterable[Backing], fdsets: Mapping[int, int]) -> dict[int, Place]:
    """Return how what `backings` have open is found again in QEMU, which has some of it in these sets."""
    found: dict[int, Place] = {}
    for number in (number for backing in backings for number in backing.held_fds):
        with contextlib.suppress(OSError):  # the guest has just let go of the device
            found[number] = Place(open_file(number), fdsets.get(number))
    return found


def write(state_dir: str, data: bytes) -> None:
    """:raises EngineError: it cannot be written; what was there before is."""
    try:
        replace_file(f"{state_dir}/{_FILE}", data)
    except OSError as error:
        raise EngineError("The state of the machine could not be written") from error


def read(state_dir: str) -> Keepsake | None:
    """Return what is there, None where nothing is. :raises KeepsakeInvalid: it cannot be read."""
    try:
        with open(f"{state_dir}/{_FILE}", "rb") as file:
            found: Keepsake = form.decoder(Keepsake).decode(file.read())
    except FileNotFoundError:
        return None
    except (OSError, *form.MALFORMED) as error:
        raise KeepsakeInvalid from error
    if found.format != FORMAT:
        raise KeepsakeInvalid
    return found


def remove(state_dir: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(f"{state_dir}/{_FILE}")


def encode_disk(disk: DiskConfig) -> msgspec.Raw:
    return msgspec.Raw(form.encode(disk))


def decode_disk(raw: msgspec.Raw) -> DiskConfig:
    return form.decode_saved(bytes(raw), DiskConfig)


def _decode(kind: type, value: Any) -> Any:
    if kind is Limit:
        return Limit.adopt(value)
    raise NotImplementedError(kind)


def _encode(value: Any) -> Any:
    match value:
        case Companion():
            return KeptCompanion(value.process_id, value.name, value.pid_file or "")
        case Limit():
            return value.interface
        case _:
            raise NotImplementedError(type(value))
