"""Overlays: what an empty one holds, and disks that all go on in one, or none of them, in a played QEMU."""

from __future__ import annotations

import shutil
import subprocess

import msgspec
import pytest

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, EngineTimeout, FrozenDisk, ImageLocked, MachineSpec, SinkKind
from cloudvmm.engine.qcow2 import OverlayError, OverlayNotMade, create_overlay
from cloudvmm.engine.qemu import commit
from cloudvmm.engine.qemu.disk import open_disk
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.hotplug import Hotplug
from cloudvmm.engine.qemu.image import open_image
from cloudvmm.engine.qemu.name import below_name, node_name
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.overlay import Freeze, NoOverlay, NotRejoined, SwitchUnknown
from cloudvmm.engine.qemu.parts import Command
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.host.lock import LockConflict, lock_file
from support.leak import Holdings

FROZEN = FrozenDisk(path="/base", image_type=ImageType.RAW, size_bytes=MIB)
OFF = ConsoleSink(kind=SinkKind.OFF)
LIMIT = RateLimiterConfig(bandwidth=TokenBucketConfig(size=MIB, refill_time=100))


class PlayedQemu:
    """Has a disk of a MiB wherever it is asked, and refuses the command `refuses`.

    Those in `silent_at` are not answered in time. `chains` are the nodes of disks. A job goes by `statuses`,
    and stays in the last one.
    """

    def __init__(self, disk_ids):
        self.commands = []
        self.refuses = None
        self.silent_at = ()
        self.chains = []
        self.statuses = [{"status": "running"}, {"status": "ready"}, {"status": "concluded"}]
        self._job = []
        self._nodes = [
            {"node-name": node_name(disk_id), "image": {"virtual-size": MIB}} for disk_id in disk_ids
        ]

    def execute(self, command, arguments=None, *, timeout_s=None, fds=()):
        self.commands.append((command, arguments))
        if command == self.refuses:
            raise QmpError(command, "GenericError", "QEMU's words")
        if command in self.silent_at:
            raise EngineTimeout(command)
        match command:
            case "block-commit":
                self._job = [{"id": arguments["job-id"], **status} for status in self.statuses]
            case "job-cancel":
                self._job = [{**self._job[0], "status": "concluded", "error": "Operation canceled"}]
            case "query-jobs":
                return [self._job.pop(0) if len(self._job) > 1 else self._job[0]]
            case "query-blockstats":
                return [_stats(chain) for chain in self.chains]
        return self._nodes

    def wait_event(self, name, *, timeout_s):
        raise EngineTimeout(name)

    def names(self):
        return [name for name, _ in self.commands]


def _stats(chain):
    node, *below = chain
    return {"node-name": node, **({"backing": _stats(below)} if below else {})}


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

    def overlays(self):
        """Return the nodes that QEMU was told to make, in their order."""
        return [arguments["node-name"] for name, arguments in self.qemu.commands if name == "blockdev-add"]

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
    create_overlay(str(path), FrozenDisk(path=str(base), image_type=ImageType.RAW, size_bytes=size_bytes))
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
        create_overlay(str(path), FROZEN)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "members", [{"image_type": ImageType.FIXED_VHD}, {"size_bytes": -1 << 70}, {"path": "/\udc80"}]
)
def test_base_that_cannot_be_named_leaves_no_file(tmp_path, members):
    path = tmp_path / "overlay"
    with pytest.raises(OverlayNotMade):
        create_overlay(str(path), msgspec.structs.replace(FROZEN, **members))
    assert not path.exists()


def test_disks_are_switched_by_one_transaction_and_their_images_can_be_read(bed):
    assert not bed.can_be_read(bed.disks["two"].path)
    freeze = bed.freeze()
    assert "transaction" not in bed.qemu.names()
    freeze.switch()
    (transaction,) = (arguments for name, arguments in bed.qemu.commands if name == "transaction")
    nodes = [action["data"]["node"] for action in transaction["actions"]]
    assert nodes == [below_name("one"), node_name("two")]
    assert [each.path for each in freeze.bases.values()] == [disk.path for disk in bed.disks.values()]
    for disk in bed.disks.values():
        assert bed.can_be_read(disk.path)
    for path in bed.paths.values():
        assert not bed.can_be_read(path)


def test_disks_can_be_switched_once_more(bed):
    bed.freeze().switch()
    bed.paths = {disk_id: f"{path}-2" for disk_id, path in bed.paths.items()}
    freeze = bed.freeze()
    freeze.switch()
    bases = freeze.bases.values()
    assert [each.path for each in bases] == [path.removesuffix("-2") for path in bed.paths.values()]
    assert {each.image_type for each in bases} == {ImageType.QCOW2}


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
    with pytest.raises(NotRejoined) as caught:
        freeze.rejoin()
    assert str(caught.value.__cause__) == "QEMU's words"
    for disk in bed.disks.values():
        assert bed.can_be_read(disk.path)


def test_overlay_below_a_limit_is_written_for_the_whole_disk(bed):
    """QEMU takes nothing but a disk's own node there."""
    freeze = bed.freeze()
    freeze.switch()
    freeze.rejoin()
    commits = [arguments for name, arguments in bed.qemu.commands if name == "block-commit"]
    tops = {each["base-node"]: (each["device"], each["top-node"]) for each in commits}
    overlay, (device, top) = commits[1]["top-node"], tops[below_name("one")]
    assert (device, top) == (node_name("one"), overlay)
    device, top = tops[node_name("two")]
    assert device == top
    assert list(bed.folder.glob("*.qcow2")) == []


def test_job_that_fails_is_not_waited_for_and_says_where_the_disk_is(bed):
    freeze = bed.freeze()
    freeze.switch()
    bed.qemu.statuses = [{"status": "running"}, {"status": "concluded", "error": "No space left on device"}]
    with pytest.raises(NotRejoined, match="The disk two goes on in .*two.qcow2") as caught:
        freeze.rejoin()
    assert "No space left on device" in str(caught.value.__cause__)
    assert bed.qemu.names()[-1] == "job-dismiss"
    assert bed.can_be_read(bed.disks["two"].path)
    assert not bed.can_be_read(bed.paths["two"])


def test_job_that_takes_too_long_is_called_off(bed, monkeypatch):
    monkeypatch.setattr(commit, "_LEAST_S", 0.05)
    freeze = bed.freeze()
    freeze.switch()
    bed.qemu.statuses = [{"status": "running"}]
    with pytest.raises(NotRejoined) as caught:
        freeze.rejoin()
    assert "not written within" in str(caught.value.__cause__)
    assert bed.qemu.names()[-3:] == ["job-cancel", "query-jobs", "job-dismiss"]
    assert bed.can_be_read(bed.disks["two"].path)


def test_job_that_qemu_may_go_on_with_keeps_others_from_the_image(bed):
    freeze = bed.freeze()
    freeze.switch()
    bed.qemu.silent_at = ("query-jobs",)
    with pytest.raises(EngineTimeout):
        freeze.rejoin()
    assert not bed.can_be_read(bed.disks["two"].path)


def test_switch_that_was_made_late_is_one(bed):
    freeze = bed.freeze()
    bed.qemu.silent_at = ("transaction",)
    bed.qemu.chains = [[node_name("one"), *bed.overlays()[:1], below_name("one")], bed.overlays()[1:]]
    freeze.switch()
    for disk_id, path in bed.paths.items():
        assert bed.resources.backings[disk_id].image.path == path
        assert bed.can_be_read(bed.disks[disk_id].path)
        assert not bed.can_be_read(path)


def test_switch_that_was_not_made_in_time_leaves_nothing(bed):
    freeze = bed.freeze()
    bed.qemu.silent_at = ("transaction",)
    bed.qemu.chains = [[node_name("one"), below_name("one")], [node_name("two")]]
    with pytest.raises(EngineTimeout):
        freeze.switch()
    freeze.undo()
    assert list(bed.folder.glob("*.qcow2")) == []
    assert not bed.can_be_read(bed.disks["two"].path)


def test_switch_that_nobody_hears_of_leaves_what_may_be_in_use_and_says_so(bed):
    freeze = bed.freeze()
    bed.qemu.silent_at = ("transaction", "query-blockstats", "blockdev-del")
    with pytest.raises(SwitchUnknown, match="one.qcow2, .*two.qcow2: delete the VM"):
        freeze.switch()
    freeze.undo()
    assert len(list(bed.folder.glob("*.qcow2"))) == 2


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
