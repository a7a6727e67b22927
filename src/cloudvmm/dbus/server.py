"""The server: one thread reads calls, one writes replies and signals. No thread waits for a command.

A command is sent to the VMM thread with a reply channel that hands the answer to the writer, so a command
that takes long keeps nobody from calling, and each answer finds its caller by the call it belongs to. Whoever
puts something into the writer's queue never blocks: neither the VMM thread nor the emitter of an event may.
Events are not queued at all: the writer is told that there are some and takes them from the hub, which keeps
the newest.

The bus may go away at any time. Then this front end ends, says so in the log, and the VMM goes on.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from jeepney.low_level import Message

from cloudvmm.api import ApiError, ApiSender, Effect, EventFd, EventFdWrite, ReplyChannel
from cloudvmm.dbus.bus import Bus, bus_address
from cloudvmm.dbus.error import (
    BusLost,
    CallError,
    DbusServerError,
    Failed,
    InvalidObjectPath,
    InvalidServiceName,
    LimitsExceeded,
    StartingSession,
)
from cloudvmm.dbus.message import Incoming, error_reply, reply, signal
from cloudvmm.dbus.method import EVENT, INTERFACE, Method
from cloudvmm.dbus.object import ApiObject, Result
from cloudvmm.events.hub import KEPT_EVENTS, Event, EventHub
from cloudvmm.events.monitor import render_event

if TYPE_CHECKING:
    from cloudvmm.api.channel import ApiResponse

Log = Callable[[str, str], None]

CLOSE_DEADLINE_S: Final = 5.0
MAX_CALLS: Final = {Effect.READS: 256, Effect.CHANGES: 64}  # under way at the same time

_CUT_DEADLINE_S: Final = 1.0
_LAST_MOMENT_S: Final = 0.1
_NAME_LENGTH: Final = 255
_SERVICE_NAME: Final = re.compile(r"[A-Za-z_-][A-Za-z0-9_-]*(\.[A-Za-z_-][A-Za-z0-9_-]*)+")
_OBJECT_PATH: Final = re.compile(r"/|(/[A-Za-z0-9_]+)+")


class DbusReply(ReplyChannel):
    """Passes the one answer on instead of keeping it."""

    __slots__ = ("_deliver",)

    def __init__(self, deliver: Callable[[ApiResponse], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def send(self, response: ApiResponse) -> None:
        if not self._sent:
            self._sent = True
            self._deliver(response)


class DbusServer:
    """A running service. Owns `bus`, and clones of `api_evt` and `api_sender`.

    :raises StartingSession: the operating system gives no descriptor or thread; `bus` is then still the
        caller's.
    """

    def __init__(
        self,
        bus: Bus,
        service_name: str,
        object_path: str,
        api_evt: EventFd,
        api_sender: ApiSender,
        *,
        events: EventHub | None = None,
        log: Log = lambda _level, _text: None,
    ) -> None:
        self._bus = bus
        self._service_name = service_name
        self._object = ApiObject(object_path)
        self._api_sender = api_sender.clone()
        self._log = log
        self._outgoing: queue.SimpleQueue[Callable[[], list[Message]] | None] = queue.SimpleQueue()
        # Each of the two is counted up by one thread only: calls by the reader, answers by the writer.
        self._called = dict.fromkeys(Effect, 0)
        self._answered = dict.fromkeys(Effect, 0)
        self._events = events
        self._next_event = 0
        self._knows_of_events = False
        self._release_serial = 0
        self._is_closing = False
        self._closing = threading.Lock()
        self._unsubscribe: Callable[[], None] = lambda: None
        with contextlib.ExitStack() as undo:
            try:
                self._api_evt = api_evt.clone()
                undo.callback(self._api_evt.close)
                self._writer = threading.Thread(target=self._write_all, name="dbus-writer", daemon=True)
                self._reader = threading.Thread(target=self._read_all, name="dbus-reader", daemon=True)
                self._writer.start()
                undo.callback(self._outgoing.put, None)
                self._reader.start()
            except (OSError, RuntimeError) as error:
                raise StartingSession from error
            undo.pop_all()
        if events is not None:
            self._unsubscribe = events.subscribe(self._tell_of_events)
            self._tell_of_events()  # what happened before

    def close(self, deadline_s: float = CLOSE_DEADLINE_S) -> bool:
        """Stop serving; return whether the bus took all that was to be said within `deadline_s`.

        A command that the VMM thread has not answered by now is not waited for. A second call does nothing.
        """
        with self._closing:
            if self._is_closing:
                return True
            self._is_closing = True
        self._unsubscribe()
        self._outgoing.put(None)
        deadline = time.monotonic() + deadline_s
        # At least a moment: the host may stand still until the deadline.
        self._writer.join(max(_LAST_MOMENT_S, deadline_s))
        self._reader.join(max(_LAST_MOMENT_S, deadline - time.monotonic()))
        is_clean = not self._writer.is_alive() and not self._reader.is_alive()
        self._bus.cut()
        self._writer.join(_CUT_DEADLINE_S)
        self._reader.join(_CUT_DEADLINE_S)
        self._bus.close()
        self._api_evt.close()
        return is_clean

    # The reader

    def _read_all(self) -> None:
        try:
            for message in self._bus.receive():
                if message is None:
                    self._log("warn", "A D-Bus message that cannot be understood is ignored")
                elif message.is_call:
                    self._take(message)
                elif self._release_serial and message.answers(self._release_serial):
                    return  # the bus has passed on all that was sent before
        except (OSError, BusLost) as error:
            self._lose(error)

    def _lose(self, error: OSError | BusLost) -> None:
        if not self._is_closing:
            self._log("error", f"The D-Bus API is gone, the VM is not: {error}")
        self._unsubscribe()
        self._outgoing.put(None)

    def _take(self, call: Incoming) -> None:
        try:
            method = self._object.method(call)
            if method is None:
                self._put_result(call, self._object.answer(call))
            else:
                self._start(method, call)
        except CallError as error:
            self._put_error(call, error)
        except Exception as error:
            # A mistake of ours: this call's loss, not the server's.
            self._log("error", f"D-Bus call {call.member}: {error!r}")
            self._put_error(call, Failed())

    def _start(self, method: Method, call: Incoming) -> None:
        """Send the command; its answer comes by `_deliver`."""
        effect = method.command.effect
        data = method.decode(call.strings(method.takes))
        if self._called[effect] - self._answered[effect] >= MAX_CALLS[effect]:
            raise LimitsExceeded
        channel = DbusReply(lambda response: self._deliver(method, call, response))
        try:
            self._api_sender.send(method.command(data, channel))
        except ApiError as error:
            raise Failed(str(error)) from error
        self._called[effect] += 1
        try:
            self._api_evt.write()
        except OSError as error:
            # Answered here; what the VMM thread says later is dropped.
            channel.send(_event_fd_write(error))

    # What others put into the writer's queue

    def _deliver(self, method: Method, call: Incoming, response: ApiResponse) -> None:
        self._outgoing.put(lambda: self._finish(method, call, response))

    def _put_result(self, call: Incoming, result: Result) -> None:
        if call.wants_reply:
            message = reply(call, *result)
            self._outgoing.put(lambda: [message])

    def _put_error(self, call: Incoming, error: CallError) -> None:
        if call.wants_reply:
            # Not the error itself: it holds on to all that was sent.
            message = error_reply(call, error)
            self._outgoing.put(lambda: [message])

    def _tell_of_events(self, _event: Event | None = None) -> None:
        if not self._knows_of_events:
            self._knows_of_events = True
            self._outgoing.put(self._signals)

    # The writer

    def _write_all(self) -> None:
        try:
            while (make := self._outgoing.get()) is not None:
                self._write(make)
            # Known before the answer can come.
            self._release_serial = self._bus.next_serial()
            self._bus.release_name(self._service_name)
        except OSError:
            self._bus.cut()  # the reader notices and tells

    def _write(self, make: Callable[[], list[Message]]) -> None:
        try:
            for message in make():
                self._bus.send(message)
        except OSError:
            raise
        except Exception as error:
            self._log("error", f"A D-Bus message cannot be sent: {error!r}")

    def _finish(self, method: Method, call: Incoming, response: ApiResponse) -> list[Message]:
        self._answered[method.command.effect] += 1
        if not call.wants_reply:
            return []
        try:
            return [reply(call, *method.result(response))]
        except CallError as error:
            return [error_reply(call, error)]
        except Exception as error:
            self._log("error", f"D-Bus reply to {call.member}: {error!r}")
            return [error_reply(call, Failed())]

    def _signals(self) -> list[Message]:
        assert self._events is not None
        # Before looking, so that whatever is not seen now is told of again.
        self._knows_of_events = False
        events = self._events.since(self._next_event, limit=KEPT_EVENTS)
        if events and events[0].number > self._next_event:
            lost = events[0].number - self._next_event
            self._log("warn", f"The message bus was too slow; {lost} events are lost to it")
        if events:
            self._next_event = events[-1].number + 1
        return [self._signal(event) for event in events if not event.is_ours]

    def _signal(self, event: Event) -> Message:
        # As the monitor has it, but for the empty line between two.
        return signal(self._object.path, INTERFACE, EVENT, render_event(event).decode().rstrip("\n"))


def _event_fd_write(error: OSError) -> EventFdWrite:
    failure = EventFdWrite()
    failure.__cause__ = error
    return failure


def start_dbus_thread(
    service_name: str,
    object_path: str,
    api_evt: EventFd,
    api_sender: ApiSender,
    *,
    system_bus: bool = False,
    events: EventHub | None = None,
    log: Log = lambda _level, _text: None,
) -> DbusServer:
    """Serve as `service_name` on the session bus, or the system bus, from which events are signalled too.

    :raises StartingSession: there is no such bus, or it does not give us the name.
    """
    try:
        _check_names(service_name, object_path)
        bus = Bus.at(bus_address(system_bus=system_bus))
        with contextlib.ExitStack() as undo:
            undo.callback(bus.close)
            bus.take_name(service_name)
            server = DbusServer(bus, service_name, object_path, api_evt, api_sender, events=events, log=log)
            undo.pop_all()
    except StartingSession:
        raise
    except DbusServerError as error:
        raise StartingSession from error
    return server


def _check_names(service_name: str, object_path: str) -> None:
    if not _SERVICE_NAME.fullmatch(service_name) or len(service_name) > _NAME_LENGTH:
        raise InvalidServiceName(service_name)
    if not _OBJECT_PATH.fullmatch(object_path):
        raise InvalidObjectPath(object_path)
