"""A folder by way of which files come to a process that Landlock holds to it.

What such a process opens again by a descriptor is judged by where the descriptor was opened. So a file that
it is to have later is mounted on a name in the folder for a moment and opened there. That takes the right to
mount.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Final

from cloudvmm.host.id_map import IdMap, clone_mount
from cloudvmm.host.scratch import ScratchFolder, remove_file
from cloudvmm.host.syscall import system_call, unmount
from cloudvmm.host.user import User, refused, want_again

_MOVE_MOUNT: Final = 429
_FROM_EMPTY_PATH: Final = 0x4
_HERE: Final = -100
_MEMORY: Final = "/memfd:"
_DELETED: Final = " (deleted)"
_KEPT: Final = "doorway"
_FILE: Final = "f"


class Doorway:
    """Owns its folder, `path`.

    With `state_dir`, a folder that is ours alone, it lies there and may outlive us: then the next `Doorway`
    in that folder is the same one.

    `reader` is whom the process is, where that is not us: a file that comes is its owner's to it, and that is
    `reader`, as far as its file system can show it so.
    """

    def __init__(self, state_dir: str | None = None, *, reader: User | None = None) -> None:
        """:raises OSError: there is no place for it."""
        self.reader = reader
        self._folder = None if state_dir is not None else ScratchFolder()
        self._name = f"{state_dir}/{_KEPT}/{_FILE}" if self._folder is None else self._folder.socket_path
        self.path = os.path.dirname(self._name)
        if self._folder is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            self._sweep()

    def admit(self, fd: int, undo: contextlib.ExitStack) -> int:
        """Return a descriptor of the file of `fd`, closed by `undo`, that may be opened again until then: for
        writing, too, which QEMU asks for whether or not its memory ever gets to the file.

        :raises OSError: the kernel refuses; we lack the right to mount, for one.
        """
        if os.readlink(f"/proc/self/fd/{fd}").startswith(_MEMORY):
            return fd  # it lies nowhere, and everybody may
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        os.close(os.open(self._name, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
        undo.callback(os.unlink, self._name)
        self._mount(fd)
        undo.callback(unmount, self._name)
        admitted = os.open(self._name, access | os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, admitted)
        return admitted

    def close(self) -> None:
        """Remove the folder. Idempotent."""
        if self._folder is not None:
            self._folder.close()
            return
        self._sweep()
        with contextlib.suppress(OSError):
            os.rmdir(self.path)

    def _sweep(self) -> None:
        """Take away what was about to be opened when its manager was killed."""
        with contextlib.suppress(OSError):
            remove_file(self.path, _FILE)

    def _mount(self, fd: int) -> None:
        with _named(fd):
            tree = clone_mount(fd)
        try:
            if self.reader is not None and refused(self.reader, [want_again(fd, os.O_RDWR)]):
                # Where it cannot be, the process says then that it may not.
                with contextlib.suppress(OSError), IdMap(self.reader) as id_map:
                    id_map.show(tree, os.fstat(fd))
            target = os.fsencode(self._name) + b"\0"
            system_call(_MOVE_MOUNT, tree, b"\0", _HERE, target, _FROM_EMPTY_PATH)
        finally:
            os.close(tree)


def remove_doorway(state_dir: str) -> None:
    """Remove what a `Doorway` in this folder has left, if there was one."""
    if os.path.isdir(f"{state_dir}/{_KEPT}"):
        Doorway(state_dir).close()


@contextlib.contextmanager
def _named(fd: int) -> Iterator[None]:
    """Give a file that was made without a name one for the moment: what has none is not mounted."""
    if os.fstat(fd).st_nlink:
        yield
        return
    folder = os.path.dirname(os.readlink(f"/proc/self/fd/{fd}").removesuffix(_DELETED))
    name = f"{folder}/.cloudvmm-{os.urandom(8).hex()}"
    os.link(f"/proc/self/fd/{fd}", name, follow_symlinks=True)
    try:
        yield
    finally:
        os.unlink(name)
