"""The parser of command lines with flags of `flag.py`: help, and whatever can be wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from cloudvmm.cli.flag import FLAGS, Args, Arity, Flag, Group
from cloudvmm.cli.usage import USAGE_STATUS, UsageParser, shape_of

OWN_COMMANDS = (
    "Beside the flags there are the commands 'cloudvmm guest' (a small guest for first steps), "
    "'cloudvmm upgrade' (take the VM of a running cloudvmm over), 'cloudvmm daemon' (many VMs in one "
    "process), 'cloudvmm vms' (what such a daemon holds) and 'cloudvmm completion' (for your shell); --help "
    "behind one tells more."
)


def parse(argv: Sequence[str], *, program: str) -> Args:
    """Read the command line of a VMM. Prints help or a usage error and exits where that is asked for."""
    parser = build_parser(program, with_help=not argv or "-h" in argv or "--help" in argv)
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(USAGE_STATUS)
    args = parser.parse_words(argv, Args())
    _check_groups(parser, args.given)
    return args


_NARGS: dict[Arity, int | str | None] = {
    Arity.ONE: None,
    Arity.MANY: "+",
    Arity.OPTIONAL: "?",
    Arity.SWITCH: 0,
}


class _Use(argparse.Action):
    """Stores the value of a flag and that it was given; refuses a second use of one for single use."""

    def __init__(self, *, flag: Flag, dest: str, **options: Any) -> None:
        super().__init__(dest=dest, nargs=_NARGS[flag.arity], **options)
        self.flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.flag.arity is Arity.MANY:
            values = [*(getattr(namespace, self.dest) or ()), *values]
        elif self.flag.name in namespace.given:
            message = f"the argument '{shape_of(self)}' cannot be used multiple times"
            raise argparse.ArgumentError(self, message)
        elif self.flag.arity is Arity.SWITCH:
            values = True
        namespace.given.add(self.flag.name)
        setattr(namespace, self.dest, values)


def build_parser(
    program: str, *, with_help: bool, flags: Sequence[Flag] = FLAGS, description: str = "Launch a VMM."
) -> UsageParser:
    """Return the parser of `flags`; texts for `--help` cost imports, so they are made where asked for."""
    parser = UsageParser(
        prog=program,
        usage="%(prog)s [OPTIONS]",
        description=description,
        epilog=OWN_COMMANDS if program == "cloudvmm" else None,
    )
    parser.set_defaults(given=set())
    options = parser.add_argument_group("Options")
    for flag in flags:
        _add_flag(options, flag, with_help=with_help)
    options.add_argument("-v", action="count", default=0, help="Log more; up to three times")
    options.add_argument("-V", "--version", action="store_true", help="Print version")
    options.add_argument("-h", "--help", action="help", help="Print help")
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: Flag, *, with_help: bool) -> None:
    options: dict[str, Any] = {}
    if flag.arity is Arity.OPTIONAL:
        options["const"] = ""
    if flag.arity is not Arity.SWITCH:
        options["metavar"] = f"<{flag.name}>"
    group.add_argument(
        f"--{flag.name}",
        dest=flag.member,
        action=_Use,
        flag=flag,
        default=flag.unset,
        choices=flag.choices,
        help=_help(flag) if with_help else None,
        **options,
    )


def _help(flag: Flag) -> str:
    # The schemas of all option strings are worth importing only where someone reads them.
    from cloudvmm.options.table import syntax

    parts = [flag.help]
    if described := syntax(flag.name):
        parts.append(f'"{described}"')
    if flag.default is not None:
        parts.append(f"[default: {flag.default}]")
    if flag.choices is not None:
        parts.append(f"[possible values: {', '.join(flag.choices)}]")
    return " ".join(parts).replace("%", "%%")


def _check_groups(parser: UsageParser, given: set[str]) -> None:
    payloads = [flag.name for flag in FLAGS if flag.group is Group.PAYLOAD]
    if not given.isdisjoint(payloads):
        return
    needy = [flag.name for flag in FLAGS if flag.group is Group.VM and flag.name in given]
    if needy:
        shapes = {action.dest: shape_of(action) for action in parser._actions}
        one_of = f"<{'|'.join(f'--{name} <{name}>' for name in payloads)}>"
        used = " ".join(shapes[name.replace("-", "_")] for name in needy)
        parser.refuse(
            f"the following required arguments were not provided:\n  {one_of}", usage=f"{used} {one_of}"
        )
