"""The Python client: one method per command, for any server that speaks Cloud Hypervisor's API.

`Client` blocks, `AsyncClient` is for asyncio, `cloudvmm.Vmm` has the same methods without a server.
`DaemonClient` and `AsyncDaemonClient` are for the own socket of a daemon. Configs
and answers are the types of `cloudvmm.config` and `cloudvmm.api`. Nothing of these, and no asyncio, is
imported before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cloudvmm.client.client import Client
from cloudvmm.client.daemon import DaemonClient
from cloudvmm.client.error import (
    AnswerNotUnderstood,
    BadReply,
    ClientError,
    ConnectionFailed,
    EventsLost,
    NoAnswer,
    RemovalRefused,
    ResizeRefused,
)
from cloudvmm.client.failure import (
    BadRequest,
    Conflict,
    InternalServerError,
    NotFound,
    NotSupported,
    ServerError,
    ServerFull,
    TooManyRequests,
)
from cloudvmm.client.method import Methods
from cloudvmm.client.stream import EventStream
from cloudvmm.client.table import COMMANDS, Command

if TYPE_CHECKING:
    from cloudvmm.client.async_client import AsyncClient
    from cloudvmm.client.async_daemon import AsyncDaemonClient
    from cloudvmm.client.async_method import AsyncMethods
    from cloudvmm.client.async_stream import AsyncEventStream
    from cloudvmm.events.hub import Event

_LATER = {
    "AsyncClient": "cloudvmm.client.async_client",
    "AsyncDaemonClient": "cloudvmm.client.async_daemon",
    "AsyncMethods": "cloudvmm.client.async_method",
    "AsyncEventStream": "cloudvmm.client.async_stream",
    "Event": "cloudvmm.events.hub",
}

__all__ = [
    "COMMANDS",
    "AnswerNotUnderstood",
    "AsyncClient",
    "AsyncDaemonClient",
    "AsyncEventStream",
    "AsyncMethods",
    "BadReply",
    "BadRequest",
    "Client",
    "ClientError",
    "Command",
    "Conflict",
    "ConnectionFailed",
    "DaemonClient",
    "Event",
    "EventStream",
    "EventsLost",
    "InternalServerError",
    "Methods",
    "NoAnswer",
    "NotFound",
    "NotSupported",
    "RemovalRefused",
    "ResizeRefused",
    "ServerError",
    "ServerFull",
    "TooManyRequests",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
