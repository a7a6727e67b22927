"""What is left of the one-time bursts of rate limits, which QEMU knows nothing of.

A throttle group starts with room for its burst alone. Once its disks have done as much, its maximum becomes
the size of the bucket, which is then full, as it is in the reference. That this is seen late does no harm:
until then the disks have the average rate, and the full bucket behind it.
"""

from __future__ import annotations

import contextlib
import threading

import msgspec

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.rate_limit import RateLimiterConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.qemu.counter import disk_counters
from cloudvmm.engine.qemu.name import device_id
from cloudvmm.engine.qemu.parts import Properties
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.engine.qemu.rate_limit import Tokens, burst_of, group_id, limiter_id, limits, own_limiter_id

_QUERY_TIMEOUT_S = 1.0


class _Unspent(msgspec.Struct):
    limiter: RateLimiterConfig
    left: Tokens


class BurstWatch:
    """Asks and tells over `client`, which is lent and may be used by others as well.

    One thread looks; disks join and leave from any.
    """

    def __init__(self, client: QmpClient, vm_config: VmConfig) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._unspent: dict[str, _Unspent] = {}
        self._members: dict[str, tuple[str, Tokens]] = {}  # disk id: its throttle group, and what it had done
        for group in vm_config.rate_limit_groups or ():
            self._start(group_id(group.id), group.rate_limiter_config)
        for disk in vm_config.disks or ():
            self.join(disk)

    def join(self, disk: DiskConfig) -> None:
        """Take note of a disk that was made; one without a limit is none of our business."""
        name = limiter_id(disk)
        if name is None or disk.id is None:
            return
        with self._lock:
            if disk.rate_limiter_config is not None:
                self._start(name, disk.rate_limiter_config)
            self._members[disk.id] = (name, Tokens())

    def leave(self, disk_id: str) -> None:
        """Forget a device that is gone, and a limiter that was its own; a group keeps what is left of it."""
        with self._lock:
            self._members.pop(disk_id, None)
            self._unspent.pop(own_limiter_id(disk_id), None)

    def look(self) -> None:
        """Blocking. See what the disks have done; lower the maxima of those whose burst is spent.

        :raises EngineError: QEMU does not answer.
        """
        with self._lock:
            if not self._unspent:
                return
        stats = self._client.execute("query-blockstats", timeout_s=_QUERY_TIMEOUT_S)
        with self._lock:
            spent = self._spend(disk_counters(stats, device_id))
        for name, value in spent.items():
            with contextlib.suppress(QmpError):  # removed meanwhile
                self._client.execute(
                    "qom-set",
                    {"path": f"/objects/{name}", "property": "limits", "value": value},
                    timeout_s=_QUERY_TIMEOUT_S,
                )

    def _start(self, name: str, limiter: RateLimiterConfig) -> None:
        burst = burst_of(limiter)
        if burst:
            self._unspent[name] = _Unspent(limiter, burst)

    def _spend(self, counters: dict[str, dict[str, int]]) -> dict[str, Properties]:
        """Take off what was done since the last look; return the new limits by the name of the group."""
        before = {name: each.left for name, each in self._unspent.items()}
        for disk_id, (name, done) in self._members.items():
            if disk_id in counters and name in self._unspent:
                now = _tokens(counters[disk_id])
                each = self._unspent[name]
                each.left = each.left.without(now.without(done))
                self._members[disk_id] = (name, now)
        spent = {
            name: limits(each.limiter, each.left)
            for name, each in self._unspent.items()
            if each.left.kinds != before[name].kinds
        }
        self._unspent = {name: each for name, each in self._unspent.items() if each.left}
        return spent


def _tokens(counters: dict[str, int]) -> Tokens:
    return Tokens(
        bandwidth=counters["read_bytes"] + counters["write_bytes"],
        ops=counters["read_ops"] + counters["write_ops"],
    )
