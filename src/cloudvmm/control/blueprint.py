"""From a stored config to a machine: check, complete, number, build. Runs on the worker."""

from __future__ import annotations

import copy
import os
from typing import TypeVar

import msgspec

from cloudvmm.api.error import (
    ConfigValidation,
    CpuManager,
    DeviceManager,
    KernelLoad,
    LockingError,
    MemoryManager,
    MigratableRestore,
    VmRestoreFailed,
)
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.error import ValidationError
from cloudvmm.config.memory import HotplugMethod
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.control.condition import check_devices, check_memory, check_numa, check_vcpus
from cloudvmm.control.console import Consoles
from cloudvmm.control.error import (
    BadSlots,
    DeviceRefused,
    FirmwareFile,
    InitramfsFile,
    KernelFile,
    PayloadFileError,
    RamRefused,
    UnknownDevices,
    VcpusRefused,
)
from cloudvmm.control.generation import settle_vmgenid
from cloudvmm.control.numbering import Numbering, device_ids, number_devices
from cloudvmm.control.ram import Ram
from cloudvmm.engine.base import (
    Engine,
    EngineError,
    EngineInfo,
    ImageLocked,
    LinkLost,
    Machine,
    MachineSpec,
    Origin,
    PayloadError,
    RamError,
    StateError,
    device_number,
    is_slot,
)
from cloudvmm.errors import VmmError

Outer = TypeVar("Outer", bound=VmmError)


class Built(msgspec.Struct, frozen=True):
    """A machine with no vCPU running, and the completed config that it was built from."""

    vm_config: VmConfig
    numbering: Numbering
    machine: Machine


class NumberedOrigin(msgspec.Struct, frozen=True):
    """A machine's state to go on from, how its devices were numbered, and what RAM it has."""

    numbering: Numbering
    source: Origin
    ram: Ram


def build_vm(
    engine: Engine,
    stored: VmConfig,
    consoles: Consoles,
    state_dir: str | None,
    *,
    origin: NumberedOrigin | None = None,
    debugger_fd: int | None = None,
    warn: Warn = unheard,
) -> Built:
    """Blocking. Leave `stored` as it is; on failure nothing is left behind.

    With `origin` the machine goes on, paused, where that one stood; devices keep ids and slots. Debuggers
    are served on `debugger_fd`, which is lent.

    :raises VmError: as `check_config`.
    :raises CpuManager: the engine cannot give so many vCPUs.
    :raises MemoryManager: the host cannot give the memory.
    :raises DeviceManager: a device could not be made, or the machine not be built.
    :raises InitramfsFile: the guest that is to start has none.
    :raises VmRestoreFailed: what `origin` gives is not the state of such a machine.
    :raises LockingError: another process holds an image of a machine that goes on.
    """
    vm_config = copy.deepcopy(stored)
    used_ids = check_config(vm_config, warn)
    try:
        info = engine.info
    except EngineError as error:
        raise DeviceManager from error
    try:
        check_vcpus(vm_config, info.max_vcpus)
    except VcpusRefused as error:
        raise CpuManager from error
    try:
        if origin is None:
            settle_vmgenid(vm_config)
            numbering = number_devices(vm_config, used_ids, info.first_slot, info.last_slot)
        else:
            numbering = origin.numbering
            check_numbering(numbering, device_ids(vm_config, used_ids), info)
        check_devices(vm_config)
        machine = _build_machine(
            engine, vm_config, numbering, consoles, state_dir, origin=origin, debugger_fd=debugger_fd
        )
    except (StateError, LinkLost, UnknownDevices, BadSlots) as error:
        raise VmRestoreFailed from _chained(MigratableRestore(), error)
    except ImageLocked as error:
        raise (DeviceManager if origin is None else LockingError) from error
    except RamError as error:
        raise MemoryManager from error
    except (DeviceRefused, EngineError) as error:
        raise DeviceManager from error
    if origin is None:
        _check_initramfs(vm_config.payload, machine)
    for disk in vm_config.disks or []:
        write_image_type(disk, machine)
    return Built(vm_config, numbering, machine)


def check_numbering(numbering: Numbering, ids: list[str], info: EngineInfo) -> None:
    """Look whether devices called `ids` can go on under `numbering`, which comes from outside.

    :raises UnknownDevices: one has no place in it.
    :raises BadSlots: a place is none that the engine has, or is given twice.
    """
    unknown = sorted(set(ids) - set(numbering.slots))
    if unknown:
        raise UnknownDevices(unknown)
    taken = list(numbering.slots.values())
    are_possible = all(
        is_slot(slot, info.first_slot, info.last_slot) and device_number(slot) in taken for slot in taken
    )
    if not are_possible or len(set(taken)) != len(taken):
        raise BadSlots


def _chained(error: Outer, cause: VmmError) -> Outer:
    error.__cause__ = cause
    return error


def check_config(vm_config: VmConfig, warn: Warn = unheard) -> set[str]:
    """Check what is asked for before anything is made, in the reference's order; return the ids given.

    Completes `vm_config` as `config.rule.validate` does.

    :raises MemoryManager: its memory cannot be. This wins over a rule that is broken.
    :raises ConfigValidation: a rule is broken.
    :raises InvalidNumaNodes: its NUMA nodes cannot be.
    """
    try:
        check_memory(vm_config.memory)
    except RamRefused as error:
        raise MemoryManager from error
    try:
        used_ids = validate(vm_config, warn)
    except ValidationError as error:
        raise ConfigValidation from error
    check_numa(vm_config)
    return used_ids


def _build_machine(
    engine: Engine,
    vm_config: VmConfig,
    numbering: Numbering,
    consoles: Consoles,
    state_dir: str | None,
    *,
    origin: NumberedOrigin | None,
    debugger_fd: int | None,
) -> Machine:
    serial, console, debug_console = consoles.sinks()
    return engine.build(
        MachineSpec(
            vm_config=vm_config if origin is None else _as_booted(vm_config, origin.ram),
            slots=numbering.slots,
            serial=serial,
            console=console,
            debug_console=debug_console,
            state_dir=state_dir,
            origin=None if origin is None else origin.source,
            debugger_fd=debugger_fd,
            modules=() if origin is None else tuple(origin.ram.modules),
            kept_fds=() if state_dir is None else consoles.kept_fds,
        )
    )


def _as_booted(vm_config: VmConfig, ram: Ram) -> VmConfig:
    """Return `vm_config` with the RAM that the guest found when it booted: what ACPI adds is in modules.

    :raises StateError: it says that the guest has more than there is. Less is what the next boot gives it.
    """
    memory = vm_config.memory
    if not memory.size or memory.hotplug_method is not HotplugMethod.ACPI:
        return vm_config
    if memory.size > ram.current_bytes:
        raise StateError("The state is that of a machine with less RAM")
    return msgspec.structs.replace(vm_config, memory=msgspec.structs.replace(memory, size=ram.boot_bytes))


def write_image_type(disk: DiskConfig, machine: Machine) -> None:
    """Write what the image was found to be; an image that was not declared follows no backing file."""
    found = machine.image_types.get(disk.id or "")
    if disk.image_type is ImageType.UNKNOWN and found is not None:
        disk.image_type = found
        disk.backing_files = disk.backing_files and found is not ImageType.QCOW2


def _check_initramfs(payload: PayloadConfig | None, machine: Machine) -> None:
    """Close `machine` where its guest has no initramfs. The reference looks when all devices are made."""
    try:
        _check_file(payload.initramfs if payload is not None else None, InitramfsFile)
    except InitramfsFile:
        machine.close()
        raise


def final_step_error(error: EngineError, payload: PayloadConfig | None) -> VmmError:
    """Blocking. Name what went wrong in the last step of a boot as the reference does, with its cause."""
    if isinstance(error, ImageLocked):
        return _chained(LockingError(), error)
    if not isinstance(error, PayloadError):
        return _chained(DeviceManager(), error)
    try:
        if payload is not None:
            _check_file(payload.firmware, FirmwareFile)
            _check_file(payload.kernel, KernelFile)
    except PayloadFileError as refusal:
        return refusal
    # A kind of its own has the reference's words; what QEMU or the fake says by itself needs them before it.
    return _chained(KernelLoad(), error) if type(error) is PayloadError else error


def _check_file(path: str | None, kind: type[PayloadFileError]) -> None:
    if path is None:
        return
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except (OSError, ValueError) as error:
        raise kind from error
