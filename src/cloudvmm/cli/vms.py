"""`cloudvmm vms`: what a daemon holds, made, listed and ended over its own socket. Answers are JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cloudvmm.cli.usage import USAGE_STATUS, UsageParser
from cloudvmm.errors import error_chain

if TYPE_CHECKING:
    from cloudvmm.client.daemon import DaemonClient

_LONGEST_ID = 19  # digits


class Command(NamedTuple):
    """`api_command` is the daemon's; `arguments` are the names of what follows, and what they are."""

    name: str
    about: str
    api_command: str
    call: Callable[[DaemonClient, argparse.Namespace], object]
    arguments: tuple[tuple[str, str], ...] = ()


def _create(client: DaemonClient, args: argparse.Namespace) -> object:
    from cloudvmm.api.fleet import VmmsCreateData

    return client.vmms_create(VmmsCreateData(id=args.name))


def _delete(client: DaemonClient, args: argparse.Namespace) -> None:
    from cloudvmm.api.fleet import VmmsDeleteData

    client.vmms_delete(VmmsDeleteData(id=args.name))


def _shutdown(client: DaemonClient, _: argparse.Namespace) -> None:
    client.daemon_shutdown()


def _cancel_job(client: DaemonClient, args: argparse.Namespace) -> None:
    from cloudvmm.api.fleet import VmmsCancelJobData

    client.vmms_cancel_job(VmmsCancelJobData(vmm=args.name, id=args.id))


_NAME = ("name", "Name of the VM: 1 to 64 letters, digits and . _ -, the first a letter or a digit")

COMMANDS = (
    Command(
        "cancel-job",
        "Call off a command that waits, a snapshot or a migration",
        "vmms.cancel-job",
        _cancel_job,
        (_NAME, ("id", "The number that jobs tells")),
    ),
    Command("create", "Make a socket for one VM more, and tell it", "vmms.create", _create, (_NAME,)),
    Command("delete", "End a VM and its socket", "vmms.delete", _delete, (_NAME,)),
    Command(
        "jobs",
        "Which commands are under way and which wait",
        "vmms.jobs",
        lambda client, _: client.vmms_jobs(),
    ),
    Command("list", "Which VMs there are, and where", "vmms.list", lambda client, _: client.vmms_list()),
    Command("ping", "Whether the daemon answers", "daemon.ping", lambda client, _: client.daemon_ping()),
    Command(
        "shutdown",
        "End all VMs and the daemon",
        "daemon.shutdown",
        _shutdown,
    ),
)


def run_vms(words: list[str], *, program: str) -> int:
    """Carry out `vms` with the words behind it: ask the daemon, print its answer; return the exit status."""
    parser = build_parser(f"{program} vms")
    if not words:
        parser.print_help(sys.stderr)
        return USAGE_STATUS
    args = parser.parse_words(words, argparse.Namespace())
    if args.api_socket is None:
        parser.refuse("the following required arguments were not provided:\n  --api-socket <api-socket>")
    if args.command is None:
        parser.refuse(f"'{parser.prog}' requires a subcommand but one was not provided")
    return _ask(args, parser.prog)


def build_parser(prog: str) -> UsageParser:
    """Return the whole parser, for parsing and for shell completion."""
    parser = UsageParser(
        prog=prog,
        usage="%(prog)s --api-socket <api-socket> <COMMAND>",
        description="What a cloudvmm daemon holds.",
    )
    add_vms_arguments(parser)
    return parser


def add_vms_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what stands behind `vms` to `parser`."""
    parser.add_argument("--api-socket", metavar="<api-socket>", help="The daemon's own socket")
    parser.add_argument(
        "--timeout",
        metavar="<seconds>",
        type=_seconds,
        default=60.0,
        help="Give up when so long none answers",
    )
    parser.add_argument("-h", "--help", action="help", help="Print help")
    commands = parser.add_subparsers(dest="command", metavar="<COMMAND>", parser_class=type(parser))
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.about, description=command.about)
        for name, words in command.arguments:
            kind = _number if name == "id" else str
            subparser.add_argument(name, help=words, type=kind)
        if not any(action.option_strings == ["-h", "--help"] for action in subparser._actions):
            subparser.add_argument("-h", "--help", action="help", help="Print help")


def _ask(args: argparse.Namespace, program: str) -> int:
    from cloudvmm.client.daemon import DaemonClient
    from cloudvmm.client.error import ClientError
    from cloudvmm.client.failure import ServerError

    command = next(one for one in COMMANDS if one.name == args.command)
    try:
        with DaemonClient(args.api_socket, timeout_s=args.timeout) as client:
            answer = command.call(client, args)
    except ServerError as error:
        sys.stderr.write(f"{program}: {error}\n")  # the text holds the whole chain
        return 1
    except ClientError as error:
        sys.stderr.write(f"{program}: {': '.join(error_chain(error))}\n")
        return 1
    _print(answer)
    return 0


def _print(answer: object) -> None:
    if answer is None:
        return
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > _LONGEST_ID:
        raise argparse.ArgumentTypeError(f"invalid value '{text}' for '<id>': not a number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"invalid value '{text}' for '--timeout <seconds>': not a time")
    return seconds
