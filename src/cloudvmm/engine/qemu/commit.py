"""Writing what is in an overlay to the image below it, with which its disk goes on: a job of QEMU.

A job that fails ends by itself, and one that takes too long is called off. Either way the disk goes on in its
overlay, and nothing that it holds is lost: what was written below already is what the overlay covers.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Final

from cloudvmm.engine.base import EngineError, EngineTimeout
from cloudvmm.engine.qemu.qmp import QmpClient

_LEAST_S: Final = 30.0
_BYTES_PER_S: Final = 20 * 1024 * 1024
_CALLED_OFF_S: Final = 30.0  # for what is on its way to the image
_SLICE_S: Final = 0.2


class CommitFailed(EngineError):
    """The overlay was not written to the image below: why; its disk goes on in it."""


class Commit:
    """The job `name` that writes the overlay of the node `overlay` to the node `base` right below it.

    `root` is the node of the disk: the overlay, or a filter above it.
    """

    def __init__(self, control: QmpClient, name: str, *, root: str, overlay: str, base: str) -> None:
        self._control = control
        self._name = name
        # Without a base it would be the last of the chain, which others stand on.
        nodes = {"device": root, "top-node": overlay, "base-node": base}
        self._request = {"job-id": name, **nodes, "auto-dismiss": False}

    def run(self, overlay_bytes: int) -> None:
        """Blocking. Do it all; `overlay_bytes` are what there is to write, if the guest writes no more.

        :raises QmpError: QEMU refuses.
        :raises CommitFailed: it could not be written, or not in time; QEMU has given it up.
        :raises EngineError: QEMU is gone, or does not say whether it has given it up.
        """
        limit_s = _LEAST_S + overlay_bytes / _BYTES_PER_S
        deadline = time.monotonic() + limit_s
        self._control.execute("block-commit", self._request)
        try:
            if not self._reaches("ready", deadline):
                raise CommitFailed("It ended too early")
            self._control.execute("job-complete", {"id": self._name})
            self._reaches("concluded", deadline)
        except EngineTimeout:
            self._call_off()
            raise CommitFailed(f"It was not written within {limit_s:.0f} s") from None
        finally:
            with contextlib.suppress(EngineError):
                self._control.execute("job-dismiss", {"id": self._name})

    def _call_off(self) -> None:
        with contextlib.suppress(CommitFailed):  # which is what is wanted
            self._control.execute("job-cancel", {"id": self._name})
            self._reaches("concluded", time.monotonic() + _CALLED_OFF_S)

    def _reaches(self, status: str, deadline: float) -> bool:
        """Wait until the job has `status`, and say whether it has: False where it has succeeded already.

        :raises CommitFailed: it has failed. :raises EngineTimeout: it takes longer.
        """
        while True:
            job = self._look()
            if job["status"] == "concluded" and "error" in job:
                raise CommitFailed(job["error"])
            if job["status"] in (status, "concluded"):
                return bool(job["status"] == status)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise EngineTimeout("The job of QEMU takes too long")
            with contextlib.suppress(EngineTimeout):
                self._control.wait_event("JOB_STATUS_CHANGE", timeout_s=min(left_s, _SLICE_S))

    def _look(self) -> dict[str, Any]:
        for job in self._control.execute("query-jobs"):
            if job["id"] == self._name:
                return dict(job)
        raise CommitFailed("QEMU knows nothing of it any more")
