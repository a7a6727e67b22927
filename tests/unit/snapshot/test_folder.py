"""A snapshot's folder: whole or not at all, whatever comes between."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest

from cloudvmm.snapshot import folder as folder_module
from cloudvmm.snapshot.error import DamagedSnapshot, SnapshotFileError
from cloudvmm.snapshot.folder import Draft, check_files, read_file, rust_quoted
from cloudvmm.snapshot.state import SavedEngine, SavedFile, SavedState, decode_state


def describe(files):
    return SavedState(
        program="p",
        engine=SavedEngine(name="e", version="1"),
        vm=msgspec.Raw(b"{}"),
        device_tree={},
        files=files,
    )


@pytest.fixture
def draft(tmp_path):
    draft = Draft(str(tmp_path))
    with open(f"{draft.folder}/engine-ram", "wb") as file:
        file.write(b"ram")
    yield draft
    draft.discard()


def test_published_snapshot_is_whole(draft, tmp_path):
    draft.publish(b"{}", describe)
    draft.discard()

    assert sorted(os.listdir(tmp_path)) == ["config.json", "engine-ram", "state.json"]
    state = decode_state(read_file(str(tmp_path), "state.json"))
    check_files(str(tmp_path), state.files)
    assert state.files["engine-ram"].size_bytes == 3


def test_discarded_draft_leaves_nothing(draft, tmp_path):
    draft.discard()
    draft.discard()
    assert os.listdir(tmp_path) == []


def test_files_are_their_owners_alone(draft, tmp_path):
    draft.publish(b"{}", describe)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o600


def test_nothing_has_its_name_before_all_is_written(draft, tmp_path):
    def look(files):
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
        return describe(files)

    draft.publish(b"{}", look)


@pytest.mark.parametrize("name", ["config.json", "state.json", "engine-ram"])
def test_name_that_is_taken_meanwhile_undoes_all(draft, tmp_path, name):
    (tmp_path / name).write_text("mine")

    with pytest.raises(SnapshotFileError) as caught:
        draft.publish(b"{}", describe)
    draft.discard()

    assert caught.value.__cause__.errno == errno.EEXIST
    assert (os.listdir(tmp_path), (tmp_path / name).read_text()) == ([name], "mine")


def test_disk_that_is_full_leaves_nothing(draft, tmp_path, monkeypatch):
    def refuse(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module.os, "write", refuse)
    with pytest.raises(SnapshotFileError, match="Error creating VM config snapshot file"):
        draft.publish(b"{}", describe)
    monkeypatch.undo()
    draft.discard()

    assert os.listdir(tmp_path) == []


def test_file_system_without_links_is_served(draft, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(folder_module.os, "link", refuse)
    draft.publish(b"{}", describe)
    draft.discard()

    assert sorted(os.listdir(tmp_path)) == ["config.json", "engine-ram", "state.json"]


def test_folder_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(SnapshotFileError, match="Error creating VM config snapshot file"):
        Draft(str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["../secret", "engine-/../../x", "other"])
def test_file_outside_the_snapshot_is_not_looked_at(tmp_path, name):
    with pytest.raises(DamagedSnapshot, match="names the file"):
        check_files(str(tmp_path), {name: SavedFile(size_bytes=1)})


def test_file_that_is_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert read_file(str(tmp_path), "config.json") == b""


def test_large_file_is_known_by_its_size_alone(draft, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_CHECKSUM_BYTES", 2)
    draft.publish(b"{}", describe)

    state = decode_state(read_file(str(tmp_path), "state.json"))
    assert state.files["engine-ram"] == SavedFile(size_bytes=3)


def test_path_is_quoted_as_the_reference_quotes():
    assert rust_quoted('/a"b\\c') == '"/a\\"b\\\\c"'
