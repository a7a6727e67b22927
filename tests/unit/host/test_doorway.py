"""The folder by way of which files come to a confined process, where that outlives its manager."""

from __future__ import annotations

import os

from cloudvmm.host.doorway import Doorway, remove_doorway


def test_next_doorway_in_a_folder_is_the_same_one_without_what_was_on_its_way(tmp_path):
    first = Doorway(str(tmp_path))
    inode = os.stat(first.path).st_ino
    assert os.stat(first.path).st_mode & 0o777 == 0o700
    open(f"{first.path}/f", "w").close()
    second = Doorway(str(tmp_path))

    assert os.stat(second.path).st_ino == inode
    assert os.listdir(second.path) == []
    second.close()
    assert os.listdir(tmp_path) == []


def test_doorway_that_nobody_needs_any_more_is_removed(tmp_path):
    Doorway(str(tmp_path))

    remove_doorway(str(tmp_path))
    assert os.listdir(tmp_path) == []
    remove_doorway(str(tmp_path))


def test_doorways_that_end_with_us_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    one, other = Doorway(), Doorway()

    assert one.path != other.path
    one.close()
    other.close()
    assert os.listdir(tmp_path) == []
