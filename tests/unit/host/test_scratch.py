"""Folders for sockets: private, gone with their user, and swept where the user was killed."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cloudvmm.host.scratch import PREFIX, ScratchFolder
from cloudvmm.host.user import User, Want, refused
from support.leak import Holdings


@pytest.fixture(autouse=True)
def parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
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


def test_folder_for_which_no_descriptor_is_left_does_not_stay(parent):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            ScratchFolder()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert list(parent.iterdir()) == []


def test_folder_in_use_is_left_alone(parent):
    with ScratchFolder() as one, listen(one.socket_path), ScratchFolder():
        assert os.path.exists(one.socket_path)


KILLED = """
import os, signal, socket, sys
from cloudvmm.host.scratch import ScratchFolder
os.environ["TMPDIR"] = sys.argv[1]
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


KILLED_ON_THE_WAY = """
import contextlib, os, signal, sys
from cloudvmm.host.doorway import Doorway
os.environ["TMPDIR"] = sys.argv[1]
doorway = Doorway()
doorway.admit(os.open(sys.argv[2], os.O_RDWR), contextlib.ExitStack())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.root
def test_file_that_was_on_its_way_through_a_doorway_is_left_where_it_lies(parent, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "file"
    file.write_text("mine")
    command = [sys.executable, "-c", KILLED_ON_THE_WAY, str(parent), str(file)]
    child = subprocess.run(command, check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    (left,) = parent.iterdir()
    assert (left / "s").read_text() == "mine"
    with ScratchFolder():
        assert not left.exists()
    assert file.read_text() == "mine"


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
    monkeypatch.setenv("TMPDIR", str(parent / "none"))
    with pytest.raises(FileNotFoundError):
        ScratchFolder()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="Needs root, to be somebody else")
def test_socket_that_is_for_another_user_lies_where_that_gets_to_and_nothing_else_is_for_it(parent):
    somebody = User(2_013_300_000, 2_013_300_000)
    os.chmod(parent, 0o700)
    with ScratchFolder(somebody) as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(folder.socket_path)
        folder.show_socket()
        place = os.path.dirname(folder.socket_path)
        assert not Path(place).is_relative_to(parent)
        assert refused(somebody, [Want(folder.socket_path, os.W_OK), Want(place, os.X_OK)]) == []
        others = [Want(place, os.R_OK), Want(place, os.W_OK)]
        assert refused(somebody, others) == others
        another = User(somebody.uid + 1, somebody.gid + 1)
        assert refused(another, [Want(folder.socket_path, os.W_OK)]) != []
    assert not os.path.exists(place)
