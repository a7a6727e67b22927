"""The oldest QEMU that is supported, unpacked in the folder that an environment variable names."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

import pytest

from cloudvmm.host.cache import cache_folder

OLD_QEMU = "CLOUDVMM_TEST_OLD_QEMU"


def old_qemu_tree(folder: Path) -> Path:
    """Return the program itself, in a tree below `folder` where it finds its own files; skip as below."""
    root = os.environ.get(OLD_QEMU)
    if root is None:
        pytest.skip(f"{OLD_QEMU} does not name an unpacked QEMU")
    unpacked, tree = Path(root) / "usr", folder / "usr"
    (tree / "share").mkdir(parents=True)
    (tree / "bin").mkdir()
    (tree / "lib").symlink_to(unpacked / "lib")
    (tree / "share" / "qemu").symlink_to(unpacked / "share" / "qemu")
    (tree / "share" / "seabios").symlink_to("/usr/share/seabios")
    return Path(shutil.copy(unpacked / "bin" / "qemu-system-x86_64", tree / "bin"))


def old_qemu_program(folder: Path) -> Path:
    """Return a program that starts it; skip the test where there is none.

    It is the same in every test, so that it is asked once what it can do: it lies in the folder that keeps
    the answers. Where there is no such folder, it is written into `folder`.
    """
    root = os.environ.get(OLD_QEMU)
    if root is None:
        pytest.skip(f"{OLD_QEMU} does not name an unpacked QEMU")
    kept = cache_folder()
    home = folder if kept is None else Path(kept, "old-qemu")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    program = home / f"qemu-7.2-{zlib.crc32(root.encode()):08x}"
    text = (
        "#!/bin/sh\n"
        f"export QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu\n"
        f'exec {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu -L /usr/share/seabios "$@"\n'
    )
    if not program.exists() or program.read_text() != text:
        fresh = program.with_suffix(f".{os.getpid()}")  # another process may be about to run it
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.replace(program)
    return program
