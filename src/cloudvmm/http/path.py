"""The paths that are known before the commands are: where the API lies, who answers there, and its stream."""

from __future__ import annotations

from cloudvmm.api import ping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

ROOT: Final = "/api/v1/"
PING_PATH: Final = ROOT + ping.NAME
STREAM_PATH: Final = ROOT + "vm.events"


def is_stream(path: str) -> bool:
    """Whether `path`, query included, names the stream."""
    return path == STREAM_PATH or path.startswith(STREAM_PATH + "?")
