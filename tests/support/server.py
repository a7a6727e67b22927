"""A `cloudvmm` process under test: started, spoken to, ended, and looked after for what it leaves behind.

It runs in a folder of its own, which is its working and its temporary directory too: whatever it forgets
lies there. The module is run by the interpreter that runs the tests, so no PATH decides what is tested. What
goes over its connections, whoever the client is, is held against the API's document at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloudvmm.host.scratch import sweep
from support.deadline import HOST_S
from support.process import ProcessId, descendants_of, identify, state_of
from support.tap import check_all
from support.vmm import OnAnswer, Vmm
from support.wait import wait_until

TESTS = str(Path(__file__).resolve().parents[1])
PYTHONPATH = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
INTERPRETER = (sys.executable, "-X", "faulthandler")
LEFTOVER_TIMEOUT_S = 5.0  # what ends by itself later has outlived it


class Server:
    """Owns the process. `folder` is empty at the start and holds the socket's lock alone at the end.

    One that `succeeds` another takes over its VM, and its socket, which lies in the other's folder. `program`
    is the module that is run, with words of its own.
    """

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str],
        *,
        on_answer: OnAnswer | None = None,
        pass_fds: Sequence[int] = (),
        has_socket: bool = True,
        succeeds: Server | None = None,
        program: Sequence[str] = ("support.tapped",),
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.socket_path = str(folder / "api") if succeeds is None else succeeds.socket_path
        self.has_socket = has_socket
        self.expected_status = 0
        self._on_answer = on_answer
        self._kept = {"api.lock"} if has_socket and succeeds is None else set()
        self._children: set[ProcessId] = set()
        self._stderr_path = folder.with_name(f"{folder.name}.stderr")
        self.traffic = folder.with_name(f"{folder.name}.traffic")
        self.traffic.mkdir()
        socket_flags = ["--api-socket", self.socket_path] if has_socket else []
        if succeeds is not None:
            succeeds.keep("api")
            socket_flags = ["upgrade", *socket_flags]
        self._program = program
        self._flags = [*socket_flags, *flags]
        self._lives = 0
        self._process = self._start(pass_fds)
        self.vmm = Vmm(self.socket_path, on_answer=self._answered)

    def _start(self, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        traffic = self.traffic if not self._lives else self.traffic.with_suffix(f".traffic{self._lives}")
        traffic.mkdir(exist_ok=True)
        self._lives += 1
        with open(self._stderr_path, "ab") as stderr:
            return subprocess.Popen(
                [*INTERPRETER, "-m", *self._program, str(traffic), *self._flags],
                cwd=self.folder,
                env={**os.environ, "TMPDIR": str(self.folder), "PYTHONPATH": PYTHONPATH},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=pass_fds,
            )

    def restart(self) -> float:
        """Start it once more, after its end, as it was started before; what it left running is known.

        Return the seconds from its start to its first answer.
        """
        started = time.monotonic()
        self.start_again()
        self.wait_ready()
        return time.monotonic() - started

    def start_again(self) -> None:
        """As `restart`, without waiting for it."""
        self.vmm.close()
        self.wait_end()
        self.expected_status = 0
        self._process = self._start()

    def drop_flag(self, flag: str) -> None:
        """Let it have neither `flag` nor its value when it is started once more."""
        at = self._flags.index(flag)
        del self._flags[at : at + 2]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What it has written so far, to standard output too."""
        return self._stderr_path.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def keep(self, name: str) -> Path:
        """Return the path of `name` in the server's folder; it may be left there."""
        self._kept.add(name)
        return self.folder / name

    def wait_ready(self) -> None:
        """Return once it answers; fail with what it said if it ended instead."""
        wait_until(self._is_ready, "the server answers", timeout_s=HOST_S)
        self.vmm.get("vmm.ping")
        self.vmm.get("vmm.jobs")  # what carries out commands is there from the first one on

    def children(self) -> set[ProcessId]:
        """Return who the server has started and still runs; from here on they are known."""
        now = descendants_of(self.pid)
        self._children |= now
        return {child for child in now if child.is_alive()}

    def terminate(self) -> None:
        """Ask it to end as a service manager does."""
        self.children()
        self._process.terminate()

    def kill(self, *, after: ProcessId | None = None) -> None:
        """Kill it in the middle of whatever it does; nothing that it started escapes our list.

        It dies without having seen the end of `after`, which is killed first.
        """
        self.expected_status = -signal.SIGKILL
        self._process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state_of(self.pid) in ("T", "Z", ""), "the server stands still", timeout_s=HOST_S)
        self.children()
        if after is not None:
            after.kill()
        self._process.kill()

    def wait_end(self, *, timeout_s: float = HOST_S) -> int:
        """Return the exit status, as `subprocess` gives it; one that hangs is made to tell where."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # faulthandler writes every thread's stack
            self._process.wait(timeout_s)
            raise AssertionError(f"The server did not end within {timeout_s:g} s:\n{self.stderr}") from None

    def check_end(self) -> None:
        """End it if it still runs, then fail for each promise of a clean end that it broke."""
        try:
            self.vmm.close()
            if self.is_running:
                self.terminate()
            status = self.wait_end()
        finally:
            self._process.kill()
            self._process.wait()
            left = self._leftovers()
        assert not left, f"The server left behind {'; '.join(left)}:\n{self.stderr}"
        assert status == self.expected_status, (
            f"The server's exit status is {status} instead of {self.expected_status}:\n{self.stderr}"
        )
        check_all(self.traffic)

    def _leftovers(self) -> list[str]:
        """Describe what outlived the server: processes, which are ended now, and files."""
        try:
            wait_until(lambda: not self._alive(), "children end", timeout_s=LEFTOVER_TIMEOUT_S)
            left = []
        except AssertionError:
            left = [f"process {child.pid}: {child.command}" for child in self._alive()]
            for child in self._alive():
                child.kill()
        kept = set(self._kept)
        if self.expected_status < 0:
            sweep(str(self.folder))  # as whoever comes next does
            if self.has_socket:
                kept.add("api")  # whoever is killed cannot remove its socket
        return left + [f"file {name}" for name in sorted(os.listdir(self.folder)) if name not in kept]

    def _alive(self) -> list[ProcessId]:
        return [child for child in self._children if child.is_alive()]

    def _answered(self, command: str, elapsed_s: float) -> None:
        self.children()
        if self._on_answer is not None:
            self._on_answer(command, elapsed_s)

    def _is_ready(self) -> bool:
        if not self.is_running:
            raise AssertionError(f"The server ended with status {self._process.returncode}:\n{self.stderr}")
        try:
            self.vmm.connect().close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


@contextlib.contextmanager
def checked(server: Server) -> Iterator[Server]:
    """Check the server's end, and what it leaves behind; a failure before is told with what it said."""
    try:
        yield server
    except BaseException as error:
        error.add_note(f"{server.folder.name} said:\n{server.stderr[-5000:]}")
        with contextlib.suppress(AssertionError):
            server.check_end()
        raise
    server.check_end()


def process_of(pid: int) -> ProcessId:
    """Return the process with `pid`; fail if there is none."""
    who = identify(pid)
    assert who is not None, f"There is no process {pid}"
    return who
