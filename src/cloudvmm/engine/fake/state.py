"""The fake guest's state: as a file of a snapshot, and on its way between two machines.

Over a link it is a length (32 bits, big-endian), that many bytes of JSON, and one byte back once it is read.
Who waits does so in slices, so that a kill ends the waiting soon.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from cloudvmm.config import form
from cloudvmm.config.disk import ImageType
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import (
    Base,
    BeginsAt,
    DriverKind,
    EngineError,
    EngineTimeout,
    FrozenDisk,
    LinkLost,
    MachineSpec,
    ReceivedFrom,
    SavedIn,
    SentTo,
    StateError,
    Transferred,
)
from cloudvmm.engine.fake.guest import RequestKind
from cloudvmm.engine.fake.hardware import HardwareState
from cloudvmm.engine.fake.lifeline import Lifeline
from cloudvmm.engine.qcow2 import create_overlay

FILE_NAME: Final = "engine-state.json"
MAX_BYTES: Final = 1 << 20
SILENCE_S: Final = 30.0
_SLICE_MS: Final = 20
_LENGTH: Final = struct.Struct(">I")
_SIZE: Final = struct.Struct(">Q")
_CHUNK_BYTES: Final = 1 << 20
_RECEIVED: Final = b"\x06"
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class GuestState(msgspec.Struct, frozen=True, kw_only=True):
    """`tick_ms` is how long the guest ran, `seen` what it noticed, `unseen` what it will when it wakes.

    `asked` is what it was asked for and has not done: of which kind, about what, how much. `active` are the
    devices that its drivers have, `kinds` what those are of which drivers are told of in another way.
    """

    engine: str
    tick_ms: int
    seen: dict[str, int]
    unseen: list[str]
    asked: list[tuple[RequestKind, str, int]]
    hardware: HardwareState
    active: list[str] = []
    kinds: dict[str, DriverKind] = {}


class FakeBase(Base):
    """`disks` are the images, by disk id, that nobody writes any more."""

    def __init__(self, state: GuestState, disks: dict[str, tuple[str, ImageType]]) -> None:
        self.state = state
        self.disks = disks

    @property
    def stood_still_s(self) -> float:
        return 0.0

    def make_overlay(self, disk_id: str, path: str) -> None:
        overlay_on(*self.disks[disk_id], path)

    def close(self) -> None:
        """There is nothing to release."""


def overlay_on(base_path: str, base_type: ImageType, path: str) -> None:
    """:raises DeviceError: it cannot be made; then nothing is there."""
    create_overlay(path, frozen_disk(base_path, base_type))


def frozen_disk(path: str, image_type: ImageType) -> FrozenDisk:
    """Blocking. :raises OSError: there is no such file."""
    return FrozenDisk(path=os.path.abspath(path), image_type=image_type, size_bytes=os.stat(path).st_size)


def ram_bytes_of(vm_config: VmConfig) -> int:
    return vm_config.memory.size + sum(zone.size for zone in vm_config.memory.zones or ())


def paths_of(vm_config: VmConfig, ids: Iterable[str]) -> dict[str, str]:
    """Return where the images of the disks of `ids` are."""
    paths = {disk.id: disk.path for disk in vm_config.disks or ()}
    return {device_id: path for device_id in ids if (path := paths.get(device_id)) is not None}


def save_state(state: GuestState, folder: str) -> None:
    """Write the file, which is new, and sync it; on failure it is not there.

    :raises EngineError: it cannot be written.
    """
    path = f"{folder}/{FILE_NAME}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EngineError("The state cannot be written") from error
    try:
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(state))
            file.flush()
            os.fsync(fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise EngineError("The state cannot be written") from error


def find_state(spec: MachineSpec, lifeline: Lifeline) -> GuestState | None:
    """Blocking. Return the state that `spec.origin` gives, None where there is no origin.

    :raises StateError: it is damaged, or that of another machine.
    :raises LinkLost: the other side is gone before it was whole.
    """
    match spec.origin:
        case None:
            return None
        case SavedIn(folder=folder):
            state = _load(folder)
        case BeginsAt(base=base):
            if not isinstance(base, FakeBase):
                raise StateError("The state is that of another engine")
            state = base.state
        case ReceivedFrom(link_fd=link_fd, on_transferred=on_transferred, disk_fds=disk_fds):
            for device_id, path in paths_of(spec.vm_config, disk_fds).items():
                receive_disk(path, disk_fds[device_id], lifeline)
            state = _receive(link_fd, lifeline)
            on_transferred(Transferred(bytes=len(msgspec.json.encode(state))))
    if state.hardware.slots != spec.slots:
        raise StateError("The state is that of a machine with other devices")
    # What was taken away while it ran is in the config already, and may still be in the machine.
    if ram_bytes_of(spec.vm_config) > state.hardware.ram_bytes:
        raise StateError("The state is that of a machine with less RAM")
    if spec.vm_config.cpus.boot_vcpus > state.hardware.vcpus:
        raise StateError("The state is that of a machine with fewer vCPUs")
    return state


def send_state(state: GuestState, target: SentTo, lifeline: Lifeline) -> None:
    """Blocking. Send `state` and wait until the other side has it.

    :raises LinkLost: it is gone; whether it has the state is not known.
    """
    raw = msgspec.json.encode(state)
    with _link(target.link_fd) as link:
        _send_all(link, _LENGTH.pack(len(raw)) + raw, lifeline)
        target.on_transferred(Transferred(bytes=len(raw), iteration=0, remaining_bytes=0))
        if _read(link, len(_RECEIVED), lifeline) != _RECEIVED:
            raise LinkLost("The other side did not say that it has the state")


def send_disk(path: str, link_fd: int, lifeline: Lifeline) -> None:
    """Blocking. Send what the image holds: its length, 64 bits, big-endian, and its bytes.

    :raises EngineError: it cannot be read. :raises LinkLost: the other side is gone.
    """
    try:
        with _link(link_fd) as link, open(path, "rb") as image:
            _send_all(link, _SIZE.pack(os.fstat(image.fileno()).st_size), lifeline)
            while data := image.read(_CHUNK_BYTES):
                _send_all(link, data, lifeline)
    except OSError as error:
        raise EngineError("The image cannot be read") from error


def receive_disk(path: str, link_fd: int, lifeline: Lifeline) -> None:
    """Blocking. Write what `send_disk` sends to the image, which is there.

    :raises EngineError: it cannot be written. :raises LinkLost: the other side is gone.
    """
    try:
        with _link(link_fd) as link, open(path, "r+b") as image:
            (left,) = _SIZE.unpack(_read(link, _SIZE.size, lifeline))
            while left:
                data = _read(link, min(left, _CHUNK_BYTES), lifeline)
                image.write(data)
                left -= len(data)
    except OSError as error:
        raise EngineError("The image cannot be written") from error


def _send_all(link: socket.socket, data: bytes, lifeline: Lifeline) -> None:
    left = memoryview(data)
    while left:
        _wait(link, select.POLLOUT, lifeline)
        try:
            left = left[link.send(left, _FLAGS) :]
        except OSError as error:
            raise LinkLost("The state could not be sent") from error


def _receive(link_fd: int, lifeline: Lifeline) -> GuestState:
    with _link(link_fd) as link:
        (length,) = _LENGTH.unpack(_read(link, _LENGTH.size, lifeline))
        if length > MAX_BYTES:
            raise StateError(f"The state has {length} bytes, which is too much")
        state = _decode(_read(link, length, lifeline))
        _wait(link, select.POLLOUT, lifeline)
        with contextlib.suppress(OSError):  # who is gone is missed by whoever speaks with it next
            link.send(_RECEIVED, _FLAGS)
        return state


def _load(folder: str) -> GuestState:
    try:
        with open(f"{folder}/{FILE_NAME}", "rb") as file:
            return _decode(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise StateError("The state cannot be read") from error


def _decode(raw: bytes) -> GuestState:
    try:
        state: GuestState = form.decoder(GuestState).decode(raw)
    except form.MALFORMED as error:
        raise StateError("The state is damaged") from error
    if state.engine != "fake":
        raise StateError(f"The state was made by the engine {state.engine}")
    return state


def _link(link_fd: int) -> socket.socket:
    try:
        return socket.socket(fileno=os.dup(link_fd))
    except OSError as error:
        raise LinkLost("The link is no socket") from error


def _read(link: socket.socket, size: int, lifeline: Lifeline) -> bytes:
    read = b""
    while len(read) < size:
        _wait(link, select.POLLIN, lifeline)
        try:
            chunk = link.recv(size - len(read), _FLAGS)
        except BlockingIOError:
            continue
        except OSError as error:
            raise LinkLost("The other side is gone") from error
        if not chunk:
            raise LinkLost("The other side is gone")
        read += chunk
    return read


def _wait(link: socket.socket, events: int, lifeline: Lifeline) -> None:
    poll = select.poll()
    poll.register(link, events)
    deadline_s = time.monotonic() + SILENCE_S
    while not poll.poll(_SLICE_MS):
        lifeline.wait(0)
        if time.monotonic() > deadline_s:
            raise EngineTimeout(f"The other side did nothing for {SILENCE_S:g} s")
