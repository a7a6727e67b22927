"""Boot a Linux guest through the REST API and show every call, its answer and its time.

    python examples/demo.py [--keep]

Starts `cloudvmm` on a UNIX socket in a temporary folder, takes one VM through its life, looks at it
from outside (the API) and from inside (the guest's shell), and ends with a summary. The exit status
is 0 only if every step held. With --keep the VM is left running, and how to talk to it is printed.
The HTTP client is the standard library's: any client for Cloud Hypervisor's API does the same.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloudvmm.guest import FAST_CMDLINE, build
from cloudvmm.guest.shell import GuestShell, ready_uptime_s

MIB = 1 << 20
READY_S = 120.0
PAUSE_S = 2.0


class Failed(Exception):
    """A step did not hold; the text says what was seen instead."""


def check(condition: bool, seen: object) -> None:
    if not condition:
        raise Failed(str(seen))


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=READY_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Api:
    """Calls the REST API on the socket `path` and prints each call with its answer and time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def call(self, method: str, name: str, body: object = None, *, expect: int = 204) -> Any:
        """Return the answer's JSON (None if it has none); raise Failed on any other status."""
        begun = time.perf_counter()
        status, content = self.exchange(method, name, body)
        elapsed_ms = (time.perf_counter() - begun) * 1000
        words = content.decode(errors="replace")
        print(f"  {method} /api/v1/{name} -> {status} in {elapsed_ms:.1f} ms  {shortened(words)}".rstrip())
        check(status == expect, f"{name} answered {status}, not {expect}: {words}")
        return json.loads(content) if content else None

    def exchange(self, method: str, name: str, body: object = None) -> tuple[int, bytes]:
        with contextlib.closing(UnixConnection(self._path)) as connection:
            text = None if body is None else json.dumps(body)
            headers = {} if text is None else {"Content-Type": "application/json"}
            connection.request(method, f"/api/v1/{name}", text, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


class Console:
    """The file that the guest's console is written into."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shown = 0

    def read(self) -> bytes:
        """Return all of it; print the lines that were not printed yet."""
        text = self._path.read_bytes() if self._path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < self._shown:
            self._shown = 0  # the file was begun anew
        for line in whole[self._shown :].splitlines():
            print("  console |", line.decode(errors="replace"), flush=True)
        self._shown = len(whole)
        return text


class Summary:
    """Runs steps, one after the other, and remembers which held."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.held = True

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """Print `title`, run the body, note its time; the list takes words for the summary."""
        print(f"\n{title}", flush=True)
        notes: list[str] = []
        begun = time.perf_counter()
        mark = "FAILED"
        try:
            yield notes
            mark = "ok"
        except Exception as error:
            notes.append(f"{type(error).__name__}: {error}")
            self.held = False
            raise
        finally:
            elapsed_ms = (time.perf_counter() - begun) * 1000
            self._lines.append(f"{mark:6} {title:34} {elapsed_ms:8.1f} ms  {'; '.join(notes)}".rstrip())

    def show(self) -> None:
        print("\n" + "=" * 78)
        print(*self._lines, sep="\n")
        print("=" * 78)
        print("Every step held." if self.held else "NOT every step held.")


def shortened(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} bytes)"


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.005)


class Demo:
    """One VM's life, step by step. Owns the server process and the folder it is given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "api.sock"
        self._api = Api(self._socket)
        self._console = Console(folder / "console.log")
        self._server: subprocess.Popen[bytes] | None = None
        self._pty = -1
        self.summary = Summary()

    def boot(self) -> None:
        guest = build()
        disk = self._folder / "disk.raw"
        subprocess.run(["cp", "--sparse=always", guest.disk, str(disk)], check=True)
        with self.summary.step("Start cloudvmm") as notes:
            self._start_server()
            ping = self._api.call("GET", "vmm.ping", expect=200)
            notes.append(f"version {ping['version']}, pid {ping['pid']}")
        config = {
            "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
            "memory": {"size": 512 * MIB},
            "payload": {"kernel": guest.kernel, "initramfs": guest.initramfs, "cmdline": FAST_CMDLINE},
            "disks": [{"path": str(disk)}],
            "rng": {"src": "/dev/urandom"},
            "serial": {"mode": "File", "file": str(self._folder / "console.log")},
            "console": {"mode": "Pty"},
        }
        with self.summary.step("Create the VM"):
            print(f"  {json.dumps(config)}")
            self._api.call("PUT", "vm.create", config)
            self._expect_state("Created")
        with self.summary.step("Boot it, wait for its user space") as notes:
            self._boot_and_wait(notes)

    def look(self) -> None:
        with self.summary.step("Look at it from outside") as notes:
            info = self._expect_state("Running")
            check(info["memory_actual_size"] == 512 * MIB, info["memory_actual_size"])
            for name, node in sorted(info["device_tree"].items()):
                print(f"  device {name:20} {node.get('pci_bdf') or ''}".rstrip())
            notes.append(f"{info['state']}, {len(info['device_tree'])} devices")
        self._pty = os.open(info["config"]["console"]["file"], os.O_RDWR | os.O_NOCTTY)
        with self.summary.step("Look at it from inside") as notes:
            shell = GuestShell(self._pty)
            shell.wait_ready(READY_S)
            facts = self._run(shell, "uname -r; nproc; awk '/MemTotal/ {print $2}' /proc/meminfo")
            sectors = self._run(shell, "dd if=/dev/vda of=/dev/null bs=64k count=64; cat /sys/block/vda/size")
            check(int(sectors.split()[-1]) == 64 * MIB // 512, sectors)
            kernel, processors, memory_kib = facts.split()
            notes.append(f"Linux {kernel}, {processors} CPU, {int(memory_kib) // 1024} MiB")

    def pause(self) -> None:
        with self.summary.step("Pause and resume") as notes:
            shell = GuestShell(self._pty)
            before_s = self._uptime_s(shell)
            self._api.call("PUT", "vm.pause")
            begun = time.monotonic()
            self._expect_state("Paused")
            time.sleep(PAUSE_S)  # not waiting for anything: this is the pause
            self._api.call("PUT", "vm.resume")
            paused_s = time.monotonic() - begun
            after_s = self._uptime_s(shell)
            self._expect_state("Running")
            aged_s = after_s - before_s
            check(aged_s < paused_s / 2, f"the guest aged {aged_s:.2f} s in a pause of {paused_s:.2f} s")
            notes.append(f"paused {paused_s:.2f} s, guest aged {aged_s:.2f} s")

    def count(self) -> None:
        with self.summary.step("Read the counters") as notes:
            counters = self._api.call("GET", "vm.counters", expect=200)
            (disk,) = (values for values in counters.values() if "read_bytes" in values)
            check(disk["read_bytes"] >= 4 * MIB, f"the guest read 4 MiB, counted are {disk['read_bytes']}")
            notes.append(f"{disk['read_bytes']} bytes in {disk['read_ops']} reads")

    def end(self) -> None:
        with self.summary.step("Press the power button"):
            self._api.call("PUT", "vm.power-button")
            wait_until(lambda: b"Power down" in self._console.read(), "the guest's last words", timeout_s=30)
            wait_until(lambda: self._state() == "Created", "the VM is off", timeout_s=10)
        with self.summary.step("Boot again, then cut the power") as notes:
            self._boot_and_wait(notes)
            self._api.call("PUT", "vm.shutdown")
            self._expect_state("Created")
        with self.summary.step("Delete the VM, end the server"):
            self._api.call("PUT", "vm.delete")
            self._api.call("GET", "vm.info", expect=404)
            self._api.call("PUT", "vmm.shutdown", expect=200)
            assert self._server is not None
            status = self._server.wait(10)
            check(status == 0, f"cloudvmm ended with status {status}")
            check(not self._socket.exists(), "the socket is still there")

    def tell(self) -> None:
        """Say how to talk to the VM that is left running."""
        curl = f"curl --unix-socket {self._socket}"
        print(f"\nThe VM goes on; its files are in {self._folder}. Talk to it:")
        print(f"  {curl} http://localhost/api/v1/vm.info")
        for name in ("vm.pause", "vm.resume", "vm.power-button", "vm.boot", "vmm.shutdown"):
            print(f"  {curl} -X PUT http://localhost/api/v1/{name}")
        print(f"  tail -f {self._folder}/console.log")
        print(f"To end it: the call of vmm.shutdown, then rm -r {self._folder}")

    def clear(self) -> None:
        """End what is left of the server and remove the folder."""
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Let go of the console; the VM does not notice."""
        if self._pty >= 0:
            os.close(self._pty)

    def _start_server(self) -> None:
        program = Path(sys.executable).parent / "cloudvmm"
        argv = [str(program), "--api-socket", str(self._socket), "--no-shutdown"]
        print("  $", " ".join(argv))
        with (self._folder / "cloudvmm.log").open("wb") as log:
            # A session of its own: Ctrl-C here must not reach the VM that --keep leaves running.
            self._server = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._server_answers, "the server answers", timeout_s=10)

    def _server_answers(self) -> bool:
        assert self._server is not None
        if (status := self._server.poll()) is not None:
            words = (self._folder / "cloudvmm.log").read_text(errors="replace")
            raise Failed(f"cloudvmm ended with status {status}: {words}")
        try:
            return self._api.exchange("GET", "vmm.ping")[0] == 200
        except OSError:
            return False

    def _boot_and_wait(self, notes: list[str]) -> None:
        old = self._console.read()
        begun = time.perf_counter()
        self._api.call("PUT", "vm.boot")

        def is_ready() -> bool:
            # A boot may begin the file anew or add to it.
            text = self._console.read()
            return ready_uptime_s(text.removeprefix(old)) is not None

        wait_until(is_ready, "cloudvmm-guest ready", timeout_s=READY_S)
        notes.append(f"ready after {time.perf_counter() - begun:.2f} s")

    def _expect_state(self, state: str) -> Any:
        info = self._api.call("GET", "vm.info", expect=200)
        check(info["state"] == state, f"the VM is {info['state']}, not {state}")
        return info

    def _state(self) -> str:
        return str(json.loads(self._api.exchange("GET", "vm.info")[1])["state"])

    def _uptime_s(self, shell: GuestShell) -> float:
        return float(self._run(shell, "cut -d' ' -f1 /proc/uptime"))

    def _run(self, shell: GuestShell, script: str) -> str:
        status, output = shell.run(script, timeout_s=30)
        text = output.decode(errors="replace")
        print(f"  guest # {script}")
        print(*(f"  guest | {line}" for line in text.splitlines()), sep="\n")
        check(status == 0, f"status {status}: {text}")
        return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Boot a guest through the REST API and show every step.")
    parser.add_argument("--keep", action="store_true", help="leave the VM running, say how to talk to it")
    args = parser.parse_args()
    demo = Demo(Path(tempfile.mkdtemp(prefix="cloudvmm-demo-")))
    try:
        demo.boot()
        demo.look()
        demo.pause()
        demo.count()
        if not args.keep:
            demo.end()
    except Exception as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        demo.summary.held = False
    except BaseException:  # Ctrl-C: nothing is kept
        demo.summary.held = False
        raise
    finally:
        demo.close()
        if demo.summary.held and args.keep:
            demo.tell()
        else:
            demo.clear()
    demo.summary.show()
    return 0 if demo.summary.held else 1


if __name__ == "__main__":
    sys.exit(main())
