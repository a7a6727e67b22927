"""The QEMUs that tests run on: the one on the path, the oldest supported, and the newest there is."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from cloudvmm.engine.qemu.binary import BINARY_NAME, parse_version
from cloudvmm.engine.qemu.engine import QemuEngine
from support.deadline import HOST_S
from support.old_qemu import old_qemu_program

VERSIONS: Final = ("path", "7.2", "newest")
# For what differs little between versions: `./test.sh --long` runs it on the oldest, too.
SAMPLED_VERSIONS: Final = ("path", pytest.param("7.2", marks=pytest.mark.long), "newest")
NEW_QEMU: Final = "CLOUDVMM_TEST_NEW_QEMU"


def find_qemu(which: str, folder: Path) -> str:
    """Return the program of one of `VERSIONS`; what must be written for that goes into `folder`.

    Skips the test where there is none: scripts/old_qemu.sh and scripts/new_qemu.sh fetch them.
    """
    if which == "7.2":
        return str(old_qemu_program(folder))
    if which == "newest":
        root = os.environ.get(NEW_QEMU)
        if root is None:
            pytest.skip(f"{NEW_QEMU} does not name an unpacked QEMU")
        return f"{root}/bin/{BINARY_NAME}"
    found = shutil.which(BINARY_NAME)
    if found is None:
        pytest.skip(f"The program {BINARY_NAME} is missing")
    return found


def look_apart(engine: QemuEngine, folder: Path) -> None:
    """Have `engine` ask its QEMU, which this test alone runs, and keep the answers in `folder`."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CLOUDVMM_CACHE", str(folder))
        engine.facts()


@cache
def version_of(program: str) -> tuple[int, int]:
    """Return the version of a QEMU: major, minor."""
    answer = subprocess.run(
        [program, "-version"], stdout=subprocess.PIPE, text=True, check=True, timeout=HOST_S
    ).stdout
    version = parse_version(answer)
    assert version is not None, answer
    return version[:2]
