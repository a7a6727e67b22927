"""Which state may follow which: the whole decision, in one table (reference: lifecycle.md section 1).

`VmState.SHUTDOWN` is never observed: shutting down drops the VM object, and what is left reads as Created.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.api.data import VmState
from cloudvmm.api.error import InvalidStateTransition

TRANSITIONS: Final = {
    VmState.CREATED: frozenset({VmState.RUNNING, VmState.PAUSED, VmState.SHUTDOWN, VmState.BREAK_POINT}),
    VmState.RUNNING: frozenset({VmState.PAUSED, VmState.SHUTDOWN, VmState.BREAK_POINT}),
    VmState.PAUSED: frozenset({VmState.RUNNING, VmState.SHUTDOWN}),
    VmState.SHUTDOWN: frozenset({VmState.RUNNING}),
    VmState.BREAK_POINT: frozenset({VmState.CREATED, VmState.RUNNING}),
}


def check_transition(current: VmState, target: VmState) -> None:
    """Do nothing where `target` may follow `current`.

    :raises InvalidStateTransition: it may not.
    """
    if target not in TRANSITIONS[current]:
        raise InvalidStateTransition(current.value, target.value)
