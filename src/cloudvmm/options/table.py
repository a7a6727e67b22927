"""Every flag that takes an option string, with its schema: the source of help, completion and reference."""

from __future__ import annotations

from typing import NamedTuple

from cloudvmm.options import console, cpu, device, disk, memory, net, operation, payload, platform, rate_limit
from cloudvmm.options.schema import Key, Schema

SCHEMAS: dict[str, Schema] = {
    "balloon": device.BALLOON,
    "console": console.CONSOLE,
    "cpus": cpu.CPUS,
    "debug-console": console.DEBUG_CONSOLE,
    "device": device.DEVICE,
    "disk": disk.DISK,
    "fs": device.FS,
    "fw-cfg-config": payload.FW_CFG_CONFIG,
    "generic-vhost-user": device.GENERIC_VHOST_USER,
    "ivshmem": device.IVSHMEM,
    "landlock-rules": platform.LANDLOCK_RULES,
    "memory": memory.MEMORY,
    "memory-zone": memory.MEMORY_ZONE,
    "net": net.NET,
    "numa": platform.NUMA,
    "pci-segment": platform.PCI_SEGMENT,
    "platform": platform.PLATFORM,
    "pmem": device.PMEM,
    "rate-limit-group": rate_limit.RATE_LIMIT_GROUP,
    "restore": operation.RESTORE,
    "rng": device.RNG,
    "rtc": device.RTC,
    "serial": console.SERIAL,
    "tpm": device.TPM,
    "user-device": device.USER_DEVICE,
    "vdpa": device.VDPA,
    "vsock": device.VSOCK,
}

OPERATIONS: dict[str, Schema] = {
    "receive-migration": operation.RECEIVE_MIGRATION,
    "restore": operation.RESTORE,
    "send-migration": operation.SEND_MIGRATION,
}
"""What commands of the remote take, beside the flags above that their `add-` commands share."""


class KeyDescription(NamedTuple):
    """One key for readers. `default` is written as in an option string; None where the key is then unset."""

    name: str
    syntax: str
    help: str
    default: str | None
    is_required: bool


def syntax(flag: str) -> str | None:
    """Describe the option string of `flag` (without dashes); None where it takes none."""
    schema = SCHEMAS.get(flag)
    return None if schema is None else schema.syntax


def describe(schema: Schema) -> list[KeyDescription]:
    """Tell about each key of `schema`, in its order, for a reference; words without a value come first."""
    words = [KeyDescription(word, word, _WORDS[word], None, is_required=False) for word in schema.flags]
    return words + [
        KeyDescription(
            name=key.name,
            syntax=key.syntax,
            help=key.help,
            default=_default_text(schema, key),
            is_required=key.is_required,
        )
        for key in schema.shown_keys
    ]


def _default_text(schema: Schema, key: Key) -> str | None:
    default = schema.default_of(key)
    if default is None or default == []:
        return None
    try:
        return key.kind.format(default) or None
    except ValueError:  # a default that only leaving the key out gives, such as the unknown image type
        return None


_WORDS = {
    "off": "No device",
    "null": "A device whose output is thrown away",
    "pty": "A new pseudo terminal; vm.info tells its path",
    "tty": "The terminal of this process",
}
