"""Writing the guest's memory to a file (reference: lifecycle.md section 14)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from cloudvmm.api.data import VmState
from cloudvmm.api.error import VmmShuttingDown
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Job, Steps
from cloudvmm.engine.base import Machine, MachineGone
from cloudvmm.errors import VmmError

FILE_URL = "file://"


class CoredumpRefused(VmmError):
    """Trying to coredump while VM is not running or paused"""


class CoredumpUrl(VmmError):
    def __init__(self, url: str) -> None:
        super().__init__(f"Could not extract path from URL: {url}")


class CoredumpFile(VmmError):
    """coredump file"""


def dump_guest(
    vm: Vm, destination_url: str, *, pause: Callable[[], Steps], resume: Callable[[], Steps]
) -> Generator[Job, Any, None]:
    """Steps: pause a running guest, write the dump, let the guest go on. A failed dump leaves no file.

    `pause` and `resume` are the steps of the commands of that name.

    :raises CoredumpRefused: neither running nor paused.
    :raises CoredumpUrl: not a `file://` URL.
    :raises CoredumpFile: the file exists, or cannot be made or written.
    """
    if vm.state not in (VmState.RUNNING, VmState.PAUSED):
        raise CoredumpRefused
    path = _path_of(destination_url)
    was_running = vm.state is VmState.RUNNING
    if was_running:
        yield from pause()
    try:
        yield partial(_write_dump, vm.machine, path)
    except Exception as error:
        # Cloud Hypervisor leaves the VM paused when the dump fails. Here its guest goes on, if it is there.
        if was_running and not isinstance(error, MachineGone | VmmShuttingDown):
            with contextlib.suppress(VmmError):
                yield from resume()
        raise
    if was_running:
        yield from resume()


def _path_of(url: str) -> str:
    path = url.removeprefix(FILE_URL)
    if not url.startswith(FILE_URL) or not path:
        raise CoredumpUrl(url)
    return path


def _write_dump(machine: Machine, path: str) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        raise CoredumpFile from error
    try:
        machine.coredump(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)
