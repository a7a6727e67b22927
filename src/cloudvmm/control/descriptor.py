"""File descriptors that came with a command: whose they are, and when they are closed.

They belong to the VMM from the moment the request is sent. What a stored config holds lives as long as the
config; everything else is closed when its command has ended.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import RestoreConfig, VmReceiveMigrationData
from cloudvmm.config.vm import VmConfig


def descriptors_of(data: Any) -> set[int]:
    """Return the descriptors that a command's data, or a stored config, holds."""
    match data:
        case None | VmConfig(net=None, devices=None, platform=None):
            return set()  # most requests, and most configs
        case NetConfig(fds=fds):
            found = set(fds or ())
        case DeviceConfig(fd=fd):
            found = {-1 if fd is None else fd}
        case VmConfig():
            members = [*(data.net or ()), *(data.devices or ())]
            found = set().union(*map(descriptors_of, members)) if members else set()
            if data.platform is not None and data.platform.iommufd_fd is not None:
                found.add(data.platform.iommufd_fd)
        case RestoreConfig() | VmReceiveMigrationData():
            found = {fd for net in data.net_fds or () for fd in net.fds or ()}
            found |= {-1 if vfio.fd is None else vfio.fd for vfio in data.vfio_fds or ()}
            found.add(-1 if data.iommufd_fd is None else data.iommufd_fd)
        case _:
            found = set()
    return {fd for fd in found if fd >= 0}


def close_descriptors(fds: set[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def forget(data: RestoreConfig | VmReceiveMigrationData, fds: set[int]) -> None:
    """Take `fds` out of `data`: they belong to a stored config now, which closes them in its time."""
    for net in data.net_fds or ():
        net.fds = [fd for fd in net.fds or () if fd not in fds]
    for vfio in data.vfio_fds or ():
        vfio.fd = None if vfio.fd in fds else vfio.fd
    data.iommufd_fd = None if data.iommufd_fd in fds else data.iommufd_fd


def release(data: Any, kept_by: VmConfig | None) -> None:
    """Close the descriptors of `data` that `kept_by` does not hold."""
    if fds := descriptors_of(data):
        close_descriptors(fds - descriptors_of(kept_by))
