"""Serial port, virtio console and debug port, each on the sink that control made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Final, assert_never

import msgspec

from cloudvmm.config.console import DEFAULT_DEBUG_CONSOLE_IOBASE
from cloudvmm.engine.base import ConsoleSink, MachineSpec, SinkKind
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import FdSet, Parts, Properties, opened
from cloudvmm.engine.qemu.slot import place
from cloudvmm.host.user import User

SERIAL_ID: Final = "__serial"
CONSOLE_ID: Final = "__console"
DEBUG_CONSOLE_ID: Final = "__debug_console"
_ENDS: Final = (".in", ".out")


class Stream(msgspec.Struct, frozen=True):
    """What was opened for a sink: `fd` is its stream, or the folder of its pipes, or its file, which QEMU has
    as set `set_id` then.
    """

    fd: int
    set_id: int


def serial_parts(spec: MachineSpec, *, stream: Stream | None) -> Parts:
    """Describe the first serial port, ttyS0 to a Linux guest."""
    if spec.serial.kind is SinkKind.OFF:
        return Parts()
    chardev = _chardev(spec.serial, SERIAL_ID, stream)
    device = {"driver": "isa-serial", "id": qdev_id(SERIAL_ID), "index": 0, "chardev": chardev["id"]}
    return Parts(fdsets=_fdsets(spec.serial, stream), chardevs=[chardev], devices=[device])


def console_parts(spec: MachineSpec, *, stream: Stream | None) -> Parts:
    """Describe the virtio console, hvc0 to a Linux guest."""
    if spec.console.kind is SinkKind.OFF:
        return Parts()
    console_id = spec.vm_config.console.id or CONSOLE_ID
    chardev = _chardev(spec.console, console_id, stream)
    bus = qdev_id(console_id)
    port = {
        "driver": "virtconsole",
        "id": part_id(console_id, "port"),
        "bus": f"{bus}.0",
        "chardev": chardev["id"],
    }
    controller = {
        "driver": "virtio-serial-pci",
        "id": bus,
        **place(spec.slots, console_id),
        "disable-legacy": "on",
        "max_ports": 1,
    }
    return Parts(fdsets=_fdsets(spec.console, stream), chardevs=[chardev], devices=[controller, port])


def debug_console_parts(spec: MachineSpec, *, stream: Stream | None) -> Parts:
    """Describe the debug port, which takes bytes and gives none."""
    if spec.debug_console.kind is SinkKind.OFF:
        return Parts()
    iobase = spec.vm_config.debug_console.iobase
    chardev = _chardev(spec.debug_console, DEBUG_CONSOLE_ID, stream)
    device = {
        "driver": "isa-debugcon",
        "id": qdev_id(DEBUG_CONSOLE_ID),
        "iobase": DEFAULT_DEBUG_CONSOLE_IOBASE if iobase is None else iobase,
        "chardev": chardev["id"],
    }
    return Parts(fdsets=_fdsets(spec.debug_console, stream), chardevs=[chardev], devices=[device])


def open_stream(sink: ConsoleSink, user: User | None = None) -> int | None:
    """Return a descriptor of what `sink` writes to, or through which it is opened, for a QEMU that runs as
    `user`, as us if None; None where QEMU opens it, or has nothing.

    :raises OSError: we have no descriptor left.
    """
    if sink.stream_fd is not None:
        return os.dup(sink.stream_fd)
    if sink.kind is SinkKind.PIPES:
        return _open_folder(sink.path or "", user)
    if sink.kind is not SinkKind.FILE:
        return None
    try:
        return os.open(sink.path or "", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):  # a pipe that nobody reads yet, for one
        return None


def written_files(streams: Iterable[tuple[ConsoleSink, int | None]]) -> list[str]:
    """Return the files and pipes that QEMU opens for the output of the guest, and its input.

    `streams` are sinks with what was opened for each, if anything was.
    """
    found = []
    for sink, fd in streams:
        if sink.kind is SinkKind.FILE and fd is None:
            found.append(os.path.abspath(sink.path or ""))
        elif sink.kind is SinkKind.PIPES and fd is not None:
            found += [f"{_pipes(sink, fd)}{end}" for end in _ENDS]
    return found


def _open_folder(path: str, user: User | None) -> int:
    """Return a descriptor of the folder of the pipes at `path`, having shown them to `user`."""
    folder = os.path.dirname(path)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if user is not None:
        with contextlib.suppress(OSError):  # it takes a power of root's then
            for end in _ENDS:
                os.chown(f"{path}{end}", user.uid, -1, follow_symlinks=False)
            os.chmod(folder, 0o711)
    return fd


def _pipes(sink: ConsoleSink, folder_fd: int) -> str:
    """Return the path of its pipes, to which who has the folder open gets whatever the way to it is."""
    return f"{opened(folder_fd)}/{os.path.basename(sink.path or '')}"


def _fdsets(sink: ConsoleSink, stream: Stream | None) -> list[FdSet]:
    if sink.kind is not SinkKind.FILE or stream is None:
        return []
    return [FdSet(stream.fd, stream.set_id)]


def _chardev(sink: ConsoleSink, device_id: str, stream: Stream | None) -> Properties:
    return {"id": part_id(device_id, "chr"), "backend": _backend(sink, stream)}


def _backend(sink: ConsoleSink, stream: Stream | None) -> Properties:
    match sink.kind:
        case SinkKind.NULL | SinkKind.OFF:
            return {"type": "null", "data": {}}
        case SinkKind.FILE:
            sets = _fdsets(sink, stream)
            path = sets[0].path if sets else os.path.abspath(sink.path or "")
            return {"type": "file", "data": {"out": path, "append": True}}
        case SinkKind.PIPES:
            path = sink.path or ""
            device = os.path.abspath(path) if stream is None else _pipes(sink, stream.fd)
            return {"type": "pipe", "data": {"device": device}}
        case SinkKind.STREAM:
            return {
                "type": "socket",
                "data": {"addr": {"type": "fd", "data": {"str": str(stream and stream.fd)}}, "server": False},
            }
        case _:
            assert_never(sink.kind)
