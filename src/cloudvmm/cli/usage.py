"""The form of a command line's refusals: what clap, the reference's parser, says, and its exit status.

Which flags there are is not here. Every program's parser is a `UsageParser`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

USAGE_STATUS = 2

_SURPLUS_VALUE = "ignored explicit argument "
_OPTION_COMMA = r",(?=\S)"  # not one of a sentence


class UsageParser(argparse.ArgumentParser):
    """argparse that knows no abbreviations, and whose refusals read like clap's."""

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": HelpFormatter, "allow_abbrev": False, "add_help": False, **options}
        super().__init__(exit_on_error=False, **options)

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Read a command line without its first word; exit where something is wrong with it, and say what."""
        try:
            args, extras = self.parse_known_args(list(words))
        except argparse.ArgumentError as error:
            self.refuse(clap_text(error))
        if extras:
            self.refuse_unexpected(extras[0].split("=")[0])
        return args

    def refuse(self, message: str, *, tip: str | None = None, usage: str | None = None) -> NoReturn:
        """Print `message` and exit. `usage` is the form that would do; the general one if not given."""
        tips = f"  tip: {tip}\n\n" if tip else ""
        shown = f"Usage: {self.prog} {usage}\n" if usage else self.format_usage()
        self.exit(USAGE_STATUS, f"error: {message}\n\n{tips}{shown}\nFor more information, try '--help'.\n")

    def error(self, message: str) -> NoReturn:
        self.refuse(message)

    def refuse_unexpected(self, word: str) -> NoReturn:
        """Say that `word` belongs nowhere, and exit."""
        from difflib import get_close_matches

        flags = [flag for action in self._actions for flag in action.option_strings if flag[:2] == "--"]
        similar = get_close_matches(word, flags, n=1) if word[:1] == "-" else []
        tip = f"a similar argument exists: '{similar[0]}'" if similar else None
        self.refuse(f"unexpected argument '{word}' found", tip=tip)

    # The two hooks below are argparse's own; their messages replace argparse's.

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if action.option_strings:
            choices = ", ".join(map(str, action.choices))
            message = f"invalid value '{value}' for '{shape_of(action)}'\n  [possible values: {choices}]"
        else:
            message = f"unrecognized subcommand '{value}'"
        raise argparse.ArgumentError(action, message)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            message = f"a value is required for '{shape_of(action)}' but none was supplied"
            raise argparse.ArgumentError(action, message) from None


class HelpFormatter(argparse.HelpFormatter):
    """Breaks lines at the commas of an option string, which has no blanks to break at."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "Usage: " if prefix is None else prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = super()._split_lines(re.sub(_OPTION_COMMA, ",\0 ", text), width)
        return [line.replace(",\0 ", ",").replace("\0", "") for line in lines]


def shape_of(action: argparse.Action) -> str:
    """Return a flag with its value, as clap names it: `--disk <disk>...`."""
    flag = action.option_strings[-1] if action.option_strings else ""
    value = f"<{flag.lstrip('-') or action.dest}>"
    shown = {0: "", "?": f"[{value}]", "+": f"{value}..."}.get(action.nargs or "", value)
    return f"{flag} {shown}".strip() if action.nargs != 0 else flag


def clap_text(error: argparse.ArgumentError) -> str:
    """Return argparse's words as clap's."""
    if error.message.startswith(_SURPLUS_VALUE):
        value = error.message.removeprefix(_SURPLUS_VALUE).strip("'\"")
        return f"unexpected value '{value}' for '{error.argument_name}' found; no more were expected"
    return error.message
