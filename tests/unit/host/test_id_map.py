"""Files of one user that are shown as another's."""

from __future__ import annotations

import os

import pytest

from cloudvmm.host import id_map
from cloudvmm.host.id_map import open_as
from cloudvmm.host.user import User, Want, refused

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="Needs root, to mount"),
]
SOMEBODY = User(2_013_300_000, 2_013_300_000)


def test_file_that_is_shown_as_a_users_can_be_opened_again_by_it_and_has_not_changed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(0o600)
    os.chown(path, 1000, 1001)
    fd = os.open(path, os.O_RDWR)
    want = Want(f"/proc/self/fd/{fd}", os.R_OK | os.W_OK)
    assert refused(SOMEBODY, [want]) == [want]
    try:
        shown = open_as(SOMEBODY, fd, os.O_RDWR)
    except OSError as error:
        pytest.skip(f"This file system or kernel has no such mounts: {error}")

    assert refused(SOMEBODY, [Want(f"/proc/self/fd/{shown}", os.R_OK | os.W_OK)]) == []
    assert os.fstat(shown).st_uid == SOMEBODY.uid
    assert (path.stat().st_uid, path.stat().st_gid) == (1000, 1001)
    os.pwrite(shown, b"behind", 0)
    assert path.read_bytes() == b"behind"
    os.close(fd)
    os.close(shown)


def test_host_without_user_namespaces_is_told_by_the_error_alone(tmp_path, monkeypatch, capfd):
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare: not permitted >&2\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match="no user namespace"):
        open_as(SOMEBODY, file.fileno(), os.O_WRONLY)

    assert capfd.readouterr() == ("", "")


def test_program_that_never_makes_a_user_namespace_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    (tmp_path / "unshare").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(id_map, "_LONGEST_WAIT_S", 0.1)
    with (tmp_path / "file").open("w") as file, pytest.raises(TimeoutError, match="does not begin"):
        open_as(SOMEBODY, file.fileno(), os.O_WRONLY)

    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_nothing_is_left_of_a_file_that_cannot_be_shown(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    pipe_fds = os.pipe()
    with pytest.raises(OSError, match=r"."):
        open_as(SOMEBODY, pipe_fds[0], os.O_RDONLY)

    for fd in pipe_fds:
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
