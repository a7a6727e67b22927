"""Usage errors and help, in the form that clap gives them."""

import os

import pytest

from cloudvmm.cli.remote.command import SUBCOMMANDS
from cloudvmm.cli.remote.parser import parse_args

HINT = "\nFor more information, try '--help'.\n"
USAGE = "\nUsage: ch-remote [OPTIONS] <COMMAND>\n"


def leave(capsys, *argv, program="ch-remote"):
    """Parse what ends the program; return its status, standard output and standard error."""
    with pytest.raises(SystemExit) as caught:
        parse_args(argv, program=program)
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


USAGE_ERRORS = [
    (["frob"], f"error: unrecognized subcommand 'frob'\n{USAGE}{HINT}"),
    (
        ["snapshoot", "x"],
        "error: unrecognized subcommand 'snapshoot'\n\n  tip: a similar subcommand exists: 'snapshot'\n"
        f"{USAGE}{HINT}",
    ),
    (
        ["--api-socket"],
        f"error: a value is required for '--api-socket <api-socket>' but none was supplied\n{HINT}",
    ),
    (
        ["--api-socket", "/a", "--api-socket", "/b", "info"],
        f"error: the argument '--api-socket <api-socket>' cannot be used multiple times\n{USAGE}{HINT}",
    ),
    (
        ["--dbus-system-bus=1", "info"],
        f"error: unexpected value '1' for '--dbus-system-bus' found; no more were expected\n{USAGE}{HINT}",
    ),
    (["--frob", "info"], f"error: unexpected argument '--frob' found\n{USAGE}{HINT}"),
    (["info", "x"], f"error: unexpected argument 'x' found\n\nUsage: ch-remote info\n{HINT}"),
    (
        ["info", "--api-socket", "/s"],
        f"error: unexpected argument '--api-socket' found\n\nUsage: ch-remote info\n{HINT}",
    ),
    (
        ["resize", "--cpu=3"],
        "error: unexpected argument '--cpu' found\n\n  tip: a similar argument exists: '--cpus'\n"
        f"\nUsage: ch-remote resize [OPTIONS]\n{HINT}",
    ),
    (
        ["resize", "--cpus", "1", "--cpus", "2"],
        "error: the argument '--cpus <cpus>' cannot be used multiple times\n"
        f"\nUsage: ch-remote resize [OPTIONS]\n{HINT}",
    ),
    (
        ["resize-disk", "--size", "1"],
        "error: the following required arguments were not provided:\n  --disk <disk>\n"
        f"\nUsage: ch-remote resize-disk --disk <disk> --size <size>\n{HINT}",
    ),
    (
        ["resize-zone"],
        "error: the following required arguments were not provided:\n  --id <id>\n  --size <size>\n"
        f"\nUsage: ch-remote resize-zone --id <id> --size <size>\n{HINT}",
    ),
    (["--timeout", "0", "ping"], f"error: invalid value '0' for '--timeout <seconds>': not a time\n{HINT}"),
    (
        ["--timeout", "inf", "ping"],
        f"error: invalid value 'inf' for '--timeout <seconds>': not a time\n{HINT}",
    ),
    (["events", "--from", "-1"], f"error: invalid value '-1' for '--from <number>': not a number\n{HINT}"),
]


@pytest.mark.parametrize(("argv", "text"), USAGE_ERRORS, ids=lambda value: " ".join(value)[:40])
def test_usage_error(argv, text, capsys):
    assert leave(capsys, *argv) == (2, "", text)


NEEDING = [
    subcommand for subcommand in SUBCOMMANDS if subcommand.argument and not subcommand.argument.default
]


@pytest.mark.parametrize("subcommand", NEEDING, ids=lambda subcommand: subcommand.name)
def test_missing_positional_is_a_usage_error(subcommand, capsys):
    status, out, err = leave(capsys, subcommand.name)
    name = subcommand.argument.name
    assert (status, out) == (2, "")
    assert err.startswith(
        f"error: the following required arguments were not provided:\n  <{name}>\n\nUsage: "
    )
    assert err.endswith(f"<{name}>\n{HINT}")


def test_word_that_is_no_text_is_a_usage_error(capsys):
    status, _, err = leave(capsys, "add-disk", os.fsdecode(b"path=/\xff"))
    assert (status, err) == (2, f"error: invalid UTF-8 was detected in one or more arguments\n{USAGE}{HINT}")


def test_no_subcommand_names_them_all(capsys):
    status, out, err = leave(capsys, "--api-socket", "/s")
    assert (status, out) == (2, "")
    assert err.startswith(
        "error: 'ch-remote' requires a subcommand but one was not provided\n"
        "  [subcommands: add-device, add-disk,"
    )


def test_no_word_at_all_is_help_on_standard_error(capsys):
    status, out, err = leave(capsys)
    assert (status, out) == (2, "")
    assert err.startswith(
        "Remotely control a cloud-hypervisor VMM.\n\nUsage: ch-remote [OPTIONS] <COMMAND>\n"
    )


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"], ["help", "help"]], ids=" ".join)
def test_help_lists_every_subcommand(argv, capsys):
    status, out, err = leave(capsys, *argv)
    assert (status, err) == (0, "")
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()]
    assert listed == [*(subcommand.name for subcommand in SUBCOMMANDS), "help"]


@pytest.mark.parametrize("subcommand", SUBCOMMANDS, ids=lambda subcommand: subcommand.name)
def test_both_ways_to_a_subcommands_help_say_the_same(subcommand, capsys):
    first = leave(capsys, subcommand.name, "--help")
    assert leave(capsys, "help", subcommand.name) == first
    assert first[0] == 0
    assert first[1].startswith(f"{subcommand.about}\n\nUsage: ch-remote {subcommand.name}")


def test_help_shows_the_keys_of_an_option_string(capsys):
    _, out, _ = leave(capsys, "add-vsock", "--help")
    assert "Usage: ch-remote add-vsock <vsock_config>\n" in out
    assert '"id=<text>,iommu=on|off,pci_segment=<number>,' in out


def test_help_of_nothing_known_is_a_usage_error(capsys):
    status, _, err = leave(capsys, "help", "frob")
    assert (status, err.splitlines()[0]) == (2, "error: unrecognized subcommand 'frob'")


@pytest.mark.parametrize(
    ("program", "line"),
    [("ch-remote", "ch-remote v54.0.0\n"), ("cloudvmm-remote", "cloudvmm-remote 0.1.0\n")],
)
@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version_has_the_programs_name(flag, program, line, capsys):
    assert leave(capsys, flag, program=program) == (0, line, "")


def test_flags_may_have_their_value_behind_an_equals_sign():
    args = parse_args(["--api-socket=/a=b", "--timeout=1.5", "events", "--from=7"], program="ch-remote")
    assert (args.api_socket, args.timeout, vars(args)["from"]) == ("/a=b", 1.5, 7)


def test_what_is_not_given_is_none():
    args = parse_args(["resize", "--cpus", "2"], program="ch-remote")
    assert (args.api_socket, args.timeout, args.dbus_system_bus) == (None, None, False)
    assert (args.cpus, args.memory, args.balloon) == ("2", None, None)
