"""What benchmarks measure: the server as its users start it, a plain echo beside it, connections to both.

The REST client is the tests' own; the loops that are timed use a bare socket, so that what they show is the
server and not the client.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support.rest import request_bytes
from support.vmm import Vmm

POLL_EVERY_S = 0.0005
START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 30.0
READ_BYTES = 65536
_SCHED_CLOCK = 2  # see clock_getcpuclockid(3): the clock of a process is made of its pid
ANSWER_ENDS = (b"}", b"]", b"\r\n\r\n")
SUCCESS = b"HTTP/1.1 2"
_LOG = "stderr"
# Nothing of it is looked at before a boot: not the kernel, not KVM.
SMALL_CONFIG = {
    "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
    "payload": {"kernel": "/vmlinux"},
    "console": {"mode": "Null"},
}


def program() -> str:
    """Return the path of the installed command that belongs to the running interpreter."""
    path = Path(sys.executable).with_name("cloudvmm")
    if not path.exists():
        raise SystemExit(f"{path} is missing: install the package into this environment first")
    return str(path)


@contextlib.contextmanager
def running_server(
    folder: str, flags: Sequence[str], *, binary: str | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Vmm]]:
    """Run `cloudvmm` with `flags` on a socket in `folder`; it answers from the start and ends at the end.

    `binary` is another program that is started alike: the real Cloud Hypervisor.
    """
    process, path = start_server(folder, flags, binary=binary)
    vmm = Vmm(path)
    try:
        connect(path, process).close()
        yield process, vmm
    finally:
        vmm.close()
        end_server(process)


def start_server(
    folder: str, flags: Sequence[str], *, binary: str | None = None
) -> tuple[subprocess.Popen[bytes], str]:
    """Start `cloudvmm` and return at once: the process, which is the caller's to end, and its socket.

    Its modules are compiled once, whatever this environment says: installed packages are compiled too.
    """
    path = os.path.join(folder, "api")
    with open(os.path.join(folder, _LOG), "ab") as log:
        process = subprocess.Popen(
            [binary or program(), "--api-socket", path, *flags],
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    return process, path


def server_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def end_server(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def check_peer(binary: str) -> None:
    """End with the reason where the real Cloud Hypervisor does not do what is to be measured.

    It opens /dev/kvm when it starts, so none starts on a host without.
    """
    with tempfile.TemporaryDirectory() as folder, running_server(folder, [], binary=binary) as (_, vmm):
        vmm.get("vmm.ping")
        vmm.put("vm.create", SMALL_CONFIG)
        vmm.get("vm.info")
        vmm.put("vm.delete")


def connect(
    path: str, process: subprocess.Popen[bytes] | None = None, *, timeout_s: float = START_TIMEOUT_S
) -> socket.socket:
    """Connect as soon as somebody listens at `path`; the socket is the caller's to close.

    Where `process`, which is to listen, ends instead, what it said is the reason to end.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if process is not None and process.poll() is not None:
                log = Path(path).with_name(_LOG)
                said = log.read_text(errors="replace").strip() if log.exists() else ""
                words = " ".join(map(str, process.args)) if isinstance(process.args, list) else process.args
                raise SystemExit(f"{words!r} ended with status {process.returncode}: {said}") from None
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_EVERY_S)
        else:
            return client


class Probe:
    """One request, sent again and again over one connection that is kept."""

    def __init__(
        self, path: str, method: str, command: str, body: bytes | None = None, *, beside: Probe | None = None
    ) -> None:
        """The connection is that of `beside`, which closes it, if there is one."""
        self._request = request_bytes(method, f"/api/v1/{command}", body)
        self._socket = connect(path) if beside is None else beside._socket

    def timed_us(self) -> float:
        """Send it; return the microseconds until the whole answer is there.

        :raises EOFError: the server closed the connection instead.
        """
        client = self._socket
        started = time.perf_counter_ns()
        client.sendall(self._request)
        answer = client.recv(READ_BYTES)
        # The server sends an answer in one piece; a large one may still arrive in several.
        while not answer.endswith(ANSWER_ENDS):
            piece = client.recv(READ_BYTES)
            if not piece:
                raise EOFError("The server closed the connection in the middle of a measurement")
            answer += piece
        took_us = (time.perf_counter_ns() - started) / 1000
        if answer.startswith(b"HTTP/") and not answer.startswith(SUCCESS):  # an echo says neither
            raise SystemExit(f"{self._request!r} is answered by {answer!r}")
        return took_us

    def close(self) -> None:
        self._socket.close()


def processor_s(pid: int) -> float:
    """Return the seconds of processor time that the process `pid` has used, all its threads together."""
    return time.clock_gettime(~pid << 3 | _SCHED_CLOCK)


@contextlib.contextmanager
def echo_server(folder: str) -> Iterator[str]:
    """Run a bare echo, a thread per connection, in a process of its own; give its socket's path."""
    path = os.path.join(folder, "echo")
    with child_process(lambda: _serve_echo(path)):
        connect(path).close()
        yield path


@contextlib.contextmanager
def child_process(run: Callable[[], None]) -> Iterator[None]:
    """Carry out `run`, which must not return, in a forked process, which is killed at the end."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    try:
        yield
    finally:
        has_ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
        if not has_ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if has_ended:
        raise SystemExit("What was to run beside the measurement ended before it")


def _serve_echo(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_echo, args=(client,), daemon=True).start()


def _echo(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # clients are killed
        while piece := client.recv(READ_BYTES):
            client.sendall(piece)
