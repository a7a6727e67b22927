"""Kernel, initramfs and command line, or firmware."""

from __future__ import annotations

import os
from typing import Final

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.base import PayloadError
from cloudvmm.engine.qemu.fact import QemuFacts

_ELF_MAGIC: Final = b"\x7fELF"


def payload_arguments(payload: PayloadConfig | None, facts: QemuFacts, *, firmware_is_elf: bool) -> list[str]:
    """Return the options for what the machine starts; without a payload only the small firmware.

    An ELF firmware is a PVH program, such as the Rust hypervisor firmware, and starts as a kernel does.
    Paths are made absolute, since QEMU runs in a folder of its own.
    """
    if payload is None:
        return _small_firmware(facts)
    if payload.firmware is not None:
        if firmware_is_elf:
            return [*_small_firmware(facts), "-kernel", _absolute(payload.firmware)]
        return ["-bios", _absolute(payload.firmware)]
    arguments = _small_firmware(facts)
    if payload.kernel is not None:
        arguments += ["-kernel", _absolute(payload.kernel)]
        if payload.initramfs is not None:
            arguments += ["-initrd", _absolute(payload.initramfs)]
        if payload.cmdline is not None:
            arguments += ["-append", payload.cmdline]
    return arguments


def is_elf(path: str) -> bool:
    """Say whether the file `path` is an ELF program.

    :raises PayloadError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(_ELF_MAGIC)) == _ELF_MAGIC
    except (OSError, ValueError) as error:
        raise PayloadError("The firmware could not be read") from error


def _small_firmware(facts: QemuFacts) -> list[str]:
    path = facts.qboot_path or facts.seabios_path
    return [] if path is None else ["-bios", path]


def _absolute(path: str) -> str:
    return os.path.abspath(path)
