"""qemu-storage-daemon as a vhost-user back end for disks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

from support.deadline import HOST_S
from support.wait import wait_until


class StorageDaemon:
    """Serves the raw `image` at `path` from its making to `close`; one client after another."""

    def __init__(self, path: str, image: Path, *, queues: int = 1) -> None:
        self.path = path
        self._image = image
        self._queues = queues
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it, anew where it was killed; return once it listens."""
        program = shutil.which("qemu-storage-daemon")
        if program is None:
            pytest.skip("qemu-storage-daemon is missing")
        node = f"driver=raw,node-name=image,file.driver=file,file.filename={_escape(str(self._image))}"
        export = (
            "type=vhost-user-blk,id=export,node-name=image,writable=on"
            f",num-queues={self._queues},addr.type=unix,addr.path={_escape(self.path)}"
        )
        self._process = subprocess.Popen(
            [program, "--blockdev", node, "--export", export], stdin=subprocess.DEVNULL
        )
        wait_until(self._listens, f"a back end at {self.path}", timeout_s=HOST_S)

    def kill(self) -> None:
        """End it without a chance to clear up: its socket stays behind, dead."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(HOST_S)

    def close(self) -> None:
        """End it and clear up behind it. Idempotent."""
        if self._process is not None:
            self.kill()
            self._process = None
            Path(self.path).unlink(missing_ok=True)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "qemu-storage-daemon has ended"
        if not os.path.exists(self.path):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.path) == 0


def _escape(value: str) -> str:
    return value.replace(",", ",,")
