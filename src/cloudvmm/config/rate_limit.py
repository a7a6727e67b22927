"""Token buckets that limit a device's I/O, and groups that share one."""

from __future__ import annotations

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import U64


class TokenBucketConfig(msgspec.Struct, kw_only=True):
    """`size` tokens (bytes or operations) refill evenly within `refill_time` milliseconds."""

    size: U64
    one_time_burst: U64 | None = None
    refill_time: U64


class RateLimiterConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    bandwidth: TokenBucketConfig | None = None
    ops: TokenBucketConfig | None = None


class RateLimiterGroupConfig(msgspec.Struct, kw_only=True):
    id: str = ""
    rate_limiter_config: RateLimiterConfig = msgspec.field(default_factory=RateLimiterConfig)


class InvalidRateLimiterGroup(ValidationError):
    """Invalid rate-limiter group"""


def check_rate_limit_group(group: RateLimiterGroupConfig) -> None:
    limits = group.rate_limiter_config
    if (limits.bandwidth is None and limits.ops is None) or not group.id:
        raise InvalidRateLimiterGroup
