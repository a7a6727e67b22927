"""Requests over D-Bus, to the interface `org.cloudhypervisor.DBusApi1`. Imported only when asked for.

The interface passes no descriptors and lacks two commands; both are the reference's.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from cloudvmm.cli.remote.command import BY_NAME
from cloudvmm.cli.remote.error import BusFailure, DBusApiClient, NotOnDBus, NotOpened
from cloudvmm.cli.remote.log import note
from cloudvmm.cli.remote.request import Request

INTERFACE = "org.cloudhypervisor.DBusApi1"
ABSENT = frozenset(
    {
        "cancel-job",
        "cancel-migration",
        "cancel-snapshot",
        "events",
        "fork",
        "jobs",
        "migration-progress",
        "nmi",
        "resize-disk",
        "snapshot-progress",
    }
)
"""Sub-commands that the interface has no method for."""

_SYSTEM_BUS = "unix:path=/var/run/dbus/system_bus_socket"


class BusApi:
    """The service `service_name` on a bus, which shows the interface at `object_path`."""

    def __init__(
        self, service_name: str, object_path: str, *, is_system_bus: bool, timeout_s: float | None
    ) -> None:
        self._names = (object_path, service_name)
        self._is_system_bus = is_system_bus
        self._timeout_s = timeout_s
        self._connection: DBusConnection | None = None

    def connect(self) -> None:
        """Connect to the bus; whether the service is there shows in a call.

        :raises NotOpened: there is no such bus, or a name cannot be one.
        """
        path, name = self._names
        try:
            self._address = DBusAddress(path, bus_name=name, interface=INTERFACE)
            self._connection = open_dbus_connection(_bus_address(is_system_bus=self._is_system_bus))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise _not_opened(_text(error)) from error

    def call(self, request: Request) -> bytes | None:
        """Call the method of `request`; return the text of its answer, None where it has none.

        :raises NotOnDBus: there is no such method.
        :raises DBusApiClient: the service refused, or there is no answer.
        """
        if request.subcommand in ABSENT:
            raise NotOnDBus(request.subcommand)
        if request.fds:
            note("File descriptors cannot be passed over D-Bus; they are dropped")
        method = BY_NAME[request.subcommand].dbus_method
        assert self._connection is not None
        try:
            reply = self._connection.send_and_get_reply(
                self._message(method, request.body), timeout=self._timeout_s
            )
        except (OSError, EOFError) as error:
            raise DBusApiClient from BusFailure(f"I/O error: {_text(error)}")
        return _content(reply)

    def percent_of(self, command: str) -> float | None:
        """:raises NotOnDBus: there is no such question."""
        raise NotOnDBus("jobs")

    def follow(self, target: str) -> NoReturn:
        """:raises NotOnDBus: there is a signal, and no stream."""
        raise NotOnDBus("events")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _message(self, method: str, body: bytes | None) -> Any:
        if body is None:
            return new_method_call(self._address, method)
        return new_method_call(self._address, method, "s", (body.decode(),))


def _content(reply: Any) -> bytes | None:
    detail = str(reply.body[0]) if reply.body else None
    if reply.header.message_type is MessageType.error:
        name = reply.header.fields.get(HeaderFields.error_name, "")
        raise DBusApiClient from BusFailure(f"{name}: {'no details' if detail is None else detail}")
    return detail.encode() if detail else None


def _bus_address(*, is_system_bus: bool) -> str:
    if is_system_bus:
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _SYSTEM_BUS
    if address := os.environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix:path={folder}/bus"
    raise _not_opened("Neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR says where the session bus is")


def _not_opened(reason: str) -> NotOpened:
    return NotOpened(f"Error creating D-Bus proxy: dbus api client error: {reason}")


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (os error {error.errno})"
    return str(error) or type(error).__name__
