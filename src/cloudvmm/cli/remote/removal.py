"""`remove-device --wait`: ask the guest to let go of a device, and wait until it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from cloudvmm.cli.remote.error import DeviceStays, HttpApiClient, NotOnDBus, SocketFailed
from cloudvmm.cli.remote.progress import Progress
from cloudvmm.cli.remote.request import Request
from cloudvmm.client.client import encode_data
from cloudvmm.client.codec import decode
from cloudvmm.client.error import ClientError, RemovalRefused
from cloudvmm.client.method import Methods
from cloudvmm.client.stream import EventStream, RemoteEvents

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
    try:
        with Progress("Waiting for the guest to let go of the device"):
            _Vmm(api).remove_device(device_id, wait_s)
    except (TimeoutError, RemovalRefused) as error:
        raise DeviceStays(str(error)) from None
    except ClientError as error:
        failure = SocketFailed()
        failure.__cause__ = error
        raise HttpApiClient from failure
    except NotOnDBus:
        raise NotOnDBus("remove-device --wait") from None


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
