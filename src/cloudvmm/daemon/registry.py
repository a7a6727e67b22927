"""A daemon's state folder: which VMMs it holds, so that the next daemon on the folder has them too.

`lock` is held for as long as the daemon lives, `format` says which version wrote the folder, `vmms.json` is
the list, replaced by a rename, and `vms/NAME` is the state folder of the VMM called NAME. A VMM is in the
list before it has a folder, and for as long as it has one. What is in a VMM's folder is that VMM's business.
"""

from __future__ import annotations

import os
import shutil
from typing import Final

import msgspec

from cloudvmm.config import form
from cloudvmm.config.error import DecodeError
from cloudvmm.errors import VmmError
from cloudvmm.host.error import HostError
from cloudvmm.host.lock import LockConflict
from cloudvmm.host.own_folder import format_of, replace_file, take_folder

FORMAT: Final = "daemon 1"


class DaemonFolderInUse(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The state folder {path!r} is in use by another running daemon")


class DaemonFolderFormat(HostError):
    def __init__(self, path: str, found: str) -> None:
        super().__init__(
            f"The state folder {path!r} has format {found!r}, this release writes {FORMAT!r}; "
            "use another folder or the release that wrote it"
        )


class DaemonFolderFailed(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The state folder {path!r} cannot be used")


class DaemonListBroken(VmmError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The list of VMMs {path!r} cannot be read")


class _List(msgspec.Struct):
    vmms: list[str]


class Registry:
    """Owns the folder. Every method blocks on the disk; one thread at a time."""

    def __init__(self, path: str) -> None:
        """Take the folder, making it (0700) where it is missing.

        :raises HostError: another daemon has it, another release wrote it, or the host refuses.
        """
        self._path = path
        try:
            self._lock_fd = take_folder(path)
        except LockConflict:
            raise DaemonFolderInUse(path) from None
        except OSError as error:
            raise DaemonFolderFailed(path) from error
        try:
            _check_format(path)
            os.makedirs(f"{path}/vms", mode=0o700, exist_ok=True)
        except OSError as error:
            os.close(self._lock_fd)
            raise DaemonFolderFailed(path) from error
        except BaseException:
            os.close(self._lock_fd)
            raise

    def folder_of(self, vmm_id: str) -> str:
        return f"{self._path}/vms/{vmm_id}"

    def read(self) -> list[str]:
        """Return the names of the VMMs that the last daemon held.

        :raises DaemonListBroken: the list is none of ours.
        """
        path = f"{self._path}/vmms.json"
        try:
            with open(path, "rb") as file:
                return form.decode(file.read(), _List).vmms
        except FileNotFoundError:
            return []
        except (OSError, DecodeError) as error:
            raise DaemonListBroken(path) from error

    def write(self, vmm_ids: list[str]) -> None:
        """Replace the list; after a failure it is as it was.

        :raises OSError: the disk has no room, or refuses.
        """
        replace_file(f"{self._path}/vmms.json", msgspec.json.encode(_List(vmm_ids)), is_synced=True)

    def remove(self, vmm_id: str) -> None:
        """Remove a VMM's folder, as far as that goes."""
        shutil.rmtree(self.folder_of(vmm_id), ignore_errors=True)

    def close(self) -> None:
        os.close(self._lock_fd)


def _check_format(path: str) -> None:
    found = format_of(path, FORMAT)
    if found != FORMAT:
        raise DaemonFolderFormat(path, found)
