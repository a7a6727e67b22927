"""What does not fit on its disk is refused before a byte of it is written."""

from __future__ import annotations

import pytest

from cloudvmm.engine.qemu.room import TooLittleDisk, check_disk
from cloudvmm.errors import error_chain
from cloudvmm.host.room import free_disk

MIB = 1 << 20


def test_what_is_larger_than_the_disk_is_refused(tmp_path):
    with pytest.raises(TooLittleDisk, match=r"takes \d+ MiB, and the disk has \d+ MiB left") as caught:
        check_disk(str(tmp_path), 1 << 60)
    assert error_chain(caught.value)[-1] == "No space left on device (os error 28)"


def test_what_fits_is_taken(tmp_path):
    check_disk(str(tmp_path), MIB)
    with open(tmp_path / "file", "wb") as file:
        check_disk(file.fileno(), MIB)


@pytest.mark.parametrize("path", ["/proc", "/nonexistent"])
def test_where_nobody_counts_all_is_taken(path):
    check_disk(path, 1 << 60)


def test_place_that_is_not_there_has_no_room():
    with pytest.raises(FileNotFoundError):
        free_disk("/nonexistent")
