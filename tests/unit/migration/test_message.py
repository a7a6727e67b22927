"""Frames and messages between two VMMs: what is written is read, and nothing else is."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest

from cloudvmm.migration.error import ProtocolError
from cloudvmm.migration.message import (
    HEAD,
    KINDS,
    MAGIC,
    MAX_BODY_BYTES,
    MAX_OFFER_BYTES,
    VERSION,
    Accept,
    Complete,
    Done,
    Hello,
    Offer,
    Ready,
    Refuse,
    Welcome,
    choose_version,
    decode_body,
    decode_head,
    encode_message,
    max_body_bytes,
    refusal,
)

OFFER = Offer(
    config=msgspec.Raw(b'{"cpus":{}}'),
    vm=msgspec.Raw(b'{"counter":1}'),
    engine="fake",
    engine_version="1",
    is_local=True,
)
MESSAGES = [
    Hello(program="p", versions=[1, 2], role="control"),
    Hello(program="p", versions=[1], role="state", token="t"),
    Welcome(version=1),
    OFFER,
    Accept(token="t"),
    Ready(),
    Complete(is_paused=True),
    Done(),
    Refuse(reasons=["a", "b"]),
]


def decode(raw: bytes):
    kind, length = decode_head(raw[: HEAD.size])
    assert length == len(raw) - HEAD.size
    return decode_body(kind, raw[HEAD.size :])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_comes_out_as_it_went_in(message):
    assert decode(encode_message(message)) == message


def test_every_kind_is_tested():
    assert {type(message) for message in MESSAGES} == set(KINDS.values())


def test_frame_is_as_the_page_says():
    raw = encode_message(Welcome(version=1))
    assert raw == b"CVMg" + b"\x00\x02" + b"\x00\x00" + b"\x00\x00\x00\x0d" + b'{"version":1}'


def test_member_that_is_not_known_is_ignored():
    assert decode_body(Welcome, b'{"version":1,"later":{"a":[1]}}') == Welcome(version=1)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"HTTP/1.1 200", "does not speak the migration protocol"),
        (HEAD.pack(MAGIC, 1, 1, 0), "does not speak the migration protocol"),
        (HEAD.pack(MAGIC, 0, 0, 0), "unknown message: 0"),
        (HEAD.pack(MAGIC, 9, 0, 0), "unknown message: 9"),
        (HEAD.pack(MAGIC, 1, 0, MAX_BODY_BYTES + 1), "Hello is too large"),
        (HEAD.pack(MAGIC, 3, 0, MAX_OFFER_BYTES + 1), "Offer is too large"),
    ],
)
def test_head_that_is_none_is_refused(head, words):
    with pytest.raises(ProtocolError, match=words):
        decode_head(head)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"version":"1"}', b"\xff", b"[" * 100_000])
def test_body_that_is_none_is_refused(body):
    with pytest.raises(ProtocolError, match="Welcome is malformed"):
        decode_body(Welcome, body)


def test_largest_bodies_are_bounded():
    assert (max_body_bytes(Offer), max_body_bytes(Hello)) == (MAX_OFFER_BYTES, MAX_BODY_BYTES)


def test_message_too_large_is_not_sent():
    with pytest.raises(ProtocolError, match="too large to be sent"):
        encode_message(Refuse(reasons=["x" * MAX_BODY_BYTES]))


@pytest.mark.parametrize("versions", [[VERSION], [VERSION, 99], [99, VERSION]])
def test_version_that_both_know_is_chosen(versions):
    assert choose_version(Hello(program="p", versions=versions, role="control")) == VERSION


@pytest.mark.parametrize("versions", [[], [99], [0, 2]])
def test_no_common_version_is_refused_with_both(versions):
    with pytest.raises(ProtocolError, match=f"this release speaks {VERSION}"):
        choose_version(Hello(program="p", versions=versions, role="control"))


def test_long_chains_of_reasons_are_cut_and_can_be_sent():
    message = refusal(["\udcff" + "x" * 5000] * 100)

    assert (len(message.reasons), len(message.reasons[0])) == (32, 1000)
    assert decode(encode_message(message)) == message


def test_noise_is_refused_and_nothing_else_happens():
    noise = random.Random(7)
    for _ in range(3000):
        frame = bytearray(encode_message(noise.choice(MESSAGES)))
        for _ in range(noise.randrange(1, 4)):
            frame[noise.randrange(len(frame))] = noise.randrange(256)
        with contextlib.suppress(ProtocolError):
            kind, _ = decode_head(bytes(frame[: HEAD.size]))
            assert isinstance(decode_body(kind, bytes(frame[HEAD.size :])), kind)
