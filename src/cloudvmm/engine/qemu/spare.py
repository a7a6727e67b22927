"""Ways over which a QEMU goes on taking its memory when the one it has is lost, laid before that happens.

A guest that runs before its memory is there may have QEMU's main loop wait for a page, as for a request to a
disk. It then executes no command but an urgent one, and only the main loop takes descriptors. So they have
been given to it before, and all of them: nobody knows which command takes a descriptor that is given while
the main loop waits.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from typing import Final

from cloudvmm.engine.base import EngineError, EngineTimeout, LinkLost
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError

COUNT: Final = 32
_LOOK_S: Final = 0.05
_PAUSE_S: Final = 30.0


class Spares:
    """`urgent` is a monitor for urgent commands, and nobody else's. Owned. For one thread."""

    def __init__(self, urgent: QmpClient) -> None:
        self._urgent = urgent
        self._numbers = itertools.count()
        self._spares: list[tuple[str, socket.socket]] = []

    def lay(self) -> None:
        """Blocking. Have `COUNT` of them; once, before any memory comes.

        :raises EngineError: QEMU is gone, or refuses.
        """
        while len(self._spares) < COUNT:
            name = f"spare{next(self._numbers)}"
            near, far = socket.socketpair()
            try:
                with far:
                    self._urgent.execute("getfd", {"fdname": name}, fds=[far.fileno()])
            except BaseException:
                near.close()
                raise
            self._spares.append((name, near))

    def take(self, check: Callable[[], None]) -> socket.socket:
        """Blocking. Have QEMU go on over one of them, and return our end of it, which is the caller's.

        What `check` raises ends it.

        :raises LinkLost: QEMU does not go on. :raises EngineError: there is none left.
        """
        if not self._spares:
            raise EngineError(f"The connection was lost {COUNT} times, and QEMU has no other way left")
        name, near = self._spares.pop()
        try:
            self._go_on(f"fd:{name}", check)
        except BaseException:
            near.close()
            raise
        return near

    def forget_events(self) -> None:
        """Take from QEMU what it tells every monitor; now and then."""
        self._urgent.poll_events()

    def close(self) -> None:
        """Release all that is left, and the monitor. Idempotent."""
        while self._spares:
            self._spares.pop()[1].close()
        self._urgent.close()

    def _go_on(self, uri: str, check: Callable[[], None]) -> None:
        deadline_s = time.monotonic() + _PAUSE_S
        while True:
            try:
                self._urgent.execute("migrate-recover", {"uri": uri}, is_urgent=True)
            except EngineTimeout as error:
                raise LinkLost("QEMU does not go on") from error
            except QmpError as refused:  # it has not seen yet that its link is gone
                check()
                if time.monotonic() > deadline_s:
                    raise LinkLost("QEMU does not go on") from refused
            else:
                return
            with contextlib.suppress(QmpError):
                self._urgent.execute("migrate-pause", is_urgent=True)
            with contextlib.suppress(EngineTimeout):
                self._urgent.wait_event("MIGRATION", timeout_s=_LOOK_S)
