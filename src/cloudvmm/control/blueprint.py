"""From a stored config to a machine: check, complete, number, build. Runs on the worker."""

from __future__ import annotations

import copy

import msgspec

from cloudvmm.api.error import ConfigValidation, DeviceManager, KernelLoad, LockingError, VmError
from cloudvmm.config.disk import ImageType
from cloudvmm.config.error import ValidationError
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.console import Consoles
from cloudvmm.control.numbering import NoFreeSlot, Numbering, SlotTaken, number_devices
from cloudvmm.engine.base import Engine, EngineError, ImageLocked, Machine, MachineSpec, PayloadError


class Built(msgspec.Struct, frozen=True):
    """A machine with no vCPU running, and the completed config that it was built from."""

    vm_config: VmConfig
    numbering: Numbering
    machine: Machine


def build_vm(engine: Engine, stored: VmConfig, consoles: Consoles, state_dir: str | None) -> Built:
    """Blocking. Leave `stored` as it is; on failure nothing is left behind.

    :raises ConfigValidation: a rule of the configuration is broken.
    :raises DeviceManager: a device could not be made, or the machine not be built.
    """
    vm_config = copy.deepcopy(stored)
    try:
        used_ids = validate(vm_config)
    except ValidationError as error:
        raise ConfigValidation from error
    try:
        info = engine.info
        numbering = number_devices(vm_config, used_ids, info.first_slot, info.last_slot)
        serial, console, debug_console = consoles.sinks()
        machine = engine.build(
            MachineSpec(
                vm_config=vm_config,
                slots=numbering.slots,
                serial=serial,
                console=console,
                debug_console=debug_console,
                state_dir=state_dir,
            )
        )
    except (NoFreeSlot, SlotTaken, EngineError) as error:
        raise DeviceManager from error
    _write_image_types(vm_config, machine)
    return Built(vm_config, numbering, machine)


def _write_image_types(vm_config: VmConfig, machine: Machine) -> None:
    """Write what the images were found to be; an image that was not declared follows no backing file."""
    for disk in vm_config.disks or []:
        found = machine.image_types.get(disk.id or "")
        if disk.image_type is ImageType.UNKNOWN and found is not None:
            disk.image_type = found
            disk.backing_files = disk.backing_files and found is not ImageType.QCOW2


def final_step_error(error: EngineError) -> VmError:
    """Name what went wrong in the last step of a boot as the reference does."""
    if isinstance(error, ImageLocked):
        return LockingError()
    if isinstance(error, PayloadError):
        return KernelLoad()
    return DeviceManager()
