"""What is opened for a machine, what is refused before, and that all of it goes away again."""

from __future__ import annotations

import contextlib
import os
import socket

import msgspec
import pytest

from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, EngineError, ImageLocked, MachineSpec, SinkKind
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.confinement import Policy
from cloudvmm.engine.qemu.device import balloon_target_bytes
from cloudvmm.engine.qemu.image import DiskPathMissing
from cloudvmm.engine.qemu.memory import RamMisaligned
from cloudvmm.engine.qemu.net import FdNotUsable
from cloudvmm.engine.qemu.resource import RngSourceError, acquire
from cloudvmm.host.lock import LockConflict, lock_file
from cloudvmm.host.user import User

MIB = 1 << 20
OFF = ConsoleSink(kind=SinkKind.OFF)


def spec_of(config: dict, *, serial: ConsoleSink = OFF) -> MachineSpec:
    vm_config = msgspec.convert({"memory": {"size": 64 * MIB}, **config}, VmConfig)
    return MachineSpec(vm_config=vm_config, slots={}, serial=serial, console=OFF, debug_console=OFF)


@pytest.fixture
def undo():
    """Checks that whatever a test opened through it is closed again."""
    before = sorted(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        yield stack
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return str(path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="Needs root, to be somebody else")
def test_machine_that_is_not_held_to_its_files_needs_no_place_for_a_folder(undo, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    attempt = Attempt(policy=Policy(has_landlock=False), user=User(2_013_300_000, 2_013_300_000))

    assert acquire(spec_of({}), undo, attempt=attempt).doorway is None


def ram_fd_of(resources):
    (ram,) = resources.rams.values()
    return ram.fd


def test_ram_is_a_fresh_memfd_of_the_right_size(undo):
    resources = acquire(spec_of({}), undo)
    assert os.fstat(ram_fd_of(resources)).st_size == 64 * MIB
    assert os.fstat(ram_fd_of(resources)).st_blocks == 0
    assert resources.inherited_fds == [ram_fd_of(resources)]
    assert not os.get_inheritable(ram_fd_of(resources))


def test_mergeable_ram_is_left_to_qemu(undo):
    resources = acquire(spec_of({"memory": {"size": 64 * MIB, "mergeable": True}}), undo)
    assert ram_fd_of(resources) is None
    assert resources.inherited_fds == []


@pytest.mark.parametrize("size", [MIB + 1, MIB + 4096])
def test_ram_that_is_not_whole_pages_is_refused(undo, size):
    with pytest.raises(RamMisaligned):
        acquire(spec_of({"memory": {"size": size}}), undo)


def test_every_descriptor_is_inherited_once(undo, image):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serial = ConsoleSink(kind=SinkKind.STREAM, stream_fd=theirs.fileno())
        spec = spec_of({"disks": [{"id": "a", "path": image}]}, serial=serial)
        resources = acquire(spec, undo)
        assert len(resources.inherited_fds) == len(set(resources.inherited_fds)) == 3
        assert theirs.fileno() not in resources.inherited_fds
        resources.close()


def test_lock_lasts_as_long_as_any_copy_of_the_descriptor(undo, image):
    resources = acquire(spec_of({"disks": [{"id": "a", "path": image}]}), undo)
    resources.lock_images()
    copy = os.dup(resources.disks[0].image.fd)
    resources.close()
    with open(image, "r+b") as other:
        with pytest.raises(LockConflict):
            lock_file(other.fileno(), path=image, write=True)
        os.close(copy)
        lock_file(other.fileno(), path=image, write=True)


def test_image_of_another_machine_is_refused_at_the_lock_only(undo, image):
    config = {"disks": [{"id": "a", "path": image}]}
    first, second = acquire(spec_of(config), undo), acquire(spec_of(config), undo)
    first.lock_images()
    with pytest.raises(ImageLocked, match="Cannot lock images of all block devices") as caught:
        second.lock_images()
    assert image in str(caught.value.__cause__)


def test_readonly_disks_share_an_image(undo, image):
    config = {"disks": [{"id": "a", "path": image, "readonly": True}]}
    acquire(spec_of(config), undo).lock_images()
    acquire(spec_of(config), undo).lock_images()
    writer = acquire(spec_of({"disks": [{"id": "a", "path": image}]}), undo)
    with pytest.raises(ImageLocked):
        writer.lock_images()


def test_passed_queues_are_duplicated_and_stay_the_callers(undo):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        spec = spec_of({"net": [{"id": "n", "num_queues": 2}]})
        spec.vm_config.net[0].fds = [theirs.fileno()]
        resources = acquire(spec, undo)
        assert resources.backings["n"].fds != [theirs.fileno()]
        assert resources.interfaces == {}
        resources.close()
        assert os.fstat(theirs.fileno())


def test_passed_descriptor_that_is_closed_is_refused(undo):
    spec = spec_of({"net": [{"id": "n"}]})
    spec.vm_config.net[0].fds = [987654]
    with pytest.raises(FdNotUsable, match="987654 of n"):
        acquire(spec, undo)


def test_disk_without_path_is_refused(undo):
    with pytest.raises(DiskPathMissing):
        acquire(spec_of({"disks": [{"id": "a"}]}), undo)


def test_entropy_source_that_is_missing_is_refused(undo):
    with pytest.raises(RngSourceError):
        acquire(spec_of({"rng": {"src": "/no/such/source"}}), undo)


def test_failure_of_the_last_device_releases_the_first(undo, image):
    with pytest.raises(EngineError), contextlib.ExitStack() as inner:
        acquire(spec_of({"disks": [{"id": "a", "path": image}, {"id": "b", "path": "/no/such"}]}), inner)
    with open(image, "r+b") as other:
        lock_file(other.fileno(), path=image, write=True)


def test_close_is_idempotent(undo, image):
    resources = acquire(spec_of({"disks": [{"id": "a", "path": image}]}), undo)
    resources.close()
    resources.close()
    assert ram_fd_of(resources) is None


def test_image_that_cannot_be_unlocked_is_closed(undo, image):
    (disk,) = acquire(spec_of({"disks": [{"id": "a", "path": image}]}), undo).disks
    path_only = os.open(image, os.O_PATH)
    os.dup2(path_only, disk.image.fd, inheritable=False)
    os.close(path_only)
    disk.release()
    assert disk.image.fd == -1


def test_balloon_target_is_what_is_left_to_the_guest():
    assert balloon_target_bytes(spec_of({"balloon": {"size": 16 * MIB}}), 64 * MIB) == 48 * MIB
    assert balloon_target_bytes(spec_of({"balloon": {"size": 0}}), 64 * MIB) is None
    assert balloon_target_bytes(spec_of({}), 64 * MIB) is None
