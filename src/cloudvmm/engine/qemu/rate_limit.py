"""Rate limits of disks: the reference's token buckets as QEMU's throttle groups.

A bucket of the reference holds `size` tokens, refills evenly within `refill_time` milliseconds, and has
`one_time_burst` tokens more that are spent first and never come back. QEMU's bucket leaks at an average rate
and takes in up to a maximum before requests wait. So the average is the rate of the refill, the maximum the
size; what is spent once is followed by `burst.py`, which then has the maximum changed.

QEMU counts whole tokens a second, and takes no maximum below a second's worth of the average: a bucket that
refills quicker holds a tenth of a second's worth, or a whole second's, what is nearer.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.rate_limit import RateLimiterConfig, RateLimiterGroupConfig, TokenBucketConfig
from cloudvmm.engine.qemu.name import part_id
from cloudvmm.engine.qemu.parts import Parts, Properties

_MOST: Final = 10**15  # of whatever, that QEMU counts
_BELOW_SECOND_SHARE: Final = 0.55  # half-way between a tenth of a second's worth and a whole one


class Tokens(msgspec.Struct, frozen=True):
    """Numbers of bytes and of operations: what is left of one-time bursts, or what a disk has done."""

    bandwidth: int = 0
    ops: int = 0

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Say of which there are any."""
        return self.bandwidth > 0, self.ops > 0

    def __bool__(self) -> bool:
        return any(self.kinds)

    def without(self, other: Tokens) -> Tokens:
        return Tokens(max(0, self.bandwidth - other.bandwidth), max(0, self.ops - other.ops))


def is_limited(bucket: TokenBucketConfig | None) -> bool:
    """Say whether `bucket` limits at all: to the reference, one without size or refill time does not."""
    return bucket is not None and bucket.size > 0 and bucket.refill_time > 0


def burst_of(limiter: RateLimiterConfig) -> Tokens:
    """Return the one-time bursts that `limiter` grants."""
    return Tokens(*(_burst(bucket) for bucket in (limiter.bandwidth, limiter.ops)))


def limits(limiter: RateLimiterConfig, left: Tokens) -> Properties:
    """Return QEMU's ``ThrottleLimits`` for `limiter` while `left` of its one-time bursts are unspent."""
    return {
        **_bucket_limits("bps-total", limiter.bandwidth, left.bandwidth),
        **_bucket_limits("iops-total", limiter.ops, left.ops),
    }


def limiter_id(disk: DiskConfig) -> str | None:
    """Return the QEMU id of the throttle group that `disk` is in, its own or a shared one; None: of none."""
    if disk.rate_limit_group is not None:
        return group_id(disk.rate_limit_group)
    own = disk.rate_limiter_config
    if disk.id is None or own is None or not (is_limited(own.bandwidth) or is_limited(own.ops)):
        return None
    return own_limiter_id(disk.id)


def own_limiter_id(disk_id: str) -> str:
    """Return the QEMU id of the throttle group that is the disk's own, if it has one."""
    return part_id(disk_id, "limit")


def group_id(name: str) -> str:
    """Return the QEMU id of the throttle group for the rate limiter group `name`."""
    return part_id(name, "group")


def group_parts(groups: list[RateLimiterGroupConfig] | None) -> Parts:
    """Describe the rate limiter groups of a VM; disks join them then and later."""
    return Parts(
        objects=[throttle_group(group_id(group.id), group.rate_limiter_config) for group in groups or ()]
    )


def throttle_group(name: str, limiter: RateLimiterConfig) -> Properties:
    return {"qom-type": "throttle-group", "id": name, "limits": limits(limiter, burst_of(limiter))}


def _burst(bucket: TokenBucketConfig | None) -> int:
    return (bucket.one_time_burst or 0) if bucket is not None and is_limited(bucket) else 0


def _bucket_limits(name: str, bucket: TokenBucketConfig | None, left: int) -> Properties:
    if bucket is None or not is_limited(bucket):
        return {name: 0, f"{name}-max": 0}
    average = min(_MOST, max(1, round(bucket.size * 1000 / bucket.refill_time)))
    return {name: average, f"{name}-max": _maximum(average, bucket.size, left)}


def _maximum(average: int, size: int, left: int) -> int:
    if left > 0:
        # The burst alone: when it is spent the levels start at 0 again, and the bucket is full.
        return min(_MOST, max(average, left))
    if size < average * _BELOW_SECOND_SHARE:
        return 0
    return min(_MOST, max(average, size))
