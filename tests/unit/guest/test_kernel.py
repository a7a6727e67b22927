"""Taking the ELF kernel out of a bzImage, for each way that a kernel is packed."""

import gzip
import lzma
import shutil
import struct
import subprocess

import pytest

from cloudvmm.guest.error import KernelImageError, ToolFailed
from cloudvmm.guest.kernel import extract_vmlinux

VMLINUX = b"\x7fELF" + bytes(range(256)) * 64


def bzimage(payload: bytes, *, setup_sectors: int = 3, offset: int = 0x80) -> bytes:
    """Make a boot header that points to `payload`, as the boot protocol lays it out."""
    start = (setup_sectors + 1) * 512 + offset
    image = bytearray(start) + payload + b"trailing bytes"
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, offset, len(payload))
    return bytes(image)


def with_length(packed: bytes) -> bytes:
    return packed + struct.pack("<I", len(VMLINUX))


def pack(program: list[str]) -> bytes:
    return subprocess.run(program, input=VMLINUX, capture_output=True, check=True).stdout


def test_gzip_kernel_comes_out_whole():
    assert extract_vmlinux(bzimage(gzip.compress(VMLINUX))) == VMLINUX


def test_xz_kernel_comes_out_whole():
    assert extract_vmlinux(bzimage(with_length(lzma.compress(VMLINUX)))) == VMLINUX


@pytest.mark.skipif(shutil.which("lz4") is None, reason="needs the program lz4")
def test_lz4_kernel_comes_out_whole():
    # -l: the legacy frame, which the kernel's build uses.
    assert extract_vmlinux(bzimage(with_length(pack(["lz4", "-l", "-c"])))) == VMLINUX


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd")
def test_zstd_kernel_comes_out_whole():
    assert extract_vmlinux(bzimage(with_length(pack(["zstd", "-q", "-c"])))) == VMLINUX


def test_zero_setup_sectors_mean_four():
    image = bytearray(bzimage(gzip.compress(VMLINUX), setup_sectors=4))
    image[0x1F1] = 0

    assert extract_vmlinux(bytes(image)) == VMLINUX


@pytest.mark.parametrize("image", [b"", b"\0" * 4096, b"\x7fELF" + b"\0" * 4096])
def test_file_that_is_no_bzimage_is_refused(image):
    with pytest.raises(KernelImageError, match="not a Linux bzImage"):
        extract_vmlinux(image)


def test_bzimage_cut_short_is_refused():
    with pytest.raises(KernelImageError, match="cut short"):
        extract_vmlinux(bzimage(gzip.compress(VMLINUX))[:-64])


def test_unknown_packing_is_refused_with_its_first_bytes():
    with pytest.raises(KernelImageError, match="425a6839"):
        extract_vmlinux(bzimage(b"BZh9" + b"\0" * 64))


def test_damaged_payload_is_refused():
    packed = bytearray(gzip.compress(VMLINUX))
    packed[15] ^= 0xFF

    with pytest.raises(KernelImageError, match=r"does not unpack|not an ELF file"):
        extract_vmlinux(bzimage(bytes(packed)))


@pytest.mark.skipif(shutil.which("lz4") is None, reason="needs the program lz4")
def test_damaged_lz4_payload_is_refused_in_the_programs_words():
    with pytest.raises(ToolFailed, match="lz4 ended with status"):
        extract_vmlinux(bzimage(b"\x02\x21\x4c\x18\xff\xff\xff\x7f" + b"\0" * 64))


def test_payload_that_is_no_elf_is_refused():
    with pytest.raises(KernelImageError, match="not an ELF file"):
        extract_vmlinux(bzimage(gzip.compress(b"MZ" * 64)))
