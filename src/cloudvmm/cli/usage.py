"""The form of a command line's refusals: what clap, the reference's parser, says, and its exit status.

Which flags there are is not here. Every program's parser is a `UsageParser`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

USAGE_STATUS = 2

_SURPLUS_VALUE = "ignored explicit argument "
_OPTION_COMMA = r",(?=\S)"  # not one of a sentence
_OF_A_VALUE = ("a value is required", "invalid value")  # clap shows no usage where a value alone is at fault
_SIMILAR = 0.7

N = TypeVar("N")


class UsageParser(argparse.ArgumentParser):
    """argparse that knows no abbreviations, and whose refusals read like clap's."""

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": HelpFormatter, "allow_abbrev": False, "add_help": False, **options}
        super().__init__(exit_on_error=False, **options)

    def parse_words(self, words: Sequence[str], into: N) -> N:
        """Read a command line without its first word; exit where something is wrong with it, and say what."""
        self.refuse_other_than_text(words)
        try:
            args, extras = self.parse_known_args(list(words), into)
        except argparse.ArgumentError as error:
            self.refuse(clap_text(error))
        if extras:
            self.refuse_unexpected(extras[0].split("=")[0])
        return args

    def refuse(self, message: str, *, tip: str | None = None, usage: str | None = None) -> NoReturn:
        """Print `message` and exit. `usage` is the form that would do; the general one if not given."""
        parts = [f"error: {message}\n"]
        if tip:
            parts.append(f"  tip: {tip}\n")
        if not message.startswith(_OF_A_VALUE):
            parts.append(f"Usage: {self.prog} {usage}\n" if usage else self.format_usage())
        parts.append("For more information, try '--help'.\n")
        self.exit(USAGE_STATUS, "\n".join(parts))

    def error(self, message: str) -> NoReturn:
        self.refuse(message)

    def refuse_other_than_text(self, words: Sequence[str]) -> None:
        """Exit where one of `words` is not UTF-8; Python has put surrogates in the place of its bytes."""
        if any("\udc80" <= letter <= "\udcff" for word in words for letter in word):
            self.refuse("invalid UTF-8 was detected in one or more arguments")

    def refuse_unexpected(self, word: str) -> NoReturn:
        """Say that `word` belongs nowhere, and exit."""
        from difflib import get_close_matches

        flags = [flag[2:] for action in self._actions for flag in action.option_strings if flag[:2] == "--"]
        similar = get_close_matches(word[2:], flags, n=1, cutoff=_SIMILAR) if word[:2] == "--" else []
        tip = f"a similar argument exists: '--{similar[0]}'" if similar else None
        self.refuse(f"unexpected argument '{word}' found", tip=tip)

    # The two hooks below are argparse's own; their messages replace argparse's.

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(action, f"unrecognized subcommand '{value}'")
        if not value:
            raise argparse.ArgumentError(action, _value_required(action))
        message = f"invalid value '{value}' for '{shape_of(action)}'{_possible_values(action)}"
        raise argparse.ArgumentError(action, message)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            raise argparse.ArgumentError(action, _value_required(action)) from None


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


def _value_required(action: argparse.Action) -> str:
    return f"a value is required for '{shape_of(action)}' but none was supplied{_possible_values(action)}"


def _possible_values(action: argparse.Action) -> str:
    return f"\n  [possible values: {', '.join(map(str, action.choices))}]" if action.choices else ""


def clap_text(error: argparse.ArgumentError) -> str:
    """Return argparse's words as clap's."""
    if error.message.startswith(_SURPLUS_VALUE):
        value = error.message.removeprefix(_SURPLUS_VALUE).strip("'\"")
        return f"unexpected value '{value}' for '{error.argument_name}' found; no more were expected"
    return error.message
