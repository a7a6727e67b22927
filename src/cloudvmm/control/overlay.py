"""Disks that go on in new images: where those are, and what the configuration says of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Final

import msgspec

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import FrozenDisk
from cloudvmm.engine.qcow2 import create_overlay
from cloudvmm.errors import VmmError

_MAX_NUMBER: Final = 1_000_000


class NoOverlayDirectory(VmmError):
    def __init__(self, path: str) -> None:
        super().__init__(f"There is no directory {path!r} for new disk images")


class FrozenDisksNeedOverlays(VmmError):
    def __init__(self, disk_ids: list[str]) -> None:
        super().__init__(
            f"The snapshot stands on images that must stay as they are, of the disks {', '.join(disk_ids)}:"
            " give an overlay_directory, or override their paths"
        )


def written_disks(vm_config: VmConfig) -> list[DiskConfig]:
    """Return the disks that the guest can write."""
    return [disk for disk in vm_config.disks or () if not disk.readonly]


def free_paths(directory: str, disk_ids: list[str]) -> dict[str, str]:
    """Blocking. Return paths in `directory` where there is nothing yet, by the ids of disks.

    :raises NoOverlayDirectory: there is no such directory.
    """
    with contextlib.suppress(ValueError):  # a NUL in it
        for number in range(_MAX_NUMBER) if os.path.isdir(directory) else ():
            folder = os.path.abspath(directory)
            paths = {
                disk_id: f"{folder}/disk{place}-{number}.qcow2" for place, disk_id in enumerate(disk_ids)
            }
            if not any(map(os.path.lexists, paths.values())):
                return paths
    raise NoOverlayDirectory(directory)


def on_overlays(vm_config: VmConfig, overlays: Mapping[str, str]) -> VmConfig:
    """Return `vm_config` with the disks of these ids in the images at those paths."""
    disks = []
    for disk in vm_config.disks or ():
        path = overlays.get(disk.id or "")
        if path is not None:
            disk = msgspec.structs.replace(disk, path=path, image_type=ImageType.QCOW2, backing_files=True)
        disks.append(disk)
    return msgspec.structs.replace(vm_config, disks=disks) if overlays else vm_config


def make_overlays(
    vm_config: VmConfig, frozen: Mapping[str, FrozenDisk], directory: str | msgspec.UnsetType
) -> dict[str, str]:
    """Blocking. Make a new image for each disk of `vm_config` that is still in a frozen one.

    Return their paths, by disk id; they are the caller's to remove. On failure none is left.

    :raises FrozenDisksNeedOverlays: there is such a disk, and no directory.
    :raises NoOverlayDirectory: there is no such directory.
    :raises EngineError: one cannot be made.
    """
    stuck = [
        disk.id
        for disk in written_disks(vm_config)
        if disk.id is not None and disk.id in frozen and _is_at(disk, frozen[disk.id].path)
    ]
    if not stuck:
        return {}
    if directory is msgspec.UNSET:
        raise FrozenDisksNeedOverlays(stuck)
    paths = free_paths(directory, stuck)
    with contextlib.ExitStack() as undo:
        for disk_id, path in paths.items():
            create_overlay(path, frozen[disk_id])
            undo.callback(os.unlink, path)
        undo.pop_all()
    return paths


def remove_overlays(overlays: Mapping[str, str]) -> None:
    """Blocking. Remove what `make_overlays` made."""
    for path in overlays.values():
        with contextlib.suppress(OSError):
            os.unlink(path)


def _is_at(disk: DiskConfig, path: str) -> bool:
    if disk.path is None:
        return False
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(disk.path, path)
    return os.path.abspath(disk.path) == path
