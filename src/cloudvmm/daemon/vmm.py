"""`cloudvmm.Vmm`: a VMM in this process, with the methods and exceptions of the client.

No socket is between. Otherwise a command takes the way it takes over REST: its data is checked in the same
form, its descriptors are duplicated as sending them would, and a failure becomes what the client raises.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from cloudvmm import api
from cloudvmm.client.codec import decode, encode
from cloudvmm.client.error import ConnectionFailed, NoAnswer
from cloudvmm.client.failure import ServerError, server_error
from cloudvmm.client.method import Methods
from cloudvmm.client.stream import EventStream
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.runner import Log
from cloudvmm.control.sibling import Siblings
from cloudvmm.control.vmm import VmmThread
from cloudvmm.daemon.brood import Brood
from cloudvmm.daemon.events import LocalEvents
from cloudvmm.errors import VmmError, error_chain, error_code
from cloudvmm.events.hub import EventHub
from cloudvmm.events.monitor import log_text
from cloudvmm.host.rights import close_descriptors
from cloudvmm.http.descriptor import place_descriptors
from cloudvmm.http.error import DeserializeFailed, HttpError
from cloudvmm.http.status import api_failure, http_status

if TYPE_CHECKING:
    from cloudvmm.client.table import Command
    from cloudvmm.engine.base import Engine
    from cloudvmm.http.server import HttpServer

EngineName = Literal["qemu", "fake"]

_HTTP_END_S: Final = 1.0
_REQUESTS: Final = {request.name: request for request in api.COMMANDS}

T = TypeVar("T")


class VmmFailed(VmmError):
    """The VMM ended because of a fault"""


class VmmEnded(ConnectionFailed):
    """The command came after the VMM's end: it has not run."""

    def __init__(self) -> None:
        VmmError.__init__(self, "The VMM has ended")
        self.path = ""


def _ignore(level: str, text: object) -> None:
    """Log to nobody."""


def _said(log: Callable[[str, str], None] | None) -> Log:
    if log is None:
        return _ignore
    return log if isinstance(log, LazyLog) else _with_texts(log)


def _with_texts(log: Callable[[str, str], None]) -> Log:
    """Return what hands `log` nothing but texts."""
    return lambda level, text: log(level, text if isinstance(text, str) else text())


class LazyLog:
    """A log for many VMMs: it says whose text it is, and a text that nobody wants is not made."""

    __slots__ = ("_log", "_name")

    def __init__(self, log: Log, name: str) -> None:
        self._log = log
        self._name = name

    def __call__(self, level: str, text: str | Callable[[], str]) -> None:
        self._log(level, lambda: f"{self._name}: {text if isinstance(text, str) else text()}")


class Vmm(Methods):
    """A VMM that lives as long as this object is open: `with Vmm("fake") as vmm: vmm.vm_create(...)`.

    `engine` runs the VM: "qemu", "fake", or one that you made. With `state_dir` that folder holds what the
    VMM keeps; with `api_socket` it serves REST there too, where `peers` is given to these users alone. A
    guest that switches itself off leaves the VMM there unless `no_shutdown` is False. The VMMs of clones end
    with it, unless they are in a `brood` that is somebody else's. `on_end` is called once when the VMM has
    ended; with `removes_lock` there is no lock beside the socket either by then. `log` takes a level and a
    text, from any thread, and must not block.

    Any thread may call any method.

    :raises VmmError: the state folder or the socket cannot be had.
    :raises OSError: the operating system gives no descriptor, or no state folder.
    """

    def __init__(
        self,
        engine: EngineName | Engine = "qemu",
        *,
        state_dir: str | os.PathLike[str] | None = None,
        api_socket: str | os.PathLike[str] | None = None,
        no_shutdown: bool = True,
        max_connections: int = 10,
        peers: Collection[int] | None = None,
        log: Callable[[str, str], None] | None = None,
        brood: Siblings | None = None,
        on_end: Callable[[], None] | None = None,
        removes_lock: bool = False,
    ) -> None:
        said = _said(log)
        hub = EventHub()
        hub.subscribe(lambda event: said("info", partial(log_text, event)))
        hub.emit("vmm", "starting")
        self._hub = hub
        self._on_end = on_end
        self._streams: set[LocalEvents] = set()
        self._ended = threading.Event()
        runs = _engine(engine)
        self._own_brood: Brood | None = None
        if brood is None:
            self._own_brood = Brood(
                runs, no_shutdown=no_shutdown, max_connections=max_connections, peers=peers, log=log
            )
        self._vmm = VmmThread(
            runs,
            events=hub,
            state_dir=None if state_dir is None else os.fspath(state_dir),
            no_shutdown=no_shutdown,
            log=said,
            siblings=brood or self._own_brood,
        )
        # Held where the eventfd is rung and where it is closed: its number may be another file's by then.
        self._lock = threading.Lock()
        with contextlib.ExitStack() as undo:
            undo.callback(self._end_vmm)
            self._server = self._serve(api_socket, max_connections, peers, said, removes_lock=removes_lock)
            if self._server is not None:
                undo.callback(self._server.close, remove_socket=True)
            self._end_thread = threading.Thread(target=self._watch_end, name="vmm-end", daemon=True)
            self._end_thread.start()
            undo.pop_all()

    @property
    def is_running(self) -> bool:
        """Whether the VMM takes commands; `vmm_shutdown` and a fault end it."""
        return self._vmm.is_running

    @property
    def failure(self) -> VmmError | None:
        """Why the VMM has ended, if a fault was the reason."""
        return self._vmm.failure

    def call(self, command: Command[T], data: object = None, *, timeout_s: float | None = None) -> T:
        """Carry out any of `table.COMMANDS`. Without `timeout_s` it waits as long as that takes.

        :raises ServerError: the command failed; its causes are the VMM's own.
        :raises VmmEnded: there is no VMM any more.
        :raises NoAnswer: it takes longer than `timeout_s`, and goes on.
        :raises ValueError: `data` and its descriptors do not fit together.
        """
        try:
            payload = self._exchange(command.name, data, timeout_s)
        except api.RequestSend as error:
            raise VmmEnded from error
        except api.ResponseRecv as error:
            raise NoAnswer(command.name) from error
        except api.ApiError as error:
            raise _failure(command.name, api_failure(error), error_code(error)) from error
        value: T = _value(command, payload)
        return value

    def events(self, from_number: int | None = None) -> EventStream:
        stream = LocalEvents(
            self._hub, from_number, has_ended=self._ended.is_set, on_close=self._streams.discard
        )
        self._streams.add(stream)
        return stream

    def send(self, kind: type[api.ApiRequest], data: object) -> api.ReplyChannel:
        """Ask for what no client can; the answer comes over the channel. `data` is the VMM's from now on.

        :raises RequestSend: the VMM has ended.
        """
        reply = api.ReplyChannel()
        with self._lock:
            self._vmm.api_sender.send(kind(data, reply))
            self._vmm.api_evt.write()
        return reply

    def leave(self) -> None:
        """Let the VMM end, as `close` does. Returns at once."""
        with self._lock, contextlib.suppress(OSError):  # closed before
            self._vmm.exit_evt.write()

    def wait(self) -> None:
        """Blocking. Return when the VMM has ended, whoever ended it."""
        self._end_thread.join()

    def close(self) -> None:
        """Delete the VM, if any, and end the VMM; wait until nothing of it is left. May be called twice.

        So do the VMMs of its clones.
        """
        self.leave()
        if self._own_brood is not None:
            self._own_brood.close()
        self.wait()
        with self._lock:
            self._vmm.close()

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """:raises VmmFailed: a fault has ended the VMM, and nothing else is wrong."""
        self.close()
        if self.failure is not None and kind is None:
            raise VmmFailed from self.failure

    def _serve(
        self,
        api_socket: str | os.PathLike[str] | None,
        max_connections: int,
        peers: Collection[int] | None,
        log: Log,
        *,
        removes_lock: bool,
    ) -> HttpServer | None:
        if api_socket is None:
            return None
        server: HttpServer = api.start_http_path_thread(
            os.fspath(api_socket),
            self._vmm.api_evt,
            self._vmm.api_sender,
            removes_lock=removes_lock,
            max_connections=max_connections,
            peers=peers,
            events=self._hub,
            log=log,
        )
        return server

    def _end_vmm(self) -> None:
        self._vmm.exit_evt.write()
        self._vmm.join()
        self._vmm.close()

    def _watch_end(self) -> None:
        """Clear up when the VMM ends, whoever ended it."""
        self._vmm.join()
        if self._server is not None:
            self._server.close(remove_socket=True, deadline_s=_HTTP_END_S)
        self._ended.set()
        for stream in list(self._streams):
            stream.wake()
        if self._on_end is not None:
            with self._lock:
                self._vmm.close()  # whoever has to do with the end does not call `close`
            self._on_end()

    def _exchange(self, name: str, data: object, timeout_s: float | None) -> api.ApiResponsePayload:
        own, fds = _own(name, data)
        reply = api.ReplyChannel()
        try:
            with self._lock:
                self._vmm.api_sender.send(_REQUESTS[name](own, reply))
                fds.clear()  # they are the VMM's from here on
                self._vmm.api_evt.write()
        finally:
            close_descriptors(fds)
        return reply.recv(timeout_s)


def _engine(engine: EngineName | Engine) -> Engine:
    match engine:
        case "qemu":
            from cloudvmm.engine.qemu import QemuEngine

            return QemuEngine()
        case "fake":
            from cloudvmm.engine.fake import FakeEngine

            return FakeEngine()
        case str():
            raise ValueError(f"There is no engine called {engine}")
        case _:
            return engine


def _own(name: str, data: object) -> tuple[Any, list[int]]:
    """Return a copy of `data`, checked, and the duplicates of its descriptors, which the copy holds."""
    kind = _REQUESTS[name].body
    if not isinstance(data, kind or type(None)):
        raise ValueError(f"{name} takes {'no data' if kind is None else f'a {kind.__name__}'}")
    body, fds = encode(data)
    if body is None or kind is None:
        return None, []
    try:
        own: Any = form.decode(body, kind)
    except DecodeError as error:
        raise _deserialize_failed(name, error) from error
    duplicates: list[int] = []
    try:
        for fd in fds:
            duplicates.append(os.dup(fd))
        place_descriptors(own, duplicates)
    except BaseException:
        close_descriptors(duplicates)
        raise
    return own, duplicates


def _deserialize_failed(name: str, error: DecodeError) -> ServerError:
    failure = DeserializeFailed()
    failure.__cause__ = error
    return _failure(name, failure, error_code(failure))


def _failure(name: str, failure: HttpError, code: str) -> ServerError:
    return server_error(name, http_status(failure), tuple(error_chain(failure)), code)


def _value(command: Command[Any], payload: api.ApiResponsePayload) -> Any:
    match payload:
        case api.VmActionPayload(body=body):
            return decode(command.name, command.answer, body or b"")
        case api.VmInfo():
            # The VMM's own config must not change under its hands.
            return api.VmInfo(
                config=form.decode_saved(form.encode(payload.config), VmConfig),
                state=payload.state,
                memory_actual_size=payload.memory_actual_size,
                device_tree=payload.device_tree,
            )
        case (
            api.VmmPingResponse()
            | api.VmMigrationProgress()
            | api.VmSnapshotProgress()
            | api.VmForkResponse()
            | api.VmmJobs()
        ):
            return payload
        case _:
            return None
