"""As which user QEMU runs where root starts it, and which of root's powers it has then.

Its user is that of no other process, so that it is nobody to all others. `setpriv` makes it that, behind our
thread: a thread of ours that were the same user could be signalled by QEMU, and we with it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from typing import Final, Literal

from cloudvmm.engine.base import EngineError
from cloudvmm.errors import error_chain
from cloudvmm.host.capability import Capability, lacking
from cloudvmm.host.program import is_script
from cloudvmm.host.user import (
    User,
    UserNotAvailable,
    Want,
    check_changeable,
    is_judged_elsewhere,
    lone_user,
    refused,
)

# A user of its own where we are root, or ours, or a certain one.
Wish = Literal["auto", "root"] | User

# What `setpriv` needs to make its program another user, and gives up then.
CHANGING: Final = (Capability.SETUID, Capability.SETGID, Capability.SETPCAP)
# With the last of them `access`, too, knows the powers of who is not root; QEMU looks for its files by that.
_SECURE_BITS: Final = "+noroot,+noroot_locked,+no_setuid_fixup,+no_setuid_fixup_locked"
_GROUP_USES: Final = stat.S_IRGRP | stat.S_IWGRP


class OtherUser(EngineError):
    """QEMU cannot run as the user of --qemu-user"""


def find_user(wish: Wish, binary: str) -> tuple[User | None, str | None]:
    """Return the user of a QEMU that is about to be started, None where it is ours, and why it is not so.

    Who starts QEMU by way of a script may have it do what takes root.

    :raises OtherUser: it is to be a certain one, and cannot.
    """
    ours = os.geteuid()
    if wish == "root" or (wish == "auto" and ours != 0) or (isinstance(wish, User) and wish.uid == ours):
        return None, None
    if wish == "auto" and is_script(binary):
        return None, f"{binary} is a script: QEMU runs as root"
    try:
        check_changeable()
        return (wish if isinstance(wish, User) else lone_user()), None
    except (UserNotAvailable, OSError) as error:
        if isinstance(wish, User):
            raise OtherUser from error
        return None, f"QEMU runs as root: {': '.join(error_chain(error))}"


def find_obstacle(wish: Wish, wants: Iterable[Want]) -> str | None:
    """Return why a QEMU that was to be a user of its own has to be root for what is wanted, None if not."""
    if wish != "auto":
        return None
    found = next((want.path for want in wants if is_judged_elsewhere(want.path)), None)
    return None if found is None else f"QEMU runs as root: the file system of {found} knows no powers of root"


def in_groups_of(user: User, devices: Iterable[str]) -> User:
    """Return `user`, in the groups that an administrator has set aside for those of `devices` too."""
    groups = set(user.groups)
    for path in devices:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            if found.st_gid and found.st_mode & _GROUP_USES == _GROUP_USES:
                groups.add(found.st_gid)
    return User(user.uid, user.gid, tuple(sorted(groups)))


def powers_for(user: User, wants: Iterable[Want]) -> list[Capability]:
    """Return what `user` needs of root's powers to open what is wanted; none where it may anyway.

    :raises OSError: we cannot ask on behalf of that user.
    """
    lacked = refused(user, wants)
    if not lacked:
        return []
    is_for_reading = not any(want.mode & os.W_OK or _is_barred(want) for want in lacked)
    if is_for_reading and not lacking([Capability.DAC_READ_SEARCH]):
        return [Capability.DAC_READ_SEARCH]
    return [Capability.DAC_OVERRIDE]


def setpriv_words(user: User, kept: Iterable[Capability]) -> list[str]:
    """Return what makes `setpriv` start its program as `user`, with those powers alone that are `kept`."""
    powers = ",".join(["-all", *(f"+{each.name.lower()}" for each in kept)])
    groups = ("--groups", ",".join(map(str, user.groups))) if user.groups else ("--clear-groups",)
    return [
        *("--reuid", str(user.uid), "--regid", str(user.gid), *groups),
        *("--inh-caps", powers, "--ambient-caps", powers, "--bounding-set", powers),
        *("--securebits", _SECURE_BITS),
    ]


def _is_barred(want: Want) -> bool:
    """Whether a program is wanted that not everybody may run, wherever it lies."""
    return bool(want.mode & os.X_OK) and not os.stat(want.path).st_mode & stat.S_IXOTH
