"""Starting, watching and ending a process, with a shell in the place of QEMU."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading

import pytest

from cloudvmm.engine.base import EngineError, EngineTimeout
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec
from cloudvmm.host.cgroup import ControlGroup
from cloudvmm.host.pid_file import find_process
from support.cgroup import group_folder
from support.deadline import HOST_S
from support.leak import Holdings
from support.wait import wait_until

LONG_S = 20.0
PR_SET_THP_DISABLE = 41
STANDARD_SIGNALS = 0x7FFFFFFF  # the C library ignores two of its own beyond them
FOREVER = "while :; do read -r line || exec sleep 300; done"


@pytest.fixture
def start(request):
    """Start a shell script as the process; it is closed after the test."""

    def run(script: str, **options) -> ChildProcess:
        process = ChildProcess(ProcessSpec(["/bin/sh", "-c", script], **options))
        request.addfinalizer(process.close)
        return process

    return run


def test_pidfd_is_readable_when_the_process_has_ended(start):
    process = start("exit 0")

    assert select.select([process], [], [], LONG_S)[0] == [process]
    assert process.has_ended()


def test_status_and_last_words_make_the_ending(start):
    process = start("echo 'qemu-system-x86_64: -device x: no such device' >&2; exit 1")
    process.wait(timeout_s=LONG_S)

    assert process.ending() == "QEMU exited with status 1: -device x: no such device"
    assert process.exit_status() == 1


def test_signal_is_named_in_the_ending(start):
    process = start(FOREVER)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout_s=LONG_S)

    assert process.ending() == "QEMU was killed by signal 9 (SIGKILL)"
    assert process.exit_status() is None


@pytest.fixture
def ignored_sigchld():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("ignored_sigchld")
def test_end_whose_status_the_kernel_dropped_is_an_end_all_the_same(start):
    process = start(f"echo bad >&2; {FOREVER}")
    wait_until(process.words, "its words", timeout_s=LONG_S)
    process.kill()
    process.wait(timeout_s=LONG_S)

    assert process.exit_status() is None
    assert process.ending() == "QEMU ended, nobody knows how: bad"


def test_end_whose_status_somebody_else_took_is_an_end_all_the_same(start):
    process = start("exit 3")
    os.waitpid(process.pid, 0)

    assert process.has_ended()
    assert process.ending() == "QEMU ended, nobody knows how"


def test_warnings_are_words_but_no_complaint(start):
    process = start(
        "echo 'qemu-system-x86_64: warning: old' >&2; echo '/usr/bin/qemu-system-x86_64: bad' >&2"
    )
    process.wait(timeout_s=LONG_S)

    assert process.words() == "warning: old\nbad"
    assert process.complaint() == "bad"


def test_only_the_end_of_a_flood_of_words_is_kept(start):
    process = start("yes complaint | head -c 3000000; exit 1")
    process.wait(timeout_s=LONG_S)

    assert 3000 < len(process.words()) <= 4096


def test_wait_on_a_process_that_runs_is_a_timeout(start):
    with pytest.raises(EngineTimeout):
        start(FOREVER).wait(timeout_s=0.05)


def test_named_descriptors_keep_their_numbers_and_others_are_closed():
    receiver, sender = os.pipe()
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    try:
        process = ChildProcess(ProcessSpec(["/bin/ls", "/proc/self/fd"], fds=[sender]))
        process.wait(timeout_s=LONG_S)
        listed = {int(line) for line in process.words().split()}
        process.close()
    finally:
        for fd in (receiver, sender, other):
            os.close(fd)

    # 3 is the folder itself, which ls has open.
    assert listed == {0, 1, 2, 3, sender}


def test_process_has_a_session_of_its_own_and_reads_nothing(start):
    process = start("read -r line || exit 3")
    process.wait(timeout_s=LONG_S)

    assert process.exit_status() == 3
    assert os.getsid(0) != process.pid


def test_signals_that_python_ignores_are_not_ignored_in_the_child(start):
    process = start(FOREVER)
    wait_until(lambda: b"300" in _cmdline(process.pid), "the shell runs", timeout_s=LONG_S)
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        status = dict(line.split(":\t", 1) for line in file if ":\t" in line)

    assert int(status["SigIgn"], 16) & STANDARD_SIGNALS == 0
    assert int(status["SigBlk"], 16) & STANDARD_SIGNALS == 0


def test_huge_pages_are_off_in_the_child_alone(start):
    process = start(FOREVER, thp=False)

    assert _thp_enabled(process.pid) == "0"
    assert _thp_enabled(os.getpid()) == "1"


def test_manager_without_huge_pages_stays_so(start):
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    try:
        start(FOREVER, thp=False)
        assert _thp_enabled(os.getpid()) == "0"
    finally:
        prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def test_huge_pages_stay_on_in_what_is_spawned_beside(monkeypatch, start):
    """The flag is the whole process's: whoever spawns meanwhile would hand it on."""
    spawn = os.posix_spawn
    begun, beside = threading.Event(), []

    def spawn_slowly(*arguments, **options):
        if not begun.is_set():
            begun.set()
            other = threading.Thread(target=lambda: beside.append(ChildProcess(ProcessSpec(["/bin/cat"]))))
            other.start()
            other.join(0.2)  # what does not wait for us is done by then
            assert not beside
        return spawn(*arguments, **options)

    monkeypatch.setattr(os, "posix_spawn", spawn_slowly)
    start(FOREVER, thp=False)
    wait_until(lambda: beside, "the other process", timeout_s=LONG_S)
    beside[0].close()


@pytest.fixture
def no_standard_input():
    kept = os.dup(0)
    os.close(0)
    yield
    os.dup2(kept, 0)
    os.close(kept)


@pytest.mark.usefixtures("no_standard_input")
def test_words_are_kept_where_the_log_would_be_standard_input(start):
    process = start("echo bad >&2; read -r line || exit 3")
    process.wait(timeout_s=LONG_S)

    assert process.ending() == "QEMU exited with status 3: bad"


@pytest.mark.usefixtures("no_standard_input")
def test_descriptor_that_would_be_standard_input_is_refused():
    receiver, sender = os.pipe()
    try:
        with pytest.raises(EngineError, match="descriptor 0: standard input or output is closed"):
            ChildProcess(ProcessSpec(["/bin/true"], fds=[receiver]))
    finally:
        os.close(receiver)
        os.close(sender)


def test_missing_program_is_an_error_and_leaves_nothing(tmp_path):
    before = Holdings()

    with pytest.raises(EngineError, match="QEMU could not be started"):
        ChildProcess(ProcessSpec(["/nowhere/qemu"], state_dir=str(tmp_path)))
    before.assert_nothing_added()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argument", ["\ud800", "a\0b"])
def test_argument_that_no_program_can_have_is_an_error_and_leaves_nothing(argument):
    before = Holdings()

    with pytest.raises(EngineError, match="QEMU could not be started"):
        ChildProcess(ProcessSpec(["/bin/true", argument]))
    before.assert_nothing_added()


def test_no_thread_to_be_had_is_an_error_and_leaves_nothing(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = Holdings()
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="QEMU could not be started"):
        patch.setattr(threading.Thread, "start", refuse)
        ChildProcess(ProcessSpec(["/bin/true"]))
    before.assert_nothing_added()


def test_state_folder_tells_pid_and_argv_and_is_empty_after_close(start, tmp_path):
    process = start(FOREVER, state_dir=str(tmp_path), pid_file=str(tmp_path / "pid"))
    found = find_process(str(tmp_path / "pid"))

    assert found is not None
    assert found.pid == process.pid
    found.close()
    assert (tmp_path / "argv").read_text() == f"/bin/sh\n-c\n{FOREVER}\n"
    assert (tmp_path / "qemu.log").exists()
    process.close()
    assert os.listdir(tmp_path) == []


def test_state_is_the_owners_alone_whatever_was_there_before(start, tmp_path):
    (tmp_path / "argv").touch(mode=0o666)
    before = os.umask(0)
    try:
        start(FOREVER, state_dir=str(tmp_path), pid_file=str(tmp_path / "pid"))
    finally:
        os.umask(before)

    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"argv": 0o600, "pid": 0o600, "qemu.log": 0o600}


def test_log_in_a_folder_is_begun_anew_before_it_fills_the_disk(start, tmp_path, monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.process._LOG_CHECK_S", 0.02)
    done, go = tmp_path / "done", tmp_path / "go"
    flood = f"yes complaint | head -c 2000000; >{done}; until [ -e {go} ]; do sleep 0.1; done; echo last"
    process = start(flood, state_dir=str(tmp_path))
    wait_until(done.exists, "the flood", timeout_s=LONG_S)
    wait_until(lambda: (tmp_path / "qemu.log").stat().st_size < 1 << 20, "a short log", timeout_s=HOST_S)
    go.touch()
    process.wait(timeout_s=LONG_S)

    assert process.words().endswith("last")
    assert (tmp_path / "qemu.log").stat().st_size < 1 << 20


def test_state_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(EngineError):
        ChildProcess(ProcessSpec(["/bin/true"], state_dir=str(tmp_path / "missing")))


def test_close_ends_the_process_and_leaves_nothing(start):
    before = Holdings()
    process = start(FOREVER)
    process.close()
    process.close()

    before.assert_nothing_added()


def test_kill_after_close_does_no_harm(start):
    process = start(FOREVER)
    process.close()
    process.kill()

    assert process.ending().startswith("QEMU was killed by signal 9")


MANAGER = """
import sys, time
from cloudvmm.engine.qemu.process import ProcessSpec, ChildProcess
state_dir = sys.argv[1] if len(sys.argv) > 1 else None
process = ChildProcess(ProcessSpec(["/bin/sleep", "300"], state_dir=state_dir))
print(process.pid, flush=True)
time.sleep(300)
"""


@pytest.fixture
def manager(request):
    """Start a manager of its own; return it and the pid of the process it started."""

    def run(*arguments: str) -> tuple[subprocess.Popen[str], int]:
        child = subprocess.Popen(
            [sys.executable, "-c", MANAGER, *arguments], stdout=subprocess.PIPE, text=True
        )
        request.addfinalizer(child.communicate)
        request.addfinalizer(child.kill)
        assert child.stdout is not None
        return child, int(child.stdout.readline())

    return run


@pytest.mark.parametrize("has_state_dir", [False, True])
def test_process_dies_with_its_manager(manager, tmp_path, has_state_dir):
    child, pid = manager(*([str(tmp_path)] if has_state_dir else []))
    wait_until(lambda: b"300" in _cmdline(pid), "the program runs", timeout_s=LONG_S)
    child.kill()

    wait_until(lambda: not _runs(pid), "the process is gone", timeout_s=LONG_S)


def test_manager_gone_before_the_death_signal_was_set_is_noticed(tmp_path):
    """What the shell looks at: another parent than the manager it was started by."""
    from cloudvmm.engine.qemu import process

    mark = tmp_path / "started"
    not_our_pid = "1" if os.getpid() != 1 else "2"
    argv = ["sh", "-c", process._PARENT_CHECK, not_our_pid, "touch", str(mark)]

    assert subprocess.run(argv, check=False).returncode != 0
    assert not mark.exists()


@pytest.fixture
def group(tmp_path):
    with group_folder() as folder:
        made = ControlGroup(str(folder), most_processes=10)
        yield made
        made.close()


GROUP_AND_FILES = "cat /proc/self/cgroup >&2; ls -l /proc/self/fd >&2; echo said"


@pytest.mark.parametrize("is_told_of", [False, True])
def test_process_is_in_its_group_from_its_first_word_and_has_no_way_out_of_it(
    is_told_of, group, start, tmp_path
):
    pid_file = f"{tmp_path}/pid" if is_told_of else None
    process = start(GROUP_AND_FILES, group_fd=group.procs_fd, pid_file=pid_file)
    process.wait(timeout_s=LONG_S)

    words = process.words()
    assert f"/{os.path.basename(group.path)}\n" in words
    assert "cgroup.procs" not in words
    assert words.endswith("said")


def test_process_that_cannot_join_its_group_is_not_started(start, tmp_path):
    with open("/dev/full", "wb") as nowhere:
        process = start(f"touch {tmp_path}/mark", group_fd=nowhere.fileno())
        process.wait(timeout_s=LONG_S)

    assert process.words().endswith("The control group cannot be joined")
    assert process.exit_status() == 1
    assert not (tmp_path / "mark").exists()


def _cmdline(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _runs(pid: int) -> bool:
    """Whether it is there and no zombie, which has no command line."""
    return _cmdline(pid) != b""


def _thp_enabled(pid: int) -> str:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(line.split()[1] for line in file if line.startswith("THP_enabled"))
