"""`events`: what happens to the VM, one JSON document per line, until the VMM ends."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cloudvmm.cli.remote.error import HttpApiClient, SocketFailed
from cloudvmm.cli.remote.log import note
from cloudvmm.cli.remote.rest import print_body
from cloudvmm.client.error import ClientError, NoAnswer
from cloudvmm.client.sse import Frame, FrameParser

if TYPE_CHECKING:
    from cloudvmm.cli.remote.bus import BusApi
    from cloudvmm.cli.remote.rest import RestApi

_STREAM = "vm.events"
_GAP, _END = "gap", "end"


def print_events(api: RestApi | BusApi, *, first: int | None) -> None:
    """Follow the events from the number `first` on, or from now; return when the server says that it ends.

    :raises NotOpened: there is no server.
    :raises HttpApiClient: the server refused, or is lost.
    :raises NotOnDBus: `api` is a message bus.
    """
    target = _STREAM if first is None else f"{_STREAM}?from={first}"
    with contextlib.closing(api.follow(target)) as stream:
        parser = FrameParser()
        try:
            while piece := stream.read():
                if not _print_frames(parser.feed(piece)):
                    return
        except ClientError as error:
            raise HttpApiClient from _lost(error)
    raise HttpApiClient from _lost(NoAnswer(_STREAM))


def _print_frames(frames: list[Frame]) -> bool:
    """Print each; say whether more is to come."""
    for frame in frames:
        if frame.name == _END:
            return False
        if frame.name == _GAP:
            note(f"Some events are no longer kept: {frame.data}")
        else:
            print_body(frame.data.encode())
    return True


def _lost(error: ClientError) -> SocketFailed:
    failure = SocketFailed()
    failure.__cause__ = error
    return failure
