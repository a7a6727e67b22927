"""Folders for sockets: private, gone with their user, and swept where the user was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from cloudvmm.host.scratch import PREFIX, ScratchFolder
from support.leak import Holdings


@pytest.fixture(autouse=True)
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = Holdings()
    yield tmp_path
    before.assert_nothing_added()


def listen(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    return listener


def test_folder_is_private_and_goes_with_its_socket(parent):
    with ScratchFolder() as folder, listen(folder.socket_path):
        (path,) = parent.iterdir()
        assert path.stat().st_mode & 0o777 == 0o700
        assert [each.name for each in path.iterdir()] == ["s"]
    assert list(parent.iterdir()) == []
    folder.close()


def test_folder_in_use_is_left_alone(parent):
    with ScratchFolder() as one, listen(one.socket_path), ScratchFolder():
        assert os.path.exists(one.socket_path)


KILLED = """
import os, signal, socket, sys, tempfile
from cloudvmm.host.scratch import ScratchFolder
tempfile.tempdir = sys.argv[1]
folder = ScratchFolder()
socket.socket(socket.AF_UNIX).bind(folder.socket_path)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_of_a_process_that_was_killed_goes_when_the_next_is_made(parent):
    child = subprocess.run([sys.executable, "-c", KILLED, str(parent)], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    (left,) = parent.iterdir()
    assert (left / "s").is_socket()
    with ScratchFolder():
        assert not left.exists()


def test_what_is_no_folder_of_ours_stays(parent):
    (parent / f"{PREFIX}file").write_text("mine")
    (parent / f"{PREFIX}full").mkdir()
    (parent / f"{PREFIX}full" / "mine").touch()
    (parent / "cloudvmm-data").mkdir()
    (parent / f"{PREFIX}link").symlink_to("cloudvmm-data")
    before = sorted(parent.rglob("*"))
    ScratchFolder().close()
    assert sorted(parent.rglob("*")) == before


def test_place_that_is_none_is_told(parent, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(parent / "none"))
    with pytest.raises(FileNotFoundError):
        ScratchFolder()
