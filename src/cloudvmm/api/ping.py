"""`vmm.ping` for who wants its answer as JSON: what whoever starts a VMM asks first.

The command of the list is `action.VmmPing`, and answers the same. This one needs neither the data of commands
nor what reads and writes it, so that a server can say who it is before these are loaded.
"""

from __future__ import annotations

from cloudvmm.api.plumbing import VmmPingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from cloudvmm.api.channel import ReplyChannel

NAME: Final = "vmm.ping"


class Pong:
    """Who answers; `json` is a `data.VmmPingResponse`."""

    __slots__ = ("json",)

    def __init__(self, json: bytes) -> None:
        self.json = json


class Ping:
    """A question to the VMM thread, which answers `reply` with a `Pong`."""

    __slots__ = ("reply",)

    name = NAME
    error = VmmPingError

    def __init__(self, reply: ReplyChannel) -> None:
        self.reply = reply
