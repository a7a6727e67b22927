"""A wrong option on either command line: its name, what was given and what is allowed are all printed."""

import socket
import subprocess
import sys

import pytest

from cloudvmm.cli.remote.main import main as remote_main

SERVER = ["--engine=fake"]
BOOT = [*SERVER, "--kernel=/dev/null"]
LONG_S = 20.0
PROGRAM = "import sys; from cloudvmm.cli.main import main; sys.exit(main())"
COUNT = "Allowed: a number from 1 to 4096; given: {}"
MONITOR = "Allowed: path=<path> or fd=<number>"
LANDLOCK = "Allowed: --landlock-rules access=r|w|rw"
IO_PORT = "The IO port was not properly provided in hex or a `0x` prefix is missing: zz"

# The words, the texts of the chain, and the line after it.
SERVER_FAULTS = [
    (
        [*SERVER, "--api-socket=fd=zz"],
        ["Error parsing --api-socket", "invalid digit found in string"],
        "Allowed: <path>, path=<path> or fd=<number>; given: fd=zz",
    ),
    ([*SERVER, "--event-monitor=foo"], ["Error parsing --event-monitor", "Unknown option: foo"], MONITOR),
    (
        [*SERVER, "--event-monitor=fd=x"],
        ["Error parsing --event-monitor", "Unable to convert x for fd"],
        MONITOR,
    ),
    ([*SERVER, "--event-monitor=path="], ["Error parsing --event-monitor: path or fd required"], MONITOR),
    ([*BOOT, "--gdb=foo"], ["Error parsing --gdb", "Unknown option: foo"], "Allowed: path=<path>"),
    ([*BOOT, "--gdb=path="], ["Error parsing --gdb: path required"], "Allowed: path=<path>"),
    (
        [*SERVER, "--api-socket-peers=uid=0", "--api-socket-peers=uid=x"],
        ["Error parsing --api-socket-peers", "Unable to convert x for uid"],
        "Allowed: uid=<number>",
    ),
    (
        [*SERVER, "--api-socket-peers=uid="],
        ["Error parsing --api-socket-peers: uid required"],
        "Allowed: uid=<number>",
    ),
    (
        [*SERVER, "--max-connections=x"],
        ["Error parsing --max-connections", "invalid digit found in string"],
        COUNT.format("x"),
    ),
    (
        [*SERVER, "--max-connections=0"],
        ["Error parsing --max-connections", "0 is not in the range from 1 to 4096"],
        COUNT.format("0"),
    ),
    (
        [*BOOT, "--landlock-rules=path=/tmp,access=x"],
        [
            "Error parsing config",
            "Error validating configuration",
            "Invalid landlock access: Invalid Landlock access: Invalid access: x",
        ],
        LANDLOCK,
    ),
    (
        [*BOOT, "--debug-console=tty,iobase=zz"],
        ["Error parsing config", "Error validating configuration", IO_PORT],
        "Allowed: --debug-console iobase=0x<port>",
    ),
    (
        [*BOOT, "--debug-console=iobase=0x10"],
        ["Error parsing config", "Error parsing --debug-console: invalid console mode given"],
        "Allowed: off|pty|tty|null,file=<path>,iobase=0x<port>",
    ),
]
REMOTE_FAULTS = [
    (
        ["resize", "--cpus=x"],
        ["Error parsing CPU count", "invalid digit found in string"],
        "Allowed: --cpus <number>; given: x",
    ),
    (
        ["resize", "--memory=1g"],
        ["Error parsing memory size", "Invalid value: 1g"],
        "Allowed: --memory <size>[K|M|G]; given: 1g",
    ),
    (
        ["resize", "--balloon=xK"],
        ["Error parsing balloon size", "Invalid value: x"],
        "Allowed: --balloon <size>[K|M|G]; given: xK",
    ),
    (
        ["resize-zone", "--id=z", "--size=1x"],
        ["Error parsing memory size", "Invalid value: 1x"],
        "Allowed: --size <size>[K|M|G]; given: 1x",
    ),
    (
        ["resize-disk", "--disk=d", "--size=1x"],
        ["Invalid disk size", "Invalid value: 1x"],
        "Allowed: --size <size>[K|M|G]; given: 1x",
    ),
]


def server_says(words):
    """Run the server in a process of its own, whose signals and umask it may change."""
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, timeout=LONG_S, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    return done.stderr


def assert_printed(text, chain, allowed):
    lines = [line for line in text.splitlines() if line]
    numbered = [f"  {number}: {line}" for number, line in enumerate(chain)]
    assert lines[1:] == [*(numbered if len(chain) > 1 else [f"  {chain[0]}"]), allowed]


@pytest.mark.parametrize(("words", "chain", "allowed"), SERVER_FAULTS)
def test_server_names_the_option_what_was_given_and_what_is_allowed(words, chain, allowed):
    assert_printed(server_says([*words, "--log-file=/dev/null"]), chain, allowed)


@pytest.mark.parametrize(("words", "chain", "allowed"), REMOTE_FAULTS)
def test_remote_names_the_option_what_was_given_and_what_is_allowed(
    words, chain, allowed, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("RUST_LOG", "off")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api"))
        listener.listen()
        assert remote_main([f"--api-socket={tmp_path / 'api'}", *words]) == 1
    assert_printed(capsys.readouterr().err, chain, allowed)


@pytest.mark.parametrize(
    ("log_format", "why"),
    [("{x}", "Unknown format token '{x}'"), ("a{", "Unterminated '{' in format string")],
)
def test_log_format_names_every_token(log_format, why):
    text = server_says([*SERVER, f"--log-format={log_format}"])
    *chain, allowed = [line for line in text.splitlines() if line][1:]
    assert chain == ["  0: Error parsing logger format", f"  1: {why}"]
    assert allowed.startswith("Allowed: --log-format of text, {{, }} and {boottime} {wallclock} ")
    assert allowed.endswith(f" {{localoffset}}; given: {log_format}")
