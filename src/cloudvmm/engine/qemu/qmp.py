"""A blocking QMP client over a connected stream socket.

One thread at a time executes commands; others wait for their turn, within their own deadline. `abort` may be
called by any thread and makes a call that waits fail at once. Events that arrive between replies are kept
aside in order, the newest `MAX_KEPT_EVENTS` of them. After `EngineTimeout` the connection stays usable: the
answer that comes late is recognised by its id and dropped.

QEMU reads a monitor byte by byte, each in a round of its loop, which makes 4 ms of a thousand: what is long
is not waited for where that can be helped.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cloudvmm.engine.base import EngineError, EngineTimeout, MachineGone
from cloudvmm.engine.qemu.codec import (
    Event,
    Greeting,
    Message,
    MessageBuffer,
    QmpGarbage,
    Refusal,
    Reply,
    encode_command,
)

DEFAULT_TIMEOUT_S = 10.0
MAX_KEPT_EVENTS = 256
_RECEIVE_BYTES = 64 * 1024
_RECEIVES_PER_POLL = 16
_HANDSHAKE_ID = 0
_SLICE_S = 0.2
_RESET = b"\xff"  # no JSON: QEMU forgets what it has of a line, and says so

Observer = Callable[[str, dict[str, Any]], None]


class QmpError(EngineError):
    """QEMU refused `command`; `error_class` and `description` are its own words."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(description)
        self.command = command
        self.error_class = error_class
        self.description = description


def offer_handshake(sock: socket.socket, *, has_urgent: bool = False) -> None:
    """Send the capabilities negotiation; may be done before QEMU has started, it is read when it has.

    With `has_urgent` commands may be urgent.
    """
    arguments = {"enable": ["oob"]} if has_urgent else None
    sock.sendall(encode_command("qmp_capabilities", arguments, command_id=_HANDSHAKE_ID))


class QmpClient:
    """Owns `sock`. `offer_handshake` must have been done on it; `handshake` awaits the answer.

    `observe` is called with the name and arguments of each command before it is sent.
    """

    def __init__(self, sock: socket.socket, *, observe: Observer | None = None) -> None:
        self._socket = sock
        self._observe = observe
        self._buffer = MessageBuffer()
        self._events: deque[Event] = deque(maxlen=MAX_KEPT_EVENTS)
        self._last_id = _HANDSHAKE_ID
        self._posted: set[int | None] = set()
        self._answers: list[Reply | Refusal] = []
        self._aborted = False
        self._at_end = False
        self._turn = threading.RLock()

    def fileno(self) -> int:
        """The socket, for polling alone."""
        return self._socket.fileno()

    def handshake(self, *, timeout_s: float) -> tuple[int, int, int]:
        """Blocking. Await the greeting and QEMU's consent; return QEMU's version.

        :raises MachineGone: the peer closed. :raises EngineTimeout: it stayed silent.
        """
        deadline = time.monotonic() + timeout_s
        with self._turn:
            greeting = self._receive("greeting", deadline)
            if not isinstance(greeting, Greeting):
                raise QmpGarbage
            self._await_reply("qmp_capabilities", _HANDSHAKE_ID, deadline)
        return greeting.version

    def rejoin(self, *, timeout_s: float) -> list[Event]:
        """Blocking. Go on with a conversation that another process left, and return the events since.

        It may have ended in the middle of a line of its own, or of one of QEMU's: what is half is dropped, as
        are the answers to what that process asked.

        :raises MachineGone: the connection ended. :raises EngineTimeout: QEMU does not answer.
        """
        self._last_id = time.monotonic_ns()  # above all that were given before
        events: list[Event] = []
        deadline = time.monotonic() + timeout_s
        with self._turn:
            self._socket.settimeout(timeout_s)
            try:
                self._socket.sendall(_RESET)
            except OSError as error:
                raise self._gone("rejoin") from error
            command_id = self._begin("query-status", None, deadline)
            while True:
                try:
                    message = self._receive("query-status", deadline)
                except QmpGarbage:
                    continue
                if isinstance(message, Event):
                    events.append(message)
                elif isinstance(message, Reply) and message.command_id == command_id:
                    return events

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        fds: Sequence[int] = (),
        is_urgent: bool = False,
    ) -> Any:
        """Blocking. Send one command, with `fds` (lent) beside it, and return what QEMU returns.

        One that `is_urgent` QEMU executes at once, whatever its main loop waits for; there are few such ones.

        :raises QmpError: QEMU refused.
        :raises EngineTimeout: no answer within `timeout_s`: it may or may not have been carried out.
        :raises MachineGone: the connection ended: it may or may not have been carried out.
        """
        deadline = time.monotonic() + timeout_s
        with self._taking_turn(command, timeout_s):
            number = self._begin(command, arguments, deadline, fds=fds, is_urgent=is_urgent)
            return self._await_reply(command, number, deadline)

    def tell(
        self, commands: Sequence[tuple[str, dict[str, Any]]], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Send commands, by name and arguments, and let the answers, be they refusals, be dropped.

        QEMU carries them out after what was sent before, and before what is sent next. Blocking only where
        QEMU takes nothing.

        :raises EngineTimeout: nothing was sent in time. :raises MachineGone: the connection ended.
        """
        if not commands:
            return
        name = commands[0][0]
        with self._taking_turn(name, timeout_s):
            lines = [self._line(*command)[1] for command in commands]
            self._send(name, b"".join(lines), (), time.monotonic() + timeout_s)

    def wait_event(self, name: str, *, timeout_s: float) -> Event:
        """Blocking. Take the next event `name`, kept aside or to come; earlier other events are dropped.

        :raises EngineTimeout: it did not come. :raises MachineGone: the connection ended.
        """
        deadline = time.monotonic() + timeout_s
        with self._turn:
            while True:
                while self._events:
                    event = self._events.popleft()
                    if event.name == name:
                        return event
                message = self._receive(name, deadline)
                if isinstance(message, Event):
                    self._events.append(message)

    def execute_until(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        event: str,
        timeout_s: float,
        is_last: Callable[[Event], bool] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Event:
        """Blocking. Execute `command`, whose work is done when QEMU sends `event`, and return that event.

        Of several events of that name it is the first that `is_last`. Nobody else takes one meanwhile.
        `check` is called every now and then, may execute commands, and what it raises ends the waiting.

        :raises EngineError: as `execute` and `wait_event`.
        """
        deadline = time.monotonic() + timeout_s
        with self._turn:
            self._events.clear()
            self.execute(command, arguments)
            while True:
                found = self._wait_checking(event, deadline, check)
                if is_last is None or is_last(found):
                    return found

    def poll_events(self) -> list[Event]:
        """Return and forget the events that arrived so far; never blocks.

        QEMU sends each event to every monitor and keeps in its own memory what nobody reads: a monitor for
        commands wants this called from time to time as well. Nothing is read while a command is under way.

        :raises MachineGone: the connection ended and all that came before was given out.
        """
        if not self._turn.acquire(blocking=False):
            return []
        try:
            for _ in range(_RECEIVES_PER_POLL):
                if not self._receive_now():
                    break
            events = [*self._events]
            self._events.clear()
            for message in self._buffer:
                if isinstance(message, Event):
                    events.append(message)
                else:
                    self._keep_answer(message)
        finally:
            self._turn.release()
        if not events and self._at_end:
            raise self._gone("events")
        return events

    def post(self, command: str, arguments: dict[str, Any] | None = None) -> int | None:
        """Send one short command and return its number; the answer is given by `take_answers`.

        Never blocks: where the socket has no room, or the connection has ended, nothing is sent, and there is
        no number. One thread alone may use a client in this way, and execute nothing on it.
        """
        number, line = self._line(command, arguments)
        try:
            self._socket.settimeout(0)
            self._socket.send(line)
        except OSError:
            return None
        self._posted.add(number)
        return number

    def take_answers(self) -> list[Reply | Refusal]:
        """Return and forget what `poll_events` received as answers to what was posted, in order."""
        answers, self._answers = self._answers, []
        return answers

    def abort(self) -> None:
        """End the conversation from any thread: what waits fails with `MachineGone`. Idempotent."""
        self._aborted = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed or never connected: nobody waits

    def close(self) -> None:
        """Close the socket. No call may be under way."""
        self._aborted = True
        self._socket.close()

    def _wait_checking(self, name: str, deadline: float, check: Callable[[], None] | None) -> Event:
        while True:
            left_s = deadline - time.monotonic()
            if check is None or left_s <= _SLICE_S:
                return self.wait_event(name, timeout_s=left_s)
            with contextlib.suppress(EngineTimeout):
                return self.wait_event(name, timeout_s=_SLICE_S)
            check()

    @contextlib.contextmanager
    def _taking_turn(self, command: str, timeout_s: float) -> Iterator[None]:
        """:raises EngineTimeout: other threads had their turns for so long. Nothing was sent."""
        if not self._turn.acquire(timeout=timeout_s):
            raise EngineTimeout(f"QEMU is still busy with another command ({command})")
        try:
            yield
        finally:
            self._turn.release()

    def _begin(
        self,
        command: str,
        arguments: dict[str, Any] | None,
        deadline: float,
        *,
        fds: Sequence[int] = (),
        is_urgent: bool = False,
    ) -> int:
        """Send a command, in one's turn, and return its number."""
        number, line = self._line(command, arguments, is_urgent=is_urgent)
        self._send(command, line, fds, deadline)
        return number

    def _line(
        self, command: str, arguments: dict[str, Any] | None, *, is_urgent: bool = False
    ) -> tuple[int, bytes]:
        """Return the next number, and the line that is to be sent with it."""
        if self._observe is not None:
            self._observe(command, arguments or {})
        self._last_id += 1
        return self._last_id, encode_command(
            command, arguments, command_id=self._last_id, is_urgent=is_urgent
        )

    def _keep_answer(self, message: Message) -> None:
        if isinstance(message, Reply | Refusal) and message.command_id in self._posted:
            self._posted.discard(message.command_id)
            self._answers.append(message)

    def _send(self, command: str, line: bytes, fds: Sequence[int], deadline: float) -> None:
        try:
            self._arm(command, deadline)
        except TimeoutError:
            # Another thread had its turn for so long. Nothing is out, so the next command may be sent.
            raise EngineTimeout(f"QEMU is still busy with another command ({command})") from None
        except OSError as error:
            raise self._gone(command) from error
        try:
            if fds:
                line = line[socket.send_fds(self._socket, [line], list(fds)) :]
            self._socket.sendall(line)
        except TimeoutError:
            # Half a line may be out: what follows would be glued to it.
            self.abort()
            raise EngineTimeout(f"QEMU did not take the command {command}") from None
        except OSError as error:
            raise self._gone(command) from error

    def _await_reply(self, command: str, command_id: int, deadline: float) -> Any:
        while True:
            message = self._receive(command, deadline)
            match message:
                case Event():
                    self._events.append(message)
                case Reply() if message.command_id == command_id:
                    return message.value
                case Refusal() if message.command_id in (command_id, None):
                    raise QmpError(command, message.error_class, message.description)
                case _:
                    continue  # the late answer to a command that timed out

    def _receive(self, awaited: str, deadline: float) -> Message:
        while (message := self._buffer.take()) is None:
            try:
                self._arm(awaited, deadline)
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                raise EngineTimeout(f"QEMU did not answer in time ({awaited})") from None
            except OSError as error:
                raise self._gone(awaited) from error
            if not data:
                raise self._gone(awaited)
            self._buffer.feed(data)
        return message

    def _receive_now(self) -> bool:
        """Take in what is there without waiting; say whether there was something."""
        try:
            self._socket.settimeout(0)
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._at_end = not data
        self._buffer.feed(data)
        return bool(data)

    def _arm(self, awaited: str, deadline: float) -> None:
        if self._aborted:
            raise self._gone(awaited)
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining_s)

    def _gone(self, awaited: str) -> MachineGone:
        why = "was ended" if self._aborted else "closed the connection"
        return MachineGone(f"QEMU {why} while it was asked ({awaited})")
