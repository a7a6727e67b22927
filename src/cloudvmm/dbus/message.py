"""Messages as this front end needs them: a call that came in, and what goes out. No I/O.

A body is parsed only once its signature is known to be one of ours, which are strings alone: whatever else
a client sends costs nothing but the bytes.
"""

from __future__ import annotations

from typing import Any, Final

from jeepney.low_level import (
    Header,
    HeaderFields,
    Message,
    MessageFlag,
    MessageType,
    parse_signature,
)
from jeepney.wrappers import DBusAddress, new_error, new_method_return, new_signal

from cloudvmm.dbus.error import CallError, InvalidArgs, LimitsExceeded
from cloudvmm.errors import json_text

BODY_LIMIT_BYTES: Final = 4 << 20
"""As for REST; more is read, but not kept."""

NO_RESULT: tuple[str, tuple[Any, ...]] = ("", ())


class Incoming:
    """A message off the bus."""

    __slots__ = ("_body_at", "_raw", "header", "is_cut")

    def __init__(self, raw: bytes, *, is_cut: bool = False) -> None:
        """`is_cut` says that the body was too long to keep.

        :raises Exception: of many kinds, for what is no D-Bus message.
        """
        self.header, self._body_at = Header.from_buffer(raw)
        self.is_cut = is_cut
        self._raw = raw

    @property
    def is_call(self) -> bool:
        return self.header.message_type is MessageType.method_call

    @property
    def wants_reply(self) -> bool:
        return not self.header.flags & MessageFlag.no_reply_expected

    @property
    def path(self) -> str:
        return self._field(HeaderFields.path)

    @property
    def interface(self) -> str:
        """Empty where the caller leaves it open."""
        return self._field(HeaderFields.interface)

    @property
    def member(self) -> str:
        return self._field(HeaderFields.member)

    @property
    def signature(self) -> str:
        return self._field(HeaderFields.signature)

    def answers(self, serial: int) -> bool:
        return self.header.fields.get(HeaderFields.reply_serial) == serial  # type: ignore[no-any-return]

    @property
    def error_name(self) -> str:
        """Empty where it is no error."""
        return self._field(HeaderFields.error_name)

    def strings(self, signature: str) -> tuple[str, ...]:
        """Return the arguments, for a `signature` of strings alone; only once, for they are not kept.

        :raises InvalidArgs: the caller sent others.
        :raises LimitsExceeded: the caller sent too much.
        """
        if self.signature != signature:
            raise InvalidArgs(f"{self.member} takes '{signature}', not '{self.signature}'")
        if self.is_cut:
            raise LimitsExceeded(f"The arguments of {self.member} are longer than {BODY_LIMIT_BYTES} bytes")
        try:
            values = self.values()
        except Exception as error:  # of many kinds: a bus passes no such message on
            raise InvalidArgs(f"The arguments of {self.member} are malformed") from error
        self._raw = b""
        return values

    def values(self) -> tuple[Any, ...]:
        """Return the whole body, whatever it holds; only for a message whose sender is trusted."""
        body_type = parse_signature(list(f"({self.signature})"))
        values: tuple[Any, ...] = body_type.parse_data(self._raw, self._body_at, self.header.endianness)[0]
        return values

    def _field(self, field: HeaderFields) -> str:
        text: str = self.header.fields.get(field, "")
        return text


def reply(call: Incoming, signature: str, body: tuple[Any, ...]) -> Message:
    return new_method_return(call, signature or None, body)


def error_reply(call: Incoming, error: CallError) -> Message:
    return new_error(call, error.name, "s", (dbus_text(str(error)),))


def signal(object_path: str, interface: str, member: str, text: str) -> Message:
    return new_signal(DBusAddress(object_path, interface=interface), member, "s", (text,))


def dbus_text(text: str) -> str:
    """Return `text` as D-Bus can carry it; the bus throws out whoever sends it anything else."""
    return json_text(text).replace("\0", "\N{REPLACEMENT CHARACTER}")
