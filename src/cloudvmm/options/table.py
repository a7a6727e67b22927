"""Every flag that takes an option string, with its schema: the source of help and completion."""

from __future__ import annotations

from cloudvmm.options import console, cpu, device, disk, memory, net, operation, payload, platform, rate_limit
from cloudvmm.options.schema import Schema

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


def syntax(flag: str) -> str | None:
    """Describe the option string of `flag` (without dashes); None where it takes none."""
    schema = SCHEMAS.get(flag)
    if schema is None:
        return None
    keys = [f"{key.name}={key.kind.syntax}" for key in schema.keys if not key.name.startswith("_")]
    return ",".join(["|".join(schema.flags), *keys] if schema.flags else keys)
