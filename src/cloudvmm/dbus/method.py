"""The methods of `org.cloudhypervisor.DBusApi1`, which are `cloudvmm.api.COMMANDS`, and how they answer.

A method takes the body of the REST request as one string, or nothing. It gives one string or nothing; an
optional string that is not there is the empty one, as zbus has it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from cloudvmm.api import (
    COMMANDS,
    ApiError,
    ApiRequest,
    ApiResponsePayload,
    Empty,
    ResponsePayloadType,
    VmActionPayload,
    VmInfo,
)
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError
from cloudvmm.dbus.error import Failed
from cloudvmm.dbus.message import NO_RESULT

# How the reference names the argument where it is not the name of the type; code generators use it.
_ARGUMENTS: Final = {
    "vm.resize": "vm_resize",
    "vm.resize-zone": "vm_resize_zone",
    "vm.add-user-device": "vm_add_user_device",
    "vm.remove-device": "vm_remove_device",
    "vm.receive-migration": "receive_migration_data",
    "vm.send-migration": "send_migration_data",
}

INTERFACE: Final = "org.cloudhypervisor.DBusApi1"
EVENT: Final = "Event"


class Method:
    """One command as D-Bus shows it. `takes` and `gives` are signatures."""

    __slots__ = ("argument", "command", "gives", "name", "takes")

    def __init__(self, command: type[ApiRequest]) -> None:
        self.command = command
        self.name = "".join(word.capitalize() for word in re.split("[.-]", command.name))
        type_name = "" if command.body is None else _snake_case(command.body.__name__)
        self.argument = _ARGUMENTS.get(command.name, type_name)
        self.takes = "s" if self.argument else ""
        self.gives = "" if command.answer is Empty else "s"

    def decode(self, texts: tuple[str, ...]) -> Any:
        """Return what the command is given. Descriptors are dropped, as from any JSON.

        :raises Failed: the text is not what the command wants.
        """
        if self.command.body is None:
            return None
        try:
            return form.decode(texts[0].encode(), self.command.body)
        except DecodeError as error:
            raise Failed(str(error)) from error

    def result(self, response: ApiResponsePayload | ApiError) -> tuple[str, tuple[str, ...]]:
        """Return the signature and the body of a reply.

        :raises Failed: the command did not succeed.
        """
        if isinstance(response, ApiError):
            raise Failed(str(response)) from response
        if not isinstance(response, self.command.answer):
            raise Failed(str(ResponsePayloadType()))
        if self.gives == "":
            return NO_RESULT
        return self.gives, (_encode(response).decode(),)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _encode(payload: ApiResponsePayload) -> bytes:
    match payload:
        case VmActionPayload():
            return payload.body or b""
        case VmInfo():
            return form.encode(payload)
        case _:
            return msgspec.json.encode(payload)


METHODS: Final = {
    method.name: method for method in (Method(command) for command in COMMANDS if command.is_on_dbus)
}
