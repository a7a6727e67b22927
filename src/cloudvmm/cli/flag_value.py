"""What the values of the VMM's own flags mean."""

from __future__ import annotations

import contextlib

from cloudvmm import cli

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

    from cloudvmm.cli.error import FlagError
    from cloudvmm.host.user import User

MOST_CONNECTIONS = 4096  # each is a thread
MOST_VMMS = 4096  # each is five


def parse_api_socket(text: str) -> str | int:
    """Return the path of the socket, or the number of an inherited listening one.

    Text that is no option string is the path itself.

    :raises ParsingApiSocket: when `fd=` is not a number.
    """
    if "=" not in text:
        return text
    from cloudvmm.options.error import GrammarError
    from cloudvmm.options.grammar import Options, read_options

    options = Options()
    with contextlib.suppress(GrammarError):  # what was read before the fault counts, as in the reference
        read_options(options, text, ("path", "fd"))
    fd = options.get("fd")
    if fd is None:
        return options.get("path") or text
    try:
        return _descriptor(fd)
    except ValueError:
        raise cli.error.ParsingApiSocket(fd) from cli.error.InvalidDescriptor()


def parse_api_socket_peers(texts: Sequence[str] | None) -> frozenset[int] | None:
    """Return the users that may connect, None where all may.

    :raises ParsingApiSocketPeers: when one of `texts` has no uid.
    """
    if texts is None:
        return None
    from cloudvmm.options.error import GrammarError
    from cloudvmm.options.grammar import parse_options

    found = set()
    for text in texts:
        try:
            uid = parse_options(text, ("uid",)).convert("uid", _descriptor)
        except GrammarError as error:
            raise cli.error.ParsingApiSocketPeers from error
        if uid is None:
            raise cli.error.BareApiSocketPeer
        found.add(uid)
    return frozenset(found)


def parse_max_connections(text: str) -> int:
    """Return the number of HTTP connections that there may be at a time.

    :raises ParsingMaxConnections: when `text` is no number from 1 to `MOST_CONNECTIONS`.
    """
    return _parse_count(
        text, MOST_CONNECTIONS, lambda: cli.error.ParsingMaxConnections(text, MOST_CONNECTIONS)
    )


def parse_qemu_cgroup(text: str | None) -> str | None:
    """Blocking, briefly. Return the folder in which QEMU gets control groups, having tried that.

    :raises ParsingQemuCgroup: when none can be made and used there.
    """
    if text is None:
        return None
    import os

    from cloudvmm.host.cgroup import GroupNotUsable, check_parent

    if not os.path.isabs(text) or "\0" in text:
        raise cli.error.ParsingQemuCgroup(text)
    try:
        check_parent(text)
    except GroupNotUsable as error:
        raise cli.error.ParsingQemuCgroup(text) from error
    return text


def parse_qemu_user(text: str) -> Literal["auto", "root"] | User:
    """Return as whom QEMU runs.

    :raises ParsingQemuUser: when there is no such user.
    """
    if text == "auto":
        return "auto"
    if text == "root":
        return "root"
    import pwd

    from cloudvmm.host.user import NOBODY, User

    is_number = text.isascii() and text.isdecimal()
    try:
        found = pwd.getpwuid(int(text)) if is_number else pwd.getpwnam(text)
    except (KeyError, ValueError, OverflowError):
        if is_number and int(text) < NOBODY:
            return User(int(text), int(text))
        raise cli.error.ParsingQemuUser(text) from None
    return User(found.pw_uid, found.pw_gid)


def parse_max_vmms(text: str) -> int:
    """Return the number of VMMs that a daemon may hold.

    :raises ParsingMaxVmms: when `text` is no number from 1 to `MOST_VMMS`.
    """
    most = MOST_VMMS
    return _parse_count(text, most, lambda: cli.error.ParsingMaxVmms(text, most))


def _parse_count(text: str, most: int, failure: Callable[[], FlagError]) -> int:
    try:
        count = _descriptor(text)
    except ValueError:
        raise failure() from cli.error.InvalidDescriptor()
    if not 1 <= count <= most:
        raise failure() from cli.error.CountOutOfRange(count, most)
    return count


def parse_event_monitor(text: str) -> str | int:
    """Return the path to write events to, or the number of an inherited descriptor, which wins.

    :raises ParsingEventMonitor: when `text` does not parse.
    :raises BareEventMonitor: when it has neither.
    """
    from cloudvmm.options.error import Conversion, GrammarError
    from cloudvmm.options.grammar import parse_options

    try:
        options = parse_options(text, ("path", "fd"))
        fd = options.convert("fd", _descriptor)
        if options.is_set("fd") and fd is None:
            raise Conversion("fd", "")
    except GrammarError as error:
        raise cli.error.ParsingEventMonitor from error
    target = fd if fd is not None else options.get("path")
    if target is None:
        raise cli.error.BareEventMonitor
    return target


def parse_gdb(text: str) -> str:
    """Return the path of the socket on which a debugger is served.

    :raises ParsingGdb: when `text` does not parse.
    :raises BareGdb: when it has no path.
    """
    from cloudvmm.options.error import GrammarError
    from cloudvmm.options.grammar import parse_options

    try:
        options = parse_options(text, ("path",))
    except GrammarError as error:
        raise cli.error.ParsingGdb from error
    path = options.get("path")
    if path is None:
        raise cli.error.BareGdb
    return path


def _descriptor(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 0x7FFF_FFFF:
        raise ValueError(text)
    return int(text)
