"""Control groups: one's own, gone with all that is in it, and swept where their user was killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloudvmm.errors import error_chain
from cloudvmm.host.cgroup import (
    ControlGroup,
    GroupNotUsable,
    check_parent,
    limit_processes,
    remove_group,
    sweep_groups,
)
from support.cgroup import group_folder, groups_in, members_of
from support.deadline import HOST_S
from support.leak import Holdings

MOST = 4096


@pytest.fixture
def parent():
    before = Holdings()
    with group_folder() as folder:
        yield folder
    before.assert_nothing_added()


@pytest.fixture
def sleeper():
    """A process, in no group of ours."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def made(parent, state=None):
    return ControlGroup(str(parent), most_processes=MOST, state_dir=None if state is None else str(state))


def join(group, process):
    os.write(group.procs_fd, b"%d" % process.pid)


def put_below(group, process):
    (group / "below/deep").mkdir(parents=True)
    (group / "below/beside").mkdir()
    (group / "below/deep/cgroup.procs").write_text(str(process.pid))


def test_group_is_its_owners_alone_and_goes_with_what_is_in_it(parent, sleeper):
    group = made(parent)
    assert groups_in(parent) == [Path(group.path)]
    assert Path(group.path).stat().st_mode & 0o777 == 0o700
    join(group, sleeper)
    assert members_of(Path(group.path)) == {sleeper.pid}
    group.close()
    group.close()
    assert sleeper.wait(HOST_S) == -signal.SIGKILL
    assert groups_in(parent) == []


def test_group_in_which_others_were_made_goes_with_them_all(parent, sleeper):
    group = made(parent)
    put_below(Path(group.path), sleeper)
    group.close()
    assert sleeper.wait(HOST_S) == -signal.SIGKILL
    assert groups_in(parent) == []


def test_group_for_which_no_descriptor_is_left_does_not_stay(parent):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            made(parent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert groups_in(parent) == []


BARE = """
import contextlib, os, sys
from cloudvmm.host.cgroup import ControlGroup
os.close(0)
os.close(1)
with contextlib.closing(ControlGroup(sys.argv[1], most_processes=10)) as group:
    print(group.procs_fd, file=sys.stderr)
"""


def test_descriptor_for_a_child_is_above_those_that_are_the_childs_own(parent):
    words = [sys.executable, "-c", BARE, str(parent)]
    child = subprocess.run(words, check=False, timeout=HOST_S, capture_output=True, text=True)
    assert int(child.stderr) > 2
    assert groups_in(parent) == []


@pytest.mark.parametrize(("controllers", "limit"), [("cpu pids\n", "4096"), ("cpu\n", "none"), ("", "none")])
def test_processes_are_limited_where_they_are_counted(controllers, limit, tmp_path):
    (tmp_path / "cgroup.controllers").write_text(controllers)
    (tmp_path / "pids.max").write_text("none")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        limit_processes(fd, MOST)
    finally:
        os.close(fd)
    assert (tmp_path / "pids.max").read_text() == limit


def test_groups_in_use_and_those_of_others_are_left_alone(parent, sleeper):
    (parent / "cloudvmm-mine").mkdir()
    (parent / "cloudvmm-kept-0123456789ab").mkdir()
    group = made(parent)
    join(group, sleeper)
    before = groups_in(parent)
    sweep_groups(str(parent))
    assert groups_in(parent) == before
    assert sleeper.poll() is None
    group.close()


KILLED = """
import os, signal, sys
from cloudvmm.host.cgroup import ControlGroup
group = ControlGroup(sys.argv[1], most_processes=10)
os.write(group.procs_fd, sys.argv[2].encode())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_group_whose_user_was_killed_is_swept_with_what_is_in_it(parent, sleeper):
    words = [sys.executable, "-c", KILLED, str(parent), str(sleeper.pid)]
    child = subprocess.run(words, check=False, timeout=HOST_S)
    assert child.returncode == -signal.SIGKILL
    (left,) = groups_in(parent)
    assert members_of(left) == {sleeper.pid}
    sweep_groups(str(parent))
    assert groups_in(parent) == []
    assert sleeper.wait(HOST_S) == -signal.SIGKILL


def test_group_that_was_left_is_swept_with_those_in_it(parent, sleeper):
    put_below(parent / "cloudvmm-0123456789ab", sleeper)
    sweep_groups(str(parent))
    assert groups_in(parent) == []
    assert sleeper.wait(HOST_S) == -signal.SIGKILL


def test_group_that_was_made_a_moment_before_its_user_was_killed_is_swept(parent):
    (parent / "cloudvmm-0123456789ab").mkdir()
    sweep_groups(str(parent))
    assert groups_in(parent) == []


def test_group_that_is_to_outlive_us_is_found_again_and_goes_with_its_file(parent, sleeper, tmp_path):
    first = made(parent, tmp_path)
    join(first, sleeper)
    first.leave()
    sweep_groups(str(parent))
    found = ControlGroup.adopt(str(tmp_path))
    assert found is not None
    assert members_of(Path(found.path)) == {sleeper.pid}
    found.close()
    assert sleeper.wait(HOST_S) == -signal.SIGKILL
    assert groups_in(parent) == []
    assert os.listdir(tmp_path) == []
    assert ControlGroup.adopt(str(tmp_path)) is None


def test_group_that_nobody_goes_on_with_is_removed(parent, sleeper, tmp_path):
    group = made(parent, tmp_path)
    join(group, sleeper)
    group.leave()
    remove_group(str(tmp_path))
    assert sleeper.wait(HOST_S) == -signal.SIGKILL
    assert groups_in(parent) == []
    assert os.listdir(tmp_path) == []


def test_another_group_takes_the_place_of_one_that_was_left(parent, sleeper, tmp_path):
    first = made(parent, tmp_path)
    join(first, sleeper)
    first.leave()
    second = made(parent, tmp_path)
    assert groups_in(parent) == [Path(second.path)]
    second.close()
    assert groups_in(parent) == []


def test_group_that_cannot_be_removed_is_not_forgotten(parent, tmp_path):
    left = tmp_path / "cloudvmm-kept-0123456789ab"
    left.mkdir()
    (left / "file").touch()
    (tmp_path / "cgroup").write_text(str(left))
    with pytest.raises(OSError, match=left.name):
        made(parent, tmp_path)
    assert (tmp_path / "cgroup").read_text() == str(left)
    assert groups_in(parent) == []


def test_file_of_a_group_that_was_never_made_goes(parent, tmp_path):
    (tmp_path / "cgroup").write_text(f"{parent}/cloudvmm-kept-0123456789ab")
    assert ControlGroup.adopt(str(tmp_path)) is None
    remove_group(str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["mine", "cloudvmm-kept-", "cloudvmm-kept-0123456789ab/.."])
def test_group_with_another_name_than_ours_is_not_believed_to_be_ours(name, parent, sleeper, tmp_path):
    (parent / "mine").mkdir()
    (parent / "mine/cgroup.procs").write_text(str(sleeper.pid))
    (tmp_path / "cgroup").write_text(f"{parent}/{name}")
    remove_group(str(tmp_path))
    assert groups_in(parent) == [parent / "mine"]
    assert sleeper.poll() is None


def test_folder_in_which_groups_can_be_made_is_left_as_it_was(parent):
    check_parent(str(parent))
    assert groups_in(parent) == []


def test_folder_that_is_none_of_groups_is_refused(tmp_path):
    with pytest.raises(GroupNotUsable) as caught:
        check_parent(str(tmp_path))
    assert error_chain(caught.value)[1] == "It is no folder of control groups of version 2 (cgroup2)"
    assert os.listdir(tmp_path) == []


def test_folder_that_only_looks_like_one_is_refused(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("")
    with pytest.raises(GroupNotUsable):
        check_parent(str(tmp_path))
    assert os.listdir(tmp_path) == ["cgroup.controllers"]


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(GroupNotUsable, match="none") as caught:
        check_parent(f"{tmp_path}/none")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_folder_in_which_no_groups_can_be_made_is_refused(parent):
    (parent / "cgroup.max.descendants").write_text("0")
    with pytest.raises(GroupNotUsable) as caught:
        check_parent(str(parent))
    assert isinstance(caught.value.__cause__, OSError)
    (parent / "cgroup.max.descendants").write_text("max")


CHECKED = """
import os, sys
from cloudvmm.host.cgroup import GroupNotUsable, check_parent
os.setgroups([])
os.setresuid(65534, 65534, 65534)  # only now: it may not be let into the folder that we are imported from
try:
    check_parent(sys.argv[1])
except GroupNotUsable as error:
    cause = error.__cause__
    print("write:" if cause.filename is None else cause.filename, cause.strerror)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="It takes root to be somebody else")
def test_folder_in_which_we_can_make_groups_and_fill_none_is_refused(parent):
    """So it is where that folder was given to us, and not the group that we are in ourselves."""
    for name in ("", "cgroup.procs"):
        os.chown(parent / name, 65534, 65534)
    child = subprocess.run(
        [sys.executable, "-c", CHECKED, str(parent)],
        check=False,
        timeout=HOST_S,
        capture_output=True,
        text=True,
    )
    assert child.stdout == "write: Permission denied\n", child
    assert groups_in(parent) == []
