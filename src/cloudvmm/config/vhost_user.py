"""What every device served by a vhost-user back end needs."""

from __future__ import annotations

from cloudvmm.config.error import ValidationError
from cloudvmm.config.memory import MemoryConfig, is_backed_by_shared_memory


class VhostUserRequiresSharedMemory(ValidationError):
    """Using vhost-user requires using shared memory or huge pages"""


class VhostUserMissingSocket(ValidationError):
    """No socket provided when using vhost-user"""


class VhostUserRateLimiterNotSupported(ValidationError):
    """Rate limiting is not supported with vhost-user"""


def check_shared_memory(memory: MemoryConfig) -> None:
    """:raises VhostUserRequiresSharedMemory: when a back end could not map guest RAM."""
    if not is_backed_by_shared_memory(memory):
        raise VhostUserRequiresSharedMemory


def check_vhost_user(memory: MemoryConfig, *, vhost_socket: str | None, is_rate_limited: bool) -> None:
    """Raise the first rule that a disk or network device served by a back end breaks."""
    check_shared_memory(memory)
    if vhost_socket is None:
        raise VhostUserMissingSocket
    if is_rate_limited:
        raise VhostUserRateLimiterNotSupported
