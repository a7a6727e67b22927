"""What two VMMs say to each other: frames, and the messages inside them. Pure.

Who says what in which order is in docs/migration.md.

A frame is a head of 12 bytes and a body. The head: the 4 bytes "CVMg", the kind of message (16 bits), 16 bits
that are zero, and the length of the body (32 bits), big-endian. The body is a JSON object; members that the
reader does not know are ignored. `Hello` and `Refuse` keep their form in every version of the protocol.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal

import msgspec

from cloudvmm.config import form
from cloudvmm.migration.error import ProtocolError

VERSION: Final = 1
MAX_CONNECTIONS: Final = 128
MAGIC: Final = b"CVMg"
HEAD: Final = struct.Struct(">4sHHI")
# A config that came as 4 MiB of JSON is larger with all its defaults written out.
MAX_OFFER_BYTES: Final = 16 << 20
MAX_BODY_BYTES: Final = 64 << 10
MAX_REASONS: Final = 32
MAX_REASON_CHARACTERS: Final = 1000
MAX_NAME_CHARACTERS: Final = 80


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first message on every connection: who speaks, which versions it knows, what the connection is for.

    `token` is what `Accept` gave; it shows that a connection for the state belongs to the migration, and
    `number` counts these from 0.
    """

    program: str
    versions: list[int]
    role: str
    token: str = ""
    number: int = 0


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The version that is spoken from here on."""

    version: int


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """The VM to take over: its config, what else its VMM knows about it, and whose engine runs it.

    `config` is the form of `vm.info`; `vm` is that of the control room. The state comes over `connections`.
    With `is_postcopy` the guest is to go on before all of its memory is there. `copied_disks` are the ids of
    disks that come along, each over a further connection in this order, and their bytes.
    """

    config: msgspec.Raw
    vm: msgspec.Raw
    engine: str
    engine_version: str
    is_local: bool = False
    is_postcopy: bool = False
    copied_disks: dict[str, int] = {}
    connections: Annotated[int, msgspec.Meta(ge=1, le=MAX_CONNECTIONS)] = 1


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    """The VM can be taken over. The state is expected on a connection that says `token`.

    `is_postcopy` and `copied_disks` are as in the offer; a release that knows nothing of them is silent.
    """

    token: str
    is_postcopy: bool = False
    copied_disks: list[str] = []


class Ready(msgspec.Struct, frozen=True):
    """The whole state is there; the VM stands paused."""


class Complete(msgspec.Struct, frozen=True, kw_only=True):
    """The VM is yours. It is let run, unless `is_paused`; it has stood still for `stood_ms`, if it ran."""

    is_paused: bool
    stood_ms: float | None = None


class Done(msgspec.Struct, frozen=True):
    """The VM is ours."""


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """It is over, and nothing of the VM remains where this is said. `reasons` is an error chain."""

    reasons: list[str]


Message = Hello | Welcome | Offer | Accept | Ready | Complete | Done | Refuse
Role = Literal["control", "state"]

KINDS: Final[dict[int, type[Message]]] = {
    1: Hello,
    2: Welcome,
    3: Offer,
    4: Accept,
    5: Ready,
    6: Complete,
    7: Done,
    8: Refuse,
}
_NUMBERS: Final = {kind: number for number, kind in KINDS.items()}


def encode_message(message: Message) -> bytes:
    """Return the frame of `message`.

    :raises ProtocolError: it is too large to be sent.
    """
    body = msgspec.json.encode(message)
    kind = type(message)
    if len(body) > max_body_bytes(kind):
        raise ProtocolError(f"The message {kind.__name__} is too large to be sent: {len(body)} bytes")
    return HEAD.pack(MAGIC, _NUMBERS[kind], 0, len(body)) + body


def decode_head(head: bytes) -> tuple[type[Message], int]:
    """Return which message follows and the length of its body.

    :raises ProtocolError: it is no head, or what it announces is not known or too large.
    """
    magic, number, zero, length = HEAD.unpack(head)
    if magic != MAGIC or zero != 0:
        raise ProtocolError("The other side does not speak the migration protocol of cloudvmm")
    kind = KINDS.get(number)
    if kind is None:
        raise ProtocolError(f"The other VMM sent an unknown message: {number}")
    if length > max_body_bytes(kind):
        raise ProtocolError(f"The other VMM's message {kind.__name__} is too large: {length} bytes")
    return kind, length


def decode_body(kind: type[Message], body: bytes) -> Message:
    """:raises ProtocolError: `body` is not that of a `kind`."""
    try:
        message: Message = form.decoder(kind).decode(body)
    except form.MALFORMED as error:
        raise ProtocolError(f"The other VMM's message {kind.__name__} is malformed") from error
    return message


def max_body_bytes(kind: type[Message]) -> int:
    return MAX_OFFER_BYTES if kind is Offer else MAX_BODY_BYTES


def choose_version(hello: Hello) -> int:
    """:raises ProtocolError: there is no version that both know."""
    if VERSION not in hello.versions:
        known = ", ".join(str(version) for version in hello.versions[:8])
        name = readable(hello.program, MAX_NAME_CHARACTERS)
        raise ProtocolError(
            f"The other VMM ({name}) speaks version {known} of the migration protocol, this release speaks "
            f"{VERSION}"
        )
    return VERSION


def check_welcome(welcome: Welcome) -> None:
    """:raises ProtocolError: it is for a version that we have not offered."""
    if welcome.version != VERSION:
        raise ProtocolError(
            f"The other VMM answered with version {welcome.version} of the migration protocol, this release "
            f"speaks {VERSION}"
        )


def readable(text: str, limit: int = MAX_REASON_CHARACTERS) -> str:
    """Return what somebody else said so that it can stand in a line of ours: in the log, in an answer."""
    return "".join(character if character.isprintable() else "?" for character in text[:limit])


def refusal(reasons: list[str]) -> Refuse:
    """Return a `Refuse` with as much of `reasons` as may be sent."""
    texts = [reason.encode(errors="replace").decode() for reason in reasons[:MAX_REASONS]]
    return Refuse(reasons=[text[:MAX_REASON_CHARACTERS] for text in texts])
