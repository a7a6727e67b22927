"""The root tree of the default guest as plain values, before it becomes an archive or a disk.

What lies in the tree is decided here and in `module.py`; how it is written is `cpio.py`'s and
`disk.py`'s business.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import msgspec

ROOTFS = Path(__file__).parent / "rootfs"

_FOLDERS = ("dev", "dev/pts", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr", "var", "var/log")


class Entry(msgspec.Struct, frozen=True):
    """One member of the tree. `path` has no leading slash; `mode` has the file type's bits."""

    path: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def regular(path: str, content: bytes, *, executable: bool = False) -> Entry:
    return Entry(path, stat.S_IFREG | (0o755 if executable else 0o644), content)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int) -> Entry:
    return Entry(path, stat.S_IFCHR | 0o600, device=(major, minor))


def own_files() -> dict[str, bytes]:
    """Return our own files of the guest, by path in the tree, in a stable order."""
    files = sorted(path for path in ROOTFS.rglob("*") if path.is_file())
    return {str(path.relative_to(ROOTFS)): path.read_bytes() for path in files}


def root_tree(*, busybox: bytes, applets: Iterable[str], modules: Mapping[str, bytes]) -> list[Entry]:
    """Return the whole tree in an order that makes every folder before its members.

    `applets` are the paths at which busybox is to be found ("bin/cat"), `modules` the files below
    lib/modules by path, indexes included.
    """
    members: dict[str, Entry] = {path: folder(path) for path in _FOLDERS}
    members["tmp"] = Entry("tmp", stat.S_IFDIR | 0o1777)
    members["dev/console"] = character_device("dev/console", 5, 1)
    members["dev/null"] = character_device("dev/null", 1, 3)
    members["bin/busybox"] = regular("bin/busybox", busybox, executable=True)
    for path in applets:
        members.setdefault(path, symlink(path, "/bin/busybox"))
    for path, content in own_files().items():
        members[path] = regular(path, content, executable=content.startswith(b"#!"))
    for path, content in modules.items():
        members[path] = regular(path, content)
    for path in list(members):
        for parent in PurePosixPath(path).parents:
            if str(parent) != ".":
                members.setdefault(str(parent), folder(str(parent)))
    return [members[path] for path in sorted(members)]
