"""Which users a process can be in the place of root, and what the kernel says that they may open."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cloudvmm.host.capability import Capability, lacking
from cloudvmm.host.syscall import system_call
from cloudvmm.host.user import (
    User,
    UserNotAvailable,
    Want,
    acting,
    check_changeable,
    is_judged_elsewhere,
    lone_user,
    refused,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="Needs root, to be somebody else"),
]
SOMEBODY = 2_013_300_000
ASK = "from cloudvmm.engine.qemu.identity import find_user; print(*find_user('auto', '/bin/true'))"


def told_by(*before: str) -> str:
    """Return what a process that `before` starts is told about QEMU's user."""
    done = subprocess.run([*before, sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def ids_and_powers() -> dict[str, list[str]]:
    """Return those of this thread, and whether the process can be dumped."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    found = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    kept = {name: found[name] for name in ("Uid", "Gid", "Groups", "CapEff", "CapPrm")}
    return {**kept, "dumpable": [str(system_call(157, 3))]}


def test_lone_user_is_nobody_and_never_the_same_twice():
    users = [lone_user() for _ in range(20)]

    assert len({user.uid for user in users}) == 20
    assert all(user.uid == user.gid > 65535 and user.groups == () for user in users)
    for user in users:
        with pytest.raises(ProcessLookupError):
            os.getpriority(os.PRIO_USER, user.uid)


def test_user_that_some_process_is_is_not_given_again(monkeypatch):
    monkeypatch.setattr("cloudvmm.host.user._RANGES", (range(SOMEBODY, SOMEBODY + 2),))
    words = ["setpriv", "--reuid", str(SOMEBODY), "--clear-groups", "--regid", str(SOMEBODY), "cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as somebody:
        assert somebody.stdin is not None
        assert somebody.stdout is not None
        somebody.stdin.write(b"\n")
        somebody.stdin.flush()
        assert somebody.stdout.read(1) == b"\n"  # it is that user by now
        assert {lone_user().uid for _ in range(20)} == {SOMEBODY + 1}


def test_no_user_is_to_be_had_where_all_have_a_name(monkeypatch):
    monkeypatch.setattr("cloudvmm.host.user._RANGES", (range(1),))

    with pytest.raises(UserNotAvailable):
        lone_user()


def test_kernel_says_what_a_user_may_open_that_we_may(tmp_path):
    ours, everybodys, program = (tmp_path / name for name in ("ours", "everybodys", "program"))
    for path, mode in ((ours, 0o600), (everybodys, 0o644), (program, 0o755)):
        path.touch()
        path.chmod(mode)
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    able = [Want(str(everybodys), os.R_OK), Want(str(program), os.X_OK), Want("/dev/null", os.R_OK | os.W_OK)]
    unable = [Want(str(ours), os.R_OK), Want(str(everybodys), os.R_OK | os.W_OK)]
    missing = Want(str(tmp_path / "missing"), os.R_OK)

    assert refused(User(SOMEBODY, SOMEBODY), [*able, *unable, missing]) == unable
    os.chown(ours, SOMEBODY, -1)
    assert refused(User(SOMEBODY, SOMEBODY), unable[:1]) == []
    os.chown(ours, 0, SOMEBODY + 1)
    ours.chmod(0o640)
    assert refused(User(SOMEBODY, SOMEBODY), unable[:1]) == unable[:1]
    assert refused(User(SOMEBODY, SOMEBODY, (SOMEBODY + 1,)), unable[:1]) == []


def test_thread_that_asks_is_who_it_was_before():
    before = ids_and_powers()
    with acting(User(SOMEBODY, SOMEBODY, (SOMEBODY + 5,))):
        assert os.getresuid() == (0, 0, 0)
        assert ids_and_powers()["Uid"] == ["0", "0", "0", str(SOMEBODY)]
        assert os.getgroups() == [SOMEBODY + 5]

    assert ids_and_powers() == before
    assert lacking([Capability.DAC_OVERRIDE]) == []


def test_user_that_a_thread_asks_for_may_not_signal_it():
    with acting(User(SOMEBODY, SOMEBODY)):
        signal = ["/bin/sh", "-c", f"kill -0 {threading.get_native_id()}"]
        words = ["setpriv", "--reuid", str(SOMEBODY), "--clear-groups", "--regid", str(SOMEBODY), *signal]
        done = subprocess.run(words, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "not permitted" in done.stderr


def test_kernel_that_does_not_tell_of_other_users_keeps_it_root(monkeypatch):
    monkeypatch.setattr("cloudvmm.host.user._FACCESSAT2", 100_000)

    with pytest.raises(UserNotAvailable, match=r"Linux 5\.8"):
        check_changeable()


def test_file_system_whose_server_decides_is_told_from_others(tmp_path, monkeypatch):
    found = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True)
    assert not is_judged_elsewhere(str(tmp_path))
    assert not is_judged_elsewhere(str(tmp_path / "missing"))

    monkeypatch.setattr("cloudvmm.host.user._SERVED_TYPES", {int(found.stdout, 16)})
    assert is_judged_elsewhere(str(tmp_path))


@pytest.mark.parametrize("power", ["setuid", "setgid", "kill", "sys_ptrace", "sys_nice", "dac_override"])
def test_process_without_a_power_that_it_takes_stays_root_and_says_why(power):
    without = ("setpriv", f"--bounding-set=-{power}")

    told = told_by(*without)
    assert told.startswith("None QEMU runs as root: ")
    assert told.endswith(f"here: we lack CAP_{power.upper()}")


def test_user_namespace_that_knows_no_other_user_has_none_to_give():
    if subprocess.run(["unshare", "--map-root-user", "true"], check=False).returncode:
        pytest.skip("No user namespaces here")

    assert told_by("unshare", "--map-root-user").startswith("None QEMU runs as root: ")


def test_group_that_could_not_be_had_back_keeps_it_root(monkeypatch):
    monkeypatch.setattr("os.getgroups", lambda: [0, 65534])

    with pytest.raises(UserNotAvailable, match="we are in a group that has no number"):
        check_changeable()


def test_limit_of_processes_that_would_bind_another_user_keeps_it_root(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (100, 100))

    with pytest.raises(UserNotAvailable, match="RLIMIT_NPROC"):
        check_changeable()
