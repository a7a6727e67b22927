"""Whatever is written in an option string, it gives a struct or an OptionError."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudvmm.options.error import OptionError
from cloudvmm.options.table import SCHEMAS, syntax
from option_grammar import FLAG_PARSERS as PARSERS

VALUES = st.text(alphabet='0123456789KMG[],@:-"+xonf \u0663\u00b2', max_size=12)


@pytest.mark.parametrize("flag", sorted(SCHEMAS))
def test_any_string_is_read_or_refused(flag):
    keys = st.sampled_from([key.name for key in SCHEMAS[flag].keys] + list(SCHEMAS[flag].flags) + ["nope"])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(keys, VALUES), max_size=5))
    def check(options):
        with contextlib.suppress(OptionError):
            PARSERS[flag](",".join(f"{key}={value}" for key, value in options))

    check()


def test_every_flag_with_an_option_string_has_a_parser_and_a_syntax():
    assert set(SCHEMAS) == set(PARSERS)
    assert syntax("serial") == "off|pty|tty|null,file=<path>,socket=<path>"
    assert syntax("kernel") is None
