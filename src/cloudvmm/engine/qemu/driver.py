"""Which virtio devices the guest's drivers have in use.

QEMU sends no event when a driver takes a device or resets it, but can be asked about each device: for its
status; or, of QEMU 11, which dies of that question (11.1.3 does), whether its first queue is set up. A thread
asks, often while the guest boots or has just changed something, ever less often after that, and never while
the guest is paused. So what it finds is as late as `pause_s` says, and what a driver does and undoes between
two looks is not seen. A device that is to go is looked at once more before it does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from cloudvmm.engine.base import DriverChanged, DriverKind, EngineError, EngineTimeout
from cloudvmm.engine.qemu.name import device_id
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.host.eventfd import EventFd

SHORTEST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
_PAUSE_SHARE: Final = 0.1  # of the time since the last change

_QUERY_TIMEOUT_S: Final = 1.0
_END_TIMEOUT_S: Final = 2.0
_NOT_ASKABLE: Final = frozenset({"vhost-user-i2c"})  # QEMU 7.2 to 10.0 end themselves over the question
_DRIVER_OK: Final = "VIRTIO_CONFIG_S_DRIVER_OK"


class NoThread(EngineError):
    """The host gives no thread to watch the guest's drivers"""


def pause_s(quiet_s: float, *, is_settled: bool) -> float:
    """Return how long to wait for the next look, `quiet_s` after the last change.

    `is_settled` is a guest whose drivers have every device: what can change is rare.
    """
    if is_settled:
        return LONGEST_PAUSE_S
    return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, quiet_s * _PAUSE_SHARE))


def device_paths(devices: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Translate the answer to ``x-query-virtio``: id of the API to QEMU's path.

    Those alone that are ours and can be asked about.
    """
    paths = {}
    for device in devices:
        parts = device["path"].split("/")
        name = device_id(parts[3]) if len(parts) > 3 and parts[2] == "peripheral" else None
        if name is not None and device.get("name") not in _NOT_ASKABLE:
            paths[name] = device["path"]
    return paths


def is_active(status: dict[str, Any]) -> bool:
    """Say whether the device whose ``x-query-virtio-status`` this is has a driver that is ready."""
    return any(word.startswith(_DRIVER_OK) for word in status["status"]["statuses"])


class DriverWatch:
    """Asks over `client`, which is lent and may be used by others as well.

    `kind_of` tells how changes of a device are to be told, `has_driver` whether a driver has a device that
    QEMU is not to be asked about, None for others; `beside` is done with each look. `dies_of_status` is a
    QEMU that must not be asked for a device's status; `is_vhost_user` tells of a device whether its queues
    are another program's. `fileno` is readable while `take` has something to give. `close` ends the thread; a
    client that was aborted makes that quick.
    """

    def __init__(
        self,
        client: QmpClient,
        *,
        kind_of: Callable[[str], DriverKind] = lambda _: DriverKind.VIRTIO,
        has_driver: Callable[[str], bool | None] = lambda _: None,
        beside: Callable[[], None] = lambda: None,
        dies_of_status: bool = False,
        is_vhost_user: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._client = client
        self._kind_of = kind_of
        self._has_driver = has_driver
        self._beside = beside
        self._dies_of_status = dies_of_status
        self._is_vhost_user = is_vhost_user
        self._changed = threading.Condition()
        self._is_running = False
        self._is_hurried = False
        self._is_over = False
        self._is_closed = False
        self._active: set[str] = set()
        self._gone: set[str] = set()  # since the look under way began, as the next
        self._seen: set[str] = set()
        self._found: list[DriverChanged] = []
        self._news = EventFd()
        self._last_change_s = time.monotonic()
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        return self._news.fileno()

    @property
    def active(self) -> list[str]:
        """The ids of the devices whose drivers are known to be ready."""
        with self._changed:
            return sorted(self._active)

    def go_on(self, active: Iterable[str]) -> None:
        """Know which devices' drivers were ready, before `run`: that is told already."""
        self._active = set(active)

    def run(self) -> None:
        """Look from now on, often at first: the guest runs.

        :raises NoThread: the operating system gives none.
        """
        with self._changed:
            if self._is_over:
                return
            self._is_running = True
            self._last_change_s = time.monotonic()
            self._changed.notify()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="driver-watch", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise NoThread from error
                self._thread = thread

    def hurry(self) -> None:
        """Look often again, as soon as the guest runs: a device was plugged."""
        with self._changed:
            self._is_hurried = True
            self._last_change_s = time.monotonic()
            self._changed.notify()

    def rest(self) -> None:
        """Look no more until `run`: the guest stands still."""
        with self._changed:
            self._is_running = False
            self._changed.notify()

    def take(self) -> list[DriverChanged]:
        """Return what was found since the last call; never blocks."""
        with self._changed:
            if self._is_over:
                return []
            self._news.read()
            found, self._found = self._found, []
            return found

    def look_at(self, device_id: str) -> None:
        """Blocking, two seconds at most. Look now whether a driver has the device, which is about to go.

        Then `forget` knows, however early the device goes. Where QEMU does not say, it knows what it knew.
        """
        with contextlib.suppress(EngineError):
            path = device_paths(self._execute("x-query-virtio", {})).get(device_id)
            if path is None or not self._is_active(device_id, path):
                return
            with self._changed:
                self._seen.add(device_id)
                if device_id not in self._active:
                    self._active.add(device_id)
                    self._tell([self._change(device_id, is_active=True)])

    def forget(self, device_id: str) -> bool:
        """Take note that the device is gone; return whether a driver had it, as far as is known."""
        with self._changed:
            self._gone.add(device_id)
            was_active = device_id in self._active
            self._active.discard(device_id)
            return was_active

    def end(self) -> None:
        """Look no more, and have nothing to give from now on."""
        with self._changed:
            self._is_over = True
            if not self._is_closed:
                self._news.read()
            self._changed.notify()

    def close(self) -> None:
        """Blocking. End the thread and release the descriptor. Idempotent."""
        self.end()
        if self._thread is not None:
            self._thread.join(_END_TIMEOUT_S)
        with self._changed:
            self._is_closed = True
            self._news.close()

    def _run(self) -> None:
        # Whatever ends the conversation ends the machine too, and is told elsewhere; a QEMU without these
        # commands cannot be watched.
        is_settled = False
        with contextlib.suppress(EngineError):
            while self._wait(is_settled):
                with contextlib.suppress(EngineTimeout):  # QEMU is busy: the next look tells
                    is_settled = self._look()

    def _wait(self, is_settled: bool) -> bool:
        """Wait until it is time to look; False when there is nothing more to look at."""
        with self._changed:
            due_s = time.monotonic() + self._pause_s(is_settled=is_settled)
            while not self._is_over:
                if self._is_running and self._is_hurried:
                    self._is_hurried = False
                    due_s = time.monotonic() + self._pause_s(is_settled=False)
                left_s = due_s - time.monotonic()
                if self._is_running and left_s <= 0:
                    return True
                before = self._is_running
                self._changed.wait(left_s if self._is_running else None)
                if self._is_running and not before:
                    due_s = time.monotonic() + self._pause_s(is_settled=is_settled)
            return False

    def _pause_s(self, *, is_settled: bool) -> float:
        return pause_s(time.monotonic() - self._last_change_s, is_settled=is_settled)

    def _look(self) -> bool:
        """Ask about every device; return whether all have their driver."""
        self._beside()
        with self._changed:
            self._gone.clear()
            self._seen.clear()
        paths = device_paths(self._execute("x-query-virtio", {}))
        active = {name for name, path in paths.items() if self._is_active(name, path)}
        with self._changed:
            active = (active | self._seen) - self._gone
            gone = self._active - active
            found = [self._change(name, is_active=False) for name in sorted(gone)]
            found += [self._change(name, is_active=True) for name in paths if name in active - self._active]
            self._active = active
            self._tell(found)
        return len(active) == len(paths)

    def _tell(self, found: list[DriverChanged]) -> None:
        if found and not self._is_over:
            self._found += found
            self._last_change_s = time.monotonic()
            self._news.write()

    def _change(self, name: str, *, is_active: bool) -> DriverChanged:
        return DriverChanged(name, is_active=is_active, kind=self._kind_of(name))

    def _is_active(self, name: str, path: str) -> bool:
        known = self._has_driver(name)
        if known is not None:
            return known
        try:
            if self._dies_of_status:
                return self._has_queue(name, path)
            return is_active(self._execute("x-query-virtio-status", {"path": path}))
        except QmpError:
            return False  # unplugged meanwhile

    def _has_queue(self, name: str, path: str) -> bool:
        """Say whether the first queue is set up; a reset takes all down.

        :raises QmpError: a vhost-user device is not started.
        """
        question = {"path": path, "queue": 0}
        if self._is_vhost_user(name):  # the other question would make the back end stop the queue
            self._execute("x-query-virtio-vhost-queue-status", question)
            return True
        return bool(self._execute("x-query-virtio-queue-status", question)["vring-desc"])

    def _execute(self, command: str, arguments: dict[str, Any]) -> Any:
        return self._client.execute(command, arguments, timeout_s=_QUERY_TIMEOUT_S)
