"""What can be made to go wrong, and when. Public: tests and authors of clients fill the table.

A fault strikes at the start of an operation, before the operation checks or changes anything::

    faults = Faults({"boot": Fail(PayloadError, "The kernel is invalid")})
    faults.set("pause", Hang())              # from any thread, also while the machine runs
    faults.set("nmi", Delay(0.5), times=1)   # the first call only
    faults.clear("boot")
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final, assert_never

import msgspec

from cloudvmm.engine.base import EngineError
from cloudvmm.engine.fake.lifeline import Lifeline

OPERATIONS: Final = frozenset(
    {
        "build",
        "boot",
        "pause",
        "resume",
        "power_button",
        "nmi",
        "coredump",
        "add_device",
        "remove_device",
        "resize_vcpus",
        "add_memory",
        "request_zone_size",
        "resize_balloon",
        "resize_disk",
        "counters",
        "pci_resources",
        "save",
        "send",
        "transfer_rest",
        "check_postcopy",
        "fork",
        "freeze_disks",
        "close",
    }
)


class Fail(msgspec.Struct, frozen=True):
    """Raise `error` with `text`, or with the text of its class; nothing else happens."""

    error: type[EngineError]
    text: str | None = None


class Hang(msgspec.Struct, frozen=True):
    """Never come back; only `kill` (`abort_build` for `build`) ends the operation."""


class Delay(msgspec.Struct, frozen=True):
    """Go on after `seconds`, or fail with `MachineGone` as soon as the machine is killed."""

    seconds: float


class Die(msgspec.Struct, frozen=True):
    """The machine ends: `Exited(reason)` is reported and the operation fails with `MachineGone`."""

    reason: str = "The machine died of an injected fault"


Fault = Fail | Hang | Delay | Die


class Faults:
    """Operation name to fault. Every method may be called by any thread at any time."""

    def __init__(self, table: Mapping[str, Fault] | None = None) -> None:
        self._lock = threading.Lock()
        self._table: dict[str, tuple[Fault, int | None]] = {}
        for operation, fault in (table or {}).items():
            self.set(operation, fault)

    def set(self, operation: str, fault: Fault, *, times: int | None = None) -> None:
        """Let `fault` strike the next `times` calls of `operation`, or every one until `clear`.

        :raises ValueError: no operation has that name, or `times` is less than 1.
        :raises TypeError: `fault` is none.
        """
        if not isinstance(fault, Fault):
            raise TypeError(f"{fault!r} is no fault; for an error set Fail(its class, its text)")
        if operation not in OPERATIONS:
            raise ValueError(f"No operation is called {operation}; there are {', '.join(sorted(OPERATIONS))}")
        if times is not None and times < 1:
            raise ValueError(f"A fault strikes at least once, not {times} times")
        with self._lock:
            self._table[operation] = (fault, times)

    def clear(self, operation: str | None = None) -> None:
        """Heal `operation`, or all of them. What already waits goes on waiting."""
        with self._lock:
            if operation is None:
                self._table.clear()
            else:
                self._table.pop(operation, None)

    def has(self, operation: str) -> bool:
        """Tell whether a fault waits for `operation`."""
        with self._lock:
            return operation in self._table

    def take(self, operation: str) -> Fault | None:
        """Return the fault that strikes this call, and count it."""
        with self._lock:
            fault, times = self._table.get(operation, (None, None))
            if fault is None or times is None:
                return fault
            if times == 1:
                del self._table[operation]
            else:
                self._table[operation] = (fault, times - 1)
            return fault


def strike(fault: Fault | None, lifeline: Lifeline, *, die: Callable[[str], None]) -> None:
    """Let `fault` happen to the operation under way. Blocks as the fault wants.

    :raises EngineError: the fault is a failure.
    :raises MachineGone: the machine died of it, or was killed meanwhile.
    """
    match fault:
        case None:
            return
        case Fail():
            raise fault.error(*(() if fault.text is None else (fault.text,)))
        case Hang():
            lifeline.wait(None)
        case Delay():
            lifeline.wait(fault.seconds)
        case Die():
            die(fault.reason)
            lifeline.wait(0)
        case _:
            assert_never(fault)
