"""Which files can be started as a payload."""

from __future__ import annotations

import os
import struct

import pytest

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.base import PayloadError
from cloudvmm.engine.qemu.kernel import (
    FirmwareInvalid,
    FirmwareUnreadable,
    InitramfsUnreadable,
    KernelInvalid,
    KernelLacksPvh,
    KernelUnreadable,
    NoPayload,
    check_payload,
)
from cloudvmm.errors import error_chain, error_code

OTHER_NOTE = struct.pack("<III", 4, 3, 3) + b"GNU\0" + b"abc\0"
PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", 0x1000000)


def elf64(notes: bytes) -> bytes:
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 2)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0)
    note = struct.pack("<IIQQQQQQ", 4, 4, 64 + 112, 0, 0, len(notes), len(notes), 4)
    return bytes(header) + load + note + notes


def elf32(notes: bytes) -> bytes:
    header = bytearray(52)
    header[:6] = b"\x7fELF\x01\x01"
    struct.pack_into("<I", header, 28, 52)
    struct.pack_into("<HH", header, 42, 32, 1)
    note = struct.pack("<IIIIIIII", 4, 52 + 32, 0, 0, len(notes), len(notes), 4, 4)
    return bytes(header) + note + notes


def bz_image() -> bytes:
    return bytes(0x202) + b"HdrS" + bytes(1024)


@pytest.fixture
def file_with(tmp_path):
    def make(content: bytes, name: str = "payload") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return make


@pytest.mark.parametrize(
    "content", [elf64(OTHER_NOTE + PVH_NOTE), elf32(PVH_NOTE), bz_image()], ids=["elf64", "elf32", "bzImage"]
)
def test_kernel_that_can_be_started(file_with, content):
    check_payload(PayloadConfig(kernel=file_with(content), initramfs=file_with(b"cpio", "initramfs")))


@pytest.mark.parametrize("content", [elf64(PVH_NOTE), bytes(128 * 1024)], ids=["elf", "image"])
def test_firmware_that_can_be_started(file_with, content):
    check_payload(PayloadConfig(firmware=file_with(content)))


@pytest.mark.parametrize("payload", [None, PayloadConfig(), PayloadConfig(initramfs="/x")])
def test_nothing_to_start(payload):
    with pytest.raises(NoPayload):
        check_payload(payload)


@pytest.mark.parametrize("content", [b"", b"kernel", bytes(4096), bz_image()[:0x204]])
def test_file_that_is_no_kernel(file_with, content):
    with pytest.raises(KernelInvalid) as caught:
        check_payload(PayloadConfig(kernel=file_with(content)))
    assert error_chain(caught.value) == [
        "Cannot load the kernel into memory",
        "Kernel Loader: failed to load bzImage kernel image: Kernel Loader: Invalid bzImage",
        "Kernel Loader: Invalid bzImage",
    ]
    assert error_code(caught.value) == "KernelInvalid"


@pytest.mark.parametrize(
    "content",
    [
        elf64(OTHER_NOTE),
        elf64(PVH_NOTE)[:100],
        elf64(PVH_NOTE)[:-16],
        b"\x7fELF",
        b"\x7fELF\x02" + b"\xff" * 80,
        elf64(struct.pack("<III", 2**32 - 1, 2**32 - 1, 18)),
    ],
)
def test_elf_program_without_pvh_entry(file_with, content):
    with pytest.raises(KernelLacksPvh, match="^Kernel lacks PVH header$"):
        check_payload(PayloadConfig(kernel=file_with(content)))


@pytest.mark.parametrize("content", [b"", b"x" * 1000])
def test_file_that_is_no_firmware(file_with, content):
    with pytest.raises(FirmwareInvalid):
        check_payload(PayloadConfig(firmware=file_with(content)))


def test_files_that_are_missing_have_the_reason_as_cause(file_with):
    kernel = file_with(bz_image())
    refusals = {
        KernelUnreadable: PayloadConfig(kernel="/nowhere"),
        InitramfsUnreadable: PayloadConfig(kernel=kernel, initramfs="/nowhere"),
        FirmwareUnreadable: PayloadConfig(firmware="/nowhere"),
    }

    for kind, payload in refusals.items():
        with pytest.raises(kind) as caught:
            check_payload(payload)
        assert isinstance(caught.value, PayloadError)
        assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_folders_pipes_and_impossible_paths_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    for path in (str(tmp_path), str(tmp_path / "pipe"), "nul\0character"):
        with pytest.raises(KernelUnreadable):
            check_payload(PayloadConfig(kernel=path))
