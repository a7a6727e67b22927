"""A private message bus and clients of it that are not ours: dbus-daemon, busctl, gdbus, dbus-monitor."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.wait import is_readable

SERVICE = "org.example.Vmm"
OBJECT = "/org/example/Vmm"
INTERFACE = "org.cloudhypervisor.DBusApi1"
FAILED = "org.freedesktop.DBus.Error.Failed"
TIMEOUT_S = 30.0

_CONFIG = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
    <deny own="org.example.Forbidden"/>
  </policy>
</busconfig>
"""
_GDBUS_ERROR = re.compile(r"Error: GDBus\.Error:([A-Za-z0-9_.]+): (.*)", re.DOTALL)


class CallFailed(Exception):
    """An error reply: its D-Bus name and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text)
        self.name = name
        self.text = text


class PrivateBus:
    """Owns a dbus-daemon whose files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        for program in ("dbus-daemon", "busctl", "gdbus", "dbus-monitor"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        folder.mkdir()
        self.address = f"unix:path={folder / 'bus'}"
        config = folder / "bus.conf"
        config.write_text(_CONFIG.format(socket=folder / "bus"))
        self.daemon = subprocess.Popen(
            ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.daemon.stdout is not None
        assert self.daemon.stdout.readline()  # it listens

    def close(self) -> None:
        self.daemon.kill()
        self.daemon.wait()
        assert self.daemon.stdout is not None
        self.daemon.stdout.close()

    def busctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        return _run(["busctl", f"--address={self.address}", *args])

    def spawn_busctl(self, member: str, *args: str) -> subprocess.Popen[str]:
        """Begin a call of a method of the API; the caller waits for it."""
        return subprocess.Popen(
            ["busctl", f"--address={self.address}", "call", SERVICE, OBJECT, INTERFACE, member, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, member: str, text: str | None = None) -> list[Any]:
        """Call a method of the API by busctl; return its results.

        :raises CallFailed: its name is unknown here, since busctl keeps it to itself.
        """
        args = [] if text is None else ["s", text]
        done = self.busctl("--json=short", "call", SERVICE, OBJECT, INTERFACE, member, *args)
        if done.returncode != 0:
            raise CallFailed("", done.stderr.strip().removeprefix("Call failed: "))
        results: list[Any] = msgspec.json.decode(done.stdout)["data"] if done.stdout.strip() else []
        return results

    def gdbus(self, method: str, *args: str, path: str = OBJECT) -> tuple[Any, ...]:
        """Call any method, named with its interface, by gdbus; return its results.

        :raises CallFailed: an error was answered.
        """
        where = ["--address", self.address, "--dest", SERVICE, "--object-path", path]
        done = _run(["gdbus", "call", *where, "--timeout", str(int(TIMEOUT_S)), "--method", method, *args])
        if done.returncode != 0:
            found = _GDBUS_ERROR.match(done.stderr.strip())
            assert found is not None, done.stderr
            raise CallFailed(found[1], found[2].split("\n(According to introspection data")[0])
        results: tuple[Any, ...] = ast.literal_eval(done.stdout)
        return results


class Monitor:
    """A program that prints the signals it sees, one way or the other. It listens once it is made."""

    def __init__(self, command: list[str], *, ready: str) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._seen = b""
        self.read_until(ready)

    def read_until(self, text: str) -> str:
        """Return all that was printed so far, once `text` is in it."""
        assert self._process.stdout is not None
        while text.encode() not in self._seen:
            assert is_readable(self._process.stdout.fileno(), timeout_s=TIMEOUT_S), self._seen.decode()
            piece = self._process.stdout.read1(65536)
            assert piece, f"The monitor ended: {self._seen.decode()}"
            self._seen += piece
        return self._seen.decode()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def gdbus_monitor(bus: PrivateBus) -> Monitor:
    where = ["--address", bus.address, "--dest", SERVICE, "--object-path", OBJECT]
    return Monitor(["gdbus", "monitor", *where], ready="is owned by")


def dbus_monitor(bus: PrivateBus) -> Monitor:
    rule = f"type='signal',interface='{INTERFACE}'"
    return Monitor(["dbus-monitor", "--address", bus.address, rule], ready="NameLost")


def signalled(printed: str) -> list[str]:
    """Return the documents in what gdbus monitor has printed."""
    marker = f"{INTERFACE}.Event "
    return [ast.literal_eval(line.split(marker, 1)[1])[0] for line in printed.splitlines() if marker in line]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Else they print what is beyond ASCII as question marks.
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=False, env=environment
    )
