"""A QEMU that is not there, not a QEMU, too old, talks garbage or never talks."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from support.attack import Call, bare_config
from support.deadline import HOST_S
from support.guest import find_guest
from support.process import descendants_of
from support.rest import Reply
from support.server import Server
from support.vm import choose_engine
from support.wait import wait_until
from support.watch import Watch

ServerFactory = Callable[..., Server]

AT_ONCE_S = 4.0  # of a `Watch`; QEMU is waited for for ten seconds, at least
PRETEND = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    -S) {machine} ;;
  esac
done
exec {real} "$@"
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known about any QEMU; the guest, which lies in the same cache, is still found."""
    guest = tmp_path / "guest.json"
    guest.write_bytes(msgspec.json.encode(find_guest()))
    monkeypatch.setenv("CLOUDVMM_TEST_GUEST", str(guest))
    monkeypatch.setenv("CLOUDVMM_CACHE", str(tmp_path / "cache"))


def script(folder: Path, text: str, mode: int = 0o755) -> str:
    path = folder / "qemu"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def pretender(folder: Path, machine: str) -> str:
    """A QEMU that is itself when asked about, and does `machine` when it is to run one."""
    choose_engine("qemu")
    return script(folder, PRETEND.format(machine=machine, real=shutil.which("qemu-system-x86_64")))


def server_with(cloudvmm_server: ServerFactory, folder: Path, binary: str) -> Server:
    server = cloudvmm_server("--qemu", binary, "--event-monitor", f"path={folder}/events")
    server.vmm.put("vm.create", bare_config(choose_engine("qemu"), folder))
    return server


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        (None, 0, "There is no program at"),
        ("#!/bin/sh\n", 0o644, "There is no program at"),
        (
            "#!/bin/sh\necho QEMU emulator version 6.0.0\n",
            0o755,
            "is not|is QEMU 6.0.0; 7.2 or newer is needed|PC",
        ),
        ("#!/bin/sh\necho hello\n", 0o755, "is not a QEMU system emulator"),
        ("#!/bin/sh\nhead -c 100000 /dev/urandom\n", 0o755, "is not a QEMU system emulator"),
        ("#!/bin/sh\necho I am broken >&2; exit 3\n", 0o755, "I am broken"),
        ("#!/nonexistent\n", 0o755, "not found|No such file"),
        ("\x7fELF is all there is", 0o755, "failed|Exec format error"),
    ],
    ids=["missing", "not-executable", "too-old", "hello", "noise", "exit-3", "no-interpreter", "bad-elf"],
)
def test_unfit_binary_is_refused_by_name_and_the_vmm_goes_on(
    cloudvmm_server: ServerFactory, tmp_path: Path, text: str | None, mode: int, expected: str
) -> None:
    binary = str(tmp_path / "qemu") if text is None else script(tmp_path, text, mode)
    server = server_with(cloudvmm_server, tmp_path, binary)
    words = server.vmm.put("vm.boot", expect=500)
    assert any(part in " ".join(words) for part in expected.split("|")), words
    assert binary in " ".join(words)
    assert server.vmm.get("vm.info")["state"] == "Created"


@pytest.mark.qemu
@pytest.mark.parametrize(
    "machine",
    [
        "exec head -c 100000 /dev/urandom",
        "exit 0",
        "exit 1",
        'ulimit -f 0; echo >"$0.log"',
        "echo so sad >&2; exit 1",
    ],
)
def test_machine_that_ends_before_it_speaks_fails_the_boot(
    cloudvmm_server: ServerFactory, tmp_path: Path, machine: str
) -> None:
    server = server_with(cloudvmm_server, tmp_path, pretender(tmp_path, machine))
    words = server.vmm.put("vm.boot", expect=500)
    assert len(words) >= 4 and words[-1]
    assert server.vmm.get("vm.info")["state"] == "Created"
    assert not descendants_of(server.pid)


@pytest.mark.qemu
@pytest.mark.parametrize(
    "line",
    [r"\377\376\000", "{}", '{"QMP":1}', "[1]", '{"return":{}}', '{"event":7}', "x" * 300000],
    ids=["bytes", "empty", "no-version", "array", "reply", "event", "long"],
)
def test_machine_that_talks_garbage_fails_the_boot_or_is_overtaken(
    cloudvmm_server: ServerFactory, tmp_path: Path, line: str
) -> None:
    # It answers on every descriptor that it was handed.
    noise = tmp_path / "noise"
    noise.write_bytes(line.encode().decode("unicode_escape").encode("latin-1") + b"\r\n")
    each = f"n=${{fd##*/}}; [ $n -gt 2 ] && cat {noise} >&$n"
    machine = f"for fd in /proc/self/fd/*; do {each}; done 2>/dev/null; exec sleep 300"
    server = server_with(cloudvmm_server, tmp_path, pretender(tmp_path, machine))
    call = Call(server.socket_path, "PUT", "vm.boot")
    wait_until(lambda: call.is_over or has_machine(server), "QEMU is started", timeout_s=HOST_S)
    server.vmm.get("vmm.ping")
    assert ends_at_once(server, call).status == 500


@pytest.mark.qemu
@pytest.mark.parametrize("how", ["vmm.shutdown", "SIGTERM"])
@pytest.mark.parametrize("silent", ["always", "as a machine"])
def test_machine_that_never_speaks_is_overtaken_at_once(
    cloudvmm_server: ServerFactory, tmp_path: Path, silent: str, how: str
) -> None:
    binary = (
        script(tmp_path, "#!/bin/sh\nexec sleep 300\n")
        if silent == "always"
        else pretender(tmp_path, "exec sleep 300")
    )
    server = server_with(cloudvmm_server, tmp_path, binary)
    call = Call(server.socket_path, "PUT", "vm.boot")
    events = tmp_path / "events"
    wait_until(lambda: b'"booting"' in events.read_bytes(), "the boot is under way", timeout_s=HOST_S)
    wait_until(lambda: any("sleep" in child.command for child in server.children()), "QEMU", timeout_s=HOST_S)
    assert not call.is_over
    assert ends_at_once(server, call, by_signal=how == "SIGTERM").status == 500


def has_machine(server: Server) -> bool:
    """Return whether a machine was started; a QEMU that is only asked about itself is none."""
    return any(" -S" in child.command or "sleep" in child.command for child in server.children())


def ends_at_once(server: Server, call: Call, *, by_signal: bool = False) -> Reply:
    """End the VMM, in time; return what the call was answered with."""
    server.children()
    with Watch() as watch:
        if by_signal:
            os.kill(server.pid, signal.SIGTERM)
        else:
            server.vmm.put("vmm.shutdown")
        assert server.wait_end() == 0
    assert watch.elapsed_s < AT_ONCE_S
    reply = call.outcome(timeout_s=HOST_S)
    assert reply is not None
    return reply
