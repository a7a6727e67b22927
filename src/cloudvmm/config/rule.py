"""All rules about a configuration, in the reference's order: the first one broken is the answer.

The rules of one resource are beside its struct; here is only their order and what spans resources.
Checks of the host (does the image exist, is there memory enough) are not rules; they belong to boot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from cloudvmm.config.confidential import check_confidential
from cloudvmm.config.console import check_console_file, warn_of_shared_terminal
from cloudvmm.config.cpu import check_topology, check_vcpu_count
from cloudvmm.config.device import (
    check_balloon_size,
    check_fs,
    check_generic_vhost_user,
    check_ivshmem,
    check_tpm,
    check_unbehind_iommu,
    check_user_devices,
    check_vfio_device,
    check_vsock_cid,
)
from cloudvmm.config.disk import check_disk
from cloudvmm.config.error import DuplicateDevicePath
from cloudvmm.config.identifier import claim_identifier
from cloudvmm.config.landlock import check_landlock_rule
from cloudvmm.config.memory import check_memory
from cloudvmm.config.net import check_net
from cloudvmm.config.numa import check_numa
from cloudvmm.config.payload import settle_payload
from cloudvmm.config.pci import PciDevice, check_pci_device, check_pci_segment
from cloudvmm.config.platform import check_platform
from cloudvmm.config.rate_limit import check_rate_limit_group
from cloudvmm.config.vhost_user import check_shared_memory
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard

D = TypeVar("D", bound=PciDevice)


def validate(vm: VmConfig, warn: Warn = unheard) -> set[str]:
    """Check every rule and return the identifiers that the user gave.

    Changes `vm` in two ways: a firmware payload loses its command line and initramfs, and `iommu`
    becomes true where a device or the platform asks for one. What is allowed and perhaps not meant goes to
    `warn`.

    :raises ValidationError: the first rule broken; `vm` may have lost the two members above.
    """
    claimed: set[str] = set()
    settle_payload(vm.payload, warn)
    check_confidential(vm)
    warn_of_shared_terminal(vm.console, vm.serial, vm.debug_console, warn)
    check_console_file(vm.console)
    check_console_file(vm.serial)
    check_vcpu_count(vm.cpus)
    _check_storage_and_network(vm, claimed)
    _check_devices(vm.pmem, vm, claimed)
    _check_devices(_present(vm.rng, vm.rtc, vm.console), vm, claimed)
    check_topology(vm.cpus)
    check_memory(vm.memory)
    check_user_devices(vm)
    _check_devices(vm.user_devices, vm, claimed, check=check_unbehind_iommu)
    _check_devices(vm.vdpa, vm, claimed)
    _check_passthrough_and_singletons(vm, claimed)
    check_numa(vm)
    _check_platform(vm, claimed)
    vm.iommu |= _needs_iommu(vm)
    return claimed


def _check_storage_and_network(vm: VmConfig, claimed: set[str]) -> None:
    for group in vm.rate_limit_groups or ():
        check_rate_limit_group(group)
        claim_identifier(claimed, group.id)
    _check_devices(vm.disks, vm, claimed, check=check_disk)
    _check_devices(vm.net, vm, claimed, check=check_net)
    if vm.fs:
        check_shared_memory(vm.memory)
        _check_devices(vm.fs, vm, claimed, check=check_fs)
    if vm.generic_vhost_user:
        check_shared_memory(vm.memory)
        _check_devices(vm.generic_vhost_user, vm, claimed, check=check_generic_vhost_user)


def _check_passthrough_and_singletons(vm: VmConfig, claimed: set[str]) -> None:
    if vm.vsock is not None:
        check_vsock_cid(vm.vsock)
    if vm.balloon is not None:
        _check_devices([vm.balloon], vm, claimed)
        check_balloon_size(vm.balloon, vm)
    paths: set[str] = set()
    for device in vm.devices or ():
        if device.path is not None:
            if device.path in paths:
                raise DuplicateDevicePath(device.path)
            paths.add(device.path)
        _check_devices([device], vm, claimed, check=check_vfio_device)
    _check_devices(_present(vm.vsock), vm, claimed)


def _check_platform(vm: VmConfig, claimed: set[str]) -> None:
    for zone in vm.memory.zones or ():
        claim_identifier(claimed, zone.id)
    for segment in vm.pci_segments or ():
        check_pci_segment(segment, vm)
    if vm.platform is not None:
        check_platform(vm.platform)
    if vm.tpm is not None:
        check_tpm(vm.tpm)
    for rule in vm.landlock_rules or ():
        check_landlock_rule(rule)
    if vm.ivshmem is not None:
        _check_devices([vm.ivshmem], vm, claimed, check=check_ivshmem)


def _check_devices(
    devices: Iterable[D] | None,
    vm: VmConfig,
    claimed: set[str],
    *,
    check: Callable[[D, VmConfig], None] = check_pci_device,
) -> None:
    for device in devices or ():
        check(device, vm)
        claim_identifier(claimed, device.id)


def _present(*devices: PciDevice | None) -> list[PciDevice]:
    return [device for device in devices if device is not None]


def _needs_iommu(vm: VmConfig) -> bool:
    if vm.platform is not None and vm.platform.iommu_segments is not None:
        return True
    groups: tuple[Iterable[PciDevice] | None, ...] = (
        vm.disks,
        vm.net,
        vm.pmem,
        vm.vdpa,
        vm.devices,
        _present(vm.rng, vm.rtc, vm.console, vm.balloon, vm.vsock),
    )
    return any(device.iommu for group in groups for device in group or ())
