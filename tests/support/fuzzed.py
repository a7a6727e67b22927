"""A server on the fake engine that takes whatever is thrown at it, and an HTTP session that throws.

What is thrown may name files: `harmless` keeps them inside the server's own folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection

from support.vmm import Vmm
from support.wait import wait_until

TIMEOUT_S = 20.0


class FuzzedServer:
    """Owns the process. One that ended because it was told to is started again by `reach`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder / "api")
        self.starts = 0
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._vmm = Vmm(self.path)
        (folder / "kernel").write_bytes(b"a kernel")

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def reach(self, state: str) -> None:
        """Have a server that holds "nothing", or a VM that is "created" or "booted"."""
        try:
            wait_until(self._has_nothing, "the VM can be deleted", timeout_s=TIMEOUT_S)
        except (OSError, EOFError):  # it is ending, or has ended
            self._start_again()
        if state == "nothing":
            return
        self._vmm.put("vm.create", self._config())
        if state == "booted":
            self._vmm.put("vm.boot")

    def close(self) -> int | None:
        """End it; return its exit status."""
        self._vmm.close()
        if self._process is None:
            return None
        self._process.terminate()
        return self._process.wait(TIMEOUT_S)

    def _has_nothing(self) -> bool:
        """Return whether the VM is gone; one that is being sent stays until that has failed."""
        return self._vmm.exchange("PUT", "vm.delete").status == 204

    def _start_again(self) -> None:
        self._vmm.close()
        if self._process is not None:
            status = self._process.wait(TIMEOUT_S)
            assert status == 0, f"The server ended with status {status}:\n{self.said[-5000:]}"
        self.starts += 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cloudvmm.cli.main", "--engine", "fake", "--api-socket", self.path],
                cwd=self.folder,
                env={**os.environ, "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_ready, "the server answers", timeout_s=TIMEOUT_S)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, EOFError):
            return self._vmm.exchange("GET", "vmm.ping").status == 200
        return False

    def _config(self) -> dict[str, Any]:
        return {
            "payload": {"kernel": str(self.folder / "kernel")},
            "memory": {"size": 256 << 20, "shared": True},
            "console": {"mode": "Off"},
        }


def harmless(value: Any) -> Any:
    """Return `value` with no text in it that leads out of the folder that a server runs in.

    A whole number has no fraction: to JSON Schema 1.0 is an integer, to the reference it is not.
    """
    match value:
        case str():
            return value.replace("..", "").replace("/", "") if "/" in value or ".." in value else value
        case float() if value.is_integer():
            return int(value)
        case list():
            return [harmless(item) for item in value]
        case dict():
            return {key: harmless(item) for key, item in value.items()}
        case _:
            return value


def session(path: str) -> requests.Session:
    """Return a session whose every request goes to the UNIX socket at `path`."""
    made = requests.Session()
    made.trust_env = False
    made.mount("http://", _Adapter(path))
    return made


class _Connection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


class _Pool(HTTPConnectionPool):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def _new_conn(self) -> _Connection:
        return _Connection(self._path)


class _Adapter(HTTPAdapter):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._pool = _Pool(path)

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> _Pool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
