"""What following a VM takes, without I/O: an event stream's state, and pauses between questions.

Shared by `stream.py`, which blocks, and `async_stream.py`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from cloudvmm.client.deadline import Deadline
from cloudvmm.client.error import NoAnswer
from cloudvmm.client.sse import Frame, FrameParser
from cloudvmm.client.table import EVENTS

if TYPE_CHECKING:
    from cloudvmm.api.data import VmInfo
    from cloudvmm.events.hub import Event

_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.05


class Pause:
    """Grows from question to question, so that what is soon there is soon seen."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def fits(self, deadline: Deadline) -> bool:
        """Whether there is time for another question."""
        try:
            deadline.left_s()
        except TimeoutError:
            return False
        return True

    def next_s(self, deadline: Deadline) -> float:
        """:raises TimeoutError: there is no time left."""
        left_s = deadline.left_s()
        pause_s, self._next_s = self._next_s, min(self._next_s * 2, _LONGEST_PAUSE_S)
        return pause_s if left_s is None else min(pause_s, left_s)


def is_running(info: VmInfo) -> bool:
    return info.state.value == "Running"


class Follower:
    """What of a stream has been seen, over any number of connections.

    `next_number` is that of the event to come next; None as long as it is not known.
    """

    def __init__(self, from_number: int | None) -> None:
        self.next_number = from_number
        self.is_over = False
        self._frames: deque[Frame] = deque()
        self._parser = FrameParser()
        self._has_heard = True

    def target(self) -> str:
        """What to GET, first and after a loss."""
        return EVENTS if self.next_number is None else f"{EVENTS}?from={self.next_number}"

    def feed(self, piece: bytes) -> None:
        """:raises BadReply: these are not server-sent events."""
        frames = self._parser.feed(piece)
        self._has_heard |= bool(frames)
        self._frames.extend(frames)

    def take(self) -> Event | None:
        """Return the next event that has come, if any; `is_over` tells that none will.

        :raises EventsLost: some are missing before the next one; the call after this one goes on with it.
        :raises BadReply: it is not an event.
        """
        while self._frames and not self.is_over:
            frame = self._frames.popleft()
            match frame.name:
                case "gap":
                    self._skip(frame)
                case "end":
                    self.is_over = True
                case _:
                    return self._event(frame)
        return None

    def lost(self) -> None:
        """The connection is lost; return if the stream can go on over another one.

        :raises NoAnswer: it cannot: nothing came over the last one, or no number is known to go on from.
        """
        if self.next_number is None or not self._has_heard:
            raise NoAnswer(EVENTS)
        self._has_heard = False
        self._parser = FrameParser()

    def _skip(self, frame: Frame) -> None:
        from cloudvmm.client.event import decode_gap

        gap = decode_gap(frame.data)
        self.next_number = gap.first
        raise gap

    def _event(self, frame: Frame) -> Event:
        from cloudvmm.client.event import decode_event

        event = decode_event(frame.data)
        self.next_number = event.number + 1
        return event
