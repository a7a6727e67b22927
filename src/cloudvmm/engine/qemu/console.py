"""Serial port, virtio console and debug port, each on the sink that control made."""

from __future__ import annotations

import os
from typing import Final, assert_never

from cloudvmm.config.console import DEFAULT_DEBUG_CONSOLE_IOBASE
from cloudvmm.engine.base import ConsoleSink, MachineSpec, SinkKind
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.slot import place

SERIAL_ID: Final = "__serial"
CONSOLE_ID: Final = "__console"
DEBUG_CONSOLE_ID: Final = "__debug_console"


def serial_parts(spec: MachineSpec, *, fd: int | None) -> Parts:
    """Describe the first serial port, ttyS0 to a Linux guest; `fd` is the stream of the sink, if it has
    one.
    """
    if spec.serial.kind is SinkKind.OFF:
        return Parts()
    chardev = _chardev(spec.serial, SERIAL_ID, fd=fd)
    device = {"driver": "isa-serial", "id": qdev_id(SERIAL_ID), "index": 0, "chardev": chardev["id"]}
    return Parts(chardevs=[chardev], devices=[device])


def console_parts(spec: MachineSpec, *, fd: int | None) -> Parts:
    """Describe the virtio console, hvc0 to a Linux guest."""
    if spec.console.kind is SinkKind.OFF:
        return Parts()
    console_id = spec.vm_config.console.id or CONSOLE_ID
    chardev = _chardev(spec.console, console_id, fd=fd)
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
    return Parts(chardevs=[chardev], devices=[controller, port])


def debug_console_parts(spec: MachineSpec, *, fd: int | None) -> Parts:
    """Describe the debug port, which takes bytes and gives none."""
    if spec.debug_console.kind is SinkKind.OFF:
        return Parts()
    iobase = spec.vm_config.debug_console.iobase
    chardev = _chardev(spec.debug_console, DEBUG_CONSOLE_ID, fd=fd)
    device = {
        "driver": "isa-debugcon",
        "id": qdev_id(DEBUG_CONSOLE_ID),
        "iobase": DEFAULT_DEBUG_CONSOLE_IOBASE if iobase is None else iobase,
        "chardev": chardev["id"],
    }
    return Parts(chardevs=[chardev], devices=[device])


def _chardev(sink: ConsoleSink, device_id: str, *, fd: int | None) -> Properties:
    return {"id": part_id(device_id, "chr"), "backend": _backend(sink, fd=fd)}


def _backend(sink: ConsoleSink, *, fd: int | None) -> Properties:
    match sink.kind:
        case SinkKind.NULL | SinkKind.OFF:
            return {"type": "null", "data": {}}
        case SinkKind.FILE:
            return {"type": "file", "data": {"out": os.path.abspath(sink.path or ""), "append": True}}
        case SinkKind.STREAM:
            return {
                "type": "socket",
                "data": {"addr": {"type": "fd", "data": {"str": str(fd)}}, "server": False},
            }
        case _:
            assert_never(sink.kind)
