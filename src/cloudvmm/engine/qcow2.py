"""Empty qcow2 images on others: what an overlay is before anything was written to it."""

from __future__ import annotations

import os
from typing import Final

from cloudvmm.config.disk import ImageType
from cloudvmm.engine.base import DeviceError, FrozenDisk
from cloudvmm.engine.image import QCOW2_MAGIC, SECTOR_BYTES

BASE_FORMATS: Final = {ImageType.RAW: "raw", ImageType.QCOW2: "qcow2", ImageType.VHDX: "vhdx"}
"""What the image below may be, and how it is called there."""
MAX_NAME_BYTES: Final = 1023

_CLUSTER_BITS: Final = 16
_CLUSTER: Final = 1 << _CLUSTER_BITS
_ENTRY_BYTES: Final = 8
_MAPPED_BY_L1_ENTRY: Final = _CLUSTER // _ENTRY_BYTES * _CLUSTER
_REFCOUNT_ORDER: Final = 4  # 16 bits each
_HEADER_BYTES: Final = 104
_BASE_FORMAT: Final = 0xE2792ACA


class OverlayError(DeviceError):
    """Root of why a disk cannot go on in an overlay"""


class OverlayNotMade(OverlayError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The overlay {path} could not be made")


def create_overlay(path: str, base: FrozenDisk) -> None:
    """Blocking. Make an empty qcow2 image at `path`, a new file, on the image of `base`, as large as that.

    :raises OverlayNotMade: the system refused, or no image can name such a base; then there is none.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        raise OverlayNotMade(path) from error
    try:
        content, end = _empty_image(
            os.path.abspath(base.path), BASE_FORMATS[base.image_type], base.size_bytes
        )
        for offset, piece in content.items():
            os.pwrite(fd, piece, offset)
        os.ftruncate(fd, end)
    except (OSError, KeyError, OverflowError, UnicodeEncodeError) as error:
        os.unlink(path)
        raise OverlayNotMade(path) from error
    finally:
        os.close(fd)


def _empty_image(base_path: str, base_format: str, size_bytes: int) -> tuple[dict[int, bytes], int]:
    """Return what an empty qcow2 image holds, by offset, and where it ends.

    One cluster each for the header, the refcount table and a block of it, then the L1 table, all zeroes.
    """
    size_bytes = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
    l1_entries = max(1, -(-size_bytes // _MAPPED_BY_L1_ENTRY))
    l1_clusters = -(-l1_entries * _ENTRY_BYTES // _CLUSTER)
    clusters = 3 + l1_clusters
    name = base_path.encode()
    extension = _field(_BASE_FORMAT, 4) + _field(len(base_format), 4) + base_format.encode().ljust(8, b"\0")
    extension += bytes(8)  # the end of extensions
    header = QCOW2_MAGIC + b"".join(
        _field(value, length)
        for value, length in (
            (3, 4),  # version
            (_HEADER_BYTES + len(extension), 8),  # where the base's name is
            (len(name), 4),
            (_CLUSTER_BITS, 4),
            (size_bytes, 8),
            (0, 4),  # no encryption
            (l1_entries, 4),
            (3 * _CLUSTER, 8),
            (_CLUSTER, 8),  # refcount table
            (1, 4),  # its clusters
            (0, 4),  # snapshots
            (0, 8),
            (0, 8),  # incompatible features
            (0, 8),  # compatible ones
            (0, 8),  # autoclear ones
            (_REFCOUNT_ORDER, 4),
            (_HEADER_BYTES, 4),
        )
    )
    content = {
        0: header + extension + name,
        _CLUSTER: _field(2 * _CLUSTER, 8),
        2 * _CLUSTER: _field(1, 2) * clusters,
    }
    return content, clusters * _CLUSTER


def _field(value: int, length: int) -> bytes:
    return value.to_bytes(length, "big")
