"""The REST front end from both sides: a VMM thread that follows a script, and a client of raw bytes."""

from __future__ import annotations

import array
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from cloudvmm.api import (
    ApiError,
    ApiRequest,
    ApiResponsePayload,
    ApiSender,
    Empty,
    EventFd,
    ForkedVm,
    JobState,
    MigrationPhase,
    MigrationRole,
    ReplyChannel,
    SnapshotPhase,
    VmActionPayload,
    VmForkResponse,
    VmInfo,
    VmMigrationProgress,
    VmmJob,
    VmmJobs,
    VmmPingResponse,
    VmSnapshotProgress,
    VmState,
    api_channel,
)
from cloudvmm.api.action import VmmPing
from cloudvmm.api.ping import Ping, Pong
from cloudvmm.config.vm import VmConfig
from support.deadline import HOST_S
from support.traffic import Traffic
from support.watch import CLOCK

TIMEOUT_S = HOST_S
PONG = VmmPingResponse(build_version="v54.0.0", version="54.0.0", pid=7, features=["io_uring", "kvm"])
UNDER_WAY = VmMigrationProgress(
    role=MigrationRole.SENDER, phase=MigrationPhase.SENDING, elapsed_ms=5, transferred_bytes=1 << 20
)
SAVING = VmSnapshotProgress(
    phase=SnapshotPhase.SAVING, elapsed_ms=5, saved_bytes=1 << 20, total_bytes=1 << 28
)
FORKED = VmForkResponse(
    clones=[ForkedVm(id="clone-0", api_socket="/c/clone-0/api.sock", directory="/c/clone-0")],
    pause_ms=18.5,
    disks={"_disk0": "/c/disk0-0.qcow2"},
)
JOBS = VmmJobs(
    jobs=[
        VmmJob(
            id=7,
            command="vm.boot",
            state=JobState.RUNNING,
            since=1790000000.25,
            elapsed_ms=5,
            can_cancel=False,
        )
    ]
)
PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n"

Answer = ApiResponsePayload | ApiError


def plain_answer(command: type[ApiRequest]) -> Answer:
    """Return what `command` answers when nothing is special."""
    if command.answer is VmmPingResponse:
        return PONG
    if command.answer is VmInfo:
        return VmInfo(config=VmConfig(), state=VmState.CREATED, memory_actual_size=512 << 20)
    if command.answer is VmMigrationProgress:
        return UNDER_WAY
    if command.answer is VmSnapshotProgress:
        return SAVING
    if command.answer is VmForkResponse:
        return FORKED
    if command.answer is VmmJobs:
        return JOBS
    if command.name == "vm.counters":
        return VmActionPayload(b'{"_disk0":{"read_bytes":512}}')
    if command.answer is VmActionPayload:
        return VmActionPayload(b'{"id":"_disk0","bdf":"0000:00:01.0"}')
    return Empty()


class _PongReply:
    """Where a `Ping` is answered as the command `VmmPing` is."""

    def __init__(self, reply: ReplyChannel) -> None:
        self._reply = reply

    def send(self, answer: Answer) -> None:
        self._reply.send(Pong(msgspec.json.encode(answer)) if isinstance(answer, VmmPingResponse) else answer)


class ScriptedVmm:
    """Receives requests on a thread of its own and answers as scripted; silent ones stay unanswered."""

    def __init__(self) -> None:
        self.event = EventFd()
        self.sender: ApiSender
        self.sender, self._receiver = api_channel()
        self.requests: list[ApiRequest] = []
        self.script: dict[str, Answer | Callable[[ApiRequest], Answer | None]] = {}
        self.received = threading.Condition()
        self._stop = EventFd()
        self._thread = threading.Thread(target=self._run, name="scripted-vmm")
        self._thread.start()

    def answer(self, name: str, answer: Answer | Callable[[ApiRequest], Answer | None]) -> None:
        """From now on answer the command called `name` so; a function may give None, for no answer yet."""
        self.script[name] = answer

    def await_request(self, name: str) -> ApiRequest:
        """Wait for the newest request called `name`."""
        with self.received:
            assert self.received.wait_for(lambda: self._last(name), TIMEOUT_S), f"No {name} came"
        return self._last(name)

    def names(self) -> list[str]:
        with self.received:
            return [request.name for request in self.requests]

    def leave(self) -> None:
        """End as the VMM thread ends: refuse what comes; what is queued gets no answer from here."""
        self._receiver.close()

    def close(self) -> None:
        self._stop.write()
        self._thread.join()
        self._stop.close()
        self.event.close()

    def _last(self, name: str) -> Any:
        return next((request for request in reversed(self.requests) if request.name == name), None)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self.event, select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        while not self._stop.read():
            poller.poll()
            for _ in range(self.event.read()):
                request = self._receiver.take()
                assert request is not None
                self._serve(request)

    def _serve(self, request: ApiRequest | Ping) -> None:
        if isinstance(request, Ping):
            request = VmmPing(None, _PongReply(request.reply))
        answer = self.script.get(request.name, plain_answer(type(request)))
        with self.received:
            self.requests.append(request)
            self.received.notify_all()
        if callable(answer):
            answer = answer(request)
        if answer is not None:
            request.reply.send(answer)


class Reply(msgspec.Struct, frozen=True):
    """`raw` is the whole response, byte for byte."""

    raw: bytes
    status: int
    body: bytes

    @property
    def code(self) -> str:
        """The stable name of the error; empty for a success."""
        head, _, _ = self.raw.partition(b"\r\n\r\n")
        codes = [line[18:] for line in head.split(b"\r\n") if line.startswith(b"X-Cloudvmm-Error: ")]
        assert len(codes) <= 1
        return codes[0].decode() if codes else ""

    def texts(self) -> list[str]:
        return msgspec.json.decode(self.body, type=list[str])


class RestClient:
    """One connection. Every wait is bounded by `timeout_s`.

    What goes over it must be in the API's document, unless `is_documented` says that a test makes the server
    answer nonsense. `answered_at` is when the last response was complete, by `CLOCK`.
    """

    def __init__(self, path: str, *, timeout_s: float = TIMEOUT_S, is_documented: bool = True) -> None:
        self.answered_at = 0.0
        self._traffic = Traffic() if is_documented else None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout_s)
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise
        self._left = b""

    def send(self, raw: bytes, fds: list[int] | None = None) -> None:
        if self._traffic is not None:
            self._traffic.sent(raw)
        if not fds:
            self.socket.sendall(raw)
            return
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        sent = self.socket.sendmsg([raw], [rights])
        if left := raw[sent:]:
            self.socket.sendall(left)

    def reply(self) -> Reply:
        """Read exactly one response."""
        while b"\r\n\r\n" not in self._left:
            self._read()
        head, _, rest = self._left.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")),
            0,
        )
        while len(rest) < length:
            self._read()
            rest = self._left[len(head) + 4 :]
        self._left = rest[length:]
        self.answered_at = CLOCK.now_s()
        if self._traffic is not None:
            self._traffic.answered(head, rest[:length])
        return Reply(head + b"\r\n\r\n" + rest[:length], int(head[9:12]), rest[:length])

    def ask(self, method: str, name: str, body: Any = None, fds: list[int] | None = None) -> Reply:
        """Send one request for the command `name`, `body` as JSON or as the bytes that it is."""
        self.send(request_bytes(method, f"/api/v1/{name}", body), fds)
        return self.reply()

    def ping(self) -> Reply:
        return self.ask("GET", "vmm.ping")

    def is_closed(self) -> bool:
        """Wait for the server to close; False if it sends something instead."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def is_quiet(self) -> bool:
        """Return whether nothing is there to be read right now."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        return not self._left and not poller.poll(0)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RestClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        piece = self.socket.recv(65536)
        if not piece:
            raise EOFError(f"The server closed after {self._left!r}")
        self._left += piece


def request_bytes(method: str, target: str, body: Any = None) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n".encode()
    if body is None:
        return head + b"\r\n"
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)


def same_file(fd: int, other: int) -> bool:
    """Return whether two descriptors are the same open thing."""
    one, two = os.fstat(fd), os.fstat(other)
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)
