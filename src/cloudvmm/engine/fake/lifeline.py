"""Waiting that a kill cuts short."""

from __future__ import annotations

import threading

from cloudvmm.engine.base import MachineGone


class Lifeline:
    """Whole until it is cut, once and for ever; every wait on it then fails. Any thread may use it."""

    __slots__ = ("_cut",)

    def __init__(self) -> None:
        self._cut = threading.Event()

    @property
    def is_cut(self) -> bool:
        return self._cut.is_set()

    def cut(self) -> None:
        self._cut.set()

    def wait(self, timeout_s: float | None) -> None:
        """Block for `timeout_s` seconds; None waits for the cut, 0 only looks.

        :raises MachineGone: the line is cut.
        """
        if self._cut.wait(timeout_s):
            raise MachineGone("The machine is gone")
