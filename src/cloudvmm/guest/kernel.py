"""Take the uncompressed kernel out of a bzImage, so that a loader can start it by its PVH entry.

Only the container is read here (Linux' x86 boot protocol, `Documentation/arch/x86/boot.rst`); the
ELF file inside is not changed.
"""

from __future__ import annotations

import lzma
import struct
import zlib

from cloudvmm.guest.error import KernelImageError
from cloudvmm.guest.tool import run_tool

_SETUP_SECTORS = 0x1F1
_BOOT_MAGIC = 0x202
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Return the ELF file inside `bzimage`. Blocks for about a second.

    :raises KernelImageError: when `bzimage` is no bzImage, or its compression is unknown.
    :raises ToolMissing: when the kernel is packed with lz4 or zstd and that program is missing.
    """
    vmlinux = _unpack(_payload(bzimage))
    if not vmlinux.startswith(b"\x7fELF"):
        raise KernelImageError("The kernel inside the bzImage is not an ELF file")
    return vmlinux


def _payload(bzimage: bytes) -> bytes:
    if len(bzimage) < 0x260 or bzimage[_BOOT_MAGIC : _BOOT_MAGIC + 4] != b"HdrS":
        raise KernelImageError("The file is not a Linux bzImage")
    setup_sectors = bzimage[_SETUP_SECTORS] or 4
    (offset,) = struct.unpack_from("<I", bzimage, _PAYLOAD_OFFSET)
    (length,) = struct.unpack_from("<I", bzimage, _PAYLOAD_LENGTH)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or length < 8:
        raise KernelImageError("The bzImage is cut short")
    return payload


def _unpack(payload: bytes) -> bytes:
    # The kernel's build appends the uncompressed length (4 bytes) to all but gzip, whose own
    # trailer is that length.
    try:
        match payload[:2]:
            case b"\x1f\x8b":
                return zlib.decompressobj(wbits=31).decompress(payload)
            case b"\xfd7":
                return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
            case b"\x02\x21":
                return run_tool(["lz4", "-dc"], package="lz4", stdin=payload[:-4])
            case b"\x28\xb5":
                return run_tool(["zstd", "-dcq"], package="zstd", stdin=payload[:-4])
            case _:
                pass
    except (zlib.error, lzma.LZMAError) as error:
        raise KernelImageError("The kernel inside the bzImage does not unpack") from error
    raise KernelImageError(f"The kernel is packed in an unknown way (it starts with {payload[:4].hex()})")
