"""What a saved or received configuration gets anew on this host: descriptors, and the nodes of its zones.

Pure: each function changes the config that it is given, which nobody else holds yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from cloudvmm.config.operation import RestoredNetConfig, RestoredVfioConfig
from cloudvmm.config.vm import VmConfig


def replace_net_fds(vm_config: VmConfig, nets: Sequence[RestoredNetConfig] | None) -> None:
    """Give each network device that had descriptors those of the same id; others are left as they are."""
    given = {net.id: net.fds for net in nets or ()}
    for net in vm_config.net or ():
        if net.fds is not None and net.id in given:
            net.fds = given[net.id]


def replace_vfio_fds(
    vm_config: VmConfig, devices: Sequence[RestoredVfioConfig] | None, iommufd_fd: int | None
) -> None:
    """Give each VFIO device of the same id its descriptor in place of its path; the platform its iommufd."""
    if devices is None:
        return
    given = {device.id: device.fd for device in devices}
    for device in vm_config.devices or ():
        if device.id in given:
            device.path = None
            device.fd = given[device.id]
    if vm_config.platform is not None:
        vm_config.platform.iommufd_fd = iommufd_fd
