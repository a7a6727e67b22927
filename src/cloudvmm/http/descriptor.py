"""File descriptors that came with a request: into which member of its data each goes.

The counts are checked before anything is placed, so a refused request leaves its data untouched. Placing is
not handing over: until the request is sent the descriptors belong to whoever received them.
"""

from __future__ import annotations

from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import RestoreConfig, RestoredVfioConfig, VmReceiveMigrationData
from cloudvmm.http.error import WrongDescriptorCount


def takes_at_most(kind: type | None) -> int | None:
    """Return how many descriptors a command with data of `kind` can take; None where only its data tells."""
    return 1 if kind is DeviceConfig else None


def place_descriptors(data: object, fds: list[int]) -> bool:
    """Write `fds` into `data`; return whether it takes any at all.

    :raises WrongDescriptorCount: the data wants another number of descriptors.
    """
    match data:
        case NetConfig():
            data.fds = list(fds) or None
        case DeviceConfig():
            _check_count(fds, at_most=1)
            data.fd = fds[0] if fds else None
        case RestoreConfig() | VmReceiveMigrationData():
            _place_restored(data, fds)
        case _:
            return False
    return True


def _place_restored(data: RestoreConfig | VmReceiveMigrationData, fds: list[int]) -> None:
    nets = data.net_fds or []
    net_count = sum(net.num_fds for net in nets)
    _check_count(fds, exactly=net_count + _vfio_count(data.vfio_fds))
    start = 0
    for net in nets:
        net.fds = fds[start : start + net.num_fds] or None
        start += net.num_fds
    data.iommufd_fd = _place_vfio(data.vfio_fds, fds[start:])


def _vfio_count(devices: list[RestoredVfioConfig] | None) -> int:
    return 0 if devices is None else len(devices) + 1


def _place_vfio(devices: list[RestoredVfioConfig] | None, fds: list[int]) -> int | None:
    """Give each device its descriptor; return the last one, which is the iommufd."""
    if devices is None:
        return None
    for device, fd in zip(devices, fds, strict=False):
        device.fd = fd
    return fds[-1]


def _check_count(fds: list[int], *, exactly: int | None = None, at_most: int | None = None) -> None:
    if (exactly is not None and len(fds) != exactly) or (at_most is not None and len(fds) > at_most):
        raise WrongDescriptorCount
