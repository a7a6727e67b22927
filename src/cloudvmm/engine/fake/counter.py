"""What the fake guest's devices have moved: a function of how long the guest has run with them.

Each disk is read 4 KiB at a time, ten times a second, and written (where it may be) once a second; each net
takes one frame of 64 bytes in and gives one out every second. The first of each comes after its interval, so
a guest that just booted shows what a device shows before its first request. Latencies are always the same.
A quarter of the memory is in use, an eighth in caches, and the balloon has told so a moment ago.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice

BALLOON_ID: Final = "__balloon"  # of one that control has not named
READ_EVERY_MS: Final = 100
WRITE_EVERY_MS: Final = 1000
FRAME_EVERY_MS: Final = 1000
REQUEST_BYTES: Final = 4096
FRAME_BYTES: Final = 64
LATENCY_US: Final = {"min": 50, "max": 150, "avg": 100}
UNUSED_LATENCY_US: Final = {"min": (1 << 64) - 1, "max": (1 << 64) - 1, "avg": 1_844_674_407_370_955}


def device_counters(device: PciDevice, tick_ms: int) -> dict[str, int] | None:
    """Return counter name to value after `tick_ms` of guest time; None where nothing is counted."""
    match device:
        case DiskConfig(vhost_user=False):
            return _disk_counters(tick_ms, is_written=not device.readonly)
        case NetConfig(vhost_user=False, user=None):
            return _net_counters(tick_ms // FRAME_EVERY_MS)
        case _:
            return None


def balloon_counters(total_bytes: int, now_s: int) -> dict[str, int]:
    """Return what a guest that has `total_bytes` says of its memory; `now_s` counts from 1970."""
    caches, used = total_bytes // 8, total_bytes // 4
    return {
        "swap_in": 0,
        "swap_out": 0,
        "major_faults": 0,
        "minor_faults": 0,
        "free_memory": total_bytes - used - caches,
        "total_memory": total_bytes,
        "available_memory": total_bytes - used,
        "disk_caches": caches,
        "htlb_pgalloc": 0,
        "htlb_pgfail": 0,
        "last_update": now_s,
    }


def _disk_counters(tick_ms: int, *, is_written: bool) -> dict[str, int]:
    reads = tick_ms // READ_EVERY_MS
    writes = tick_ms // WRITE_EVERY_MS if is_written else 0
    counters = {
        "read_bytes": reads * REQUEST_BYTES,
        "write_bytes": writes * REQUEST_BYTES,
        "read_ops": reads,
        "write_ops": writes,
    }
    for name, ops in (("read", reads), ("write", writes)):
        latency_us = LATENCY_US if ops else UNUSED_LATENCY_US
        counters |= {f"{name}_latency_{key}": value for key, value in latency_us.items()}
    return counters


def _net_counters(frames: int) -> dict[str, int]:
    size_bytes = frames * FRAME_BYTES
    return {"rx_bytes": size_bytes, "rx_frames": frames, "tx_bytes": size_bytes, "tx_frames": frames}
