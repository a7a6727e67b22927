"""The command line of a machine, from what it is and what was opened for it. Pure.

The machine is the flat `pc`, trimmed: no SMM, no VMware port, no graphics; the keyboard controller stays,
because guests reset through it. Its version is fixed, since the state of a saved guest is tied to it. The
guest's own shutdown, reset and watchdog leave the process standing still, so that whoever watches sees
them.

Left to the caller: the binary, ``-nodefaults -no-user-config -display none``, the monitors,
``-no-shutdown`` and ``-S``.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import EngineError, MachineSpec
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.console import Stream, console_parts, debug_console_parts, serial_parts
from cloudvmm.engine.qemu.cpu import cpu_arguments
from cloudvmm.engine.qemu.device import balloon_parts, pvpanic_parts, rng_parts, watchdog_parts
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.iommu import behind_iommu, iommu_parts
from cloudvmm.engine.qemu.ivshmem import ivshmem_parts
from cloudvmm.engine.qemu.kind import describe, devices_of
from cloudvmm.engine.qemu.mapped import MappedBacking
from cloudvmm.engine.qemu.memory import RAM_ID, memory_arguments, memory_parts, module_parts
from cloudvmm.engine.qemu.numa import numa_arguments
from cloudvmm.engine.qemu.parts import Parts, has_nul, render
from cloudvmm.engine.qemu.payload import payload_arguments, starts_by_seabios
from cloudvmm.engine.qemu.platform import smbios_arguments, vmgenid_parts
from cloudvmm.engine.qemu.rate_limit import group_parts
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.tpm import TPM_ID, TpmError, TpmNeedsQboot, tpm_parts
from cloudvmm.engine.qemu.vfio import has_iommufd, iommufd_parts
from cloudvmm.engine.qemu.zone import zone_parts

MACHINE: Final = "pc-i440fx-7.2,vmport=off,smm=off"
_ACTIONS: Final = "panic=none,reboot=shutdown,watchdog=pause"


class NulCharacter(EngineError):
    """A text in the configuration holds a NUL character, which no argument can"""


def arguments(spec: MachineSpec, resources: Resources, facts: QemuFacts) -> list[str]:
    """Return the options that make `spec` out of `resources`.

    :raises EngineError: the accelerator or the machine cannot give what `spec` asks for.
    :raises NoSlot: a device has no slot in `spec`.
    """
    vm_config, memory = spec.vm_config, resources.memory
    is_elf = resources.firmware_is_elf
    by_seabios = starts_by_seabios(vm_config, facts, firmware_is_elf=is_elf)
    if vm_config.tpm is not None and by_seabios:
        raise TpmError from TpmNeedsQboot()
    result = [
        *("-machine", _machine(by_seabios=by_seabios, has_nodes=bool(memory.nodes))),
        *cpu_arguments(
            vm_config.cpus, facts.accelerator, kvm_device=facts.kvm_device, loses_writes=facts.loses_writes
        ),
        *memory_arguments(
            memory.size,
            hotplug_size=memory.hotplug_size,
            pmem_bytes=_pmem_bytes(spec, resources),
            phys_bits=vm_config.cpus.max_phys_bits,
        ),
        *("-action", _ACTIONS),
        *payload_arguments(vm_config.payload, facts, firmware_is_elf=is_elf, by_seabios=by_seabios),
        *smbios_arguments(vm_config.platform),
    ]
    made = [iommu_parts(spec, facts), *machine_parts(spec, resources, facts)]
    for parts in made:
        result += render(parts)
    result += numa_arguments(memory.nodes)
    if has_nul(result) or any(map(has_nul, made)):
        raise NulCharacter
    return result


def _machine(*, by_seabios: bool, has_nodes: bool) -> str:
    """Without graphics SeaBIOS writes to the serial port, where only a firmware of the user's should."""
    graphics = "on" if by_seabios else "off"
    memory = "" if has_nodes else f",memory-backend={RAM_ID}"
    return f"{MACHINE},graphics={graphics}{memory}"


def machine_parts(spec: MachineSpec, resources: Resources, facts: QemuFacts) -> list[Parts]:
    """Describe everything on the machine, in the order in which it is made.

    :raises NoSlot: a device has no slot in `spec`.
    """
    vcpus = spec.vm_config.cpus.boot_vcpus
    devices = _devices(spec, resources, facts)
    next_set = 1 + sum(len(each.fdsets) for each in devices)
    serial, console, debug_console = (
        None if fd is None else Stream(fd, set_id) for set_id, fd in enumerate(resources.streams, next_set)
    )
    return [
        *(
            memory_parts(ram, name=name, vcpus=vcpus, spares_files=facts.spares_files)
            for name, ram in resources.rams.items()
        ),
        *(module_parts(module, number, vcpus=vcpus) for number, module in enumerate(resources.modules)),
        *_zones(spec, resources, facts),
        serial_parts(spec, stream=serial),
        _seated(spec.vm_config.console, console_parts(spec, stream=console)),
        debug_console_parts(spec, stream=debug_console),
        group_parts(spec.vm_config.rate_limit_groups),
        iommufd_parts(spec.vm_config.platform, fd=resources.iommufd_fd),
        *devices,
        _seated(spec.vm_config.rng, rng_parts(spec, path=resources.rng_path)),
        _seated(spec.vm_config.balloon, balloon_parts(spec)),
        watchdog_parts(spec),
        pvpanic_parts(spec),
        ivshmem_parts(spec, resources.backings),
        tpm_parts(resources.backings.get(TPM_ID)),
        vmgenid_parts(spec.vm_config.platform),
    ]


def _seated(device: PciDevice | None, parts: Parts) -> Parts:
    return behind_iommu(parts) if device is not None and device.iommu else parts


def _pmem_bytes(spec: MachineSpec, resources: Resources) -> int:
    backings = [resources.backings[id_of(pmem.id)] for pmem in spec.vm_config.pmem or ()]
    return sum(backing.size for backing in backings if isinstance(backing, MappedBacking))


def _zones(spec: MachineSpec, resources: Resources, facts: QemuFacts) -> list[Parts]:
    seat, memory = Seat(slots=spec.slots, facts=facts), resources.memory
    return [zone_parts(zone, seat, node=memory.node_of(zone_id)) for zone_id, zone in resources.zones.items()]


def _devices(spec: MachineSpec, resources: Resources, facts: QemuFacts) -> list[Parts]:
    first_fdset = 1
    disks = 0
    result: list[Parts] = []
    for device in devices_of(spec.vm_config):
        disks += isinstance(device, DiskConfig)
        boot_index = disks if isinstance(device, DiskConfig) else None
        seat = Seat(
            slots=spec.slots,
            facts=facts,
            first_fdset=first_fdset,
            boot_index=boot_index,
            has_iommufd=has_iommufd(spec.vm_config.platform),
        )
        result.append(describe(device, resources.backings[id_of(device.id)], seat))
        first_fdset += len(result[-1].fdsets)
    return result
