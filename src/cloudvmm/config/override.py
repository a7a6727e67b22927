"""What a restore changes of the configuration that was saved: its JSON is patched, as if edited by hand.

Objects are changed member by member, and null takes a member away (RFC 7396). Devices are told by their `id`.
Whether the result is a configuration is found out where it is decoded.
"""

from __future__ import annotations

from typing import Any, Final

from cloudvmm.config.error import ValidationError

# Where a VM's files, sockets and interfaces are. What the guest itself was built from must stay.
MEMBERS: Final = (
    *("payload", "disks", "net", "rng", "balloon", "fs", "generic_vhost_user", "pmem", "serial", "console"),
    *("debug_console", "devices", "user_devices", "vdpa", "vsock", "tpm", "ivshmem", "rate_limit_groups"),
)


class OverrideError(ValidationError):
    """Root of what is wrong with the overrides of a restore."""


class OverrideNotAllowed(OverrideError):
    def __init__(self, member: str) -> None:
        super().__init__(f"'{member}' of a saved VM cannot be overridden")


class OverrideOfUnknownDevice(OverrideError):
    def __init__(self, member: str, device_id: str) -> None:
        super().__init__(f"The saved VM has no device '{device_id}' in '{member}' that could be overridden")


class OverrideWithoutId(OverrideError):
    def __init__(self, member: str) -> None:
        super().__init__(f"Overrides of '{member}' are a list of objects with the id of a device")


def override(saved: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration `saved`, decoded JSON, with `overrides`. Neither is changed.

    :raises OverrideError: they are of no device that was saved, or of what must stay.
    """
    changed = dict(saved)
    for member, value in overrides.items():
        if member not in MEMBERS:
            raise OverrideNotAllowed(member)
        before = saved.get(member)
        if isinstance(before, list) or (isinstance(value, list) and before is None):
            changed[member] = _with_devices(member, before or [], value)
        elif value is None:
            raise OverrideNotAllowed(member)  # a device that the guest has
        else:
            changed[member] = _patched(before, value)
    return changed


def _with_devices(member: str, saved: list[Any], overrides: Any) -> list[Any]:
    if not isinstance(overrides, list):
        raise OverrideWithoutId(member)
    patches: dict[str, dict[str, Any]] = {}
    for patch in overrides:
        if not isinstance(patch, dict) or not isinstance(patch.get("id"), str) or patch["id"] in patches:
            raise OverrideWithoutId(member)
        patches[patch["id"]] = patch
    changed = [_patched(device, patches.pop(_id_of(device), {})) for device in saved]
    for device_id in patches:
        raise OverrideOfUnknownDevice(member, device_id)
    return changed


def _id_of(device: Any) -> str:
    return str(device.get("id", "")) if isinstance(device, dict) else ""


def _patched(before: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(before) if isinstance(before, dict) else {}
    for member, value in patch.items():
        if value is None:
            result.pop(member, None)
        else:
            result[member] = _patched(result.get(member), value)
    return result
