"""The VMMs that forks make in this process: each is a `Vmm` with a socket, and lives until it is ended."""

from __future__ import annotations

import threading

from cloudvmm.api.plumbing import VmmShuttingDown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from cloudvmm.daemon.hatched import Hatched
    from cloudvmm.engine.base import Engine


class Brood:
    """Makes VMMs on engines like `engine`; a clone of a clone is one more of them. Any thread.

    A `control.sibling.Siblings`. `log` takes a level and a text, and must not block. Others are as those
    of `Vmm`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        no_shutdown: bool,
        max_connections: int = 10,
        peers: Collection[int] | None = None,
        log: Callable[[str, str], None] | None = None,
    ) -> None:
        self._engine = engine
        self._no_shutdown = no_shutdown
        self._max_connections = max_connections
        self._peers = peers
        self._log = log
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._hatched: set[Hatched] = set()
        self._is_ending = False

    def add(self, api_socket: str, name: str) -> Hatched:
        from cloudvmm.daemon.hatched import Hatched  # the first fork is early enough
        from cloudvmm.daemon.vmm import Vmm

        with self._lock:
            if self._is_ending:
                raise VmmShuttingDown
            hatched = Hatched(
                lambda on_end: Vmm(
                    self._engine.another(),
                    api_socket=api_socket,
                    no_shutdown=self._no_shutdown,
                    max_connections=self._max_connections,
                    peers=self._peers,
                    log=self._log,
                    brood=self,
                    on_end=on_end,
                ),
                self._drop,
            )
            self._hatched.add(hatched)
        return hatched

    def end(self) -> None:
        """Let all end, and none be made any more. Returns at once."""
        with self._lock:
            self._is_ending = True
            for hatched in self._hatched:
                hatched.vmm.leave()

    def wait(self) -> None:
        """Blocking. Return when the last has ended."""
        with self._lock:
            self._ended.wait_for(lambda: not self._hatched)

    def close(self) -> None:
        """Blocking. End all, and wait until nothing of them is left."""
        self.end()
        self.wait()

    def _drop(self, hatched: Hatched) -> None:
        with self._lock:
            self._hatched.discard(hatched)
            self._ended.notify_all()
