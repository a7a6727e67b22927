"""`vm.fork`: clones of a VM that goes on, each in a VMM of its own beside this one.

What can be refused is refused before the VM is touched. Then come the folders and the VMMs, which hold
nothing yet, then the base that is taken from the VM, and the clones that begin at it, all at once. Whatever
fails, all of that is gone again, and the VM's disks are in the images that they had.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from cloudvmm.api import error as api_error
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.api.data import Empty, ForkedVm, VmForkResponse, VmState
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError, ValidationError
from cloudvmm.config.fork import check_clone, check_forkable, clone_patch, clones_of
from cloudvmm.config.operation import CloneConfig, VmForkData
from cloudvmm.config.override import override
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.generation import renew_vmgenid
from cloudvmm.control.holding import Holding
from cloudvmm.control.numbering import generate_mac
from cloudvmm.control.overlay import NoOverlayDirectory, free_paths, on_overlays, written_disks
from cloudvmm.control.record import VmRecord, decode_record, encode_record
from cloudvmm.control.sibling import CloneData, Sibling, Siblings
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Steps
from cloudvmm.engine.base import Base, EngineError
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub

_CLONE_S: Final = 300.0
_MAX_NUMBER: Final = 1_000_000


class ForkError(VmmError):
    """Root of what keeps a VM from being forked."""


class NoSiblings(ForkError):
    """This process cannot hold more than one VM"""


class CloneFolderTaken(ForkError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The folder {path!r} of a clone could not be made")


class CloneNotMade(ForkError):
    def __init__(self, clone_id: str) -> None:
        super().__init__(f"The clone {clone_id} could not be made")


class Clone(msgspec.Struct, kw_only=True):
    """A clone to be. `overlays` are the images that are to be made for it, by the ids of disks."""

    vm: ForkedVm
    vm_config: VmConfig
    overlays: dict[str, str]
    sibling: Sibling | None = None


class Fork:
    """`holding` is the state that the steps work on; without `siblings` nothing is forked."""

    def __init__(
        self,
        events: EventHub,
        holding: Holding,
        siblings: Siblings | None,
        *,
        log: Callable[[str, str], None],
    ) -> None:
        self._log = log
        self._events = events
        self._holding = holding
        self._siblings = siblings

    def fork(self, data: VmForkData) -> Steps:
        vm = self._holding.running_vm()
        vm_config = self._holding.created_config()
        if vm.state not in (VmState.RUNNING, VmState.PAUSED):
            raise api_error.VmForkFailed from api_error.NotMigratable(vm.state.value)
        if self._siblings is None:
            raise api_error.VmForkFailed from NoSiblings()
        litter = contextlib.ExitStack()
        base: Base | None = None
        try:
            clones: list[Clone] = yield partial(_prepare, data, vm_config, self._siblings, litter)
            overlays: dict[str, str] = yield partial(_own_paths, data.directory, vm_config)
            self._events.emit("vm", "forking", is_ours=True)
            base = yield partial(_take_base, vm.machine.fork, overlays)
            self._holding.vm_config = on_overlays(vm_config, overlays)
            record = decode_record(encode_record(vm))
            yield partial(_bring_up, clones, base, record, resume=data.resume)
        except Exception:
            yield Cleanup(litter.close)
            if base is not None:
                yield Cleanup(base.close)  # no clone reads it any more
                yield from self._take_back(vm, base, vm_config, dict(overlays))
            raise
        self._events.emit("vm", "forked", {"count": str(len(clones))}, is_ours=True)
        return VmForkResponse(
            clones=[clone.vm for clone in clones],
            pause_ms=round(base.stood_still_s * 1000, 3),
            disks=overlays,
        )

    def _take_back(self, vm: Vm, base: Base, before: VmConfig, overlays: dict[str, str]) -> Steps:
        """Have the VM in the images that it had before; where that fails it goes on as it is."""
        try:
            yield Cleanup(partial(_rejoin, vm.machine.take_back, base, overlays))
        except EngineError as error:
            self._holding.vm_config = on_overlays(before, overlays)
            names = ", ".join(overlays)
            self._log("warn", f"Disks stay in their new images ({names}): {': '.join(error_chain(error))}")
        else:
            self._holding.vm_config = before
        return Empty()


def _prepare(
    data: VmForkData, parent: VmConfig, siblings: Siblings, litter: contextlib.ExitStack
) -> list[Clone]:
    """Return the clones to be, each with its folder and its VMM, which `litter` takes back."""
    try:
        wanted = clones_of(data)
        check_forkable(parent)
    except ValidationError as error:
        raise api_error.ConfigValidation from error
    try:
        if not os.path.isdir(data.directory):
            raise NoOverlayDirectory(data.directory)
        directory = os.path.abspath(data.directory)
        clones = [_plan(each, directory, parent, litter) for each in wanted]
    except (ForkError, NoOverlayDirectory, ValueError) as error:
        raise api_error.VmForkFailed from error
    for clone in clones:
        try:
            clone.sibling = siblings.add(clone.vm.api_socket, clone.vm.id)
        except (VmmError, OSError, ValueError) as error:
            raise api_error.VmForkFailed from _not_made(clone, error)
        litter.callback(clone.sibling.close)
    return clones


def _plan(wanted: CloneConfig, directory: str, parent: VmConfig, litter: contextlib.ExitStack) -> Clone:
    folder = _make_folder(directory, wanted.id)
    litter.callback(_remove_folder, folder)
    overlays = _paths(folder, parent)
    try:
        vm_config = _clone_config(parent, clone_patch(parent, folder, overlays), wanted)
        check_clone(vm_config, parent)
    except (ValidationError, DecodeError) as error:
        raise api_error.ConfigValidation from error
    renew_vmgenid(vm_config)
    for net in vm_config.net or ():
        net.mac = net.mac or generate_mac()
    paths = {disk.id: disk.path for disk in vm_config.disks or ()}
    return Clone(
        vm=ForkedVm(
            id=os.path.basename(folder),
            api_socket=wanted.api_socket or f"{folder}/api.sock",
            directory=folder,
        ),
        vm_config=vm_config,
        # Who overrides where a disk is has an image there.
        overlays={disk_id: path for disk_id, path in overlays.items() if paths.get(disk_id) == path},
    )


def _clone_config(parent: VmConfig, patch: dict[str, Any], wanted: CloneConfig) -> VmConfig:
    """:raises OverrideError: what is overridden is not there, or must stay.
    :raises DecodeError: the result is no configuration.
    """
    saved: dict[str, Any] = override(msgspec.json.decode(form.encode(parent)), patch)
    if wanted.overrides is not msgspec.UNSET:
        saved = override(saved, wanted.overrides)
    return form.decode_saved(msgspec.json.encode(saved), VmConfig)


def _make_folder(directory: str, clone_id: str | None) -> str:
    """Return a new folder in `directory`, called `clone_id` or by the first number that is free."""
    names = [clone_id] if clone_id is not None else (f"clone-{number}" for number in range(_MAX_NUMBER))
    for name in names:
        path = f"{directory}/{name}"
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            raise CloneFolderTaken(path) from error
        return path
    raise CloneFolderTaken(f"{directory}/{clone_id}") from FileExistsError("It exists")


def _remove_folder(path: str) -> None:
    import shutil  # nothing but a failure needs it

    shutil.rmtree(path, ignore_errors=True)


def _paths(folder: str, vm_config: VmConfig) -> dict[str, str]:
    """Return where in `folder` there are images for the disks that the guest can write, by their ids."""
    return {
        disk.id or "": f"{folder}/disk{place}.qcow2"
        for place, disk in enumerate(written_disks(vm_config))
        if not disk.vhost_user
    }


def _own_paths(directory: str, vm_config: VmConfig) -> dict[str, str]:
    """Return paths in `directory` of images that are not there yet, for the VM itself."""
    try:
        return free_paths(directory, [*_paths("", vm_config)])
    except NoOverlayDirectory as error:
        raise api_error.VmForkFailed from error


def _take_base(fork: Callable[[Mapping[str, str]], Base], overlays: Mapping[str, str]) -> Base:
    try:
        return fork(overlays)
    except EngineError as error:
        raise api_error.VmForkFailed from error


def _rejoin(take_back: Callable[[Base], None], base: Base, overlays: dict[str, str]) -> None:
    """Take the disks back; `overlays` are then those that are still there."""
    try:
        take_back(base)
    finally:
        for disk_id, path in tuple(overlays.items()):
            if not os.path.lexists(path):
                del overlays[disk_id]


def _bring_up(clones: list[Clone], base: Base, record: VmRecord, *, resume: bool) -> None:
    """Have all clones begin at `base`, side by side; it is closed then.

    No guest runs before all of them could: none has done anything where another fails, nor takes the
    processors from it.

    :raises VmForkFailed: one of them could not; the cause tells which, and why.
    """
    for clone in clones:
        try:
            for disk_id, path in clone.overlays.items():
                base.make_overlay(disk_id, path)
        except VmmError as error:
            raise api_error.VmForkFailed from _not_made(clone, error)
    _ask_all(
        clones,
        lambda clone, sibling: sibling.begin(CloneData(vm_config=clone.vm_config, record=record, base=base)),
    )
    base.close()
    if resume:
        _ask_all(clones, lambda _, sibling: sibling.resume())


def _ask_all(clones: list[Clone], ask: Callable[[Clone, Sibling], ReplyChannel]) -> None:
    """Ask the VMM of each clone for something, and wait until all have done it."""
    answers = []
    for clone in clones:
        assert clone.sibling is not None
        try:
            answers.append((clone, ask(clone, clone.sibling)))
        except VmmError as error:
            raise api_error.VmForkFailed from _not_made(clone, error)
    for clone, answer in answers:
        try:
            answer.recv(_CLONE_S)
        except VmmError as error:
            raise api_error.VmForkFailed from _not_made(clone, error)


def _not_made(clone: Clone, error: Exception) -> CloneNotMade:
    failure = CloneNotMade(clone.vm.id)
    failure.__cause__ = error
    return failure
