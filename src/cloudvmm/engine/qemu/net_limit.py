"""Rate limits of network devices: what the reference's two buckets are as the one that the kernel has."""

from __future__ import annotations

from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.host.limit import LARGEST_FRAME_BYTES, Bucket


def bucket_of(limiter: RateLimiterConfig | None, *, queue_pairs: int) -> Bucket | None:
    """Return the bucket for each direction; None where nothing is limited.

    In the reference each queue has buckets of its own; here all queues of a direction share theirs, which are
    so much larger. Where bytes and frames are both limited, a frame counts as so many bytes at least that
    the bytes are used up as soon as the frames are. A one-time burst is not to be had.
    """
    if limiter is None:
        return None
    bandwidth, ops = _flow(limiter.bandwidth, queue_pairs), _flow(limiter.ops, queue_pairs)
    if ops is None:
        return None if bandwidth is None else _bucket(*bandwidth)
    if bandwidth is None or bandwidth[0] >= ops[0] * LARGEST_FRAME_BYTES:
        return _bucket(*(LARGEST_FRAME_BYTES * part for part in ops), least_bytes=LARGEST_FRAME_BYTES)
    least_bytes = max(1, bandwidth[0] // max(1, ops[0]))
    return _bucket(bandwidth[0], min(bandwidth[1], ops[1] * least_bytes), least_bytes=least_bytes)


def _flow(bucket: TokenBucketConfig | None, queue_pairs: int) -> tuple[int, int] | None:
    """Return tokens per second, at least one, and tokens in the full bucket; None: not limited."""
    if bucket is None or not bucket.size or not bucket.refill_time:
        return None
    size = bucket.size * queue_pairs
    return max(1, size * 1000 // bucket.refill_time), size


def _bucket(bytes_per_s: int, size_bytes: int, *, least_bytes: int = 0) -> Bucket:
    return Bucket(bytes_per_s=bytes_per_s, size_bytes=size_bytes, least_bytes=least_bytes)
