"""The VM generation id: which of the VMs it is that began as the same guest.

It stays with a VM through reboots and migrations. Whatever begins where another stood, from a snapshot or by
a fork, has one of its own; the engine has its guest notice.
"""

from __future__ import annotations

import os

from cloudvmm.config.platform import NEW_VMGENID
from cloudvmm.config.vm import VmConfig

_VERSION = 0x4000_8000_0000_0000_0000  # a random one, of RFC 9562
_VERSION_MASK = 0xF000_C000_0000_0000_0000


def settle_vmgenid(vm_config: VmConfig) -> None:
    """Give `vm_config` (changed in place) an id where it asks for a new one."""
    if vm_config.platform is not None and vm_config.platform.vmgenid == NEW_VMGENID:
        vm_config.platform.vmgenid = _generate()


def renew_vmgenid(vm_config: VmConfig) -> None:
    """Give `vm_config` (changed in place) another id where it has one."""
    if vm_config.platform is not None and vm_config.platform.vmgenid is not None:
        vm_config.platform.vmgenid = _generate()


def _generate() -> str:
    digits = f"{int.from_bytes(os.urandom(16)) & ~_VERSION_MASK | _VERSION:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
