"""`--rate-limit-group`, and the limiter's keys that disks and network devices have, too."""

from __future__ import annotations

from typing import Any

from cloudvmm.config.rate_limit import RateLimiterConfig, RateLimiterGroupConfig, TokenBucketConfig
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import TEXT, U64

_BUCKETS = {"bw": ("bandwidth", "Bytes"), "ops": ("ops", "Operations")}
_PARTS = {
    "size": "{} that the bucket holds",
    "one_time_burst": "{} that are free of charge, once",
    "refill_time": "Milliseconds in which the bucket fills up",
}

LIMITER_KEYS = tuple(
    Key(f"{bucket}_{part}", U64, help.format(unit))
    for bucket, (_, unit) in _BUCKETS.items()
    for part, help in _PARTS.items()
)

RATE_LIMIT_GROUP = Schema(
    "--rate-limit-group",
    RateLimiterGroupConfig,
    Key("id", TEXT, "Identifier that disks refer to"),
    *LIMITER_KEYS,
)


def parse_rate_limit_group(text: str) -> RateLimiterGroupConfig:
    """:raises OptionError: when `text` is not what `--rate-limit-group` takes."""
    members = RATE_LIMIT_GROUP.members(text)
    limiter = take_limiter(members) or RateLimiterConfig()
    return RateLimiterGroupConfig(rate_limiter_config=limiter, **members)


def format_rate_limit_group(group: RateLimiterGroupConfig) -> str:
    """:raises Unprintable: no `--rate-limit-group` gives `group`."""
    limiter = limiter_members(group.rate_limiter_config)
    return RATE_LIMIT_GROUP.format(group, parse_rate_limit_group, **limiter)


def take_limiter(members: dict[str, Any]) -> RateLimiterConfig | None:
    """Remove the limiter's keys from `members` and return the limiter they make, if any."""
    bandwidth = _take_bucket(members, "bw")
    ops = _take_bucket(members, "ops")
    if bandwidth is None and ops is None:
        return None
    return RateLimiterConfig(bandwidth=bandwidth, ops=ops)


def limiter_members(limiter: RateLimiterConfig | None) -> dict[str, Any]:
    """Return what the limiter's keys say of `limiter`, the inverse of `take_limiter`."""
    members: dict[str, Any] = {}
    for prefix, (member, _) in _BUCKETS.items():
        bucket: TokenBucketConfig | None = getattr(limiter, member, None)
        if bucket is not None:
            members[f"{prefix}_size"] = bucket.size
            members[f"{prefix}_one_time_burst"] = bucket.one_time_burst or None
            members[f"{prefix}_refill_time"] = bucket.refill_time
    return members


def _take_bucket(members: dict[str, Any], bucket: str) -> TokenBucketConfig | None:
    """A bucket needs a size and a refill time; a burst not given is 0, not unset."""
    size = members.pop(f"{bucket}_size", 0)
    burst = members.pop(f"{bucket}_one_time_burst", 0)
    refill_time = members.pop(f"{bucket}_refill_time", 0)
    if not size or not refill_time:
        return None
    return TokenBucketConfig(size=size, one_time_burst=burst, refill_time=refill_time)
