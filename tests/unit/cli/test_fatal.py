"""The log line of what ends a program."""

from __future__ import annotations

from cloudvmm.cli.error import BareGdb, ParsingConfig
from cloudvmm.cli.fatal import fatal_text
from cloudvmm.options.error import Conversion, ParseError


def test_every_error_of_the_chain_is_named():
    error, cause = ParsingConfig(), ParseError("--memory")
    error.__cause__, cause.__cause__ = cause, Conversion("size", "512m")
    assert (
        fatal_text(error)
        == "Fatal error: ParsingConfig(ParseError(Conversion('Unable to convert 512m for size')))"
    )


def test_error_without_words_of_its_own_has_its_text():
    assert fatal_text(BareGdb()) == "Fatal error: BareGdb('Error parsing --gdb: path required')"
