"""The roots of a command's errors, and those that need no command: of the channel, of a ping, of the end.

A part of the tree in `error.py`, for what is loaded before it.
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class ApiError(VmmError):
    """Root of what a command answers with."""


class ApiPlumbingError(ApiError):
    """Root of what fails between the caller and the VMM thread."""


class EventFdWrite(ApiPlumbingError):
    """Cannot write to EventFd"""


class RequestSend(ApiPlumbingError):
    """API request send error"""


class ResponseRecv(ApiPlumbingError):
    """API response receive error"""


class ResponsePayloadType(ApiPlumbingError):
    """Wrong response payload type"""


class CreateSeccompFilter(ApiPlumbingError):
    """Cannot create seccomp filter"""


class ApplySeccompFilter(ApiPlumbingError):
    """Cannot apply seccomp filter"""


class VmmPingError(ApiError):
    """The VMM did not answer"""


class VmError(VmmError):
    """Root of what the VMM or the VM refuses."""


class VmmShuttingDown(VmError):
    """The VMM is shutting down"""
