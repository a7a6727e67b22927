"""The rules by which Landlock holds a VMM's threads: made of a configuration, and put in force.

Apart from `enclosure.py`, which says when, because few VMMs are ever held: what is here is loaded then.
Reference: config.md section 15.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final

from cloudvmm.config.landlock import check_landlock_access
from cloudvmm.config.reach import Use, named_paths
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import Engine
from cloudvmm.host.landlock import Access, Ruleset
from cloudvmm.host.program import own_files
from cloudvmm.host.scratch import scratch_parent

Rules = tuple[tuple[str, Access], ...]

_NEEDED: Final = 3  # the version that the reference needs
_HANDLED: Final = Access.RUN | Access.CHANGE
_SOCKET: Final = Access.MAKE_SOCK | Access.REMOVE_FILE
_SCRATCH: Final = _SOCKET | Access.MAKE_DIR | Access.REMOVE_DIR | Access.READ_DIR
_ACCESSES: Final = {Use.READ: Access.READ, Use.CHANGE: Access.READ | Access.CHANGE, Use.SOCKET: _SOCKET}
_OF_RULES: Final = {"r": Access.RUN, "w": Access.CHANGE}
# What is looked up by name, of the host and its processes and of those that it speaks to.
_LOOKED_UP: Final = (
    *("/proc", "/sys", "/run/systemd/resolve", "/usr/share/zoneinfo"),
    *(f"/etc/{name}" for name in ("hosts", "host.conf", "resolv.conf", "nsswitch.conf", "gai.conf")),
    *(f"/etc/{name}" for name in ("services", "protocols", "localtime", "passwd", "group")),
)
_USED: Final = ("/dev/null", "/dev/zero")


def rules_of(vm_config: VmConfig, engine: Engine, *, state_dir: str | None, readable: Sequence[str]) -> Rules:
    """Blocking. Return what a VMM may reach that runs `vm_config`, made from what is `readable`.

    :raises ValidationError: there is a rule that is none. :raises EngineError: there is no engine.
    """
    reach = engine.reach(vm_config)
    own = () if state_dir is None else ((state_dir, Access.READ | Access.CHANGE),)
    return (
        *_own_rules(),
        *own,
        (scratch_parent(), _SCRATCH),
        *((path, Access.RUN) for path in reach.runnable),
        *((path, Access.READ) for path in (*reach.readable, *readable)),
        *((path, Access.READ | Access.CHANGE) for path in (*reach.usable, *_USED)),
        *((path, _ACCESSES[use]) for path, use in named_paths(vm_config)),
        *_rules_of_user(vm_config),
    )


def ruleset_of(rules: Rules) -> Ruleset:
    """Blocking. Return `rules` as the kernel has them, for the caller to close.

    :raises HostError: the kernel refuses.
    """
    ruleset = Ruleset(needed=_NEEDED, accesses=_HANDLED)
    try:
        for path, access in rules:
            ruleset.allow_present((path,), access)
    except BaseException:
        ruleset.close()
        raise
    return ruleset


def hold_thread(sockets: Iterable[str]) -> None:
    """Hold the calling thread, and all that it starts, to what serves an API whose `sockets` are at paths.

    :raises HostError: the kernel refuses.
    """
    folders = ((os.path.dirname(os.path.abspath(path)), _SOCKET) for path in sockets)
    with ruleset_of((*_own_rules(), *folders)) as ruleset:
        ruleset.restrict_thread()


def _own_rules() -> Rules:
    return tuple((path, Access.READ) for path in (*own_files(), *_LOOKED_UP))


def _rules_of_user(vm_config: VmConfig) -> Rules:
    """:raises ValidationError: there is an access that is none."""
    rules: list[tuple[str, Access]] = []
    for rule in vm_config.landlock_rules or ():
        check_landlock_access(rule)
        rules += ((rule.path, _OF_RULES[letter]) for letter in rule.access)
    return tuple(rules)
