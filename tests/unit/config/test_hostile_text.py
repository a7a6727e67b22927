"""Whatever a client sends, decoding answers with a value or a DecodeError, and validation with a rule."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudvmm.config.error import DecodeError, ValidationError
from cloudvmm.config.form import decode, encode
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import RestoreConfig
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig

NAMES = sorted(
    {*VmConfig.__struct_fields__, *NetConfig.__struct_fields__, "kernel", "path", "uuid", "size", "id"}
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=25,
)


def use(raw, kind):
    with contextlib.suppress(DecodeError, ValidationError):
        value = decode(raw, kind)
        assert decode(encode(value), kind) == value
        if isinstance(value, VmConfig):
            validate(value)


@pytest.mark.parametrize("kind", [VmConfig, NetConfig, RestoreConfig])
def test_any_document_is_decoded_or_refused(kind):
    @settings(max_examples=200, deadline=None)
    @given(DOCUMENTS)
    def check(document):
        with contextlib.suppress(OverflowError):
            use(msgspec.json.encode(document), kind)

    check()


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=40)
    | st.text(alphabet='{}[]":,\\u0 -1e.netdisk\ud800', max_size=40).map(
        lambda t: t.encode(errors="surrogatepass")
    )
)
def test_any_bytes_are_decoded_or_refused(raw):
    use(raw, VmConfig)


def test_encoding_survives_every_code_point_that_decodes():
    text = "".join(map(chr, [0, 9, 0x22, 0x5C, 0x7F, 0x2028, 0x1F600]))
    net = NetConfig(id=text)
    assert decode(encode(net), NetConfig) == net
