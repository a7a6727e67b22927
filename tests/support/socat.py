"""A guest that has `socat`, which speaks VSOCK: the default guest with one more archive behind its own."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.guest.cpio import write_cpio
from cloudvmm.guest.tree import Entry
from support.booted import direct_boot, find_guest


def socat_program() -> str:
    """Return the path of the host's `socat`; skip the test where there is none."""
    found = shutil.which("socat")
    if found is None:
        pytest.skip("There is no socat on this host: install the package socat")
    return found


def payload_with_socat(folder: Path) -> dict[str, Any]:
    """Return the payload that boots the default guest with /usr/bin/socat in it."""
    initramfs = folder / "socat.cpio"
    if not initramfs.exists():
        whole = Path(find_guest().initramfs).read_bytes()
        initramfs.write_bytes(whole.ljust(-(-len(whole) // 4) * 4, b"\0") + _archive(socat_program()))
    return direct_boot() | {"initramfs": str(initramfs)}


def _archive(program: str) -> bytes:
    """Return `program` and the libraries that it is linked with, each where the loader looks for it."""
    listing = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    files = {"/usr/bin/socat": program}
    files |= {path: path for path in re.findall(r"(/\S+) \(0x", listing)}
    folders = sorted({str(parent) for path in files for parent in Path(path).parents if str(parent) != "/"})
    return write_cpio(
        [
            *(Entry(path.strip("/"), stat.S_IFDIR | 0o755) for path in folders),
            *(
                Entry(path.strip("/"), stat.S_IFREG | 0o755, Path(source).read_bytes())
                for path, source in sorted(files.items())
            ),
        ]
    )
