"""`vm.snapshot`: the VM into a folder, whole or not at all; it stays paused (reference: lifecycle.md 12)."""

from __future__ import annotations

import os
from functools import partial

import msgspec

from cloudvmm import __version__
from cloudvmm.api import error as api_error
from cloudvmm.api.data import DeviceTree, Empty, SnapshotPhase, VmState
from cloudvmm.config import form
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.holding import Holding
from cloudvmm.control.record import encode_record
from cloudvmm.control.saving import Saving
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Steps
from cloudvmm.engine.base import Engine, EngineError
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

    def snapshot(self, destination_url: str) -> Steps:
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
            yield from self._write(vm, vm_config, destination_url, saving)
            is_done = True
        finally:
            saving.end(is_done=is_done)
        return Empty()

    def _write(self, vm: Vm, vm_config: VmConfig, destination_url: str, saving: Saving) -> Steps:
        try:
            draft: Draft = yield partial(_begin, destination_url)
        except api_error.MigratableSend as error:
            raise api_error.VmSnapshotSendFailed from error
        try:
            yield from self._save(vm, draft, saving)
            self._events.emit("vm", "snapshotted")
            describe = partial(_describe, self._engine, encode_record(vm), vm.tree)
            config = form.encode(vm_config)
            try:
                yield partial(_publish, draft, config, describe)
            except api_error.MigratableSend as error:
                raise api_error.VmSnapshotSendFailed from error
        finally:
            yield Cleanup(draft.discard)
        return Empty()

    def _save(self, vm: Vm, draft: Draft, saving: Saving) -> Steps:
        try:
            yield partial(vm.machine.save, draft.folder, saving.note_saved)
            saving.enter(SnapshotPhase.COMPLETING)
        except (EngineError, api_error.SnapshotCancelled) as error:
            failure = api_error.MigratableSnapshot()
            failure.__cause__ = error
            raise api_error.VmSnapshotFailed from failure
        return Empty()


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


def _publish(draft: Draft, config: bytes, describe: partial[SavedState]) -> None:
    try:
        draft.publish(config, describe)
    except SnapshotError as error:
        raise api_error.MigratableSend from error


def _describe(
    engine: Engine, record: msgspec.Raw, tree: DeviceTree, files: dict[str, SavedFile]
) -> SavedState:
    info = engine.info
    return SavedState(
        program=f"cloudvmm {__version__}",
        engine=SavedEngine(name=info.name, version=info.version),
        vm=record,
        device_tree=dict(tree),
        files=files,
    )
