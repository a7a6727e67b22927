"""Help and usage lines, laid out as clap does."""

from __future__ import annotations

import os
import re
import textwrap

from cloudvmm.cli.remote.command import GLOBAL_OPTIONS, SUBCOMMANDS, Option, Subcommand

Rows = list[tuple[str, str]]

_NARROWEST = 40
_OPTION_COMMA = re.compile(r",(?=\S)")


def program_help(program: str, about_help: str) -> str:
    """What `--help` prints before any sub-command."""
    commands = [(subcommand.name, subcommand.about) for subcommand in SUBCOMMANDS]
    options = [
        *_option_rows(GLOBAL_OPTIONS),
        ("-h, --help", "Print help"),
        ("-V, --version", "Print version"),
    ]
    return (
        "Remotely control a cloud-hypervisor VMM.\n\n"
        f"Usage: {program} [OPTIONS] <COMMAND>\n\n"
        f"Commands:\n{_table([*commands, ('help', about_help)])}\n"
        f"Options:\n{_table(options)}"
    )


def subcommand_usage(subcommand: Subcommand, prog: str) -> str:
    """One line; `prog` is the program and the sub-command."""
    words = [prog]
    if any(not (option.is_required or option.is_ours) for option in subcommand.options):
        words.append("[OPTIONS]")
    words += [f"--{option.name} <{option.metavar}>" for option in subcommand.options if option.is_required]
    if subcommand.argument is not None:
        name = subcommand.argument.name
        words.append(f"<{name}>" if subcommand.argument.default is None else f"[{name}]")
    return f"Usage: {' '.join(words)}\n"


def subcommand_help(subcommand: Subcommand, prog: str) -> str:
    """What `--help` prints after a sub-command; loads the option strings' schemas."""
    parts = [f"{subcommand.about}\n", subcommand_usage(subcommand, prog)]
    if subcommand.argument is not None:
        parts.append(f"Arguments:\n{_table([_argument_row(subcommand)])}")
    parts.append(f"Options:\n{_table([*_option_rows(subcommand.options), ('-h, --help', 'Print help')])}")
    return "\n".join(parts)


def _argument_row(subcommand: Subcommand) -> tuple[str, str]:
    argument = subcommand.argument
    assert argument is not None
    if argument.default is not None:
        return f"[{argument.name}]", f"{argument.help} [default: {argument.default}]"
    if argument.schema is None:
        return f"<{argument.name}>", argument.help
    from cloudvmm.options.table import OPERATIONS, SCHEMAS

    schema = OPERATIONS.get(argument.schema) or SCHEMAS[argument.schema]
    return f"<{argument.name}>", f'{argument.help} "{schema.syntax}"'


def _option_rows(options: tuple[Option, ...]) -> Rows:
    return [
        (f"    --{option.name}" + ("" if option.is_switch else f" <{option.metavar}>"), option.help)
        for option in options
    ]


def _table(rows: Rows) -> str:
    """Two columns; the second is wrapped at blanks and at the commas of option strings."""
    left = max(len(name) for name, _ in rows)
    width = max(_columns() - left - 4, _NARROWEST)
    lines = []
    for name, text in rows:
        first, *more = textwrap.wrap(
            _OPTION_COMMA.sub(",\0 ", text), width, break_long_words=False, break_on_hyphens=False
        ) or [""]
        lines.append(f"  {name:{left}}  {first}")
        lines += [f"  {'':{left}}  {line}" for line in more]
    return "".join(f"{line.rstrip()}\n" for line in lines).replace(",\0 ", ",").replace("\0", "")


def _columns() -> int:
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 100
