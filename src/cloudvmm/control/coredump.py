"""Writing the guest's memory to a file (reference: lifecycle.md section 14)."""

from __future__ import annotations

import contextlib
import errno
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
        dump = _DumpFile(path)
    except (OSError, ValueError) as error:
        raise CoredumpFile from error
    try:
        machine.coredump(dump.fd)
        dump.keep()
    except OSError as error:
        raise CoredumpFile from error
    finally:
        dump.close()


class _DumpFile:
    """A file that has no name until it is whole, so that not even a killed VMM leaves half a dump.

    Where the file system knows no such files it has its name from the start.
    """

    def __init__(self, path: str) -> None:
        """Make it.

        :raises OSError: there is something at `path`, or no file can be made there.
        :raises ValueError: `path` holds a NUL.
        """
        self._path = path
        self._is_kept = False
        self._is_named = False
        self.fd = self._open()

    def keep(self) -> None:
        """:raises OSError: somebody else made a file at `path` meanwhile."""
        if not self._is_named:
            # A descriptor for the source makes this a linkat that follows the link in /proc to the file.
            try:
                os.link(f"/proc/self/fd/{self.fd}", self._path, src_dir_fd=self.fd)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._path) from None
        self._is_kept = True

    def close(self) -> None:
        """Release the file; it is gone unless `keep` was called."""
        if self._is_named and not self._is_kept:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        os.close(self.fd)

    def _open(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(self._path)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._path)
        with contextlib.suppress(OSError):
            folder = os.path.dirname(self._path) or "."
            return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._is_named = True
        return fd
