"""The D-Bus front end: the interface `org.cloudhypervisor.DBusApi1` on a session or system bus."""

from __future__ import annotations

from cloudvmm.dbus.error import (
    DbusServerError,
    InvalidObjectPath,
    InvalidServiceName,
    NameTaken,
    NoBus,
    StartingSession,
)
from cloudvmm.dbus.server import DbusServer, start_dbus_thread

__all__ = [
    "DbusServer",
    "DbusServerError",
    "InvalidObjectPath",
    "InvalidServiceName",
    "NameTaken",
    "NoBus",
    "StartingSession",
    "start_dbus_thread",
]
