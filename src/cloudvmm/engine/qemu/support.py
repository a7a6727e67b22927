"""What a VmConfig may ask for that this engine cannot give yet.

Refused with its name, so that nothing in a configuration is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import NotSupportedYet


def check_supported(vm_config: VmConfig) -> None:
    """Raise the first thing in `vm_config` whose means come with a later release.

    :raises NotSupportedYet: there is one.
    """
    for missing in _missing(vm_config):
        raise NotSupportedYet(f"Not supported by this release: {missing}")


def _missing(vm: VmConfig) -> Iterator[str]:
    absent: dict[str, object] = {
        "generic vhost-user devices": vm.generic_vhost_user,
        "fs devices": vm.fs,
        "pmem devices": vm.pmem,
        "VFIO devices": vm.devices,
        "vfio-user devices": vm.user_devices,
        "vDPA devices": vm.vdpa,
        "vsock devices": vm.vsock,
        "pvmemcontrol": vm.pvmemcontrol,
        "the virtio RTC": vm.rtc,
        "the debugger stub": vm.gdb,
        "the TPM": vm.tpm,
        "ivshmem devices": vm.ivshmem,
        "the virtual IOMMU": vm.iommu,
        "NUMA nodes": vm.numa,
        "PCI segments": vm.pci_segments or (vm.platform and vm.platform.num_pci_segments > 1),
        "TDX guests": vm.platform and vm.platform.tdx,
        "SEV-SNP guests": vm.platform and vm.platform.sev_snp,
        "iommufd": vm.platform and (vm.platform.iommufd or vm.platform.iommufd_fd is not None),
        "rate limiter groups": vm.rate_limit_groups,
    }
    yield from (name for name, present in absent.items() if present)
    yield from _missing_in_cpus(vm.cpus)
    yield from _missing_in_payload(vm.payload)
    for disk in vm.disks or []:
        yield from _missing_in_disk(disk)
    for net in vm.net or []:
        yield from _missing_in_net(net)


def _missing_in_cpus(cpus: CpusConfig) -> Iterator[str]:
    if cpus.affinity:
        yield "vCPU affinity"


def _missing_in_payload(payload: PayloadConfig | None) -> Iterator[str]:
    if payload is None:
        return
    if payload.igvm is not None:
        yield "IGVM payloads"
    if payload.host_data is not None:
        yield "host data of confidential guests"
    if payload.fw_cfg_config is not None:
        yield "fw_cfg items"


def _missing_in_disk(disk: DiskConfig) -> Iterator[str]:
    if disk.vhost_user or disk.vhost_socket is not None:
        yield "vhost-user disks"
    if disk.rate_limiter_config is not None or disk.rate_limit_group is not None:
        yield "rate limits of disks"
    if disk.queue_affinity:
        yield "queue affinity of disks"


def _missing_in_net(net: NetConfig) -> Iterator[str]:
    if net.vhost_user or net.vhost_socket is not None:
        yield "vhost-user network devices"
    if net.rate_limiter_config is not None:
        yield "rate limits of network devices"
