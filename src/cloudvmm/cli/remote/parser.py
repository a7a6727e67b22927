"""The command line's own form: clap's, since scripts read its usage errors and people its help.

Only which words go where is decided here; what they mean is in `request.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from cloudvmm.cli.remote.command import BY_NAME, GLOBAL_OPTIONS, SUBCOMMANDS, Option, Subcommand
from cloudvmm.cli.remote.usage import program_help, subcommand_help, subcommand_usage
from cloudvmm.cli.usage import USAGE_STATUS, UsageParser, clap_text, shape_of

_LONGEST_TIMEOUT_S = 1e9
_HELP_ABOUT = "Print this message or the help of the given subcommand(s)"
_REQUIRED = re.compile(r"the following arguments are required: (.+)")


def parse_args(argv: Sequence[str], *, program: str) -> argparse.Namespace:
    """Read the command line without its first word.

    The result has a member per global option, `command` (the name of the sub-command), `parser` (its parser)
    and a member per argument of that. Prints help or the version and exits where that is asked for, and
    exits with a usage error where the words do not fit.
    """
    words = list(argv)
    parser = build_parser(program)
    if not words:
        sys.stderr.write(parser.format_help())
        parser.exit(USAGE_STATUS)
    parser.refuse_other_than_text(words)
    args: argparse.Namespace
    args, spare = parser.parse_known_args(words)
    if args.command is None:
        parser.refuse(_no_subcommand(program))
    if spare:
        is_before = words.index(spare[0]) < words.index(args.command)
        (parser if is_before else args.parser).refuse_unexpected(spare[0].partition("=")[0])
    return args


def build_parser(program: str) -> RemoteParser:
    """Return the whole parser, for parsing and for shell completion."""
    parser = RemoteParser(prog=program)
    for option in GLOBAL_OPTIONS:
        _add_option(parser, option)
    parser.add_argument("-h", "--help", action="help", help="Print help")
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="Print version")
    subparsers = parser.add_subparsers(dest="command", metavar="<COMMAND>", parser_class=RemoteParser)
    for subcommand in SUBCOMMANDS:
        _add_subcommand(subparsers.add_parser, subcommand, program)
    helper = subparsers.add_parser("help", help=_HELP_ABOUT, prog=program)
    helper.add_argument("topic", nargs="*", action=_Help, help="Sub-command to describe")
    helper.set_defaults(parser=helper)
    return parser


def option_string_arguments(parser: argparse.ArgumentParser) -> dict[argparse.Action, str]:
    """Return the arguments in `parser` that take an option string, and by what name its schema is known."""
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {
        action: subcommand.argument.schema
        for subcommand in SUBCOMMANDS
        if subcommand.argument is not None and subcommand.argument.schema is not None
        for action in subparsers.choices[subcommand.name]._actions
        if action.dest == subcommand.argument.name
    }


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what `parser` takes, and then what its sub-commands take."""
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                actions += actions_of(subparser)
    return actions


class RemoteParser(UsageParser):
    """The parser of `subcommand`; without one that of the program."""

    def __init__(self, *, subcommand: Subcommand | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.subcommand = subcommand

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Here, and not above all, so that the usage shown is that of the sub-command.
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            self.error(clap_text(error))

    def format_usage(self) -> str:
        if self.subcommand is None:
            return f"Usage: {self.prog} [OPTIONS] <COMMAND>\n"
        return subcommand_usage(self.subcommand, self.prog)

    def format_help(self) -> str:
        if self.subcommand is None:
            return program_help(self.prog, _HELP_ABOUT)
        return subcommand_help(self.subcommand, self.prog)

    def error(self, message: str) -> NoReturn:
        if found := _REQUIRED.fullmatch(message):
            names = "\n".join(f"  {self._shape(name)}" for name in found[1].split(", "))
            self.refuse(f"the following required arguments were not provided:\n{names}")
        self.refuse(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.refuse(f"unrecognized subcommand '{value}'", tip=_similar(value))
        super()._check_value(action, value)

    def _shape(self, name: str) -> str:
        known = (action for action in self._actions if name in (action.dest, *action.option_strings))
        action = next(known, None)
        return name if action is None else shape_of(action)


class _Once(argparse.Action):
    """Stores a value or, of a switch, True; refuses a second use."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) not in (None, False):
            parser.error(f"the argument '{shape_of(self)}' cannot be used multiple times")
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from cloudvmm.cli.remote.version import version_text

        sys.stdout.write(version_text(parser.prog))
        parser.exit()


class _Help(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        topic = values[0] if values else None
        if topic is None or topic == "help":
            sys.stdout.write(program_help(parser.prog, _HELP_ABOUT))
        elif topic in BY_NAME:
            sys.stdout.write(subcommand_help(BY_NAME[topic], f"{parser.prog} {topic}"))
        else:
            parser.error(f"unrecognized subcommand '{topic}'")
        parser.exit()


def _add_subcommand(add: Callable[..., RemoteParser], subcommand: Subcommand, program: str) -> None:
    parser = add(
        subcommand.name,
        help=subcommand.about,
        subcommand=subcommand,
        prog=f"{program} {subcommand.name}",
    )
    if subcommand.argument is not None:
        argument = subcommand.argument
        form: dict[str, Any] = {} if argument.default is None else {"nargs": "?", "default": argument.default}
        if argument.is_number:
            form["type"] = partial(_number, f"<{argument.name}>")
        parser.add_argument(argument.name, help=argument.help, **form)
    for option in subcommand.options:
        _add_option(parser, option)
    parser.add_argument("-h", "--help", action="help", help="Print help")
    parser.set_defaults(parser=parser)


def _add_option(parser: RemoteParser, option: Option) -> None:
    read = _TYPES.get(option.metavar)
    kind = None if read is None else partial(read, f"--{option.name} <{option.metavar}>")
    if option.is_switch:
        form: dict[str, Any] = {"nargs": 0, "default": False}
    else:
        form = {"metavar": f"<{option.metavar}>", "required": option.is_required, "type": kind}
    dest = option.name.replace("-", "_")
    parser.add_argument(f"--{option.name}", dest=dest, action=_Once, help=option.help, **form)


def _seconds(shape: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"invalid value '{text}' for '{shape}': not a time")
    return seconds


def _number(shape: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise argparse.ArgumentTypeError(f"invalid value '{text}' for '{shape}': not a number")
    return int(text)


_TYPES: dict[str, Callable[[str, str], Any]] = {"seconds": _seconds, "number": _number}


def _no_subcommand(program: str) -> str:
    names = ", ".join([*BY_NAME, "help"])
    return f"'{program}' requires a subcommand but one was not provided\n  [subcommands: {names}]"


def _similar(word: str) -> str | None:
    from difflib import get_close_matches

    ours = [name for name, subcommand in BY_NAME.items() if subcommand.is_ours]
    theirs = [name for name in (*BY_NAME, "help") if name not in ours]
    found = get_close_matches(word, theirs) or get_close_matches(word, ours)
    matches = [f"'{match}'" for match in found]
    if not matches:
        return None
    start = "a similar subcommand exists" if len(matches) == 1 else "some similar subcommands exist"
    return f"{start}: {', '.join(matches)}"
