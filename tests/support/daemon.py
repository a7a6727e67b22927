"""A `cloudvmm daemon` process under test: started, spoken to, ended; it must leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cloudvmm.client import Client, ConnectionFailed, DaemonClient
from support.deadline import HOST_S
from support.process import ProcessId, descendants_of
from support.wait import wait_until

COMMAND = (sys.executable, "-X", "faulthandler", "-m", "cloudvmm.cli.main", "daemon")


class Daemon:
    """Owns the process. Its sockets, `folder/api` and those in `folder/api.d`, are gone at the end."""

    def __init__(self, folder: Path, flags: Sequence[str] = ("--engine", "fake")) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.path = str(folder / "api")
        self._stderr_path = folder.with_name(f"{folder.name}.stderr")
        self._children: set[ProcessId] = set()
        self._flags = flags
        self._process = self._start()
        self.client = DaemonClient(self.path, timeout_s=HOST_S)

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._stderr_path, "ab") as stderr:
            return subprocess.Popen(
                [*COMMAND, "--api-socket", self.path, *self._flags],
                cwd=self.folder,
                env={**os.environ, "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )

    def restart(self) -> None:
        """Start it once more, after its end, as it was started before."""
        self._process = self._start()
        self.wait_ready()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    def wait_ready(self) -> None:
        wait_until(self._is_ready, "the daemon answers", timeout_s=HOST_S)

    def vm(self, vmm_id: str) -> Client:
        """Return a client of the VMM called so, to be closed by the caller."""
        return Client(f"{self.path}.d/{vmm_id}.sock", timeout_s=HOST_S)

    def kill(self) -> None:
        """Kill it in the middle of whatever it does."""
        self._children |= descendants_of(self.pid)
        self._process.kill()
        self._process.wait(HOST_S)

    def terminate(self) -> None:
        self._process.terminate()

    def wait_end(self) -> int:
        try:
            return self._process.wait(HOST_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # faulthandler writes every thread's stack
            self._process.wait(HOST_S)
            raise AssertionError(f"The daemon did not end:\n{self.stderr}") from None

    def check_end(self, *, status: int = 0, kept: Sequence[str] = ()) -> None:
        """End it if it still runs; fail for what it leaves behind beside `kept`."""
        self.client.close()
        self._children |= descendants_of(self.pid)
        if self._process.poll() is None:
            self._process.terminate()
        try:
            found = self.wait_end()
            wait_until(
                lambda: not any(child.is_alive() for child in self._children),
                "its children have ended",
                timeout_s=HOST_S,
            )
        finally:
            self._process.kill()
            self._process.wait()
        assert found == status, self.stderr
        assert sorted(os.listdir(self.folder)) == sorted(["api.lock", *kept])

    def _is_ready(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"The daemon ended with status {self._process.returncode}:\n{self.stderr}")
        try:
            self.client.daemon_ping()
        except ConnectionFailed:
            return False
        return True
