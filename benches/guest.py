"""The VM that benchmarks boot: the same for the server and for a QEMU that is started by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cloudvmm.guest import GuestNotBuilt, locate

RAM_BYTES = 512 * 1024 * 1024
KERNEL_CMDLINE = "console=ttyS0 quiet panic=-1"
READY_WORDS = b"cloudvmm-guest ready"


def engine_flags(engine: str) -> list[str]:
    return ["--engine", "fake"] if engine == "fake" else ["--engine", "qemu", "--accel", "tcg"]


def bench_config(engine: str, folder: str) -> dict[str, Any]:
    """Return the JSON form of the VM; its kernel log is `serial` in `folder`."""
    return {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": RAM_BYTES},
        "payload": {**_payload(engine, folder), "cmdline": KERNEL_CMDLINE},
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "File", "file": os.path.join(folder, "serial")},
        "console": {"mode": "Null"},
    }


def _payload(engine: str, folder: str) -> dict[str, str]:
    if engine == "fake":
        kernel = Path(folder, "kernel")
        kernel.write_bytes(b"a kernel")
        return {"kernel": str(kernel)}
    try:
        guest = locate()
    except GuestNotBuilt as error:
        raise SystemExit(f"{error}; build it with `cloudvmm guest build`") from error
    return {"kernel": guest.kernel, "initramfs": guest.initramfs}
