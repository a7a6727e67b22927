"""What a command is answered with that failed, and what nobody foresaw."""

from __future__ import annotations

from cloudvmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudvmm.api.plumbing import ApiError


class InternalFault(VmmError):
    """The VMM failed inside; the text is the fault's own"""


def failed(kind: type[ApiError], cause: BaseException | None) -> ApiError:
    """Return the command's own error with `cause` behind it, ready to be sent."""
    error = kind()
    error.__cause__ = foreseen(cause) if isinstance(cause, Exception) else cause
    return error


def foreseen(error: Exception) -> Exception:
    """Return `error`; where nobody foresaw it, such as an odd answer of QEMU, an error that says so."""
    return error if isinstance(error, VmmError | OSError) else internal(error)


def internal(error: Exception) -> InternalFault:
    fault = InternalFault(f"The VMM failed inside: {error!r}")
    fault.__cause__ = error
    return fault
