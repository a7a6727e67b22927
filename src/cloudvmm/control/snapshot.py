"""`vm.snapshot`: the VM into a folder, whole or not at all; it stays paused (reference: lifecycle.md 12)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import msgspec

from cloudvmm import __version__
from cloudvmm.api import error as api_error
from cloudvmm.api.data import DeviceTree, Empty, SnapshotPhase, VmState
from cloudvmm.config import form
from cloudvmm.config.operation import VmSnapshotConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.holding import Holding
from cloudvmm.control.overlay import NoOverlayDirectory, free_paths, on_overlays, written_disks
from cloudvmm.control.record import encode_record
from cloudvmm.control.saving import Saving
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Steps
from cloudvmm.engine.base import Engine, EngineError, FrozenDisk, Machine
from cloudvmm.events.hub import EventHub
from cloudvmm.snapshot.draft import Draft
from cloudvmm.snapshot.error import SnapshotError
from cloudvmm.snapshot.folder import rust_quoted
from cloudvmm.snapshot.state import SavedEngine, SavedFile, SavedState

FILE_URL = "file://"


class Snapshot:
    """`holding` is the state that the steps work on."""

    def __init__(self, engine: Engine, events: EventHub, holding: Holding) -> None:
        self._engine = engine
        self._events = events
        self._holding = holding

    def snapshot(self, data: VmSnapshotConfig) -> Steps:
        vm = self._holding.running_vm()
        vm_config = self._holding.created_config()
        self._events.emit("vm", "snapshotting")
        try:
            if vm.state is not VmState.PAUSED:
                raise api_error.MigratableSnapshot from api_error.SnapshotOfRunningVm()
        except api_error.MigratableSnapshot as error:
            raise api_error.VmSnapshotFailed from error
        self._holding.saving = saving = Saving()
        is_done = False
        try:
            yield from self._write(vm, vm_config, data, saving)
            is_done = True
        finally:
            saving.end(is_done=is_done)
        return Empty()

    def _write(self, vm: Vm, vm_config: VmConfig, data: VmSnapshotConfig, saving: Saving) -> Steps:
        try:
            draft: Draft = yield partial(_begin, data.destination_url)
        except api_error.MigratableSend as error:
            raise api_error.VmSnapshotSendFailed from error
        disks = _Disks(vm.machine)
        try:
            try:
                yield partial(disks.look_at, vm_config, data.overlay_directory)
                yield partial(vm.machine.save, draft.folder, saving.note_saved)
                saving.enter(SnapshotPhase.COMPLETING)
                self._events.emit("vm", "snapshotted")
                describe = partial(_describe, self._engine, encode_record(vm), vm.tree, disks.frozen)
                yield partial(_publish, draft, form.encode(vm_config), describe, disks.freeze)
            except api_error.MigratableSend as error:
                raise api_error.VmSnapshotSendFailed from error
            except (EngineError, NoOverlayDirectory, api_error.SnapshotCancelled) as error:
                failure = api_error.MigratableSnapshot()
                failure.__cause__ = error
                raise api_error.VmSnapshotFailed from failure
        finally:
            if disks.are_frozen:  # whatever became of the snapshot
                self._holding.vm_config = on_overlays(vm_config, disks.overlays)
            yield Cleanup(draft.discard)
        return Empty()


class _Disks:
    """Those that are to be a part of the snapshot, if they are. Both methods block."""

    def __init__(self, machine: Machine) -> None:
        self.frozen: dict[str, FrozenDisk] = {}
        self.overlays: dict[str, str] = {}
        self.are_frozen = False
        self._machine = machine

    def look_at(self, vm_config: VmConfig, directory: str | msgspec.UnsetType) -> None:
        """Find out what there is to freeze, and where the VM is to go on."""
        if directory is not msgspec.UNSET:
            disk_ids = [disk.id or "" for disk in written_disks(vm_config)]
            self.overlays = free_paths(directory, disk_ids)
            self.frozen = self._machine.frozen_disks(disk_ids)

    def freeze(self) -> None:
        if self.overlays:
            self._machine.freeze_disks(self.overlays)
            self.are_frozen = True


def folder_of(url: str) -> str:
    """Return the folder that a `file://` URL names.

    :raises MigratableSend: it is no such URL, or there is no such folder. (The reference says so also where
        nothing is to be sent.)
    """
    path = url.removeprefix(FILE_URL)
    if not url.startswith(FILE_URL):
        raise api_error.MigratableSend from api_error.UrlWithoutPath(url)
    if not _is_folder(path):
        raise api_error.MigratableSend from api_error.NotASnapshotDirectory(rust_quoted(path))
    return path


def _is_folder(path: str) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError:  # a NUL in it
        return False


def _begin(destination_url: str) -> Draft:
    try:
        return Draft(folder_of(destination_url))
    except SnapshotError as error:
        raise api_error.MigratableSend from error


def _publish(
    draft: Draft, config: bytes, describe: partial[SavedState], before_names: Callable[[], None]
) -> None:
    try:
        draft.publish(config, describe, before_names)
    except SnapshotError as error:
        raise api_error.MigratableSend from error


def _describe(
    engine: Engine,
    record: msgspec.Raw,
    tree: DeviceTree,
    frozen: dict[str, FrozenDisk],
    files: dict[str, SavedFile],
) -> SavedState:
    info = engine.info
    return SavedState(
        program=f"cloudvmm {__version__}",
        engine=SavedEngine(name=info.name, version=info.version),
        vm=record,
        device_tree=dict(tree),
        files=files,
        frozen_disks=frozen,
    )
