"""Files of one user that are shown as another's."""

from __future__ import annotations

import os
import resource

import pytest

from cloudvmm.host.id_map import IdMap
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
        with IdMap(SOMEBODY) as id_map:
            shown = id_map.open(fd, os.O_RDWR)
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
    with (
        IdMap(SOMEBODY) as id_map,
        (tmp_path / "file").open("w") as file,
        pytest.raises(OSError, match="no user namespace"),
    ):
        id_map.open(file.fileno(), os.O_WRONLY)

    assert capfd.readouterr() == ("", "")


def test_program_that_never_makes_a_user_namespace_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    (tmp_path / "unshare").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("cloudvmm.host.id_map._LONGEST_WAIT_S", 0.1)
    with (
        IdMap(SOMEBODY) as id_map,
        (tmp_path / "file").open("w") as file,
        pytest.raises(TimeoutError, match="does not begin"),
    ):
        id_map.open(file.fileno(), os.O_WRONLY)

    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_nothing_is_left_of_a_file_that_cannot_be_shown(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    pipe_fds = os.pipe()
    with IdMap(SOMEBODY) as id_map, pytest.raises(OSError, match=r"."):
        id_map.open(pipe_fds[0], os.O_RDONLY)

    for fd in pipe_fds:
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_files_of_one_owner_are_shown_by_the_namespace_that_was_prepared(tmp_path, monkeypatch):
    spawned = []

    def spawn(*arguments, **options):
        spawned.append(arguments)
        return real_spawn(*arguments, **options)

    real_spawn = os.posix_spawn
    monkeypatch.setattr(os, "posix_spawn", spawn)
    with IdMap(SOMEBODY) as id_map:
        id_map.prepare()
        for name in ("one", "another"):
            with (tmp_path / name).open("wb") as file:
                try:
                    shown = id_map.open(file.fileno(), os.O_WRONLY)
                except OSError as error:
                    pytest.skip(f"This file system or kernel has no such mounts: {error}")
            assert os.fstat(shown).st_uid == SOMEBODY.uid
            os.close(shown)
        assert len(spawned) == 1


def test_namespace_that_was_prepared_for_nothing_is_gone(tmp_path, monkeypatch):
    before = set(os.listdir("/proc/self/fd"))
    with IdMap(SOMEBODY) as id_map:
        id_map.prepare()

    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with IdMap(SOMEBODY) as id_map:
        id_map.prepare()  # it is where it is needed that the error matters
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_namespace_for_which_there_are_too_few_descriptors_leaves_none(left):
    before = set(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + left, limits[1]))
    try:
        with IdMap(SOMEBODY) as id_map:
            id_map.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert set(os.listdir("/proc/self/fd")) == before
