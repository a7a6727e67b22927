"""Errors of the way between two VMMs.

MigrationError
├── AddressError       a URL is not one (`address.py`)
├── SendRule           an option of `vm.send-migration` does not go (`rule.py`)
├── ReceiveRule        an option of `vm.receive-migration` does not go (`rule.py`)
├── TlsDirError        the folder with keys and certificates is not one (`rule.py`)
├── ListenFailed       the receiver's address cannot be had
├── ConnectFailed      nobody answers at the sender's destination
├── LinkDown           the other VMM is gone
├── LinkTimeout        the other VMM says nothing for too long
├── TlsFailed          the other VMM is not who it must be, or the certificates are none (`tls.py`)
├── ProtocolError      the other side says what it must not
├── PeerRefused        the other VMM refused; its words are the text
├── Cancelled          it was told to end
├── OutcomeUnknown     whether the other VMM runs the VM cannot be known
└── MemoryLost         the guest runs in the other VMM and gets no more of its memory
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class MigrationError(VmmError):
    """Root of what goes wrong between two VMMs."""


class ListenFailed(MigrationError):
    """The text says what kind of socket."""


class ConnectFailed(MigrationError):
    """The text says what kind of socket."""


class LinkDown(MigrationError):
    """The other VMM closed the connection"""


class LinkTimeout(MigrationError):
    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"The other VMM did not answer within {timeout_s:g} s")


class TlsFailed(MigrationError):
    """Error setting up a TLS-encrypted connection"""


class ProtocolError(MigrationError):
    """The text says what was wrong."""


class PeerRefused(MigrationError):
    """`reasons` is the other VMM's error chain, outermost first."""

    def __init__(self, reasons: list[str]) -> None:
        words = ": ".join(reasons) or "no reason given"
        super().__init__(f"The other VMM refused: {words}")
        self.reasons = reasons


class Cancelled(MigrationError):
    """The migration was told to end"""


class OutcomeUnknown(MigrationError):
    """The other VMM was told to take over and its answer is lost, so the VM stays paused here: make sure \
that it does not run there, then call vm.resume"""


class MemoryLost(MigrationError):
    """The guest went on at the destination, and the way for the rest of its memory is gone for good: it \
must not be resumed where it came from, and where it is it stands still if it lacks some"""
