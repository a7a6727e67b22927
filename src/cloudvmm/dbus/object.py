"""The one object of the service: which call means which command, and the interfaces that every object has.

The nodes above the object are there too, so that the tree can be walked down from `/`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from cloudvmm.dbus.error import Failed, UnknownInterface, UnknownMethod, UnknownObject, UnknownProperty
from cloudvmm.dbus.introspection import INTROSPECTABLE, PEER, PROPERTIES, children_of, describe
from cloudvmm.dbus.message import NO_RESULT, Incoming
from cloudvmm.dbus.method import INTERFACE, METHODS, Method

Result = tuple[str, tuple[Any, ...]]

_MACHINE_IDS: Final = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_STANDARD: Final = {
    "Introspect": INTROSPECTABLE,
    "Ping": PEER,
    "GetMachineId": PEER,
    "Get": PROPERTIES,
    "Set": PROPERTIES,
    "GetAll": PROPERTIES,
}


class ApiObject:
    """Stateless: which paths there are follows from the object's own."""

    def __init__(self, path: str) -> None:
        self.path = path

    def method(self, call: Incoming) -> Method | None:
        """Return the command's method that is called; None where `answer` knows the call.

        :raises CallError: nobody does.
        """
        if children_of(call.path, self.path) is None and call.interface != PEER:
            raise UnknownObject(f"Unknown object '{call.path}'")
        is_ours = call.path == self.path and call.interface in ("", INTERFACE)
        if is_ours and call.member in METHODS:
            return METHODS[call.member]
        if not is_ours and call.interface not in ("", INTROSPECTABLE, PEER, PROPERTIES):
            raise UnknownInterface(f"Unknown interface '{call.interface}'")
        if call.interface not in ("", _STANDARD.get(call.member)) or call.member not in _STANDARD:
            raise UnknownMethod(f"Unknown method '{call.member}'")
        return None

    def answer(self, call: Incoming) -> Result:
        """Carry out a method that every object has.

        :raises CallError: it has no result.
        """
        match call.member:
            case "Introspect":
                call.strings("")
                children = children_of(call.path, self.path) or []
                return "s", (describe(is_object=call.path == self.path, children=children),)
            case "Ping":
                call.strings("")
                return NO_RESULT
            case "GetMachineId":
                call.strings("")
                return "s", (_machine_id(),)
            case "GetAll":
                self._check_interface(call, *call.strings("s"))
                return "a{sv}", ({},)
            case "Get":
                interface, name = call.strings("ss")
                self._check_interface(call, interface)
                raise UnknownProperty(f"Unknown property '{name}'")
            case _:  # Set; its value need not be looked at
                raise UnknownProperty("No property can be set")

    def _check_interface(self, call: Incoming, interface: str) -> None:
        standard = (INTROSPECTABLE, PEER, PROPERTIES)
        if interface not in standard and not (interface == INTERFACE and call.path == self.path):
            raise UnknownInterface(f"Unknown interface '{interface}'")


def _machine_id() -> str:
    for path in _MACHINE_IDS:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return Path(path).read_text(encoding="ascii").strip()
    raise Failed("This machine has no id")
