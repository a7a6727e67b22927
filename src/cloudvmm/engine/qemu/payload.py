"""Kernel, initramfs and command line, or firmware."""

from __future__ import annotations

import os
from typing import Final

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import PayloadError
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.platform import has_vmgenid

_ELF_MAGIC: Final = b"\x7fELF"


def starts_by_seabios(vm_config: VmConfig, facts: QemuFacts, *, firmware_is_elf: bool) -> bool:
    """Say whether SeaBIOS starts the guest, which brings no firmware: qboot is missing, or would hang.

    It does with the device of a VM generation id.
    """
    payload = vm_config.payload
    if payload is not None and payload.firmware is not None and not firmware_is_elf:
        return False
    return facts.qboot_path is None or has_vmgenid(vm_config.platform)


def payload_arguments(
    payload: PayloadConfig | None, facts: QemuFacts, *, firmware_is_elf: bool, by_seabios: bool
) -> list[str]:
    """Return the options for what the machine starts; without a payload only the small firmware.

    An ELF firmware is a PVH program, such as the Rust hypervisor firmware, and starts as a kernel does.
    Paths are made absolute, since QEMU runs in a folder of its own.
    """
    if payload is not None and payload.firmware is not None and not firmware_is_elf:
        return ["-bios", _absolute(payload.firmware)]
    small_path = facts.seabios_path if by_seabios else facts.qboot_path
    arguments = [] if small_path is None else ["-bios", small_path]
    if payload is None:
        return arguments
    if payload.firmware is not None:
        return [*arguments, "-kernel", _absolute(payload.firmware)]
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


def _absolute(path: str) -> str:
    return os.path.abspath(path)
