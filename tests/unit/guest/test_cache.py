"""Where guests lie, and that one is there whole or not at all."""

import fcntl
import os
from pathlib import Path

import msgspec
import pytest

from cloudvmm.guest import cache
from cloudvmm.guest.error import GuestNotBuilt


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUDVMM_CACHE", str(tmp_path))
    return tmp_path


def complete(staging, version):
    folder = staging / "guest"
    folder.mkdir()
    for name in ("vmlinux", "bzImage", "initramfs.cpio", "disk.raw"):
        (folder / name).write_text(name)
    return cache.publish(folder, version)


def test_empty_cache_says_how_to_fill_it():
    with pytest.raises(GuestNotBuilt, match="cloudvmm guest build"):
        cache.locate()


def test_published_guest_is_located_and_its_json_names_every_file():
    version = f"6.1-{cache.source_hash()}"
    with cache.building() as staging:
        published = complete(staging, version)

    located = cache.locate()

    assert located == published
    fields = msgspec.json.decode(located.to_json())
    assert fields["version"] == version
    assert all(Path(fields[key]).is_file() for key in ("kernel", "bzimage", "initramfs", "disk"))


def test_guest_of_other_sources_is_not_located():
    with cache.building() as staging:
        complete(staging, "6.1-000000000000")

    with pytest.raises(GuestNotBuilt):
        cache.locate()


def test_failed_build_leaves_nothing(own_cache):
    with pytest.raises(RuntimeError), cache.building() as staging:
        (staging / "half").write_text("")
        raise RuntimeError

    assert [path.name for path in (own_cache / "guest").iterdir()] == [".lock"]


def test_next_build_sweeps_what_a_killed_builder_left(own_cache):
    leftover = own_cache / "guest" / ".building-1" / "guest"
    leftover.mkdir(parents=True)

    with cache.building() as staging:
        assert not leftover.exists()
        assert staging.exists()


def test_rebuilt_version_replaces_the_old_one():
    version = f"6.1-{cache.source_hash()}"
    for _ in range(2):
        with cache.building() as staging:
            guest = complete(staging, version)

    assert cache.locate() == guest


def test_second_builder_waits_for_the_first(own_cache):
    with cache.building():
        fd = os.open(own_cache / "guest" / ".lock", os.O_RDWR)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(fd)
