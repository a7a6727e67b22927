"""`vm.restore`: the VM that a snapshot holds, under its old ids (reference: lifecycle.md section 13).

A clone comes into being in the same way, from memory in place of a folder.

What fails before the config is stored changes nothing; what fails later ends with nothing held at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, VmState
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError, ValidationError
from cloudvmm.config.operation import MemoryRestoreMode, RestoreConfig
from cloudvmm.config.override import OverrideError, override
from cloudvmm.config.restore import check_restore
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn
from cloudvmm.config.zone_update import ZoneUpdateError, update_zones
from cloudvmm.control.blueprint import Built, NumberedOrigin, build_vm
from cloudvmm.control.console import Consoles
from cloudvmm.control.descriptor import descriptors_of, forget
from cloudvmm.control.error import BadRecord, OtherVcpus
from cloudvmm.control.generation import renew_vmgenid
from cloudvmm.control.holding import Holding
from cloudvmm.control.overlay import (
    FrozenDisksNeedOverlays,
    NoOverlayDirectory,
    make_overlays,
    on_overlays,
    remove_overlays,
)
from cloudvmm.control.power import Power
from cloudvmm.control.record import VmRecord, decode_record
from cloudvmm.control.replacement import replace_net_fds, replace_vfio_fds
from cloudvmm.control.sibling import CloneData
from cloudvmm.control.snapshot import folder_of
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Steps
from cloudvmm.engine.base import BeginsAt, Engine, EngineError, FrozenDisk, MachineGone, Origin, SavedIn
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub
from cloudvmm.snapshot.error import OtherEngine, SnapshotError, SnapshotFileError
from cloudvmm.snapshot.folder import CONFIG_FILE, STATE_FILE, check_files, read_file
from cloudvmm.snapshot.state import SavedState, decode_state


class ConfigNotRead(SnapshotError):
    """Error deserialising VM config snapshot"""


class StateNotRead(SnapshotError):
    """Error deserialising VM state snapshot"""


class Restore:
    """`delete` is the steps of the command of that name."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        power: Power,
        *,
        delete: Callable[[], Steps],
        state_dir: str | None,
        log: Callable[[str, str], None],
    ) -> None:
        self._engine = engine
        self._events = events
        self._holding = holding
        self._power = power
        self._delete = delete
        self._state_dir = state_dir
        self._log = log

    def restore(self, data: RestoreConfig) -> Steps:
        if self._holding.vm_config is not None:
            raise api_error.VmAlreadyCreated
        folder, vm_config, unused = yield partial(_load_config, data)
        if unused:
            self._log("warn", "Ignoring unused 'net_fds' for VM restore.")
        record: VmRecord
        record, frozen = yield partial(_load_record, folder, self._engine)
        overlays: dict[str, str] = yield partial(_make_overlays, vm_config, frozen, data)
        if data.overlay_directory is not msgspec.UNSET and not overlays:
            self._log("warn", "Ignoring unused 'overlay_directory' for VM restore.")
        vm_config = on_overlays(vm_config, overlays)
        self._holding.vm_config = vm_config
        forget(data, descriptors_of(vm_config))
        try:
            return (yield from self._come_up(record, _origin(folder, data), resume=data.resume))
        except Exception:
            yield Cleanup(partial(remove_overlays, overlays))
            raise

    def begin(self, data: CloneData) -> Steps:
        """Hold what a VMM of this process has forked off."""
        if self._holding.vm_config is not None:
            raise api_error.VmAlreadyCreated
        self._holding.vm_config = data.vm_config
        return (yield from self._come_up(data.record, BeginsAt(data.base), resume=False))

    def _come_up(self, record: VmRecord, source: Origin, *, resume: bool) -> Steps:
        """Make the VM of the stored config, or forget that where it fails."""
        try:
            yield from self._power.open_consoles()
            yield from self.go_on(record, source)
            if resume:
                yield from self._power.resume()
        except Exception:
            yield from self._delete()
            raise
        return Empty()

    def go_on(self, record: VmRecord, source: Origin) -> Steps:
        """Build the machine of the stored config from its state; it stands paused."""
        stored, consoles = self._holding.created_config(), self._holding.consoles
        assert consoles is not None
        yield from self._power.enclose(readable=[source.folder] if isinstance(source, SavedIn) else [])
        self._events.emit("vm", "restoring")
        built: Built = yield partial(
            _build,
            self._engine,
            stored,
            consoles,
            self._state_dir,
            record,
            source,
            self._holding.debugger_fd,
            partial(self._log, "warn"),
        )
        self._holding.vm_config = built.vm_config
        vm = Vm(built.machine, built.numbering, built.vm_config)
        record.give_sizes(vm)
        vm.state = VmState.PAUSED
        self._holding.take_vm(vm)
        self._holding.promise()
        if vm.exit_reason is not None:
            raise api_error.DeviceManager from MachineGone(vm.exit_reason)
        self._events.emit("vm", "restored")
        return Empty()


def _origin(folder: str, data: RestoreConfig) -> SavedIn:
    return SavedIn(
        folder,
        is_on_demand=data.memory_restore_mode is MemoryRestoreMode.ON_DEMAND,
        has_prefault=data.prefault,
    )


def _build(
    engine: Engine,
    stored: VmConfig,
    consoles: Consoles,
    state_dir: str | None,
    record: VmRecord,
    source: Origin,
    debugger_fd: int | None,
    warn: Warn,
) -> Built:
    try:
        record.check_vcpus(stored.cpus.boot_vcpus)
    except OtherVcpus as error:
        raise api_error.VmRestoreFailed from _caused(api_error.MigratableRestore(), error)
    try:
        origin = NumberedOrigin(record.numbering(engine.info), source, record.ram)
    except EngineError as error:
        raise api_error.DeviceManager from error
    return build_vm(engine, stored, consoles, state_dir, origin=origin, debugger_fd=debugger_fd, warn=warn)


def _load_config(data: RestoreConfig) -> tuple[str, VmConfig, list[str]]:
    """Return the snapshot's folder, its config with everything replaced, and nets that need nothing."""
    try:
        folder = folder_of(data.source_url)
        vm_config = _read_config(folder, data.overrides)
    except api_error.MigratableError as error:
        raise api_error.VmRestoreFailed from error
    except OverrideError as error:
        raise api_error.ConfigValidation from error
    try:
        unused = check_restore(data, vm_config)
    except ValidationError as error:
        raise api_error.ConfigValidation from error
    renew_vmgenid(vm_config)
    replace_net_fds(vm_config, data.net_fds)
    replace_vfio_fds(vm_config, data.vfio_fds, data.iommufd_fd)
    try:
        update_zones(vm_config, data.zone_updates)
    except ZoneUpdateError as error:
        raise api_error.ApplyMemoryZoneUpdate from error
    return folder, vm_config, unused


def _read_config(folder: str, overrides: dict[str, Any] | msgspec.UnsetType) -> VmConfig:
    """:raises OverrideError: `overrides` do not fit what was saved."""
    try:
        raw = read_file(folder, CONFIG_FILE)
        if overrides is not msgspec.UNSET:
            form.decode_saved(raw, VmConfig)  # whose fault it is
            raw = msgspec.json.encode(override(msgspec.json.decode(raw), overrides))
        return form.decode_saved(raw, VmConfig)
    except SnapshotError as error:
        raise api_error.MigratableReceive from error
    except DecodeError as error:
        raise api_error.MigratableReceive from _caused(ConfigNotRead(), error)


def _make_overlays(vm_config: VmConfig, frozen: dict[str, FrozenDisk], data: RestoreConfig) -> dict[str, str]:
    try:
        return make_overlays(vm_config, frozen, data.overlay_directory)
    except (FrozenDisksNeedOverlays, NoOverlayDirectory, EngineError) as error:
        raise api_error.VmRestoreFailed from _caused(api_error.MigratableRestore(), error)


def _load_record(folder: str, engine: Engine) -> tuple[VmRecord, dict[str, FrozenDisk]]:
    try:
        state = _read_state(folder)
        name = engine.info.name
        if state.engine.name != name:
            raise OtherEngine(state.engine.name, name)
        check_files(folder, state.files)
        return decode_record(state.vm), state.frozen_disks
    except (SnapshotError, BadRecord, EngineError) as error:
        raise api_error.VmRestoreFailed from _caused(api_error.MigratableReceive(), error)


def _read_state(folder: str) -> SavedState:
    raw = read_file(folder, STATE_FILE)
    try:
        return decode_state(raw)
    except SnapshotFileError:
        raise
    except SnapshotError as error:
        raise StateNotRead from error


def _caused(error: VmmError, cause: VmmError) -> VmmError:
    error.__cause__ = cause
    return error
