"""Whether files can be shown here as another user's, which is how QEMU gets those that are root's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudvmm.host.id_map import IdMap
from cloudvmm.host.user import User

_SOMEBODY = User(2_013_300_000, 2_013_300_000)


def check_id_maps(folder: Path) -> None:
    """Skip the test where root's files of `folder` cannot be: in a chroot, for one, or on an overlay."""
    if os.geteuid() != 0:
        return
    probe = folder / "shown"
    probe.touch()
    with probe.open("rb") as file, IdMap(_SOMEBODY) as id_map:
        try:
            os.close(id_map.open(file.fileno(), os.O_RDONLY))
        except OSError as error:
            pytest.skip(f"This file system or kernel has no id-mapped mounts: {error}")
    probe.unlink()
