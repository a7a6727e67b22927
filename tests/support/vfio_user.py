"""A PCI device served over vfio-user: 4 KiB of memory behind BAR 0, and interrupts that it never raises.

It serves one client after another and speaks just what a client needs for that. A server with a `Fault` does
wrong by purpose.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

VENDOR, DEVICE = 0x1AF4, 0xBEEF
MAGIC: Final = 0xC0FFEE01  # the first word of the BAR, for as long as nobody writes there
BAR_BYTES: Final = 4096
CONFIG_BYTES: Final = 256
END_S: Final = 10.0

_HEADER = struct.Struct("<HHIII")  # id, command, size with this, flags, error
_IS_REPLY, _WANTS_NO_REPLY, _IS_ERROR = 1, 0x10, 0x20
_INVALID, _NO_SUCH = 22, 38
_ACCESS = struct.Struct("<QII")  # offset, region, count
_REGION_INFO = struct.Struct("<IIIIQQ")
_BAR0_REGION, _CONFIG_REGION = 0, 7
_READ_WRITE = 3
_DEVICE_FLAGS = 0x3  # it can be reset; it is a PCI device
_REGIONS, _INTERRUPTS = 9, 5
_LINE, _ERROR = 0, 3  # kinds of interrupts


class Command(enum.IntEnum):
    """Those of the specification that a client of such a device sends."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    RESET = 13
    REGION_WRITE_MULTI = 15


class Fault(enum.Enum):
    """What a server does wrong, and when."""

    CLOSES = "closes the connection as soon as there is one"
    HANGS_UP = "closes the connection when it was asked something"
    OLD_VERSION = "says that it speaks version 7 of the protocol"
    NO_JSON = "says its version and then no JSON"
    SILENT = "takes what is sent and never answers"
    NO_REGIONS = "answers every question for a region with an error"


class Refusal(Exception):
    """A command is answered with this error number."""


class VfioUserServer:
    """Listens at `path` from now on. `mapped` counts the descriptors of guest memory that came, `clients` the
    connections.
    """

    def __init__(self, path: Path, fault: Fault | None = None) -> None:
        self.path = path
        self.fault = fault
        self.bar = bytearray(BAR_BYTES)
        self.mapped = 0
        self.clients = 0
        self._config = bytearray(CONFIG_BYTES)
        self._client: socket.socket | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, name="vfio-user-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up and end, as a server that dies. The socket's file stays. Idempotent."""
        with self._lock:
            self._is_closed = True
            for one in (self._listener, self._client):
                if one is not None:
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
        self._thread.join(END_S)
        assert not self._thread.is_alive()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                with self._lock:
                    if self._is_closed:
                        return
                    self._client = client
                self.clients += 1
                if self.fault is not Fault.CLOSES:
                    self._power_on()
                    with contextlib.suppress(EOFError, OSError):
                        self._talk(client)
                with self._lock:
                    self._client = None

    def _power_on(self) -> None:
        self.bar[:] = struct.pack("<I", MAGIC).ljust(BAR_BYTES, b"\0")
        self._config[:] = bytes(CONFIG_BYTES)
        struct.pack_into("<HHHHBBBB", self._config, 0, VENDOR, DEVICE, 0, 0, 1, 0, 0, 0xFF)
        struct.pack_into("<HH", self._config, 0x2C, VENDOR, 1)

    def _talk(self, client: socket.socket) -> None:
        while True:
            header, fds, _, _ = socket.recv_fds(client, _HEADER.size, 16)
            self.mapped += len(fds)
            for fd in fds:
                os.close(fd)
            header += _exactly(client, _HEADER.size - len(header), had=len(header))
            number, command, size, flags, _ = _HEADER.unpack(header)
            body = _exactly(client, size - _HEADER.size, had=1)
            if self.fault is Fault.HANGS_UP:
                return
            if self.fault is Fault.SILENT:
                continue
            try:
                answer, error = self._answer(command, body), 0
            except Refusal as refusal:
                answer, error = b"", int(refusal.args[0])
            if not flags & _WANTS_NO_REPLY:
                mark = _IS_REPLY | (_IS_ERROR if error else 0)
                client.sendall(
                    _HEADER.pack(number, command, _HEADER.size + len(answer), mark, error) + answer
                )

    def _answer(self, command: int, body: bytes) -> bytes:
        answers: dict[int, Callable[[bytes], bytes]] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: lambda _: b"",
            Command.DMA_UNMAP: lambda body: body[:24],
            Command.GET_INFO: lambda _: struct.pack("<IIII", 16, _DEVICE_FLAGS, _REGIONS, _INTERRUPTS),
            Command.GET_REGION_INFO: self._region_info,
            Command.GET_IRQ_INFO: _interrupt_info,
            Command.SET_IRQS: lambda _: b"",
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.REGION_WRITE_MULTI: self._write_many,
            Command.RESET: lambda _: b"",
        }
        if command not in answers:
            raise Refusal(_NO_SUCH)
        return answers[command](body)

    def _version(self, body: bytes) -> bytes:
        major, minor = struct.unpack_from("<HH", body)
        capabilities = {
            "max_msg_fds": 8,
            "max_data_xfer_size": 1 << 20,
            "pgsizes": 4096,
            "max_dma_maps": 65535,
        }
        text = msgspec.json.encode({"capabilities": capabilities})
        if self.fault is Fault.OLD_VERSION:
            major = 7
        if self.fault is Fault.NO_JSON:
            text = b"{"
        return struct.pack("<HH", major, minor) + text + b"\0"

    def _region_info(self, body: bytes) -> bytes:
        if self.fault is Fault.NO_REGIONS:
            raise Refusal(_INVALID)
        _, _, region, _, _, _ = _REGION_INFO.unpack_from(body)
        size = {_BAR0_REGION: BAR_BYTES, _CONFIG_REGION: CONFIG_BYTES}.get(region, 0)
        return _REGION_INFO.pack(_REGION_INFO.size, _READ_WRITE if size else 0, region, 0, size, 0)

    def _read(self, body: bytes) -> bytes:
        offset, region, count = _ACCESS.unpack_from(body)
        return body[: _ACCESS.size] + bytes(self._memory(region)[offset : offset + count]).ljust(count, b"\0")

    def _write(self, body: bytes) -> bytes:
        offset, region, count = _ACCESS.unpack_from(body)
        self._store(region, offset, body[_ACCESS.size : _ACCESS.size + count])
        return body[: _ACCESS.size]

    def _write_many(self, body: bytes) -> bytes:
        (writes,) = struct.unpack_from("<Q", body)
        at = 8
        for _ in range(writes):
            offset, region, count = _ACCESS.unpack_from(body, at)
            at += _ACCESS.size
            self._store(region, offset, body[at : at + count])
            at += 8  # each has room for eight bytes
        return struct.pack("<Q", writes)

    def _memory(self, region: int) -> bytearray:
        if region not in (_BAR0_REGION, _CONFIG_REGION):
            raise Refusal(_INVALID)
        return self.bar if region == _BAR0_REGION else self._config

    def _store(self, region: int, offset: int, data: bytes) -> None:
        if region == _CONFIG_REGION and (0x10 <= offset < 0x28 or offset == 0x30):
            # There is one BAR, whose address is a multiple of its size, and no ROM.
            value = int.from_bytes(data, "little") & ~(BAR_BYTES - 1) if offset == 0x10 else 0
            data = value.to_bytes(len(data), "little")
        memory = self._memory(region)
        memory[offset : offset + len(data)] = data


def _interrupt_info(body: bytes) -> bytes:
    _, _, index, _ = struct.unpack_from("<IIII", body)
    is_there = int(index in (_LINE, _ERROR))
    return struct.pack("<IIII", 16, is_there, index, is_there)


def _exactly(client: socket.socket, count: int, *, had: int) -> bytes:
    """Receive `count` bytes. `had` is what came before them: none at all is an orderly end.

    :raises EOFError: the client hung up.
    """
    if not had:
        raise EOFError
    data = b""
    while len(data) < count:
        piece = client.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
