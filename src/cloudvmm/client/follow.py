"""What following a VM takes, without I/O: an event stream's state, and pauses between questions.

Shared by `stream.py`, which blocks, and `async_stream.py`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from cloudvmm.client.error import ClientError, NoAnswer, RemovalRefused, ResizeRefused
from cloudvmm.client.failure import NotFound, ServerFull
from cloudvmm.client.sse import Frame, FrameParser
from cloudvmm.client.table import EVENTS

if TYPE_CHECKING:
    from cloudvmm.api.data import VmInfo
    from cloudvmm.config.operation import VmResizeData, VmResizeZoneData
    from cloudvmm.events.hub import Event

_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.05
_SHORTEST_QUESTION_S: Final = 0.01


class Patience:
    """Questions asked for `timeout_s` again and again, with pauses that grow, and a complaint at the end.

    The complaint has `last_state`, what an answer said last, where there was one.
    """

    def __init__(self, timeout_s: float, complaint: str) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._complaint = complaint
        self._next_pause_s = _FIRST_PAUSE_S
        self.last_state: str | None = None

    @property
    def question_s(self) -> float:
        """How long one question may take."""
        return max(self._end - time.monotonic(), _SHORTEST_QUESTION_S)

    def pause_s(self, error: ClientError | None = None) -> float:
        """Return how long to wait before the next question; `error` is what became of the last one.

        :raises TimeoutError: the time is up.
        """
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(self._text()) from error
        pause_s, self._next_pause_s = self._next_pause_s, min(self._next_pause_s * 2, _LONGEST_PAUSE_S)
        return min(pause_s, left_s)

    def _text(self) -> str:
        text = f"{self._complaint} after {self._timeout_s:g} s"
        return text if self.last_state is None else f"{text}; the last state seen is {self.last_state}"


def is_running(info: VmInfo) -> bool:
    return info.state.value == "Running"


def may_be_well_later(error: ClientError) -> bool:
    """Whether a VM, or the server, may just not be that far: no VM, no room, or no answer in time."""
    return isinstance(error, NotFound | ServerFull) or isinstance(error.__cause__, TimeoutError)


class Removal:
    """A device that the guest was asked for: what tells that it is gone, and what to say where it is not.

    `named_id` is what the caller calls it, which may be the name of its virtio-pci wrapper.
    """

    def __init__(self, named_id: str, wait_s: float) -> None:
        self._device_id = named_id
        self._wait_s = wait_s
        self._is_paused = False

    def is_gone(self, info: VmInfo) -> bool:
        """Whether it is in the VM no more, after the request: never was, or the guest was quick."""
        self._is_paused = info.state.value == "Paused"
        node = (info.device_tree or {}).get(self._device_id)
        if node is not None and node.children:
            self._device_id = node.children[0]
        return node is None

    def is_end(self, event: Event) -> bool:
        """Whether `event` tells that it is gone, be it with its VM: a new one is made without it.

        :raises RemovalRefused: it tells that the guest keeps it.
        """
        if event.source != "vm":
            return False
        if event.event in ("shutdown", "deleted", "rebooted"):
            return True
        if (event.properties or {}).get("id") != self._device_id:
            return False
        if event.event == "device-removal-refused":
            raise RemovalRefused(self._device_id)
        return event.event == "device-removed"

    def complaint(self) -> TimeoutError:
        text = f"The guest has not let go of the device {self._device_id} after {self._wait_s:g} s"
        return TimeoutError(f"{text}; the VM is paused" if self._is_paused else text)


class Resizing:
    """Sizes that the guest was asked for: what tells that it has them, and what to say where it has not.

    `asked` is by part, as the events name it: its name, and of a zone its id.
    """

    def __init__(self, asked: dict[tuple[str, str | None], int | None], wait_s: float) -> None:
        self._left = {part: size for part, size in asked.items() if size is not None}
        self._actual: dict[tuple[str, str | None], int] = {}
        self._stepped_at_s: float | None = None
        self._wait_s = wait_s
        self._is_paused = False

    @classmethod
    def of(cls, data: VmResizeData, wait_s: float) -> Resizing:
        asked = {"vcpus": data.desired_vcpus, "ram": data.desired_ram, "balloon": data.desired_balloon}
        return cls({(part, None): size for part, size in asked.items()}, wait_s)

    @classmethod
    def of_zone(cls, data: VmResizeZoneData, wait_s: float) -> Resizing:
        return cls({("zone", data.id): data.desired_ram}, wait_s)

    def needs_no_guest(self, info: VmInfo) -> bool:
        """Whether, after the request, there is nobody to wait for: no part was asked, or the VM is off."""
        self._is_paused = info.state.value == "Paused"
        return not self._left or info.state.value == "Created"

    def is_end(self, event: Event) -> bool:
        """Whether `event` tells that the guest has all sizes, or its VM ends: a new one is made with them.

        :raises ResizeRefused: it tells that the guest does not follow.
        """
        if event.source != "vm":
            return False
        if event.event in ("shutdown", "deleted", "rebooted"):
            return True
        if event.event in ("resize-progress", "resize-refused"):
            self._take(event.event, event.properties or {})
        return not self._left

    def complaint(self) -> TimeoutError:
        """Return what to raise when the time is up: what was asked, what is, and since when."""
        found = [
            f"it has {self._actual.get(part, 'an unknown number of')} {_what(part)}, and was asked for {size}"
            for part, size in self._left.items()
        ]
        text = f"The guest has not followed the resize after {self._wait_s:g} s: {', '.join(found)}"
        if self._is_paused:
            return TimeoutError(f"{text}; the VM is paused")
        if self._stepped_at_s is None:
            return TimeoutError(f"{text}; it has done nothing")
        return TimeoutError(f"{text}; its last step was {time.monotonic() - self._stepped_at_s:.1f} s ago")

    def _take(self, name: str, told: dict[str, str]) -> None:
        part = (told["part"], told.get("id"))
        asked, actual = int(told["asked"]), int(told["actual"])
        if self._left.get(part) != asked:
            return  # somebody else's, or done
        if name == "resize-refused":
            raise ResizeRefused(_what(part), asked=asked, actual=actual)
        if asked == actual or "waits_for" in told:
            del self._left[part]
        elif self._actual.get(part, actual) != actual:
            self._stepped_at_s = time.monotonic()
        self._actual[part] = actual


def _what(part: tuple[str, str | None]) -> str:
    match part:
        case "vcpus", _:
            return "vCPUs"
        case "ram", _:
            return "bytes of RAM"
        case "balloon", _:
            return "bytes in its balloon"
        case _, zone_id:
            return f"bytes in the zone {zone_id}"


class Follower:
    """What of a stream has been seen, over any number of connections.

    `next_number` is that of the event to come next; None as long as it is not known. A server of ours says it
    first of all.
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
        if self.next_number is None and not self._frames:
            self.next_number = self._place()

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

    def _place(self) -> int | None:
        last = self._parser.last_id
        return int(last) + 1 if last.isascii() and last.isdecimal() else None

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
