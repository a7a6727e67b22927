"""A stream's bytes into frames and events, and what is done about gaps and losses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudvmm.client import BadReply, Event, EventsLost, NoAnswer
from cloudvmm.client.follow import Follower
from cloudvmm.client.sse import FRAME_LIMIT_BYTES, FrameParser


def frames(*pieces):
    parser = FrameParser()
    return [(frame.name, frame.data) for piece in pieces for frame in parser.feed(piece)]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"data: a\n\n", [("message", "a")]),
        (b"event: x\ndata:a\r\n\r\n", [("x", "a")]),
        (b"data: a\rdata: b\r\rdata: c\n\n", [("message", "a\nb"), ("message", "c")]),
        (b":\n\n: keep-alive\n\ndata: a\n\n", [("message", "a")]),
        (b"event: nothing\n\ndata\n\n", [("message", "")]),
        (b"id: 3\nretry: 5\nother\ndata: \xff\n\n", [("message", "\ufffd")]),
        (b"data: unfinished\n", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_frames_are_found_however_they_are_cut(raw, found, size):
    assert frames(*(raw[start : start + size] for start in range(0, len(raw), size))) == found


@pytest.mark.parametrize("raw", [b"x" * (FRAME_LIMIT_BYTES + 1), b"data: y\n" * FRAME_LIMIT_BYTES])
def test_endless_frame_is_given_up(raw):
    with pytest.raises(BadReply):
        frames(raw)


@given(st.binary(max_size=80), st.integers(0, 80))
def test_the_cut_makes_no_difference(raw, place):
    # What a CR at the very end means is known with the next byte only.
    raw += b"."
    assert frames(raw[:place], raw[place:]) == frames(raw)


EVENT = (
    b'id: 7\nevent: vm/booted\ndata: {"number":7,"timestamp":{"secs":1,"nanos":5},"source":"vm",'
    b'"event":"booted","properties":null,"new":0}\n\n'
)


def test_place_alone_is_no_event_but_counts():
    follower = Follower(None)
    follower.feed(b"id: 6\n\n")

    assert follower.take() is None
    assert follower.target() == "vm.events?from=7"


@pytest.mark.parametrize("raw", [b"id: 6\n", b"id: x\n\n", b"id: \xc2\xb2\n\n", b":\n\n"])
def test_place_that_is_none_does_not_count(raw):
    follower = Follower(None)
    follower.feed(raw)

    assert follower.target() == "vm.events"


def test_place_behind_events_that_are_not_taken_yet_skips_none():
    follower = Follower(None)
    follower.feed(b"id: 6\n\n" + EVENT)

    assert follower.take().number == 7
    assert follower.target() == "vm.events?from=8"


def test_event_is_taken():
    follower = Follower(None)
    follower.feed(EVENT)

    assert follower.take() == Event(number=7, monotonic_ns=1_000_000_005, source="vm", event="booted")
    assert follower.take() is None
    assert follower.target() == "vm.events?from=8"


def test_first_target_is_what_was_asked_for():
    assert Follower(None).target() == "vm.events"
    assert Follower(0).target() == "vm.events?from=0"


def test_gap_is_told_once_and_the_stream_goes_on():
    follower = Follower(3)
    follower.feed(b'event: gap\ndata: {"requested":3,"first":7}\n\n' + EVENT)

    with pytest.raises(EventsLost) as caught:
        follower.take()
    assert (caught.value.requested, caught.value.first) == (3, 7)
    assert follower.take().number == 7


def test_end_is_final():
    follower = Follower(0)
    follower.feed(EVENT + b'event: end\ndata: {"next":8}\n\n' + EVENT)

    assert follower.take().number == 7
    assert follower.take() is None
    assert follower.is_over


def test_half_an_event_is_forgotten_with_its_connection():
    follower = Follower(7)
    follower.feed(EVENT[:20])
    follower.lost()
    follower.feed(EVENT)

    assert follower.take().number == 7


def test_loss_before_any_number_is_known_is_an_error():
    with pytest.raises(NoAnswer):
        Follower(None).lost()


def test_second_loss_without_any_event_between_is_an_error():
    follower = Follower(0)
    follower.lost()
    with pytest.raises(NoAnswer):
        follower.lost()


@pytest.mark.parametrize("raw", [b"data: {}\n\n", b"data: what\n\n", b"event: gap\ndata: 3\n\n"])
def test_what_is_not_an_event_is_refused(raw):
    follower = Follower(0)
    follower.feed(raw)

    with pytest.raises(BadReply):
        follower.take()
