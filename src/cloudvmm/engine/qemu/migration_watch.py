"""How far QEMU's outgoing migration is, and that it comes to its end in the time it is given.

A thread of its own asks. Who carries QEMU's stream must not: QEMU answers nobody while it writes the last
part of it, and that part has to be carried.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from cloudvmm.engine.base import EngineError, SentTo, Transferred
from cloudvmm.engine.qemu.qmp import QmpClient

SILENCE_S: Final = 60.0  # a side that does nothing for so long ends the migration
MAX_DOWNTIME_MS: Final = 2_000_000  # QEMU takes no more
# What QEMU does not reckon with: the state of devices, the images' locks, and that the other side is told.
_REST_MS: Final = 20
MAX_BYTES_PER_S: Final = 10 << 30  # no limit: QEMU's own is 128 MiB a second
_PACE_S: Final = 0.2
_STOP_PACE_S: Final = 0.02  # the guest stands still until it is seen
_ANSWER_S: Final = 1.0
_PAGE_BYTES: Final = 4096


class MigrationWatch:
    """Watches while it is entered. `client` is lent; `sent_bytes` tells what has been carried so far.

    `at_stop` is called when the guest has been stopped, where QEMU was told to wait then. What it raises ends
    the migration.
    """

    def __init__(
        self,
        client: QmpClient,
        target: SentTo,
        sent_bytes: Callable[[], int],
        *,
        at_stop: Callable[[], None] | None = None,
    ) -> None:
        self._client = client
        self._target = target
        self._sent_bytes = sent_bytes
        self._at_stop = at_stop
        self._error: EngineError | None = None
        self._has_insisted = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="migration-watch", daemon=True)

    def __enter__(self) -> MigrationWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        insist_s = self._target.insist_s
        started_s = time.monotonic()
        while not self._end.wait(_PACE_S if self._at_stop is None else _STOP_PACE_S):
            with contextlib.suppress(EngineError):  # a QEMU that does not answer is about to be done
                if insist_s is not None and time.monotonic() - started_s >= insist_s:
                    self._insist()
                info = self._client.execute("query-migrate", timeout_s=_ANSWER_S)
                self._target.on_transferred(told(info, self._sent_bytes()))
                if info.get("status") == "pre-switchover":
                    self._go_on()

    def _go_on(self) -> None:
        """Do what is to be done while the guest stands still, and have QEMU send the rest."""
        at_stop, self._at_stop = self._at_stop, None
        if at_stop is None:
            return
        try:
            at_stop()
        except EngineError as error:
            self._error = error
            self._client.execute("migrate_cancel")
        else:
            self._client.execute("migrate-continue", {"state": "pre-switchover"})

    def _insist(self) -> None:
        """Have the guest stopped as soon as QEMU has gone over its memory once more."""
        if not self._has_insisted:
            limit = {"downtime-limit": MAX_DOWNTIME_MS}
            self._client.execute("migrate-set-parameters", limit, timeout_s=_ANSWER_S)
            self._has_insisted = True


def limit_for(downtime_ms: int) -> int:
    """Return the milliseconds that QEMU's part may take where the guest is to stand still for `downtime_ms`.

    QEMU reckons with how fast it was while the guest ran, and may be slower then.
    """
    return min(MAX_DOWNTIME_MS, max(1, downtime_ms // 4, downtime_ms * 3 // 4 - _REST_MS))


def told(info: dict[str, Any], sent_bytes: int) -> Transferred:
    """Return what `query-migrate` says of an outgoing migration."""
    ram = info.get("ram")
    if ram is None:
        return Transferred(bytes=sent_bytes)
    return Transferred(
        bytes=sent_bytes,
        iteration=max(0, ram.get("dirty-sync-count", 1) - 1),
        remaining_bytes=ram.get("remaining", 0),
        dirty_bytes_per_s=ram.get("dirty-pages-rate", 0) * ram.get("page-size", _PAGE_BYTES),
        expected_downtime_ms=info.get("expected-downtime"),
    )
