"""The root of what the operating system refuses."""

from __future__ import annotations

from cloudvmm.errors import VmmError


class HostError(VmmError):
    """The operating system refused; the cause tells what and why."""
