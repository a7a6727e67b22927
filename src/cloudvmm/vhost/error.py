"""What can be wrong with the other side of a vhost-user connection.

VmmError
└── VhostError
    ├── ProtocolBroken     the front end breaks the protocol: the connection is of no use any more
    ├── MemoryUnknown      an address is outside the memory that the front end shares
    └── RingBroken         the guest's driver breaks the rules of a ring: that ring stands still
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class VhostError(VmmError):
    """Root of the errors of a vhost-user back end."""


class ProtocolBroken(VhostError):
    pass


class MemoryUnknown(VhostError):
    def __init__(self, address: int, size: int) -> None:
        super().__init__(f"There is no guest memory at {address:#x}, {size} bytes long")


class RingBroken(VhostError):
    pass
