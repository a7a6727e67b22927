"""Processes as /proc shows them: told apart by pid and start time, so that a reused pid fools nobody."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import msgspec

# Fields of /proc/PID/stat, counted after the name.
_STATE, _PARENT, _USER_TICKS, _SYSTEM_TICKS, _START_TIME = 0, 1, 11, 12, 19


class ProcessId(msgspec.Struct, frozen=True):
    """A process that is or was. `start_ticks` is its start in clock ticks since the machine's."""

    pid: int
    start_ticks: int
    command: str = msgspec.field(default="")

    def __hash__(self) -> int:
        return hash((self.pid, self.start_ticks))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProcessId):
            return NotImplemented
        return (self.pid, self.start_ticks) == (other.pid, other.start_ticks)

    def is_alive(self) -> bool:
        """Tell whether it still runs; one that has ended and waits for its parent does not."""
        fields = _stat(self.pid)
        return (
            fields is not None and int(fields[_START_TIME]) == self.start_ticks and fields[_STATE] not in "ZX"
        )

    def kill(self) -> None:
        """End it, if it is still the same process."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def identify(pid: int) -> ProcessId | None:
    """Return who has `pid` now, None where nobody has."""
    fields = _stat(pid)
    if fields is None:
        return None
    return ProcessId(pid, int(fields[_START_TIME]), _command(pid))


def what_children_do() -> str:
    """Return, for an error, what each thread of all that this process has started works in a second.

    A vCPU that works without end spins; one that does not work waits for what does not come.
    """
    before = _thread_ticks()
    time.sleep(1)
    after = _thread_ticks()
    return "\n".join(f"{name}: {ticks - before.get(name, ticks)} ticks" for name, ticks in after.items())


def _thread_ticks() -> dict[str, int]:
    found = {}
    for child in descendants_of(os.getpid()):
        for task in Path(f"/proc/{child.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                _, name, fields = (task / "stat").read_text().replace(")", "(").split("(", 2)
                state, *numbers = fields.split()
                label = f"{child.pid}/{task.name} {name} {state}"
                found[label] = int(numbers[_USER_TICKS - 1]) + int(numbers[_SYSTEM_TICKS - 1])
    return found


def descendants_of(pid: int) -> set[ProcessId]:
    """Return all children of `pid`, their children and so on. What has lost its parent is not found."""
    found: set[ProcessId] = set()
    waiting = [pid]
    while waiting:
        for child in _children_of(waiting.pop()):
            waiting.append(child)
            if (who := identify(child)) is not None:
                found.add(who)
    return found


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it ended under our eyes, or one of its threads did
        for listing in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, listing.read_text().split())
    return found


def state_of(pid: int) -> str:
    """Return the letter of its state, as R or T; empty where there is no such process."""
    fields = _stat(pid)
    return "" if fields is None else fields[_STATE]


def status_of(pid: int, name: str) -> int:
    """Return a number of /proc/PID/status; a thread has one, too."""
    found = re.search(rf"^{name}:\s*(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, in brackets, may itself hold blanks and brackets.
    return text.rpartition(")")[2].split()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "gone"
