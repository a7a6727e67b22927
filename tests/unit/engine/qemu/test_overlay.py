"""Overlays: what an empty one holds, and disks that all go on in one, or none of them, in a played QEMU."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, ImageLocked, MachineSpec, SinkKind
from cloudvmm.engine.qcow2 import OverlayError, OverlayNotMade, create_overlay
from cloudvmm.engine.qemu.codec import Event
from cloudvmm.engine.qemu.disk import open_disk
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.hotplug import Hotplug
from cloudvmm.engine.qemu.image import open_image
from cloudvmm.engine.qemu.name import below_name, node_name
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.overlay import Freeze, NoOverlay
from cloudvmm.engine.qemu.parts import Command
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.host.lock import LockConflict, lock_file
from support.leak import Holdings

OFF = ConsoleSink(kind=SinkKind.OFF)
LIMIT = RateLimiterConfig(bandwidth=TokenBucketConfig(size=MIB, refill_time=100))


class PlayedQemu:
    """Has a disk of a MiB wherever it is asked, and refuses the command `refuses`."""

    def __init__(self, disk_ids):
        self.commands = []
        self.refuses = None
        self._nodes = [
            {"node-name": node_name(disk_id), "image": {"virtual-size": MIB}} for disk_id in disk_ids
        ]

    def execute(self, command, arguments=None, *, timeout_s=None, fds=()):
        self.commands.append((command, arguments))
        if command == self.refuses:
            raise QmpError(command, "GenericError", "QEMU's words")
        return self._nodes

    def execute_until(self, command, arguments, *, event, timeout_s, is_last):
        self.execute(command, arguments)
        told = Event(event, {"device": arguments["job-id" if "job-id" in arguments else "device"]})
        assert is_last(told)
        return told

    def names(self):
        return [name for name, _ in self.commands]


class Bed:
    """A machine with the disks "one", which is limited, and "two", each with an image of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.disks = {
            "one": DiskConfig(id="one", path=str(folder / "one.raw"), rate_limiter_config=LIMIT),
            "two": DiskConfig(id="two", path=str(folder / "two.raw")),
        }
        for disk in self.disks.values():
            disk.image_type = ImageType.RAW
            with open(disk.path, "wb") as file:
                file.truncate(MIB)
        self.paths = {disk_id: str(folder / f"{disk_id}.qcow2") for disk_id in self.disks}
        self.qemu = PlayedQemu(self.disks)
        vm_config = VmConfig(memory=MemoryConfig(size=128 * MIB), disks=list(self.disks.values()))
        self.resources = Resources(memory=memory_of(vm_config))
        for disk in self.disks.values():
            self.resources.hold(open_disk(disk))
        self.resources.lock_images()
        spec = MachineSpec(
            vm_config=VmConfig(memory=vm_config.memory), slots={"__rng": 2}, serial=OFF, console=OFF,
            debug_console=OFF,
        )  # fmt: skip
        empty = Resources(memory=memory_of(vm_config))
        self.hotplug = Hotplug(spec, empty, self.qemu, QemuFacts(binary="/qemu", version=(10, 0, 2)))
        for disk_id in self.disks:
            self.hotplug._remains[disk_id] = [Command("blockdev-del", {"node-name": node_name(disk_id)})]

    def freeze(self):
        return Freeze(
            self.paths, self.disks, control=self.qemu, hotplug=self.hotplug, resources=self.resources
        )

    def can_be_read(self, path):
        with open(path, "rb") as file:
            try:
                lock_file(file.fileno(), path=str(path), write=False)
            except LockConflict:
                return False
            return True


@pytest.fixture
def bed(tmp_path):
    bed = Bed(tmp_path)
    yield bed
    bed.resources.close()


@pytest.mark.parametrize("size_bytes", [512, MIB + 512, 512 * MIB, 512 * MIB + 512, 5 << 40])
def test_empty_overlay_is_one_to_us_and_to_qemu(tmp_path, size_bytes):
    base, path = tmp_path / "base", tmp_path / "overlay"
    with base.open("wb") as file:
        file.truncate(size_bytes)
    create_overlay(str(path), base_path=str(base), base_type=ImageType.RAW, size_bytes=size_bytes)
    image = open_image(
        str(path), readonly=False, direct=False, image_type=ImageType.QCOW2, backing_files=True
    )
    assert image.base is not None
    assert (image.base.path, image.base.image_type) == (str(base), ImageType.RAW)
    image.close()
    if shutil.which("qemu-img"):
        done = subprocess.run(["qemu-img", "check", path], capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr


def test_file_that_is_there_is_not_replaced(tmp_path):
    path = tmp_path / "overlay"
    path.write_text("mine")
    with pytest.raises(OverlayNotMade):
        create_overlay(str(path), base_path="/base", base_type=ImageType.RAW, size_bytes=MIB)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "members", [{"base_type": ImageType.FIXED_VHD}, {"size_bytes": -1 << 70}, {"base_path": "/\udc80"}]
)
def test_base_that_cannot_be_named_leaves_no_file(tmp_path, members):
    path = tmp_path / "overlay"
    known = {"base_path": "/base", "base_type": ImageType.RAW, "size_bytes": MIB}
    with pytest.raises(OverlayNotMade):
        create_overlay(str(path), **{**known, **members})
    assert not path.exists()


def test_disks_are_switched_by_one_transaction_and_their_images_can_be_read(bed):
    assert not bed.can_be_read(bed.disks["two"].path)
    freeze = bed.freeze()
    assert "transaction" not in bed.qemu.names()
    frozen = freeze.switch()
    (transaction,) = (arguments for name, arguments in bed.qemu.commands if name == "transaction")
    nodes = [action["data"]["node"] for action in transaction["actions"]]
    assert nodes == [below_name("one"), node_name("two")]
    assert [each.base_path for each in frozen] == [disk.path for disk in bed.disks.values()]
    for disk in bed.disks.values():
        assert bed.can_be_read(disk.path)
    for path in bed.paths.values():
        assert not bed.can_be_read(path)


def test_disks_can_be_switched_once_more(bed):
    bed.freeze().switch()
    bed.paths = {disk_id: f"{path}-2" for disk_id, path in bed.paths.items()}
    frozen = bed.freeze().switch()
    assert [each.base_path for each in frozen] == [path.removesuffix("-2") for path in bed.paths.values()]
    assert {each.base_type for each in frozen} == {ImageType.QCOW2}


@pytest.mark.parametrize("refused", ["add-fd", "blockdev-add", "transaction"])
def test_what_qemu_refuses_leaves_nothing(bed, refused):
    before = Holdings()
    bed.qemu.refuses = refused

    def switch():
        freeze = bed.freeze()
        try:
            freeze.switch()
        finally:
            freeze.undo()

    with pytest.raises(OverlayError, match="QEMU's words"):
        switch()
    assert sorted(path.name for path in bed.folder.iterdir()) == ["one.raw", "two.raw"]
    assert not bed.can_be_read(bed.disks["two"].path)
    before.assert_nothing_added()


def test_disk_without_an_image_of_ours_is_refused_before_anything_is_made(bed):
    bed.paths = {"two": bed.paths["two"], "three": str(bed.folder / "three.qcow2")}
    with pytest.raises(NoOverlay, match="three"):
        bed.freeze()
    assert bed.qemu.commands == []


def test_overlay_goes_before_its_base_but_after_a_filter(bed):
    def nodes(disk_id):
        commands = bed.hotplug.remains_of(disk_id)
        return [each.arguments["node-name"] for each in commands if each.name == "blockdev-del"]

    bed.freeze().switch()
    overlays = {disk_id: bed.resources.backings[disk_id].image_node for disk_id in bed.disks}
    assert nodes("one") == [node_name("one"), overlays["one"]]
    assert nodes("two") == [overlays["two"], node_name("two")]


def test_overlay_is_written_to_the_image_right_below_alone(bed):
    bed.freeze().switch()
    below = {disk_id: bed.resources.backings[disk_id].image_node for disk_id in bed.disks}
    first_paths, bed.paths = bed.paths, {disk_id: f"{path}-2" for disk_id, path in bed.paths.items()}
    freeze = bed.freeze()
    freeze.switch()
    freeze.rejoin()
    commits = [arguments for name, arguments in bed.qemu.commands if name == "block-commit"]
    assert sorted(each["base-node"] for each in commits) == sorted(below.values())
    assert {disk_id: bed.resources.backings[disk_id].image_node for disk_id in bed.disks} == below
    assert {disk_id: bed.resources.backings[disk_id].image.path for disk_id in bed.disks} == first_paths


def test_image_that_another_reads_is_not_written_again(bed):
    freeze = bed.freeze()
    freeze.switch()
    with open(bed.disks["two"].path, "rb") as file:
        lock_file(file.fileno(), path=file.name, write=False)
        with pytest.raises(ImageLocked):
            freeze.rejoin()
    assert "block-commit" not in bed.qemu.names()
    assert [image.readonly for image in bed.resources.backings["two"].image.chain()] == [False, True]
    assert bed.can_be_read(bed.disks["two"].path)
    freeze.rejoin()
    assert not bed.can_be_read(bed.disks["two"].path)


def test_image_that_qemu_does_not_write_again_can_be_read_on(bed):
    freeze = bed.freeze()
    freeze.switch()
    bed.qemu.refuses = "block-commit"
    with pytest.raises(OverlayError, match="QEMU's words"):
        freeze.rejoin()
    for disk in bed.disks.values():
        assert bed.can_be_read(disk.path)


def test_image_that_qemu_may_write_is_not_removed(bed):
    freeze = bed.freeze()
    bed.qemu.refuses = "blockdev-del"
    freeze.undo()
    assert sorted(path.name for path in bed.folder.glob("*.qcow2")) == ["one.qcow2", "two.qcow2"]


def test_disk_whose_image_was_moved_away_is_refused_and_nothing_is_left(bed):
    path = bed.folder / "two.raw"
    path.rename(bed.folder / "moved")
    path.write_bytes(bytes(MIB))
    with pytest.raises(NoOverlay, match="another file"):
        bed.freeze()
    assert list(bed.folder.glob("*.qcow2")) == []
