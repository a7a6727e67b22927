"""Rules about restoring: what a restore must replace in the configuration that was saved."""

from __future__ import annotations

from collections.abc import Sequence

from cloudvmm.config.device import VfioFdRequiresIommufdFd
from cloudvmm.config.error import IdentifierNotUnique, ValidationError
from cloudvmm.config.operation import MemoryRestoreMode, RestoreConfig, RestoredNetConfig
from cloudvmm.config.platform import IommufdFdRequiresIommufd
from cloudvmm.config.vm import VmConfig


class InvalidRestorePrefaultWithOnDemand(ValidationError):
    """'prefault' cannot be combined with 'memory_restore_mode=ondemand'"""


class RestoreNetFdCountMismatch(ValidationError):
    def __init__(self, net_id: str, given: int, expected: int) -> None:
        super().__init__(
            f"Number of Net FDs passed for '{net_id}' during Restore: {given}. Expected: {expected}"
        )


class RestoreMissingRequiredNetId(ValidationError):
    def __init__(self, net_id: str) -> None:
        super().__init__(f"Net id {net_id} is associated with FDs and is required")


class MultipleMemoryZoneUpdates(ValidationError):
    """Multiple updates for the same zone defined"""


class MemoryZoneUpdatesEmptyId(ValidationError):
    """At least one memory zone update with an empty ID was defined"""


class RestoreUnknownVfioId(ValidationError):
    def __init__(self, device_id: str) -> None:
        super().__init__(
            f"VFIO device id '{device_id}' in 'vfio_fds' does not match any device in the snapshot"
        )


class RestoreMissingVfioFd(ValidationError):
    def __init__(self, device_id: str) -> None:
        super().__init__(f"VFIO device '{device_id}' was FD backed and needs a new fd in 'vfio_fds'")


def check_restore(restore: RestoreConfig, saved: VmConfig) -> list[str]:
    """Raise the first rule that `restore` breaks against the `saved` configuration.

    Returns the ids of `net_fds` entries that nothing needs, which deserve a warning.
    """
    if restore.memory_restore_mode is MemoryRestoreMode.ON_DEMAND and restore.prefault:
        raise InvalidRestorePrefaultWithOnDemand
    unused = check_net_fds(restore.net_fds or (), saved)
    _check_zone_updates(restore)
    if restore.vfio_fds:
        _check_vfio_fds(restore, saved)
    replaced = {device.id for device in restore.vfio_fds or ()}
    for device in saved.devices or ():
        if device.fd is not None and device.id not in replaced:
            raise RestoreMissingVfioFd(device.id or "")
    return unused


def check_net_fds(entries: Sequence[RestoredNetConfig], saved: VmConfig) -> list[str]:
    """Raise where a network device of `saved` gets other descriptors than it had, or an id comes twice.

    Returns the ids of `entries` that nothing needs.
    """
    given: dict[str, RestoredNetConfig] = {}
    for entry in entries:
        if entry.id in given:
            raise IdentifierNotUnique(entry.id)
        given[entry.id] = entry
    for net in saved.net or ():
        if net.fds is None:
            continue
        replacement = given.pop(net.id or "", None)
        if replacement is None:
            raise RestoreMissingRequiredNetId(net.id or "")
        if replacement.num_fds != len(net.fds):
            raise RestoreNetFdCountMismatch(replacement.id, replacement.num_fds, len(net.fds))
    return list(given)


def _check_zone_updates(restore: RestoreConfig) -> None:
    zone_ids = {update.id for update in restore.zone_updates}
    if len(zone_ids) != len(restore.zone_updates):
        raise MultipleMemoryZoneUpdates
    if "" in zone_ids:
        raise MemoryZoneUpdatesEmptyId


def _check_vfio_fds(restore: RestoreConfig, saved: VmConfig) -> None:
    if restore.iommufd_fd is None:
        raise VfioFdRequiresIommufdFd
    if saved.platform is None or not saved.platform.iommufd:
        raise IommufdFdRequiresIommufd
    seen: set[str] = set()
    for device in restore.vfio_fds or ():
        if device.id in seen:
            raise IdentifierNotUnique(device.id)
        seen.add(device.id)
    known = {device.id for device in saved.devices or ()}
    for device_id in (device.id for device in restore.vfio_fds or ()):
        if device_id not in known:
            raise RestoreUnknownVfioId(device_id)
