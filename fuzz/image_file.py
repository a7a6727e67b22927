"""Fuzz what is read of the files that a guest, or who made its image, may have written: images and kernels.

The first line of an image says what it was declared as. What must hold: it is opened, or refused with a
DeviceError; what was opened is closed by `close`; an image that was not declared names no other file; of a
flat VMDK every extent lies within its file; a kernel is taken or refused with a PayloadError.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path

from cloudvmm.config.disk import ImageType
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.base import DeviceError, PayloadError
from cloudvmm.engine.image import SECTOR_BYTES, detect
from cloudvmm.engine.qemu.image import open_image
from cloudvmm.engine.qemu.kernel import check_payload
from cloudvmm.engine.vmdk import flat_extents
from named import named_target, words_of
from runner import main

_HOME = tempfile.TemporaryDirectory(prefix="fuzz-")
_FOLDER = Path(_HOME.name)
_IMAGE = _FOLDER / "image"
_BASE = _FOLDER / "base"
_BASE_BYTES = 64 * SECTOR_BYTES
_BASE.write_bytes(bytes(_BASE_BYTES))


def _declared(image_type: ImageType, *, readonly: bool = False) -> Callable[[bytes], Hashable]:
    def check(raw: bytes) -> Hashable:
        _IMAGE.write_bytes(raw)
        before = os.listdir("/proc/self/fd")
        try:
            return _opened(image_type, readonly=readonly)
        except DeviceError as error:
            return words_of(error)
        finally:
            assert os.listdir("/proc/self/fd") == before, "a descriptor is left"
            assert _IMAGE.read_bytes() == raw, "looking has changed it"

    return check


def _opened(image_type: ImageType, *, readonly: bool) -> Hashable:
    image = open_image(
        str(_IMAGE), readonly=readonly, direct=False, image_type=image_type, backing_files=True
    )
    try:
        if image_type is ImageType.UNKNOWN:
            assert image.base is None and image.extents is None, "an image that nobody declared names files"
        if image.data_bytes is not None:
            assert 0 <= image.data_bytes <= image.size_bytes
        assert all(each.readonly for each in image.chain()[1:]), "what is below can be written to"
        assert len(set(image.fds())) == len(image.fds())
        return image.image_type.value, len(image.chain()), image.extents is not None
    finally:
        image.close()
        image.close()


def _text(raw: bytes) -> Hashable:
    try:
        found = flat_extents(raw.decode())
    except UnicodeDecodeError:
        return "no text"
    for extent in found or ():
        assert 0 <= extent.sectors < 2**64 and 0 <= extent.offset < 2**64 and "\n" not in extent.name
    return None if found is None else tuple(extent.access for extent in found[:3])


def _detected(raw: bytes) -> Hashable:
    """The size that is told of it may be any."""
    _IMAGE.write_bytes(raw)
    fd = os.open(_IMAGE, os.O_RDONLY)
    try:
        return detect(fd, int.from_bytes(raw[-8:]) % (1 << 62)).value
    except DeviceError as error:
        return words_of(error)
    finally:
        os.close(fd)


def _payload(member: str) -> Callable[[bytes], Hashable]:
    def check(raw: bytes) -> Hashable:
        _IMAGE.write_bytes(raw)
        try:
            check_payload(PayloadConfig(**{member: str(_IMAGE)}))
        except PayloadError as error:
            return words_of(error)
        return "taken"

    return check


TARGET = named_target(
    "image_file",
    {
        "unknown": _declared(ImageType.UNKNOWN),
        "raw": _declared(ImageType.RAW),
        "qcow2": _declared(ImageType.QCOW2),
        "vmdk": _declared(ImageType.FLAT_VMDK),
        "vmdk-readonly": _declared(ImageType.FLAT_VMDK, readonly=True),
        "vhd": _declared(ImageType.FIXED_VHD),
        "vhdx": _declared(ImageType.VHDX),
        "text": _text,
        "detected": _detected,
        "kernel": _payload("kernel"),
        "firmware": _payload("firmware"),
    },
    words=(
        *(b"QFI\xfb\0\0\0\3", b"QFI\xfb\0\0\0\2", b"conectix", b"vhdxfile", b"# Disk DescriptorFile\n"),
        *(b"# Extent description\n", b"# The Disk Data Base\n", b'createType="monolithicFlat"\n', b"#DDB"),
        *(b'RW 4 FLAT "base" 0\n', b'RDONLY 4 FLAT "base" 8\n', b'NOACCESS 4 FLAT "base"\n', b"base"),
        *(b'RW 4 FLAT "image" 0\n', b"\xe2\x79\x2a\xca\0\0\0\5qcow2\0\0\0", b"\xe2\x79\x2a\xca\0\0\0\3raw"),
        *(b"\x7fELF\2\1\1", b"\x7fELF\1\1\1", b"HdrS", b"Xen\0", bytes(64), b"\xff" * 8),
    ),
    share=0.06,
)

if __name__ == "__main__":
    main(TARGET)
