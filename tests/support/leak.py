"""What this process holds: descriptors, threads, child processes; and what it holds more than before."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from support.deadline import HOST_S
from support.wait import POLL_EVERY_S


class Holdings:
    """A picture of what is held. Zombies count: a child that nobody waited for is a leak."""

    def __init__(self) -> None:
        self.descriptors = _descriptors()
        self.threads = {thread for thread in threading.enumerate() if thread.is_alive()}
        self.children = children_of(os.getpid())

    def added(self) -> list[str]:
        """Describe each thing that is held now and was not when the picture was taken."""
        now = Holdings()
        return [
            *(
                f"fd {fd} is {what}"
                for fd, what in sorted(now.descriptors.items() - self.descriptors.items())
            ),
            *(f"thread {thread.name}" for thread in now.threads - self.threads),
            *(f"process {pid}: {command_of(pid)}" for pid in now.children - self.children),
        ]

    def assert_nothing_added(self, *, timeout_s: float = HOST_S) -> None:
        """Fail if something is still held after `timeout_s`: what ends may take its time, but not more."""
        deadline = time.monotonic() + timeout_s
        while added := self.added():
            if time.monotonic() > deadline:
                raise AssertionError(f"Left behind: {'; '.join(added)}")
            time.sleep(POLL_EVERY_S)


def children_of(pid: int) -> set[int]:
    """Return the pids of all children of all threads of `pid`, zombies too."""
    children: set[int] = set()
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The thread has just ended.
            children.update(int(child) for child in listing.read_text().split())
    return children


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "gone"


def _descriptors() -> dict[int, str]:
    """Descriptor to what it is; the one that lists the folder is not among them."""
    descriptors: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return descriptors
