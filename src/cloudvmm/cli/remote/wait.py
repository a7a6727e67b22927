"""`--wait`: ask the guest to let go of a device, or to have another size, and wait until it has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from cloudvmm.cli.remote.error import DeviceStays, GuestLags, HttpApiClient, NotOnDBus, SocketFailed
from cloudvmm.cli.remote.progress import Progress
from cloudvmm.cli.remote.request import Request
from cloudvmm.client import table
from cloudvmm.client.client import encode_data
from cloudvmm.client.codec import decode
from cloudvmm.client.error import ClientError, RemovalRefused, ResizeRefused
from cloudvmm.client.method import Methods
from cloudvmm.client.stream import EventStream, RemoteEvents
from cloudvmm.config import form
from cloudvmm.config.operation import VmResizeData, VmResizeZoneData

if TYPE_CHECKING:
    from cloudvmm.cli.remote.bus import BusApi
    from cloudvmm.cli.remote.rest import RestApi
    from cloudvmm.client.table import Command

T = TypeVar("T")


def remove_device(api: RestApi | BusApi, device_id: str, *, wait_s: float) -> None:
    """Return once the guest has let go of `device_id`; nothing is asked of a server that tells no events.

    :raises DeviceStays: it has not in time, or it refuses.
    :raises RemoteError: as `api.call` and `api.follow`.
    """
    with _failures_named("remove-device"):
        try:
            with Progress("Waiting for the guest to let go of the device"):
                _Vmm(api).remove_device(device_id, wait_s)
        except (TimeoutError, RemovalRefused) as error:
            raise DeviceStays(str(error)) from None


def resize(api: RestApi | BusApi, request: Request, *, wait_s: float) -> None:
    """Return once the guest has followed `request`, which is a resize, of a zone or of all else.

    :raises GuestLags: it has not in time, or it refuses.
    :raises RemoteError: as `api.call` and `api.follow`.
    """
    body = request.body or b""
    with _failures_named(request.subcommand):
        try:
            with Progress("Waiting for the guest to follow"):
                if request.command == table.VM_RESIZE_ZONE.name:
                    _Vmm(api).resize_zone(form.decode(body, VmResizeZoneData), wait_s)
                else:
                    _Vmm(api).resize(form.decode(body, VmResizeData), wait_s)
        except (TimeoutError, ResizeRefused) as error:
            raise GuestLags(str(error)) from None


@contextlib.contextmanager
def _failures_named(subcommand: str) -> Iterator[None]:
    """Raise what goes wrong on the way to the server as the reference's client does."""
    try:
        yield
    except ClientError as error:
        failure = SocketFailed()
        failure.__cause__ = error
        raise HttpApiClient from failure
    except NotOnDBus:
        raise NotOnDBus(f"{subcommand} --wait") from None


class _Vmm(Methods):
    """The client's methods over `api`, whose errors are the reference's."""

    def __init__(self, api: RestApi | BusApi) -> None:
        self._api = api

    def call(self, command: Command[T], data: object = None, *, timeout_s: float | None = None) -> T:
        body, fds = encode_data(data)
        answer = self._api.call(Request(command.name, command.name, command.method, body, fds))
        value: T = _value(command, answer)
        return value

    def events(self, from_number: int | None = None) -> EventStream:
        return RemoteEvents(self._api.follow, from_number)


def _value(command: Command[Any], answer: bytes | None) -> Any:
    return None if command.answer == "nothing" else decode(command.name, command.answer, answer or b"")
