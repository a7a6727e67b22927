"""Disks that go along with their guest: mirrored by QEMU over NBD while the guest runs.

The receiver's QEMU serves its images, which the guest has not yet, over a link for each; the sender's mirrors
to them and stops when the guest stands still. The sender's images stay as they are, whatever happens.

A QEMU whose mirror ends while the guest writes through it writes to memory that it has freed. So no mirror
ends by itself, and none is ended before the guest stands still.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from cloudvmm.engine.base import EngineError, EngineTimeout, LinkLost
from cloudvmm.engine.qemu.migration_watch import SILENCE_S
from cloudvmm.engine.qemu.name import node_name, part_id, qdev_id
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.host.scratch import ScratchFolder

_SERVER: Final = "copies"
_PACE_S: Final = 0.1
_END_S: Final = 0.01  # the guest stands still meanwhile
_CHUNK_BYTES: Final = 256 * 1024
# What QEMU says of a job that has met with an error and waits.
_ERRORS: Final = {"failed": "Input/output error", "nospace": "No space left on device"}


class CopyFailed(EngineError):
    def __init__(self, device_id: str, words: str) -> None:
        super().__init__(f"The disk {device_id} could not be copied: {words}")


class DiskSender:
    """Mirrors disks, by their ids, over links, which are lent. `client` is lent and may be used beside.

    `stop` is called before what was begun is given up: the guest is to stand still from then on.
    """

    def __init__(self, client: QmpClient, links: Mapping[str, int], *, stop: Callable[[], None]) -> None:
        self._client = client
        self._stop = stop
        self._links = dict(links)
        self._begun: list[str] = []

    def copy(self) -> None:
        """Blocking. Return once the other side has all that is on the disks, and gets what is written.

        :raises EngineError: it cannot be done.
        """
        for device_id, link_fd in self._links.items():
            self._begin(device_id, link_fd)
        moved_s, before = time.monotonic(), -1
        while True:
            jobs = self._jobs().values()
            if all(job["status"] == "ready" for job in jobs):
                return
            offset = sum(job["current-progress"] for job in jobs)
            if offset != before:
                moved_s, before = time.monotonic(), offset
            if time.monotonic() - moved_s > SILENCE_S:
                raise EngineTimeout(f"The disks were not copied any further for {SILENCE_S:g} s")
            time.sleep(_PACE_S)

    def finish(self) -> None:
        """Blocking. Have the other side's disks be what ours are; the guest stands still.

        :raises EngineError: they are not.
        """
        for device_id in self._begun:
            self._client.execute("block-job-cancel", {"device": _copy_id(device_id)})
        deadline_s = time.monotonic() + SILENCE_S
        while any(job["status"] != "concluded" for job in self._jobs().values()):
            if time.monotonic() > deadline_s:
                raise EngineTimeout("The disks do not come to the end of their copying")
            time.sleep(_END_S)
        self._jobs()  # none has failed
        while self._begun:
            self._remove(self._begun.pop())
        self._links = {}

    def close(self) -> None:
        """Blocking. Copy no more, hang up, and have the guest stand still, unless it was finished."""
        self._hang_up()
        if self._begun:
            self._stop()
        while self._begun:
            device_id = self._begun.pop()
            job = {"device": _copy_id(device_id), "force": True}
            with contextlib.suppress(EngineError):
                self._client.execute("block-job-cancel", job)
            deadline_s = time.monotonic() + SILENCE_S
            with contextlib.suppress(EngineError, KeyError):
                while self._jobs_of_all()[_copy_id(device_id)]["status"] != "concluded":
                    if time.monotonic() > deadline_s:
                        break
                    time.sleep(_END_S)
            self._remove(device_id)

    def _hang_up(self) -> None:
        """Have QEMU wait for no answer: what the guest writes would wait with it, and a stop of the guest."""
        for link_fd in self._links.values():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(link_fd)) as link:
                link.shutdown(socket.SHUT_RDWR)
        self._links = {}

    def _begin(self, device_id: str, link_fd: int) -> None:
        name = _copy_id(device_id)
        server = {"type": "fd", "str": name}
        node = {"driver": "nbd", "node-name": _target(device_id), "server": server, "export": name}
        mirror = {
            "job-id": name,
            "device": node_name(device_id),
            "target": _target(device_id),
            "sync": "full",
            "copy-mode": "write-blocking",
            "on-source-error": "stop",
            "on-target-error": "stop",
            "auto-dismiss": False,
        }
        _await_greeting(link_fd)
        try:
            self._client.execute("getfd", {"fdname": name}, fds=[link_fd])
            self._client.execute("blockdev-add", node, timeout_s=SILENCE_S)
            self._begun.append(device_id)
            self._client.execute("blockdev-mirror", mirror)
        except QmpError as error:
            raise CopyFailed(device_id, error.description) from None

    def _remove(self, device_id: str) -> None:
        with contextlib.suppress(EngineError):
            self._client.execute("job-dismiss", {"id": _copy_id(device_id)})
        with contextlib.suppress(EngineError):
            self._client.execute("blockdev-del", {"node-name": _target(device_id)})

    def _jobs(self) -> dict[str, dict[str, Any]]:
        """Return the jobs by disk.

        :raises CopyFailed: one has failed.
        """
        jobs = self._jobs_of_all()
        found = {}
        for device_id in self._begun:
            job = found[device_id] = jobs[_copy_id(device_id)]
            if "error" in job:
                raise CopyFailed(device_id, job["error"])
        for halted in self._client.execute("query-block-jobs"):
            for device_id in self._begun:
                if halted["device"] == _copy_id(device_id) and halted["io-status"] in _ERRORS:
                    raise CopyFailed(device_id, _ERRORS[halted["io-status"]])
        return found

    def _jobs_of_all(self) -> dict[str, dict[str, Any]]:
        return {job["id"]: job for job in self._client.execute("query-jobs")}


class DiskReceiver:
    """Serves images of a guest that comes, by their ids, over links, which are lent."""

    def __init__(self, control: QmpClient, links: Mapping[str, int]) -> None:
        self._control = control
        self._links = dict(links)
        self._relays: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._is_serving = False

    def serve(self) -> None:
        """:raises EngineError: QEMU does not."""
        with ScratchFolder() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(folder.socket_path)
            listener.listen(len(self._links))
            self._control.execute("getfd", {"fdname": _SERVER}, fds=[listener.fileno()])
            address = {"type": "fd", "data": {"str": _SERVER}}
            try:
                self._control.execute("nbd-server-start", {"addr": address})
                self._is_serving = True
                for device_id, link_fd in self._links.items():
                    self._export(device_id)
                    self._relay(folder.socket_path, link_fd)
            except QmpError as error:
                raise EngineError(error.description) from None

    def close(self) -> None:
        """Blocking. Serve no more: what came is on the images. Idempotent."""
        if self._is_serving:
            self._is_serving = False
            with contextlib.suppress(EngineError):
                self._control.execute("nbd-server-stop", timeout_s=SILENCE_S)
        for sock in self._relays:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._relays:
            sock.close()
        self._relays, self._threads = [], []

    def _export(self, device_id: str) -> None:
        name = _copy_id(device_id)
        export = {"type": "nbd", "id": name, "name": name, "node-name": node_name(device_id)}
        self._control.execute("block-export-add", export | {"writable": True})

    def _relay(self, path: str, link_fd: int) -> None:
        near = socket.socket(socket.AF_UNIX)
        self._relays.append(near)
        try:
            near.connect(path)
            link = socket.socket(fileno=os.dup(link_fd))
        except OSError as error:
            raise LinkLost("The way for a disk cannot be had") from error
        self._relays.append(link)
        for one, other in ((near, link), (link, near)):
            thread = threading.Thread(target=_pass_on, args=(one, other), name="disk-copy", daemon=True)
            thread.start()
            self._threads.append(thread)


def _await_greeting(link_fd: int) -> None:
    """Wait until the other side serves, which speaks first: QEMU would wait with its guest.

    :raises LinkLost: the other side is gone. :raises EngineTimeout: it does nothing.
    """
    poll = select.poll()
    poll.register(link_fd, select.POLLIN | select.POLLRDHUP)
    ready = poll.poll(SILENCE_S * 1000)
    if not ready:
        raise EngineTimeout(f"The other side did nothing for {SILENCE_S:g} s")
    if ready[0][1] & ~select.POLLIN:
        raise LinkLost("The other side is gone")


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(_CHUNK_BYTES):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def _copy_id(device_id: str) -> str:
    return part_id(device_id, "copy")


def _target(device_id: str) -> str:
    """Return a node's name, which no disk of the API has."""
    return node_name(f"copy of {qdev_id(device_id)}")
