"""Whom a server puts requests to: the VMM thread. A daemon's socket has a service of the daemon's own."""

from __future__ import annotations

import functools

from cloudvmm.api.plumbing import EventFdWrite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from cloudvmm.api.action import ApiRequest
    from cloudvmm.api.channel import ApiSender
    from cloudvmm.api.ping import Ping
    from cloudvmm.host.eventfd import EventFd
    from cloudvmm.http.route import Route

    class Service(Protocol):
        """`routes` are the requests that it takes; if it `is_vmm` a `Ping` too. Any thread may call this."""

        is_vmm: bool

        @property
        def routes(self) -> Mapping[str, Route]: ...

        def ask(self, request: Any, fds: list[int]) -> None:
            """Take `request`; its answer comes over its reply channel, before this returns or later.

            `fds` are the descriptors that its data holds; once they are the service's the list is empty.

            :raises ApiError: it is not taken.
            """

        def document(self) -> bytes:
            """Return the OpenAPI document of the routes, as JSON."""

        def close(self) -> None:
            """Release what it holds; nobody asks any more."""


class VmmService:
    """Puts requests to a VMM thread. Owns clones of `api_evt` and `api_sender`."""

    is_vmm = True

    def __init__(self, api_evt: EventFd, api_sender: ApiSender) -> None:
        """:raises OSError: there is no descriptor."""
        self._api_evt = api_evt.clone()
        self._api_sender = api_sender.clone()

    @functools.cached_property
    def routes(self) -> Mapping[str, Route]:
        from cloudvmm.http.route import ROUTES  # a ping is answered without

        return ROUTES

    def ask(self, request: ApiRequest | Ping, fds: list[int]) -> None:
        self._api_sender.send(request)
        fds.clear()
        try:
            self._api_evt.write()
        except OSError as failure:
            raise EventFdWrite from failure

    def document(self) -> bytes:
        # Worth importing only where someone reads it.
        from cloudvmm.http.openapi import document_json

        return document_json()

    def close(self) -> None:
        self._api_evt.close()
