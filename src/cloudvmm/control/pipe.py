"""The way between a console and an engine that outlives us: two named pipes in a folder of the state folder.

The folder is ours, and holds nothing else: the engine may show it, and give the pipes, to who is to open
them. Nobody but us makes or removes anything there.

The engine has both ends of each open, so that neither ends with us. What a guest says while there is no
manager stays in the pipe for the next one, up to `PIPE_BYTES`; a guest that says more then waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from cloudvmm.control.relay import CHUNK_BYTES

PIPE_BYTES = 1 << 20
_FOLDER = "consoles"
_ENDS = ("in", "out")


class PipeStream:
    """The pipes `path`.out, from the engine, and `path`.in."""

    engine_fd = None

    def __init__(self, path: str, *, is_continued: bool = False) -> None:
        """Make them anew; those that are `is_continued` an engine has open already.

        :raises OSError: they cannot be had.
        """
        self.read_fd = self.write_fd = -1
        try:
            self.read_fd = _open(f"{path}.out", is_continued=is_continued)
            self.write_fd = _open(f"{path}.in", is_continued=is_continued)
        except OSError:
            self.close()
            raise
        with contextlib.suppress(OSError):  # the system's limit is lower, or reached: it stays as it is
            fcntl.fcntl(self.read_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def read(self) -> bytes:
        return os.read(self.read_fd, CHUNK_BYTES)

    def write(self, data: bytes) -> int:
        return os.write(self.write_fd, data)

    def close(self) -> None:
        """The pipes stay, for the engine may be there still."""
        for name in ("read_fd", "write_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)


def pipe_path(state_dir: str, name: str) -> str:
    """Return the path of the pipes of console `name`."""
    return f"{state_dir}/{_FOLDER}/{name}"


def remove_pipes(path: str) -> None:
    """Remove the pipes, and with the last ones their folder."""
    for end in _ENDS:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.{end}")
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))


def _open(path: str, *, is_continued: bool) -> int:
    if not is_continued:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    # For both directions: so it opens at once, and never ends.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
