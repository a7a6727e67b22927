"""Disks that go along with a VM: which may, what they are copied to, and what is left of that."""

from __future__ import annotations

import os

import pytest

from cloudvmm import api
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.operation import MigrationMemoryMode
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.copied_disk import CopiedDisks, DiskNotCopied, sizes_of
from cloudvmm.engine.base import EngineError
from cloudvmm.engine.fake import Fail
from cloudvmm.host.lock import lock_file
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller
from .peer import Peer
from .test_migration import is_running, receive, refusal_of, send

SIZE = 8192
RAW = {"d": ImageType.RAW}


def disks(path, **changes) -> VmConfig:
    return VmConfig(disks=[DiskConfig(id="d", path=None if path is None else str(path), **changes)])


@pytest.fixture
def image(tmp_path):
    image = tmp_path / "here"
    image.write_bytes(b"what the disk holds".ljust(SIZE, b"."))
    return image


def test_disk_on_a_raw_image_goes_along(image):
    assert sizes_of(disks(image), ["d"], RAW) == {"d": SIZE}


@pytest.mark.parametrize(
    ("changes", "disk_id", "types", "words"),
    [
        ({}, "other", RAW, "there is none of that id"),
        ({"path": None}, "d", RAW, "a back end of its own serves it"),
        ({"readonly": True}, "d", RAW, "it is read-only"),
        ({}, "d", {"d": ImageType.QCOW2}, "its image is not raw"),
        ({"path": "/nonexistent"}, "d", RAW, "its image cannot be opened"),
    ],
)
def test_disk_that_does_not_go_along(image, changes, disk_id, types, words):
    with pytest.raises(DiskNotCopied, match=f"The disk {disk_id} cannot be copied: {words}"):
        sizes_of(disks(**{"path": image} | changes), [disk_id], types)


def test_image_is_made_and_removed(tmp_path):
    there = tmp_path / "there"
    copied = CopiedDisks(disks(there), {"d": SIZE})
    assert there.stat().st_size == SIZE
    assert there.stat().st_mode & 0o777 == 0o600

    copied.discard()
    assert not there.exists()


def test_image_that_is_there_is_used_and_kept(image):
    CopiedDisks(disks(image), {"d": SIZE}).discard()

    assert image.stat().st_size == SIZE


def test_image_that_somebody_has_is_refused_and_what_was_made_is_removed(tmp_path, image):
    both = VmConfig(
        disks=[DiskConfig(id="new", path=str(tmp_path / "new")), DiskConfig(id="d", path=str(image))]
    )
    with image.open("r+b") as file:
        lock_file(file.fileno(), path=str(image), write=True)
        with pytest.raises(
            DiskNotCopied, match="is in use, perhaps because it is the same: give another path"
        ):
            CopiedDisks(both, {"new": SIZE, "d": SIZE})
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "there is none of that id at the destination"),
        ("/nonexistent/there", "its image cannot be made"),
        ("/proc", "its image cannot be opened"),
    ],
)
def test_image_that_cannot_be_had(path, words):
    with pytest.raises(DiskNotCopied, match=words):
        CopiedDisks(disks(path), {"d": SIZE})


def test_image_of_another_size_is_refused(image):
    with pytest.raises(
        DiskNotCopied, match=f"has {SIZE} bytes at the destination, and {SIZE * 2} where it is"
    ):
        CopiedDisks(disks(image), {"d": SIZE * 2})


# In a migration


@pytest.fixture
def source(caller, vm_config, image):
    vm_config.disks = [DiskConfig(id="d", path=str(image), image_type=ImageType.RAW)]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    return caller


def migrate(source: Caller, other: Caller, url: str, there) -> object:
    overrides = {"disks": [{"id": "d", "path": str(there)}]}
    answer = other.beside(api.vm_receive_migration, receive(url, overrides=overrides))
    other.wait_for_event("vm/migration-receive-ready")
    source(api.vm_send_migration, send(url, copy_disks=["d"]))
    return answer.result()


def test_disk_is_copied_to_the_path_that_the_destination_gives(source, other, url, image, tmp_path):
    there = tmp_path / "there"

    assert migrate(source, other, url, there) is None

    assert there.read_bytes() == image.read_bytes()
    assert other(api.vm_info).config.disks[0].path == str(there)


@pytest.mark.parametrize("operation", ["build", "resume"])
def test_destination_that_fails_leaves_no_image_and_the_guest_runs_on(
    source, other, url, tmp_path, operation
):
    other.engine.faults.set(operation, Fail(EngineError, "Broken"))

    assert refusal_of(migrate(source, other, url, tmp_path / "there"))[-1] == "Broken"

    source.wait_for_event("vm/migration-failed")
    wait_until(lambda: is_running(source), "the guest runs on", timeout_s=DEADLINE_S)
    assert not (tmp_path / "there").exists()


def test_overrides_that_cannot_be_are_refused_before_anything_is_stored(source, other, url):
    answer = other.beside(api.vm_receive_migration, receive(url, overrides={"cpus": {"boot_vcpus": 2}}))
    other.wait_for_event("vm/migration-receive-ready")
    source(api.vm_send_migration, send(url))

    assert refusal_of(answer.result())[-1] == "'cpus' of a saved VM cannot be overridden"
    source.wait_for_event("vm/migration-failed")
    assert is_running(source)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"copy_disks": ["d", "d"]}, "copy_disks must not name a disk twice."),
        (
            {"copy_disks": ["d"], "memory_mode": MigrationMemoryMode.POSTCOPY},
            "memory_mode=postcopy and copy_disks are mutually exclusive.",
        ),
        ({"copy_disks": ["x"]}, "The disk x cannot be copied: there is none of that id"),
    ],
)
def test_send_that_does_not_go_is_refused(source, url, options, words):
    assert source.refusal(api.vm_send_migration, send(url, **options))[-1].endswith(words)
    assert is_running(source)


def test_release_that_knows_nothing_of_it_is_told_from_its_answer(source, url):
    peer = Peer(url)
    peer.listen()
    source(api.vm_send_migration, send(url, copy_disks=["d"]))

    assert peer.accept().copied_disks == {"d": SIZE}

    source.wait_for_event("vm/migration-failed")
    assert any("does not know copy_disks" in text for text in source.logged)
    peer.close()
    peer.cut.close()
