"""A folder that belongs to one process at a time, and to one user."""

from __future__ import annotations

import os
import stat

import pytest

from cloudvmm.control.journal import Journal
from cloudvmm.daemon.registry import Registry
from cloudvmm.host.lock import LockConflict
from cloudvmm.host.own_folder import FolderNotOurs, take_folder


def test_a_folder_is_made_for_its_owner_alone_and_taken_once(tmp_path):
    path = f"{tmp_path}/below/folder"
    fd = take_folder(path)

    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    with pytest.raises(LockConflict):
        take_folder(path)
    os.close(fd)
    os.close(take_folder(path))


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
@pytest.mark.parametrize("taker", [take_folder, Journal, Registry])
def test_a_folder_that_others_may_write_to_is_refused_before_anything_is_done_there(tmp_path, taker, mode):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("lock", "vm.new", "vmms.json.new"):
        (folder / name).symlink_to(precious)
    folder.chmod(mode)

    with pytest.raises(FolderNotOurs, match="yours alone"):
        taker(str(folder))

    assert precious.read_text() == "precious"
    assert sorted(os.listdir(folder)) == ["lock", "vm.new", "vmms.json.new"]


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(FolderNotOurs):
        take_folder(str(tmp_path))
