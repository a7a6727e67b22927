"""Clones of a VM as tests see them: each by its own API, its guest by the PTY of its console."""

from __future__ import annotations

import os
from typing import Any

from cloudvmm.guest.shell import GuestShell
from support.deadline import GUEST_S, HOST_S
from support.vmm import Vmm
from support.wait import wait_until


class CloneVm:
    """The clone that `told`, of the answer to `vm.fork`, is about. To be closed."""

    def __init__(self, told: dict[str, Any], *, has_shell: bool = True) -> None:
        self.id: str = told["id"]
        self.folder: str = told["directory"]
        self.vmm = Vmm(told["api_socket"])
        self._fd = -1
        if has_shell:
            self.open_shell()

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.vmm.get("vm.info")["config"]
        return config

    def open_shell(self) -> None:
        """Talk to its guest over the PTY that its console has now."""
        path = self.config()["console"]["file"]
        self._close_shell()
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._shell = GuestShell(self._fd)

    def run(self, script: str, *, timeout_s: float = GUEST_S) -> str:
        """Run `script` in its guest; fail unless it succeeds; return what it printed."""
        status, output = self._shell.run(script, timeout_s=timeout_s)
        text = output.decode(errors="replace")
        assert status == 0, f"{script!r} in the guest of {self.id}: status {status}: {text}"
        return text.rstrip("\n")

    def close(self) -> None:
        self._close_shell()
        self.vmm.close()

    def end(self) -> None:
        """End its VMM; return when it is gone."""
        self.vmm.put("vmm.shutdown")
        self.close()
        wait_until(lambda: not os.path.exists(self.vmm.path), "the clone ends", timeout_s=HOST_S)

    def _close_shell(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
