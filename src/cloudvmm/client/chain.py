"""A reply that is no success into the exception that it stands for, causes and all.

Cloud Hypervisor tells errors by their texts alone, and ours are the same ones; our own server adds the name
of the innermost error in a header. What neither names stays a plain `VmmError` with its text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

import msgspec

import cloudvmm.config.restore
import cloudvmm.config.rule  # noqa: F401  # the rules of the configuration are errors, too
from cloudvmm.api import error as api_error
from cloudvmm.api.action import COMMANDS
from cloudvmm.api.fleet import DAEMON_COMMANDS
from cloudvmm.client.failure import ServerError, server_error
from cloudvmm.client.reply import Reply
from cloudvmm.config.error import DuplicateDevicePath, IdentifierNotUnique, ValidationError
from cloudvmm.engine import base as _engine  # noqa: F401  # so are the refusals of engines
from cloudvmm.errors import VmmError, error_code

CODE_HEADER = "x-cloudvmm-error"

_ROOMS = ("cloudvmm.api.", "cloudvmm.config.", "cloudvmm.engine.base")
_OS_ERROR = re.compile(r"\(os error \d+\)$")
_WITH_VALUES: tuple[tuple[re.Pattern[str], type[VmmError]], ...] = (
    (re.compile(r'No device with id ".*" to remove'), api_error.NoDeviceToRemove),
    (re.compile(r"Failed to find device corresponding to the given identifier: "), api_error.UnknownDeviceId),
    (re.compile(r"invalid VM state transition: \w+ to \w+"), api_error.InvalidStateTransition),
    (re.compile(r"Invalid transition: InvalidStateTransition\("), api_error.InvalidTransition),
    (re.compile(r"Identifier .* is not unique"), IdentifierNotUnique),
    (re.compile(r"Duplicated device path: "), DuplicateDevicePath),
)


def failure(command: str, reply: Reply) -> ServerError:
    """Return what `reply` to `command` means."""
    chain = read_chain(reply.body)
    code = reply.headers.get(CODE_HEADER, "")
    cause = build_causes(command, chain[1:], code)
    error = server_error(command, reply.status, chain, code or _code_of(cause))
    error.__cause__ = cause
    return error


def read_chain(body: bytes) -> tuple[str, ...]:
    """Return the texts in an error's body; in older releases it is no JSON array but one text."""
    try:
        return tuple(msgspec.json.decode(body, type=list[str]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace").strip()
        return (text,) if text else ()


def build_causes(command: str, texts: Sequence[str], code: str) -> VmmError | None:
    """Return the outermost of the errors that `texts` tell, each the cause of the one before."""
    kinds: list[type[VmmError]] = []
    for place, text in enumerate(texts):
        outer = kinds[-1] if kinds else None
        kinds.append(_kind(text, command if place == 0 else "", outer))
    _apply_code(kinds, texts, code)
    inner: VmmError | None = None
    for kind, text in zip(reversed(kinds), reversed(texts), strict=True):
        error = _make(kind, text)
        error.__cause__ = inner
        inner = error
    return inner


def _code_of(cause: VmmError | None) -> str:
    """Return the code as our own server would have given it; empty where the innermost text is not known."""
    if cause is None:
        return ""
    code = error_code(cause)
    return "" if code == VmmError.__name__ else code


def _kind(text: str, command: str, outer: type[VmmError] | None) -> type[VmmError]:
    own = _command_errors().get(command)
    if own is not None and text == _fixed_text(own):
        return own
    if (kinds := _by_text().get(text)) is not None:
        return _most_fitting(kinds, outer)
    for pattern, kind in _WITH_VALUES:
        if pattern.match(text):
            return kind
    return ValidationError if outer is api_error.ConfigValidation else VmmError


def _most_fitting(kinds: Sequence[type[VmmError]], outer: type[VmmError] | None) -> type[VmmError]:
    """Some texts belong to two errors, of the VM and of its migration; the latter has its like around it."""
    is_migration = outer is not None and issubclass(outer, api_error.MigratableError)
    fitting = (kind for kind in kinds if issubclass(kind, api_error.MigratableError) is is_migration)
    return next(fitting, kinds[0])


def _apply_code(kinds: list[type[VmmError]], texts: Sequence[str], code: str) -> None:
    """Give the innermost error of ours the class that `code` names, where its text alone did not tell."""
    named = _by_name().get(code)
    if named is None or named in kinds:
        return
    for place in reversed(range(len(kinds))):
        if not _OS_ERROR.search(texts[place]):
            if kinds[place] in (VmmError, ValidationError) or named in _by_text().get(texts[place], ()):
                kinds[place] = named
            return


def _make(kind: type[VmmError], text: str) -> VmmError:
    """Make an error without its values, which only the text knows here."""
    return kind.__new__(kind, text)


def _fixed_text(kind: type[VmmError]) -> str:
    return str(kind.__new__(kind))


@functools.cache
def _by_name() -> dict[str, type[VmmError]]:
    return {kind.__name__: kind for kind in _descendants(VmmError) if kind.__module__.startswith(_ROOMS)}


@functools.cache
def _by_text() -> dict[str, list[type[VmmError]]]:
    """Only errors whose text is always the same, and no command's own: those stand first."""
    found: dict[str, list[type[VmmError]]] = {}
    for kind in _by_name().values():
        is_fixed = kind.__init__ is VmmError.__init__ and kind.__doc__
        if is_fixed and not issubclass(kind, api_error.ApiError):
            found.setdefault(_fixed_text(kind), []).append(kind)
    return found


@functools.cache
def _command_errors() -> dict[str, type[VmmError]]:
    return {command.name: command.error for command in (*COMMANDS, *DAEMON_COMMANDS)}


def _descendants(kind: type[VmmError]) -> Iterator[type[VmmError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)
