"""The grammar of option strings, and the types of values."""

import pytest

from cloudvmm.config.cpu import CpuTopology
from cloudvmm.options import value as values
from cloudvmm.options.error import Conversion, InvalidSyntax, UnknownOption
from cloudvmm.options.grammar import Options, dequote, parse_options, read_options, split_commas

KEYS = ("size", "extra", "list", "cmdline")


def pairs(key, value):
    """Return the type of a list of pairs that stay pairs."""
    return values.tuple_list(key, value, make=lambda k, v: (k, v), split=lambda pair: pair, syntax="")


STRING_TO_LIST = pairs(values.TUPLE_KEY, values.integer_list(8))
NUMBER_TO_NUMBER = pairs(values.bare_unsigned(64), values.bare_unsigned(64))


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("size=128M", "size", "128M"),
        ("size= 128M ", "size", "128M"),
        ("extra=foo=bar", "extra", "foo=bar"),
        ("size=1,size=2", "size", "2"),
        ("list=[1,2],size=3", "list", "[1,2]"),
        ("list=[[1,2],[3,4]]", "list", "[[1,2],[3,4]]"),
        ('cmdline="console=ttyS0,9600n8"', "cmdline", "console=ttyS0,9600n8"),
        ('cmdline=a"b,c"d', "cmdline", "ab,cd"),
        ('cmdline="a ""quoted"" word"', "cmdline", 'a "quoted" word'),
        ('cmdline="[",size=1', "cmdline", "["),
        ("size=", "size", None),
        ("", "size", None),
        ("   ", "size", None),
    ],
)
def test_value_reads_as(text, key, expected):
    assert parse_options(text, KEYS).get(key) == expected


def test_empty_value_is_set_but_reads_as_unset():
    options = parse_options("size=", KEYS)
    assert options.is_set("size")
    assert options.convert("size", values.U8.parse) is None
    assert not options.is_set("extra")


def test_flag_needs_no_value_and_drops_one():
    options = parse_options("tty=whatever", (), flags=("tty",))
    assert options.is_set("tty")
    assert options.get("tty") is None


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("nope=1", UnknownOption, "Unknown option: nope"),
        ("size=1, extra=2", UnknownOption, "Unknown option:  extra"),
        ("size=1,", UnknownOption, "Unknown option: "),
        ("size", InvalidSyntax, "Invalid syntax: size"),
        ("list=[", InvalidSyntax, "Invalid syntax: list=["),
        ("size=1,list=[]]", InvalidSyntax, "Invalid syntax: size=1,list=[]]"),
        ('cmdline="', InvalidSyntax, 'Invalid syntax: cmdline="'),
        ('cmdline="""', InvalidSyntax, 'Invalid syntax: cmdline="""'),
    ],
)
def test_text_outside_the_grammar_is_refused(text, error, message):
    with pytest.raises(error) as caught:
        parse_options(text, KEYS)
    assert str(caught.value) == message


def test_what_was_read_before_a_fault_is_kept():
    options = Options()
    with pytest.raises(UnknownOption):
        read_options(options, "size=1,nope=2,extra=3", KEYS)
    assert options.get("size") == "1"
    assert not options.is_set("extra")


def test_bad_value_is_named_with_its_key():
    with pytest.raises(Conversion, match=r"^Unable to convert 512m for size$"):
        parse_options("size=512m", KEYS).convert("size", values.BYTE_SIZED.parse)


def test_dequote_and_split_agree_with_the_reference():
    assert dequote('aβ"a"""') == 'aβa"'
    assert split_commas('""') == ['""']


GOOD = [
    (values.TOGGLE, "on", True),
    (values.TOGGLE, "OFF", False),
    (values.TOGGLE, "True", True),
    (values.TOGGLE, "false", False),
    (values.U8, "255", 255),
    (values.U8, "+7", 7),
    (values.U8, '"7"', 7),
    (values.U8, "007", 7),
    (values.I32, "-5", -5),
    (values.BYTE_SIZED, "1024", 1024),
    (values.BYTE_SIZED, "1K", 1024),
    (values.BYTE_SIZED, "2M", 2 << 20),
    (values.BYTE_SIZED, "4G", 4 << 30),
    (values.BYTE_SIZED, "0K", 0),
    (values.integer_list(64), "[1,3-5]", [1, 3, 4, 5]),
    (values.integer_list(64), "3-5", [3, 4, 5]),
    (values.integer_list(16), "7", [7]),
    (values.truncated_integer_list(16), "[65537]", [1]),
    (values.truncated_integer_list(32, is_signed=True), "[4294967295]", [-1]),
    (values.STRING_LIST, "[a,b]", ["a", "b"]),
    (values.STRING_LIST, "a", ["a"]),
    (values.STRING_LIST, '["a,b",c]', ['"a,b"', "c"]),
    (STRING_TO_LIST, "[a@[1,2],b@[3-4]]", [("a", [1, 2]), ("b", [3, 4])]),
    (STRING_TO_LIST, "[ a@1 , b@2 ]", [("a", [1]), ("b", [2])]),
    (STRING_TO_LIST, '["@""b"@[1,2]]', [('@"b', [1, 2])]),
    (NUMBER_TO_NUMBER, "[1@20,2@30]", [(1, 20), (2, 30)]),
    (
        values.TOPOLOGY,
        "1:2:3:4",
        CpuTopology(threads_per_core=1, cores_per_die=2, dies_per_package=3, packages=4),
    ),
    (values.IP, "10.0.0.1", "10.0.0.1"),
    (values.IP, "FE80::0:1", "fe80::1"),
    (values.MAC, "2E:00:00:00:00:0A", "2e:00:00:00:00:0a"),
]
BAD = [
    (values.TOGGLE, "yes"),
    (values.U8, "256"),
    (values.U8, "-1"),
    (values.U8, "1_0"),
    (values.U8, "0x10"),
    (values.U8, "\u0663"),
    (values.I32, "2147483648"),
    (values.BYTE_SIZED, "512m"),
    (values.BYTE_SIZED, "1T"),
    (values.BYTE_SIZED, "1.5G"),
    (values.BYTE_SIZED, "0x10"),
    (values.BYTE_SIZED, "K"),
    (values.BYTE_SIZED, "17179869184G"),
    (values.integer_list(64), "[]"),
    (values.integer_list(64), "[3-3]"),
    (values.integer_list(64), "[5-3]"),
    (values.integer_list(64), "[1-2-3]"),
    (values.integer_list(64), "[1, 2]"),
    (values.integer_list(16), "[65536]"),
    (values.integer_list(64), "[0-18446744073709551615]"),
    (STRING_TO_LIST, "a@1"),
    (STRING_TO_LIST, "[@1]"),
    (STRING_TO_LIST, "[a@1@2]"),
    (STRING_TO_LIST, "[a]"),
    (STRING_TO_LIST, "[a@[1],b@[1]"),
    (STRING_TO_LIST, "[a@[1]],b@[2]]"),
    (NUMBER_TO_NUMBER, "[1 @2]"),
    (NUMBER_TO_NUMBER, "[1@ 2]"),
    (values.STRING_LIST, '[a"]'),
    (values.TOPOLOGY, "1:2:3"),
    (values.TOPOLOGY, "1:2:3:x"),
    (values.IP, "10.0.0"),
    (values.MAC, "2e:00:00:00:00"),
]


@pytest.mark.parametrize(("kind", "text", "expected"), GOOD)
def test_value_type_reads(kind, text, expected):
    assert kind.parse(text) == expected


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_value_type_refuses(kind, text):
    with pytest.raises(ValueError):
        kind.parse(text)
