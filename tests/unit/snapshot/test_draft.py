"""A snapshot in the making: whole or not at all, whatever comes between."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest

from cloudvmm.snapshot import draft as draft_module
from cloudvmm.snapshot import folder as folder_module
from cloudvmm.snapshot.draft import DRAFT_FOLDER, Draft
from cloudvmm.snapshot.error import DraftLeft, SnapshotFileError, SnapshotUnderWay
from cloudvmm.snapshot.folder import check_files, read_file
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

    monkeypatch.setattr(draft_module.os, "write", refuse)
    with pytest.raises(SnapshotFileError, match="Error creating VM config snapshot file"):
        draft.publish(b"{}", describe)
    monkeypatch.undo()
    draft.discard()

    assert os.listdir(tmp_path) == []


def test_file_system_without_links_is_served(draft, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(draft_module.os, "link", refuse)
    draft.publish(b"{}", describe)
    draft.discard()

    assert sorted(os.listdir(tmp_path)) == ["config.json", "engine-ram", "state.json"]


def test_folder_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(SnapshotFileError, match="Error creating VM config snapshot file"):
        Draft(str(tmp_path / "missing"))


def test_large_file_is_known_by_its_size_alone(draft, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_CHECKSUM_BYTES", 2)
    draft.publish(b"{}", describe)

    state = decode_state(read_file(str(tmp_path), "state.json"))
    assert state.files["engine-ram"] == SavedFile(size_bytes=3)


# What a writer that was killed leaves, and the next attempt


class Killed(BaseException):
    """Nothing is done any more: whoever is killed has no last words."""


WHOLE = ["config.json", "engine-ram", "state.json"]
# The functions of the system that a snapshot in the making calls, each with the calls before the blow.
BLOWS = [("fsync", 0), ("fsync", 2), ("stat", 0), ("link", 0), ("link", 1), ("link", 2), ("unlink", 0)]


def kill_writer(destination, monkeypatch, name: str, calls: int) -> None:
    """Write a snapshot up to the blow, which falls before a call, and let go of the lock as a death does."""
    real, made = getattr(os, name), []

    def strike(*args):
        made.append(args)
        if len(made) > calls:
            raise Killed
        return real(*args)

    draft = Draft(str(destination))
    (destination / DRAFT_FOLDER / "engine-ram").write_bytes(b"old")
    monkeypatch.setattr(draft_module.os, name, strike)
    with pytest.raises(Killed):
        draft.publish(b"{}", describe)
        draft.discard()
    monkeypatch.undo()
    os.close(draft._fd)


def write_whole(destination) -> None:
    draft = Draft(str(destination))
    (destination / DRAFT_FOLDER / "engine-ram").write_bytes(b"ram")
    draft.publish(b"{}", describe)
    draft.discard()


@pytest.mark.parametrize(("name", "calls"), BLOWS[:-1])
def test_snapshot_succeeds_where_a_writer_was_killed(tmp_path, monkeypatch, name, calls):
    kill_writer(tmp_path, monkeypatch, name, calls)

    write_whole(tmp_path)

    assert sorted(os.listdir(tmp_path)) == WHOLE
    check_files(str(tmp_path), decode_state(read_file(str(tmp_path), "state.json")).files)


@pytest.mark.parametrize("blow", BLOWS[-1:])
def test_whole_snapshot_of_a_killed_writer_stays(tmp_path, monkeypatch, blow):
    kill_writer(tmp_path, monkeypatch, *blow)

    with pytest.raises(SnapshotFileError, match="config") as caught:
        Draft(str(tmp_path))

    assert caught.value.__cause__.errno == errno.EEXIST
    assert sorted(os.listdir(tmp_path)) == WHOLE
    check_files(str(tmp_path), decode_state(read_file(str(tmp_path), "state.json")).files)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_snapshot_succeeds_where_a_writer_was_killed_without_links(tmp_path, monkeypatch, calls):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as without_links:
        without_links.setattr(draft_module.os, "link", refuse)
        kill_writer(tmp_path, without_links, "rename", calls)

    write_whole(tmp_path)

    assert sorted(os.listdir(tmp_path)) == WHOLE


def test_file_that_came_after_a_killed_writer_is_not_touched(tmp_path, monkeypatch):
    kill_writer(tmp_path, monkeypatch, "link", 1)
    (tmp_path / "engine-ram").unlink()
    (tmp_path / "new").write_text("mine")
    (tmp_path / "new").rename(tmp_path / "engine-ram")

    with pytest.raises(SnapshotFileError, match="engine-ram"):
        Draft(str(tmp_path))

    assert (os.listdir(tmp_path), (tmp_path / "engine-ram").read_text()) == (["engine-ram"], "mine")


@pytest.mark.parametrize("naming", [b"1 ../x\n", b"x y\n", b"12", b"\xff\xff", b"1 a\0b\n"])
def test_nonsense_about_what_was_named_is_passed_over(tmp_path, naming):
    (tmp_path / DRAFT_FOLDER).mkdir()
    (tmp_path / DRAFT_FOLDER / "naming").write_bytes(naming)

    write_whole(tmp_path)

    assert sorted(os.listdir(tmp_path)) == WHOLE


def test_second_writer_in_one_folder_is_refused_and_the_first_goes_on(draft, tmp_path):
    with pytest.raises(SnapshotUnderWay):
        Draft(str(tmp_path))

    draft.publish(b"{}", describe)
    draft.discard()
    assert sorted(os.listdir(tmp_path)) == WHOLE


@pytest.mark.root
def test_draft_of_another_user_is_left_alone(tmp_path):
    (tmp_path / DRAFT_FOLDER).mkdir()
    os.chown(tmp_path / DRAFT_FOLDER, os.geteuid() + 1, -1)

    with pytest.raises(DraftLeft, match="remove it"):
        Draft(str(tmp_path))

    assert os.listdir(tmp_path) == [DRAFT_FOLDER]


def test_draft_that_is_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    destination = tmp_path / "destination"
    destination.mkdir()
    (destination / DRAFT_FOLDER).symlink_to(elsewhere)

    with pytest.raises(SnapshotFileError):
        Draft(str(destination))

    assert os.listdir(elsewhere) == ["precious"]


@pytest.mark.parametrize("number", [errno.EBADF, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_served_once(tmp_path, monkeypatch, number):
    def refuse(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(draft_module.fcntl, "flock", refuse)
    first = Draft(str(tmp_path))
    with pytest.raises(DraftLeft):
        Draft(str(tmp_path))
    first.discard()

    write_whole(tmp_path)

    assert sorted(os.listdir(tmp_path)) == WHOLE
