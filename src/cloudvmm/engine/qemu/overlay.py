"""Disks that go on in overlays: each gets a new qcow2 image, and what it had until now is frozen below.

`Freeze` switches disks of a machine, all of them at one point of time, whether its guest runs or stands
still. From then on their images are only read, with locks that let others read them, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.engine.base import EngineError, EngineTimeout, FrozenDisk, MachineGone
from cloudvmm.engine.qcow2 import BASE_FORMATS, MAX_NAME_BYTES, OverlayError, create_overlay
from cloudvmm.engine.qemu.commit import Commit, CommitFailed
from cloudvmm.engine.qemu.disk import DiskBacking, overlay_node
from cloudvmm.engine.qemu.hotplug import Hotplug
from cloudvmm.engine.qemu.image import Image, open_image
from cloudvmm.engine.qemu.name import node_name, overlay_name
from cloudvmm.engine.qemu.parts import FdSet
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.engine.qemu.rate_limit import limiter_id
from cloudvmm.engine.qemu.resource import Resources

_TIMEOUT_S: Final = 60.0  # what the disks have under way is finished first
_BLOCK_BYTES: Final = 512


class NoOverlay(OverlayError):
    def __init__(self, disk_id: str, *, reason: str) -> None:
        super().__init__(f"The disk {disk_id} cannot go on in an overlay: {reason}")


class SwitchFailed(OverlayError):
    """The disks could not be switched to overlays; the text is QEMU's own words."""


class SwitchUnknown(OverlayError):
    def __init__(self, paths: Iterable[str]) -> None:
        names = ", ".join(paths)
        super().__init__(f"QEMU does not say whether the disks go on in {names}: delete the VM")


class NotRejoined(OverlayError):
    def __init__(self, disk_id: str, path: str) -> None:
        super().__init__(f"The disk {disk_id} goes on in {path}")


def check_overlay(disk_id: str, image: Image) -> None:
    """:raises NoOverlay: `image` cannot be below an overlay."""
    if image.image_type not in BASE_FORMATS:
        raise NoOverlay(disk_id, reason=f"no overlay can name an image of type {image.image_type.value}")
    if image.readonly:
        raise NoOverlay(disk_id, reason="it is read-only")
    try:
        name = os.path.abspath(image.path).encode()
    except UnicodeEncodeError:
        raise NoOverlay(disk_id, reason="the path of its image is not UTF-8") from None
    if len(name) > MAX_NAME_BYTES:
        raise NoOverlay(disk_id, reason="the path of its image is too long")


def frozen_disks(disk_ids: Iterable[str], *, hotplug: Hotplug, resources: Resources) -> dict[str, FrozenDisk]:
    """Blocking. Return what a `Freeze` would have be read only.

    :raises OverlayError: a disk cannot go on in an overlay.
    """
    images = {disk_id: _backing(resources, disk_id).image for disk_id in disk_ids}
    for disk_id, image in images.items():
        check_overlay(disk_id, image)
    sizes = hotplug.disk_sizes(images)
    return {
        disk_id: FrozenDisk(
            path=os.path.abspath(image.path), image_type=image.image_type, size_bytes=sizes[disk_id]
        )
        for disk_id, image in images.items()
    }


class Freeze:
    """Overlays that QEMU has open, and that are above nothing yet; `switch` or `undo` ends that.

    `bases` are what the disks have until then, by their ids.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        disks: Mapping[str, DiskConfig],
        *,
        control: QmpClient,
        hotplug: Hotplug,
        resources: Resources,
    ) -> None:
        """Blocking. Make new images at `paths`, by the ids of the disks that are to go on there.

        `disks` are their configurations. The guest may run.

        :raises OverlayError: it cannot be; nothing has changed, and no file is left.
        """
        self.bases = frozen_disks(paths, hotplug=hotplug, resources=resources)
        self._control = control
        self._undo = contextlib.ExitStack()
        self._overlays: list[_Overlay] = []
        with contextlib.ExitStack() as undo:
            for disk_id, path in paths.items():
                overlay = _Overlay(
                    disk_id,
                    path,
                    self.bases[disk_id],
                    disks[disk_id],
                    _backing(resources, disk_id),
                    hotplug,
                    control,
                    undo,
                )
                self._overlays.append(overlay)
            self._undo = undo.pop_all()

    def switch(self) -> None:
        """Blocking. Let the disks go on in their overlays, all at one point of time, or none of them.

        QEMU must be allowed to write their images now: it is not while a migration has them inactive.

        :raises OverlayError: they cannot; call `undo`.
        :raises EngineTimeout: the same; it took too long.
        :raises SwitchUnknown: QEMU has not said what came of it; call `undo`, which leaves what is in use.
        """
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": overlay.base_node, "overlay": overlay.node}}
            for overlay in self._overlays
        ]
        if actions:
            try:
                with _in_its_words():
                    self._control.execute("transaction", {"actions": actions}, timeout_s=_TIMEOUT_S)
            except EngineTimeout:
                if not self._are_in_use():
                    raise
        self._undo.pop_all()
        for overlay in self._overlays:
            overlay.settle()

    def rejoin(self) -> None:
        """Blocking. Write what is in the overlays to the images below, which the disks go on in; remove them.

        :raises NotRejoined: it cannot be; this disk, and perhaps others, go on in their overlays.
        :raises ImageLocked: another process reads an image that would be written again; its disk stays.
        """
        while self._overlays:
            self._overlays[-1].rejoin()
            self._overlays.pop()

    def undo(self) -> None:
        """Blocking. Take everything back, unless the disks have been switched. Idempotent.

        An image that QEMU does not give back stays: the guest may be writing to it.
        """
        self._undo.close()

    def _are_in_use(self) -> bool:
        """Say whether disks go on in the overlays, where QEMU did not say so in time.

        It answers in order: when it says what it has, it has carried out or refused what it was asked before.
        """
        try:
            tops = self._control.execute("query-blockstats", timeout_s=_TIMEOUT_S)
        except EngineTimeout:
            raise SwitchUnknown(overlay.path for overlay in self._overlays) from None
        in_use = {name for top in tops for name in _chain(top)}
        return all(overlay.node in in_use for overlay in self._overlays)


class _Overlay:
    """One of them, at `path` on `base`; `undo` takes it back."""

    def __init__(
        self,
        disk_id: str,
        path: str,
        base: FrozenDisk,
        disk: DiskConfig,
        backing: DiskBacking,
        hotplug: Hotplug,
        control: QmpClient,
        undo: contextlib.ExitStack,
    ) -> None:
        self._disk_id = disk_id
        self.path = path
        self._is_in_use = False
        self._backing = backing
        self._hotplug = hotplug
        self._control = control
        create_overlay(path, base)
        undo.callback(self._unlink)
        self._image = image = _open_image(path, direct=disk.direct)
        undo.callback(image.close)
        _take_off_base(image, disk_id, base_fd=backing.image.fd)
        backing.lock_overlay(image)
        self._fdset = fdset = FdSet(image.fd, hotplug.new_fdset())
        self.node = overlay_name(disk_id, fdset.set_id)
        self.base_node = backing.image_node
        self._root = self.node if limiter_id(disk) is None else node_name(disk_id)
        with _in_its_words():
            control.execute("add-fd", {"fdset-id": fdset.set_id}, fds=[fdset.fd])
            undo.callback(_try, control, "remove-fd", {"fdset-id": fdset.set_id})
            node = overlay_node(disk, image, fdset)
            control.execute("blockdev-add", {"node-name": self.node, **node}, timeout_s=_TIMEOUT_S)
            undo.callback(self._drop_node)

    def settle(self) -> None:
        """QEMU writes the overlay now: keep others from it, and let them read what is below."""
        self._hotplug.note_overlay(self._disk_id, self.node, self._fdset, base_node=self.base_node)
        self._backing.stand_on(self._image, node=self.node)

    def rejoin(self) -> None:
        """Blocking. As that of `Freeze`, for this one."""
        control = self._control
        self._backing.claim_below()
        try:
            with _in_its_words():
                written_bytes = os.fstat(self._image.fd).st_blocks * _BLOCK_BYTES
                commit = Commit(control, self.node, root=self._root, overlay=self.node, base=self.base_node)
                commit.run(written_bytes)
        except (SwitchFailed, CommitFailed) as error:  # after any other error QEMU may go on with it
            self._backing.leave_below()
            raise NotRejoined(self._disk_id, self.path) from error
        _try(control, "blockdev-del", {"node-name": self.node})
        _try(control, "remove-fd", {"fdset-id": self._fdset.set_id})
        self._hotplug.forget_overlay(self._disk_id, self.node, self._fdset.set_id)
        self._backing.stand_below(node=self.base_node)
        self._unlink()

    def _drop_node(self) -> None:
        """Where QEMU does not let go of it, a switch that nobody heard of may have been made all the same."""
        try:
            self._control.execute("blockdev-del", {"node-name": self.node})
        except MachineGone:
            return
        except EngineError:
            self._is_in_use = True

    def _unlink(self) -> None:
        if not self._is_in_use:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _backing(resources: Resources, disk_id: str) -> DiskBacking:
    backing = resources.backings.get(disk_id)
    if not isinstance(backing, DiskBacking):
        raise NoOverlay(disk_id, reason="no image of ours is behind it")
    if not backing.image_node:
        raise NoOverlay(disk_id, reason="QEMU has no name for its image")
    return backing


def _open_image(path: str, *, direct: bool) -> Image:
    return open_image(path, readonly=False, direct=direct, image_type=ImageType.QCOW2, backing_files=True)


def _take_off_base(image: Image, disk_id: str, *, base_fd: int) -> None:
    """Have the overlay alone: what is below is open already, as `base_fd`.

    :raises NoOverlay: whoever opens the overlay would have something else below.
    """
    base, is_same = image.base, False
    if base is not None:
        is_same = os.path.sameopenfile(base.fd, base_fd)
        image.base = None
        base.close()
    if not is_same:
        raise NoOverlay(disk_id, reason="another file is at the path of its image now")


def _chain(top: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the nodes that a disk goes through, from its own on."""
    node: dict[str, Any] | None = top
    while node is not None:
        yield node.get("node-name", "")
        node = node.get("backing")


@contextlib.contextmanager
def _in_its_words() -> Iterator[None]:
    try:
        yield
    except QmpError as error:
        raise SwitchFailed(error.description) from None  # the same words


def _try(control: QmpClient, command: str, arguments: dict[str, object]) -> None:
    with contextlib.suppress(EngineError):
        control.execute(command, arguments)
