"""The program from its first word to its exit status: start logic, what is printed where, and in which order.

On the fake engine; nothing here runs a guest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.deadline import HOST_S

PROGRAM = [sys.executable, "-m", "cloudvmm.cli.main"]
CHAIN = "Error: Cloud Hypervisor exited with the following chain of errors:\n"
SINGLE = "Error: Cloud Hypervisor exited with the following error:\n"
BAD_CPUS = ["--kernel", "/k", "--cpus", "boot=2,max=1"]


def run(*words: str, engine: Sequence[str] = ("--engine=fake",)) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *engine, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=HOST_S
    )


def error_of(ended: subprocess.CompletedProcess[str]) -> str:
    """Return what is printed after the log's line about it."""
    fatal, _, error = ended.stderr.rpartition("Error: ")
    assert "ERROR:cloudvmm -- Fatal error: " in fatal
    return f"Error: {error}"


EVENT_MONITOR = "path=<path> or fd=<number>"
API_SOCKET = "<path>, path=<path> or fd=<number>; given: fd=x"
LOG_FORMAT = (
    "--log-format of text, {{, }} and {boottime} {wallclock} {glog} {localglog} {thread} {level} "
    "{levelchar} {location} {msg} {pid} {tid} {year} {month} {day} {hour} {minute} {second} {micros} "
    "{offset} {localyear} {localmonth} {localday} {localhour} {localminute} {localsecond} {localmicros} "
    "{localoffset}"
)


def chain(*texts: str, allowed: str | None = None) -> str:
    lines = "".join(f"  {number}: {text}\n" for number, text in enumerate(texts))
    return CHAIN + lines + (f"\nAllowed: {allowed}\n" if allowed else "")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--kernel", "/k", "--memory", "size=512m"],
            chain(
                "Error parsing config",
                "Error parsing --memory",
                "Unable to convert 512m for size",
                allowed="size=<size>[K|M|G]",
            ),
        ),
        (
            BAD_CPUS,
            chain(
                "Error parsing config",
                "Error validating configuration",
                "Max CPUs (1) lower than boot CPUs (2)",
            ),
        ),
        (
            ["--restore", "prefault=on"],
            chain(
                "Error parsing restore",
                "Error parsing --restore: source_url missing",
                allowed="source_url=<text>,prefault=on|off,memory_restore_mode=copy|ondemand,"
                "net_fds=[<id>@[<fd>,<fd>]],vfio_fds=[<id>@<fd>],iommufd_fd=<number>,resume=on|off,"
                "zone_updates=[<id>@<host_numa_node>]",
            ),
        ),
        (
            ["--gdb", "socket=/s"],
            chain("Error parsing --gdb", "Unknown option: socket", allowed="path=<path>"),
        ),
        (["--gdb", ""], SINGLE + "  Error parsing --gdb: path required\n\nAllowed: path=<path>\n"),
        (
            ["--event-monitor", "nope=1"],
            chain("Error parsing --event-monitor", "Unknown option: nope", allowed=EVENT_MONITOR),
        ),
        (
            ["--event-monitor", ""],
            SINGLE + f"  Error parsing --event-monitor: path or fd required\n\nAllowed: {EVENT_MONITOR}\n",
        ),
        (
            ["--api-socket", "/does/not/exist"],
            chain(
                "Failed to start the VMM thread",
                "Error creation API server's socket",
                "No such file or directory: /does/not/exist (os error 2)",
            ),
        ),
        (
            ["--event-monitor", "path=/does/not/exist"],
            chain("Error doing event monitor I/O", "No such file or directory: /does/not/exist (os error 2)"),
        ),
    ],
)
def test_start_that_fails_prints_the_references_chain_and_ends_with_status_1(
    words: list[str], error: str
) -> None:
    ended = run(*words)
    assert error_of(ended) == error
    assert (ended.returncode, ended.stdout) == (1, "")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--api-socket", "fd=x"],
            chain("Error parsing --api-socket", "invalid digit found in string", allowed=API_SOCKET),
        ),
        (
            ["--api-socket", "fd=x", "--log-file", "/does/not/exist"],
            chain("Error parsing --api-socket", "invalid digit found in string", allowed=API_SOCKET),
        ),
        (
            ["--log-file", "/does/not/exist", "--log-format", "{nope}"],
            chain("Error creating log file", "No such file or directory: /does/not/exist (os error 2)"),
        ),
        (
            ["--log-format", "{nope}"],
            chain(
                "Error parsing logger format",
                "Unknown format token '{nope}'",
                allowed=f"{LOG_FORMAT}; given: {{nope}}",
            ),
        ),
        (
            ["--log-format", "{msg"],
            chain(
                "Error parsing logger format",
                "Unterminated '{' in format string",
                allowed=f"{LOG_FORMAT}; given: {{msg",
            ),
        ),
    ],
)
def test_failure_before_there_is_a_log_prints_the_chain_alone(words: list[str], error: str) -> None:
    ended = run(*words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", error)


def test_flags_of_the_vm_are_read_when_the_event_monitor_and_the_api_are_there(tmp_path: Path) -> None:
    events = tmp_path / "events"
    ended = run(*BAD_CPUS, "--event-monitor", f"path={events}", "--api-socket", "/does/not/exist/socket")
    assert "CPUs" not in ended.stderr
    assert ended.returncode == 1
    assert '"event": "starting"' in events.read_text()


def test_restore_beside_a_kernel_is_ignored() -> None:
    ended = run(*BAD_CPUS, "--restore", "nope=1")
    assert "lower than boot CPUs" in ended.stderr
    assert "restore" not in ended.stderr


def test_restore_that_fails_says_what_of_the_start_failed(tmp_path: Path) -> None:
    ended = run("--restore", f"source_url=file://{tmp_path}/absent")
    assert error_of(ended).startswith(
        f"{CHAIN}  0: Error restoring VM\n  1: The VM could not be restored\n  2: "
    )
    assert ended.returncode == 1


def test_failed_start_leaves_no_socket_of_its_own_in_use(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    for _ in range(2):
        assert "lower than boot CPUs" in run(*BAD_CPUS, "--api-socket", str(socket)).stderr


def test_warnings_about_the_vm_are_logged() -> None:
    ended = run(*BAD_CPUS, "--serial", "tty", "--platform", "uuid=u", "--log-format", "{level} {msg}")
    assert ended.stderr.splitlines()[:2] == [
        "WARN 'uuid' in --platform is deprecated; use 'system_uuid'.",
        'WARN Using TTY output for multiple consoles: ["virtio-console", "serial-console"]',
    ]


@pytest.mark.parametrize(
    ("verbosity", "levels"), [([], {"ERROR"}), (["-v"], {"ERROR", "INFO"}), (["-vv"], {"ERROR", "INFO"})]
)
def test_verbosity_chooses_what_is_logged(verbosity: list[str], levels: set[str]) -> None:
    ended = run(*BAD_CPUS, *verbosity, "--log-format", "LEVEL {level} {msg}")
    assert levels <= set(re.findall(r"^LEVEL (\w+)", ended.stderr, re.MULTILINE))
    assert ("starting" in ended.stderr) == bool(verbosity)


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version_is_printed_in_the_form_that_clients_parse(word: str) -> None:
    ended = run(word, engine=())
    assert re.fullmatch(r"cloudvmm \d+\.\d+\.\d+\S*\nMigration Protocol Versions: 0\n", ended.stdout)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_version_with_v_tells_the_features() -> None:
    assert run("-V", "-v", engine=()).stdout.endswith('\nEnabled features: ["io_uring", "kvm"]\n')


def test_help_is_printed_and_ends_with_status_0() -> None:
    ended = run("--help", engine=())
    assert ended.stdout.startswith("Usage: cloudvmm [OPTIONS]\n")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("words", [(), ("--nope",), ("--disk", "path=/d"), ("--kernel", "/k", "stray")])
def test_usage_error_ends_with_status_2(words: tuple[str, ...]) -> None:
    ended = run(*words, engine=())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Usage: cloudvmm" in ended.stderr
