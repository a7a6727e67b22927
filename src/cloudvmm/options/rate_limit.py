"""`--rate-limit-group`, and the limiter's keys of `--disk` and `--net`."""

from __future__ import annotations

from typing import Any

from cloudvmm.config.rate_limit import RateLimiterConfig, RateLimiterGroupConfig, TokenBucketConfig
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import TEXT, U64

LIMITER_KEYS = tuple(
    Key(f"{bucket}_{part}", U64)
    for bucket in ("bw", "ops")
    for part in ("size", "one_time_burst", "refill_time")
)

RATE_LIMIT_GROUP = Schema("--rate-limit-group", Key("id", TEXT), *LIMITER_KEYS)


def parse_rate_limit_group(text: str) -> RateLimiterGroupConfig:
    """:raises OptionError: when `text` is not what `--rate-limit-group` takes."""
    members = RATE_LIMIT_GROUP.members(text)
    limiter = take_limiter(members) or RateLimiterConfig()
    return RateLimiterGroupConfig(rate_limiter_config=limiter, **members)


def take_limiter(members: dict[str, Any]) -> RateLimiterConfig | None:
    """Remove the limiter's keys from `members` and return the limiter they make, if any."""
    bandwidth = _take_bucket(members, "bw")
    ops = _take_bucket(members, "ops")
    if bandwidth is None and ops is None:
        return None
    return RateLimiterConfig(bandwidth=bandwidth, ops=ops)


def _take_bucket(members: dict[str, Any], bucket: str) -> TokenBucketConfig | None:
    """A bucket needs a size and a refill time; a burst not given is 0, not unset."""
    size = members.pop(f"{bucket}_size", 0)
    burst = members.pop(f"{bucket}_one_time_burst", 0)
    refill_time = members.pop(f"{bucket}_refill_time", 0)
    if not size or not refill_time:
        return None
    return TokenBucketConfig(size=size, one_time_burst=burst, refill_time=refill_time)
