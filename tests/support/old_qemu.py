"""The oldest QEMU that is supported, unpacked in the folder that an environment variable names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

OLD_QEMU = "CLOUDVMM_TEST_OLD_QEMU"


def old_qemu_program(folder: Path) -> Path:
    """Write a program into `folder` that starts it; skip the test where there is none."""
    root = os.environ.get(OLD_QEMU)
    if root is None:
        pytest.skip(f"{OLD_QEMU} does not name an unpacked QEMU")
    program = folder / "qemu-7.2"
    program.write_text(
        "#!/bin/sh\n"
        f"export QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu\n"
        f'exec {root}/usr/bin/qemu-system-x86_64 -L {root}/usr/share/qemu -L /usr/share/seabios "$@"\n'
    )
    program.chmod(0o755)
    return program
