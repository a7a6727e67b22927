"""A snapshot's folder as it is read: whoever made it is not trusted."""

from __future__ import annotations

import os

import pytest

from cloudvmm.snapshot.error import DamagedSnapshot, SnapshotFileError
from cloudvmm.snapshot.folder import MAX_JSON_BYTES, check_files, read_file, rust_quoted
from cloudvmm.snapshot.state import SavedFile


@pytest.mark.parametrize("name", ["../secret", "engine-/../../x", "other", "engine-\0"])
def test_file_outside_the_snapshot_is_not_looked_at(tmp_path, name):
    with pytest.raises(DamagedSnapshot, match="names the file"):
        check_files(str(tmp_path), {name: SavedFile(size_bytes=1)})


def test_file_that_is_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DamagedSnapshot, match="config.json is no plain file"):
        read_file(str(tmp_path), "config.json")


@pytest.mark.parametrize("target", ["/dev/zero", "fifo"])
def test_engine_s_file_that_never_ends_is_refused(tmp_path, target):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "engine-ram").symlink_to(target)
    with pytest.raises(DamagedSnapshot, match="engine-ram is no plain file"):
        check_files(str(tmp_path), {"engine-ram": SavedFile(size_bytes=0, crc32=0)})


def test_device_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "state.json").symlink_to("/dev/zero")
    with pytest.raises(DamagedSnapshot, match="state.json is no plain file"):
        read_file(str(tmp_path), "state.json")


def test_folder_in_place_of_a_file_is_named_as_the_reference_does(tmp_path):
    (tmp_path / "state.json").mkdir()
    with pytest.raises(SnapshotFileError, match='^Error reading VM state snapshot file ".*state.json"$'):
        read_file(str(tmp_path), "state.json")


def test_file_behind_a_link_is_read(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to("elsewhere")
    assert read_file(str(tmp_path), "config.json") == b"{}"


def test_file_larger_than_any_is_refused(tmp_path):
    with open(tmp_path / "state.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(DamagedSnapshot, match="is larger than"):
        read_file(str(tmp_path), "state.json")


def test_path_is_quoted_as_the_reference_quotes():
    assert rust_quoted('/a"b\\c') == '"/a\\"b\\\\c"'
