"""One child process, QEMU or a program that serves it: how it is started, how it is ended, what it said last.

Knows nothing of QMP or of what the process does. The child gets a session of its own, nothing on
standard input, and exactly the descriptors that were named. It dies with the manager, where nobody else
could reach it: the kernel kills it when the *thread* that spawned it ends, so each has a thread of its own
that sleeps until the machine is closed. `setpriv` sets that death signal and a shell then checks that the
manager is still the parent, because a manager that was gone before the signal was set would never be
noticed. A child with a `pid_file` outlives us, and is found again by that: `adopted_process.py`.

None of them gains rights by starting another program, leaves a core of the guest's memory, or learns of our
environment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from cloudvmm.engine.base import EngineError, EngineTimeout
from cloudvmm.host.error import HostError
from cloudvmm.host.pid_file import GATE, PidFile
from cloudvmm.host.program import locate
from cloudvmm.host.standard_fd import LAST_STANDARD_FD, above_standard

WORDS_BYTES = 4096
SHELL: Final = "/bin/sh"
_THREAD_LOOK_S = 0.001
_LOG_LIMIT_BYTES = 1024 * 1024
_LOG_CHECK_S = 1.0
_PR_SET_THP_DISABLE = 41
_PR_GET_THP_DISABLE = 42
_SPAWNING = threading.Lock()  # what a child inherits of this process is changed for some of them
_PARENT_CHECK = '[ "$PPID" = "$0" ] && exec "$@"'
_NO_CORE = "ulimit -c 0"
# Into the control group that standard output is for the moment.
_JOIN = 'echo 0 && exec >&2 || { echo "The control group cannot be joined" >&2; exit 1; }'
_SETPRIV = "setpriv"
_DEFAULTED_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGCHLD,
)


class ProcessSpec:
    """What to start: `argv[0]` is an absolute path, `fds` (lent) keep their numbers in the child.

    So none of them may be 0, 1 or 2, which are the child's own. Those that are keys of `shown` are its values
    in the child. `name` is what errors call it.

    With `state_dir` the files `argv` and `qemu.log`, for their owner's eyes only, are there while the
    child lives. The log is begun anew where it is found to be longer than 1 MiB. With `pid_file`, see
    `host.pid_file`, the child outlives us; that is removed with it.

    `confine` is called by the thread that starts the child, holds that thread to what the child may do, and
    returns what `setpriv` is to be told of it beside.
    `most_files` is how many files the child may have open, at the most; it is as many as we may without.
    `group_fd` (lent) is what it joins a control group by, before its first instruction.
    """

    __slots__ = (
        *("argv", "confine", "fds", "group_fd", "most_files"),
        *("name", "pid_file", "shown", "state_dir", "thp"),
    )

    def __init__(
        self,
        argv: Sequence[str],
        *,
        fds: Sequence[int] = (),
        shown: Mapping[int, int] | None = None,
        state_dir: str | None = None,
        pid_file: str | None = None,
        thp: bool = True,
        name: str = "QEMU",
        confine: Callable[[], Sequence[str]] | None = None,
        most_files: int | None = None,
        group_fd: int | None = None,
    ) -> None:
        self.pid_file = pid_file
        self.name = name
        self.confine = confine
        self.most_files = most_files
        self.group_fd = group_fd
        self.argv = list(argv)
        self.fds = list(fds)
        self.shown = shown or {}
        self.state_dir = state_dir
        self.thp = thp


class ChildProcess:
    """Owns the child, its pidfd and its log. `kill` may be called by any thread; the rest by the owner."""

    def __init__(self, spec: ProcessSpec) -> None:
        """Start it. Blocking for about 3 ms.

        :raises EngineError: it could not be started; the cause tells why.
        """
        self._name = spec.name
        self._state_dir = spec.state_dir
        self._pid_file = spec.pid_file
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._status: os.waitid_result | None = None
        self._has_ended = False
        self._final_words = ""
        self._pidfd = -1
        self._keeper: threading.Thread | None = None
        if taken := [fd for fd in spec.fds if fd <= LAST_STANDARD_FD]:
            raise EngineError(
                f"{spec.name} cannot be given descriptor {taken[0]}: standard input or output is closed"
            )
        try:
            self._log_fd = above_standard(self._open_log())
        except OSError as error:
            raise EngineError(f"The log of {spec.name} could not be opened") from error
        try:
            with contextlib.ExitStack() as undo:
                pid_file = None if spec.pid_file is None else PidFile(spec.pid_file)
                if pid_file is not None:
                    undo.callback(pid_file.close)
                self.pid = self._start(spec, pid_file)
                self._pidfd = self._open_pidfd()
                if pid_file is not None:
                    pid_file.tell(self.pid)
        except (OSError, ValueError, RuntimeError, EngineError, HostError) as error:
            # Out of threads; a text that is no argument; what confines it failed.
            self._give_up()
            raise EngineError(f"{spec.name} could not be started") from error
        try:
            self._write_state(spec)
        except OSError as error:
            self.close()
            raise EngineError(f"The state of {spec.name} could not be written") from error

    def fileno(self) -> int:
        """The pidfd: readable from the moment the process has ended."""
        return self._pidfd

    def kill(self) -> None:
        """End it at once; nothing happens where it has ended already."""
        with self._lock:
            if self._pidfd >= 0 and not self._has_ended:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, *, timeout_s: float) -> None:
        """Blocking until it has ended; takes its status.

        :raises EngineTimeout: it still runs.
        """
        if not self.has_ended():
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            poller.poll(timeout_s * 1000)
            if not self.has_ended():
                raise EngineTimeout(f"{self._name} (process {self.pid}) did not end within {timeout_s:g} s")

    def wait_thread_end(self, name: str, *, timeout_s: float) -> bool:
        """Blocking. Wait until no thread has this name, or the time is over; return whether none has."""
        deadline = time.monotonic() + timeout_s
        while self._has_thread(name) and time.monotonic() < deadline:
            time.sleep(_THREAD_LOOK_S)
        return not self._has_thread(name)

    def _has_thread(self, name: str) -> bool:
        try:
            for task in os.listdir(f"/proc/{self.pid}/task"):
                with open(f"/proc/{self.pid}/task/{task}/comm", encoding="utf-8") as file:
                    if file.read().rstrip("\n") == name:
                        return True
        except OSError:  # a thread that ended under our eyes, or all of them
            return not self.has_ended()
        return False

    def has_ended(self) -> bool:
        """Say whether it has ended; takes its status. Never blocks."""
        with self._lock:
            if not self._has_ended and self._pidfd >= 0:
                try:
                    self._status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
                    self._has_ended = self._status is not None
                except ChildProcessError:
                    self._has_ended = True  # SIGCHLD is ignored, or somebody else has taken the status
            return self._has_ended

    def exit_status(self) -> int | None:
        """Return the status it exited with; None while it runs, where a signal ended it or it is unknown."""
        if self._status is None or self._status.si_code != os.CLD_EXITED:
            return None
        return self._status.si_status

    def ending(self) -> str:
        """Return a sentence on how it ended, with its last words where it failed."""
        if not self._has_ended:
            return f"{self._name} runs"
        words = self.complaint()
        return f"{_how(self._name, self._status)}: {words}" if words else _how(self._name, self._status)

    def complaint(self) -> str:
        """Return its last words without mere warnings; empty where it had nothing to complain about."""
        return "\n".join(line for line in self.words().splitlines() if not line.startswith("warning: "))

    def words(self) -> str:
        """Return the end of what it wrote to standard error, without its own name before each line."""
        if self._log_fd < 0:
            return self._final_words
        size = self._log_size()
        start = max(0, size - WORDS_BYTES)
        data = os.pread(self._log_fd, size - start, start)
        return "\n".join(
            _strip_name(line) for line in data.decode(errors="replace").splitlines() if line.strip()
        )

    def output(self) -> str:
        """Return all that it wrote, to standard error too."""
        return os.pread(self._log_fd, self._log_size(), 0).decode(errors="replace")

    def close(self) -> None:
        """Blocking. Kill it if it runs, wait until it is gone, release everything. Idempotent.

        :raises EngineTimeout: the kernel does not let go of it; everything else is released.
        """
        if self._pidfd < 0:
            return
        self.kill()
        try:
            self.wait(timeout_s=10)
        finally:
            self._released.set()
            if self._keeper is not None:
                self._keeper.join()
            with self._lock:
                os.close(self._pidfd)
                self._pidfd = -1
            self._final_words = self.words()
            os.close(self._log_fd)
            self._log_fd = -1
            self._remove_state()

    def _start(self, spec: ProcessSpec, pid_file: PidFile | None) -> int:
        if not os.access(spec.argv[0], os.X_OK):
            # The shell between us and it could only say so by a status.
            raise FileNotFoundError(errno.ENOENT, "There is no such program", spec.argv[0])
        ties = ("--pdeathsig", "KILL") if pid_file is None else ()
        steps = [_limits(spec.most_files), _PARENT_CHECK if pid_file is None else GATE]
        if spec.group_fd is not None:
            steps.insert(0, _JOIN)
        setpriv = [find_setpriv(), "--no-new-privs", *ties]
        argv = ["--", SHELL, "-c", "; ".join(steps), str(os.getpid()), *spec.argv]
        outcome: list[int | BaseException] = []
        started = threading.Event()

        def keep() -> None:
            try:
                outcome.append(_spawn(setpriv, argv, spec, self._log_fd, pid_file))
            except BaseException as error:
                outcome.append(error)  # whatever it is, somebody waits for it
            finally:
                started.set()
            if isinstance(outcome[0], int):
                self._keep_log_small()

        self._keeper = threading.Thread(target=keep, name="child-keeper", daemon=True)
        self._keeper.start()
        started.wait()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _keep_log_small(self) -> None:
        """Sleep until the process is released; meanwhile begin a log in a folder anew once it is long."""
        if self._state_dir is None:
            self._released.wait()
        while not self._released.wait(_LOG_CHECK_S):
            if os.fstat(self._log_fd).st_size > _LOG_LIMIT_BYTES:
                os.ftruncate(self._log_fd, 0)  # it is written to at its end, wherever that is

    def _give_up(self) -> None:
        if self._pidfd >= 0:
            self.close()
            return
        os.close(self._log_fd)
        self._log_fd = -1
        self._remove_state()

    def _open_pidfd(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:
            # Out of descriptors. The child is not reaped yet, so the pid is still its own.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            self._released.set()
            if self._keeper is not None:
                self._keeper.join()
            raise

    def _open_log(self) -> int:
        if self._state_dir is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            return os.open(f"{self._state_dir}/qemu.log", flags, 0o600)
        fd = os.memfd_create("child-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # A guest that makes it complain for ever must not fill the memory of the host.
        os.ftruncate(fd, _LOG_LIMIT_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        return fd

    def _log_size(self) -> int:
        if self._state_dir is not None:
            return os.fstat(self._log_fd).st_size
        return os.lseek(self._log_fd, 0, os.SEEK_CUR)  # the offset is shared with the child

    def _write_state(self, spec: ProcessSpec) -> None:
        if self._state_dir is not None:
            _write_file(f"{self._state_dir}/argv", "".join(f"{argument}\n" for argument in spec.argv))

    def _remove_state(self) -> None:
        paths = [] if self._pid_file is None else [self._pid_file]
        if self._state_dir is not None:
            paths += [f"{self._state_dir}/{name}" for name in ("argv", "qemu.log")]
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def find_setpriv() -> str:
    """Return the path of the program that sets what a child has of rights.

    :raises FileNotFoundError: it is not there.
    """
    return locate(_SETPRIV)


def _limits(most_files: int | None) -> str:
    """Return how the shell limits itself before it becomes the child."""
    if most_files is None:
        return _NO_CORE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = most_files if hard == resource.RLIM_INFINITY else min(most_files, hard)
    return f"{_NO_CORE}; ulimit -n {files}"


def _inheritable_fds() -> list[int]:
    """Return what a child would get unasked: mostly what this process was itself started with."""
    inheritable = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # closed meanwhile
            if fd > LAST_STANDARD_FD and os.get_inheritable(fd):
                inheritable.append(fd)
    return inheritable


def _write_file(path: str, text: str) -> None:
    # What is in an argument, be it an asset tag or the command line of a guest, is not for everybody.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(fd, 0o600)
        file.write(text)


def _spawn(
    setpriv: Sequence[str],
    argv: Sequence[str],
    spec: ProcessSpec,
    log_fd: int,
    pid_file: PidFile | None,
) -> int:
    """Have `setpriv` start `argv`; return its pid. `posix_spawn` keeps the child from running any Python."""
    actions: list[tuple[int, int] | tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
        if pid_file is None
        else (os.POSIX_SPAWN_DUP2, pid_file.gate_fd, 0),
        (os.POSIX_SPAWN_DUP2, log_fd if spec.group_fd is None else spec.group_fd, 1),
        (os.POSIX_SPAWN_DUP2, log_fd, 2),
    ]
    # Onto itself: takes close-on-exec away in the child alone.
    actions += [(os.POSIX_SPAWN_DUP2, spec.shown.get(fd, fd), fd) for fd in spec.fds]
    actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable_fds() if fd not in spec.fds]
    told = () if spec.confine is None else spec.confine()
    with _SPAWNING, contextlib.nullcontext() if spec.thp else _without_huge_pages():
        return os.posix_spawn(
            setpriv[0],
            [*setpriv, *told, *argv],
            {},
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_DEFAULTED_SIGNALS,
        )


@contextlib.contextmanager
def _without_huge_pages() -> Iterator[None]:
    """Let no transparent huge page be given to what is started meanwhile: the flag survives exec.

    It is that of the whole process, so that `_SPAWNING` must be held.
    """
    import ctypes  # rare, and 1.5 MiB: not at the top

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)
    if before < 0 or prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_THP_DISABLE")
    try:
        yield
    finally:
        prctl(_PR_SET_THP_DISABLE, before, 0, 0, 0)


def _how(name: str, status: os.waitid_result | None) -> str:
    if status is None:
        return f"{name} ended, nobody knows how"
    if status.si_code == os.CLD_EXITED:
        return f"{name} exited with status {status.si_status}"
    return f"{name} was killed by signal {status.si_status} ({_signal_name(status.si_status)})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "real-time"


def _strip_name(line: str) -> str:
    name, colon, rest = line.partition(": ")
    return rest if colon and name.rpartition("/")[2].startswith("qemu-system-") else line
