"""What the devices of a guest counted: QEMU's and the kernel's numbers under the names of the reference.

Latencies. QEMU keeps the sum of all request times and, when asked to at the start, a histogram. The
average is exact; minimum and maximum are the bounds of the outermost histogram bins that are not empty,
20 bins per factor of ten, so the minimum given is up to 11 % too low and the maximum up to 12 % too high.

Memory. What a guest says by way of its balloon; what it, or its QEMU, does not count is left out.

Network. The kernel counts on the host's side of a TAP, so its transmitted bytes are what the guest received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cloudvmm.engine.qemu.name import qdev_id

NEVER = 2**64 - 1
_LATENCY_SCALE = 10_000  # the reference keeps averages this much finer, and shows what is left of NEVER
NEVER_AVERAGE = NEVER // _LATENCY_SCALE
NET_TABLE = "/proc/thread-self/net/dev"
_BINS_PER_DECADE = 20
_DECADES = 8

# 1 µs to 100 s, in nanoseconds.
LATENCY_BOUNDARIES_NS = [
    round(1000 * 10 ** (step / _BINS_PER_DECADE)) for step in range(_BINS_PER_DECADE * _DECADES + 1)
]
# The columns of NET_TABLE behind an interface's name: the first eight are what the host received.
_NET_COUNTERS = {"rx_bytes": 8, "rx_frames": 9, "tx_bytes": 0, "tx_frames": 1}


def counting_command(disk_id: str) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of what makes QEMU keep how long each request of a disk took."""
    # The part of a disk that keeps block statistics.
    path = f"/machine/peripheral/{qdev_id(disk_id)}/virtio-backend"
    return "block-latency-histogram-set", {"id": path, "boundaries": LATENCY_BOUNDARIES_NS}


def disk_counters(
    block_stats: Iterable[dict[str, Any]], device_id: Callable[[str], str | None]
) -> dict[str, dict[str, int]]:
    """Translate the answer to ``query-blockstats``; `device_id` knows the API's id of a QEMU device."""
    counters = {}
    for entry in block_stats:
        parts = entry.get("qdev", "").split("/")
        name = device_id(parts[3]) if len(parts) > 3 and parts[2] == "peripheral" else None
        if name is not None:
            counters[name] = _one_disk(entry["stats"])
    return counters


def net_counters(interface: str) -> dict[str, int] | None:
    """Read what the TAP `interface` counted, named as the guest sees it; None where it is gone.

    The table is that of our own network namespace, while /sys shows the one that it was mounted in.
    """
    wanted = interface.encode()
    with open(NET_TABLE, "rb") as table:
        for line in table:
            name, colon, numbers = line.rpartition(b":")
            if colon and name.strip() == wanted:
                columns = numbers.split()
                return {counter: int(columns[column]) for counter, column in _NET_COUNTERS.items()}
    return None


def statistics_question(balloon_id: str) -> dict[str, str]:
    """Return the arguments of the ``qom-get`` for what a guest says of its memory."""
    return {"path": f"/machine/peripheral/{qdev_id(balloon_id)}", "property": "guest-stats"}


def balloon_counters(answer: dict[str, Any]) -> dict[str, int] | None:
    """Translate the answer to `statistics_question`; None where the guest has not said anything."""
    if not answer["last-update"]:
        return None
    told = {
        name.removeprefix("stat-").replace("-", "_"): value
        for name, value in sorted(answer["stats"].items())
        if value != NEVER
    }
    return told | {"last_update": answer["last-update"]}


def _one_disk(stats: dict[str, Any]) -> dict[str, int]:
    return {
        "read_bytes": stats["rd_bytes"],
        "read_ops": stats["rd_operations"],
        "write_bytes": stats["wr_bytes"],
        "write_ops": stats["wr_operations"],
        **_latencies(stats, "read", "rd"),
        **_latencies(stats, "write", "wr"),
    }


def _latencies(stats: dict[str, Any], name: str, short: str) -> dict[str, int]:
    # Failed requests are in QEMU's sum of times, so they count here.
    requests = stats[f"{short}_operations"] + stats.get(f"failed_{short}_operations", 0)
    if not requests:
        low, high, average = NEVER, NEVER, NEVER_AVERAGE
    else:
        average = stats[f"{short}_total_time_ns"] // requests // 1000
        low, high = _outermost(stats.get(f"{short}_latency_histogram"), average)
    return {
        f"{name}_latency_min": low,
        f"{name}_latency_max": high,
        f"{name}_latency_avg": average,
    }


def _outermost(histogram: dict[str, list[int]] | None, average: int) -> tuple[int, int]:
    """Return bounds in µs for the shortest and the longest request."""
    filled = [index for index, count in enumerate(histogram["bins"]) if count] if histogram else []
    if not histogram or not filled:
        return average, average
    edges = [0, *histogram["boundaries"], histogram["boundaries"][-1]]
    return min(edges[filled[0]] // 1000, average), max(edges[filled[-1] + 1] // 1000, average)
