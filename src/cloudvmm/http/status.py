"""Which HTTP status an error becomes, and what its body says.

Only the direct cause of a command's error is looked at: the same refusal found deeper, inside a failed
migration say, is that migration's failure and stays 500.
"""

from __future__ import annotations

import msgspec

from cloudvmm.api import (
    ApiError,
    ConfigValidation,
    CpuManager,
    DeviceManager,
    NoDeviceToRemove,
    NoSuchJob,
    UnknownDeviceId,
    VcpuRemovalPending,
    VmMissingConfig,
    VmNotCreated,
    VmResizeError,
)
from cloudvmm.api.error import InvalidVmmId, NoSuchVmm, VmmExists
from cloudvmm.config.error import DuplicateDevicePath, IdentifierNotUnique
from cloudvmm.errors import error_chain, error_code, json_text
from cloudvmm.http.error import (
    ApiFailed,
    BadRequest,
    DeserializeFailed,
    HttpError,
    NotFound,
    TooManyConnections,
    TooManyRequests,
    TooManyStreams,
)
from cloudvmm.wire.response import response


def error_response(error: HttpError, *, code: str = "") -> bytes:
    """Answer with `error` and its causes. `code` is the error's own unless it is told here."""
    body = msgspec.json.encode([json_text(text) for text in error_chain(error)])
    return response(http_status(error), body, code=code or error_code(error))


def api_failure(error: ApiError) -> HttpError:
    """Return the error that a failed command is reported as."""
    failure = TooManyRequests() if _is_removal_pending(error) else ApiFailed()
    if isinstance(failure, ApiFailed):
        failure.__cause__ = error
    return failure


def http_status(error: HttpError) -> int:
    match error:
        case BadRequest() | DeserializeFailed():
            return 400
        case NotFound():
            return 404
        case TooManyRequests():
            return 429
        case TooManyStreams() | TooManyConnections():
            return 503
        case ApiFailed():
            return _api_status(error.__cause__)
        case _:
            return 500


def _api_status(error: BaseException | None) -> int:
    cause = error.__cause__ if error is not None else None
    match cause:
        case VmNotCreated() | VmMissingConfig() | NoDeviceToRemove() | NoSuchJob() | NoSuchVmm():
            return 404
        case VmmExists():
            return 409
        case InvalidVmmId():
            return 400
        case DeviceManager(__cause__=UnknownDeviceId()):
            return 404
        case ConfigValidation(__cause__=IdentifierNotUnique() | DuplicateDevicePath()):
            return 409
        case ConfigValidation():
            return 400
        case _:
            return 500


def _is_removal_pending(error: ApiError) -> bool:
    match error:
        case VmResizeError(__cause__=CpuManager(__cause__=VcpuRemovalPending())):
            return True
        case _:
            return False
