"""Errors of the D-Bus front end.

DbusServerError                the server cannot start
├── StartingSession            outermost; the cause tells what and why
├── NoBus                      no bus is to be found, or it does not let us in
├── NameTaken                  another process has the name
├── NameRefused                the bus does not give us the name
├── InvalidServiceName
└── InvalidObjectPath
BusLost                        the bus has gone, or cannot be understood
CallError                      what a call is answered with instead of its result; `name` is D-Bus's
├── Failed                     the command's own error, its outermost text alone
├── InvalidArgs
├── LimitsExceeded
├── UnknownInterface
├── UnknownMethod
├── UnknownObject
└── UnknownProperty
"""

from __future__ import annotations

from typing import ClassVar

from cloudvmm.errors import VmmError


class DbusServerError(VmmError):
    """Root of what keeps the server from starting."""


class StartingSession(DbusServerError):
    """Error starting D-Bus session"""


class NoBus(DbusServerError):
    """No address of a message bus is known"""


class NameTaken(DbusServerError):
    """name already taken on the bus"""


class NameRefused(DbusServerError):
    """Takes the words of the bus."""


class InvalidServiceName(DbusServerError):
    def __init__(self, service_name: str) -> None:
        super().__init__(f"{service_name!r} is no well-known bus name, such as org.example.Name")
        self.service_name = service_name


class InvalidObjectPath(DbusServerError):
    def __init__(self, object_path: str) -> None:
        super().__init__(f"{object_path!r} is no object path, such as /org/example/Name")
        self.object_path = object_path


class BusLost(VmmError):
    """The message bus has closed the connection"""


class CallError(VmmError):
    """Root of what a caller is told; never raised itself."""

    name: ClassVar[str] = "org.freedesktop.DBus.Error.Failed"


class Failed(CallError):
    """Internal error"""


class InvalidArgs(CallError):
    name = "org.freedesktop.DBus.Error.InvalidArgs"


class LimitsExceeded(CallError):
    """Too many calls are under way"""

    name = "org.freedesktop.DBus.Error.LimitsExceeded"


class UnknownInterface(CallError):
    name = "org.freedesktop.DBus.Error.UnknownInterface"


class UnknownMethod(CallError):
    name = "org.freedesktop.DBus.Error.UnknownMethod"


class UnknownObject(CallError):
    name = "org.freedesktop.DBus.Error.UnknownObject"


class UnknownProperty(CallError):
    name = "org.freedesktop.DBus.Error.UnknownProperty"
