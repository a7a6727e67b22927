"""Virtio queues: their size and number, whatever device they belong to."""

from __future__ import annotations

from cloudvmm.config.error import ValidationError

MAX_QUEUE_SIZE = 32768


class InvalidQueueSize(ValidationError):
    def __init__(self, size: int) -> None:
        super().__init__(f"Queue size must be a power of 2 no greater than {MAX_QUEUE_SIZE}: {size}")


class TooManyQueues(ValidationError):
    def __init__(self, queues: int, boot_vcpus: int) -> None:
        super().__init__(f"Queue count ({queues}) must not exceed boot vCPUs ({boot_vcpus})")


def check_queue_size(size: int) -> None:
    """:raises InvalidQueueSize: unless `size` is a power of two that fits the virtio ring."""
    if not is_power_of_two(size) or size > MAX_QUEUE_SIZE:
        raise InvalidQueueSize(size)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
