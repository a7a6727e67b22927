"""The QEMU command line that a person would write for a VM that the server runs: same machine, same devices.

It is read off the running QEMU. Descriptors that the server passed become what a person has instead: a
monitor on a socket path, an image's own path, RAM that QEMU makes itself. Nothing else is changed, so both
QEMUs do the same work.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

POLL_EVERY_S = 0.0005
READ_BYTES = 65536
_TIMEOUT_S = 60.0
_SOCKET_FD = re.compile(r"^socket,id=(?P<id>[^,]+),fd=\d+")
_OWN_FDS = "/proc/self/fd/"
_FILES = ("-kernel", "-initrd", "-bios")
_PASSED = re.compile(r"/dev/fdset/|/proc/self/fd/")
_FD_SET = re.compile(r"^fd=(?P<fd>\d+),set=(?P<set>\d+)")


class HandCommand(msgspec.Struct, frozen=True):
    """`argv` starts QEMU with vCPUs running; a QMP server is then at `monitor_path`."""

    argv: list[str]
    monitor_path: str

    @property
    def paused_argv(self) -> list[str]:
        """The same, with vCPUs standing still until QMP says `cont`."""
        return [*self.argv, "-S"]


def command_of(pid: int, folder: str, *, renamed: dict[str, str]) -> HandCommand:
    """Translate the command line of the running process `pid`; see `translate`."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    binary = os.readlink(f"/proc/{pid}/exe")
    moved = _moved(pid, words)
    return translate(
        [binary, *words[1:]], folder, renamed=renamed, path_of=lambda fd: moved.get(fd) or _path_of(pid, fd)
    )


def _moved(pid: int, words: Sequence[str]) -> dict[int, str]:
    """Return the files of sets by their old numbers; QEMU has copied each, in order, and closed it."""
    fds = Path(f"/proc/{pid}/fd")
    given = [int(found["fd"]) for word in words if (found := _FD_SET.match(word))]
    numbers = sorted(int(each.name) for each in fds.iterdir())
    files = [os.readlink(fds / str(number)) for number in numbers if (fds / str(number)).is_file()]
    copies = dict.fromkeys(path for path in files if not path.startswith("/memfd:"))
    return dict(zip(given, copies, strict=False))


def _path_of(pid: int, fd: int) -> str:
    """Return the name of what is open as `fd`; what is shown to QEMU as its own has none but by another."""
    fds = Path(f"/proc/{pid}/fd")
    path = os.readlink(fds / str(fd))
    same = (each for each in fds.iterdir() if os.path.samefile(each, fds / str(fd)))
    return next((name for name in map(os.readlink, same) if name != "/"), path) if path == "/" else path


def translate(
    words: Sequence[str], folder: str, *, renamed: dict[str, str], path_of: Callable[[int], str]
) -> HandCommand:
    """Write QEMU's command line `words` by hand: sockets go to `folder`, paths change as `renamed` says.

    `path_of` tells which file a passed descriptor is.
    """
    images = _fd_sets(words, path_of)
    argv, monitors = [words[0]], []
    for option, value in _options(words[1:]):
        if option in ("-S", "-add-fd"):
            continue
        if option == "-chardev" and (found := _SOCKET_FD.match(value or "")):
            path = os.path.join(folder, found["id"])
            value = f"socket,id={found['id']},path={path},server=on,wait=off{(value or '')[found.end() :]}"
            monitors.append(path)
        argv.append(option)
        if value is not None:
            value = path_of(_number(value)) if option in _FILES and value.startswith(_OWN_FDS) else value
            argv.append(_own_ram(_rename(value, {**images, **renamed}), path_of))
    if not monitors:
        raise SystemExit(f"This is no QEMU with a monitor: {words}")
    if left := [word for word in argv if re.search(r"(^|,)fds?=\d", word) or _PASSED.search(word)]:
        raise SystemExit(f"No way to write by hand what was passed as a descriptor: {left}")
    return HandCommand(argv, monitors[0])


def start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start QEMU; the process is the caller's to end.

    It gets a session of its own, as the server gives it one: the kernel shares processors out by session.
    """
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def run_until_continued(command: HandCommand) -> float:
    """Start QEMU, shake hands over QMP, say `cont`; return the seconds that took, and end it."""
    Path(command.monitor_path).unlink(missing_ok=True)
    started = time.monotonic()
    process = start(command.paused_argv)
    try:
        with _connect(command.monitor_path, process) as monitor:
            _await(monitor, b'"QMP"')
            for name in ("qmp_capabilities", "cont"):
                monitor.sendall(msgspec.json.encode({"execute": name}) + b"\n")
                _await(monitor, b'"return"')
            return time.monotonic() - started
    finally:
        end(process)


@contextlib.contextmanager
def restored(command: HandCommand, state_path: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start QEMU with RAM that stands on its file, have it take the state and go on; end it at the end."""
    Path(command.monitor_path).unlink(missing_ok=True)
    process = start(command.paused_argv)
    capabilities = [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]
    try:
        with _connect(command.monitor_path, process) as monitor:
            _await(monitor, b'"QMP"')
            for name, arguments, words in (
                ("qmp_capabilities", {}, b'"return"'),
                ("migrate-set-capabilities", {"capabilities": capabilities}, b'"return"'),
                ("migrate-incoming", {"uri": f"file:{state_path}"}, b'"completed"'),
                ("cont", {}, b'"return"'),
            ):
                monitor.sendall(msgspec.json.encode({"execute": name, "arguments": arguments}) + b"\n")
                _await(monitor, words)
            yield process
    finally:
        end(process)


class Monitor:
    """A raw QMP connection to a QEMU started by hand: one command after the other, events kept aside."""

    def __init__(self, command: HandCommand, process: subprocess.Popen[Any]) -> None:
        self._events: dict[str, dict[str, Any]] = {}
        self._socket = _connect(command.monitor_path, process)
        _await(self._socket, b'"QMP"')
        self.execute("qmp_capabilities")

    def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        self._socket.sendall(msgspec.json.encode({"execute": name, "arguments": arguments or {}}) + b"\n")
        answers = [msgspec.json.decode(line) for line in _await(self._socket, b'"return"').splitlines()]
        self._events |= {answer["event"]: answer for answer in answers if "event" in answer}
        for answer in answers:
            if "return" in answer:
                return answer["return"]
        raise SystemExit(f"QEMU by hand does not answer {name}")

    def event_s(self, name: str) -> float:
        """Return when QEMU told the event `name` for the last time, by its clock; wait for the first."""
        deadline = time.monotonic() + _TIMEOUT_S
        while name not in self._events:
            if time.monotonic() > deadline:
                raise SystemExit(f"QEMU by hand does not tell {name}")
            time.sleep(POLL_EVERY_S)
            self.execute("query-name")
        told = self._events[name]["timestamp"]
        return float(told["seconds"] + told["microseconds"] / 1_000_000)

    def close(self) -> None:
        self._socket.close()


def _connect(path: str, process: subprocess.Popen[Any]) -> socket.socket:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            monitor.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            monitor.close()
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"QEMU by hand gives no monitor: {process.args}") from None
            time.sleep(POLL_EVERY_S)
        else:
            monitor.settimeout(_TIMEOUT_S)
            return monitor


def _await(monitor: socket.socket, words: bytes) -> bytes:
    """Read up to the end of the line that has `words`; return all that was read."""
    heard = b""
    while not (words in heard and heard.endswith(b"\n")):
        piece = monitor.recv(READ_BYTES)
        if not piece:
            raise SystemExit(f"QEMU by hand closed its monitor after {heard!r}")
        heard += piece
        if b'"error"' in heard:
            raise SystemExit(f"QEMU by hand refuses: {heard!r}")
    return heard


def _options(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Pair each option with its value, if it has one."""
    pairs: list[tuple[str, str | None]] = []
    for word in words:
        if pairs and not word.startswith("-") and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], word)
        else:
            pairs.append((word, None))
    return pairs


def _own_ram(value: str, path_of: Callable[[int], str]) -> str:
    """Return `value` with RAM in a passed memfd made a memfd of QEMU's own, or in a file that file."""
    if not value.startswith('{"qom-type":"memory-backend-file"'):
        return value
    ram = msgspec.json.decode(value)
    if not (path := str(ram["mem-path"])).startswith(_OWN_FDS):
        return value
    if ram.get("readonly"):
        file = path_of(_number(path))
        return msgspec.json.encode({**ram, "mem-path": file}).decode()
    del ram["mem-path"]
    return msgspec.json.encode({**ram, "qom-type": "memory-backend-memfd"}).decode()


def _number(path: str) -> int:
    return int(path.removeprefix(_OWN_FDS))


def _fd_sets(words: Sequence[str], path_of: Callable[[int], str]) -> dict[str, str]:
    """Return the name of each descriptor set in `words`, and the path of the file in it."""
    found = [_FD_SET.match(value) for option, value in itertools.pairwise(words) if option == "-add-fd"]
    return {f"/dev/fdset/{one['set']}": path_of(int(one["fd"])) for one in found if one}


def _rename(value: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        value = re.sub(rf"{re.escape(old)}(?!\d)", lambda _, new=new: new, value)
    return value
