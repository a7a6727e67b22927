"""What keeps a device from being given away, on a made-up sysfs and /dev/vfio."""

from __future__ import annotations

import fcntl
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.host import vfio
from cloudvmm.host.vfio import (
    HostDeviceMissing,
    MemoryLockLimit,
    NoIommuGroup,
    NotAHostDevice,
    NoVfioCdev,
    NoVfioType1,
    OpenIommufd,
    OpenVfioContainer,
    OpenVfioGroup,
    VfioDriverMissing,
    VfioGroupNotViable,
    check_cdev,
    check_group,
    check_iommu,
    check_memory_lock,
    find_device,
)

MIB = 1024 * 1024


class Sysfs:
    """A host with the device 0000:01:00.0, bound to vfio-pci in group 7; `path` is how users name it."""

    def __init__(self, root: Path) -> None:
        self.dev = root / "vfio"
        self.folder = root / "devices" / "0000:01:00.0"
        self.path = root / "bus" / "0000:01:00.0"
        self.group = root / "groups" / "7"
        for folder in (self.dev / "devices", self.folder, self.path.parent, self.group / "devices"):
            folder.mkdir(parents=True)
        self.path.symlink_to(self.folder)
        (self.folder / "subsystem").symlink_to(root)
        (self.folder / "iommu_group").symlink_to(self.group)
        (self.group / "devices" / self.folder.name).symlink_to(self.folder)
        self.bind(self.folder, "vfio-pci")
        for name in ("7", "vfio"):
            (self.dev / name).touch()

    def bind(self, folder: Path, driver: str | None) -> None:
        (folder / "driver").unlink(missing_ok=True)
        if driver is not None:
            (folder / "driver").symlink_to(f"/drivers/{driver}")

    def add_neighbour(self, name: str, driver: str | None) -> None:
        folder = self.folder.with_name(name)
        folder.mkdir()
        self.bind(folder, driver)
        (self.group / "devices" / name).symlink_to(folder)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What the ioctls answer: the flags of the group, whether the container has type 1."""
    found = {vfio._VFIO_GROUP_GET_STATUS: 1, vfio._VFIO_CHECK_EXTENSION: 1}

    def ioctl(_fd: int, request: int, argument: Any) -> int:
        if request == vfio._VFIO_GROUP_GET_STATUS:
            argument[4] = found[request]
            return 0
        return found[request]

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[int, int]) -> Sysfs:
    made = Sysfs(tmp_path)
    monkeypatch.setattr(vfio, "_GROUPS", str(made.dev))
    monkeypatch.setattr(vfio, "_CDEVS", str(made.dev / "devices"))
    monkeypatch.setattr(vfio, "_IOMMU", str(tmp_path / "iommu"))
    return made


def test_device_is_found_behind_its_links_and_can_be_opened(host):
    folder = find_device(str(host.path))
    assert folder == str(host.folder)
    check_group(folder)


def test_mediated_device_has_a_driver_of_vfio_too(host):
    host.bind(host.folder, "vfio_mdev")
    assert find_device(str(host.path)) == str(host.folder)


@pytest.mark.parametrize(
    ("break_it", "error_class", "words"),
    [
        (lambda host: host.path.unlink(), HostDeviceMissing, "There is no device "),
        (lambda host: (host.folder / "subsystem").unlink(), NotAHostDevice, "is no device: a folder such as"),
        (
            lambda host: (host.folder / "iommu_group").unlink(),
            NoIommuGroup,
            "The device 0000:01:00.0 is in no IOMMU group",
        ),
        (
            lambda host: host.bind(host.folder, "nvme"),
            VfioDriverMissing,
            "has the driver nvme, and needs vfio-pci",
        ),
        (lambda host: host.bind(host.folder, None), VfioDriverMissing, "has no driver, and needs vfio-pci"),
    ],
)
def test_device_that_cannot_be_given_is_refused(
    host: Sysfs, break_it: Callable[[Sysfs], None], error_class: type[Exception], words: str
) -> None:
    break_it(host)
    with pytest.raises(error_class) as refusal:
        find_device(str(host.path))
    assert words in str(refusal.value)


def test_path_with_a_nul_is_refused(host):
    with pytest.raises(HostDeviceMissing):
        find_device("/a\0b")


def test_group_that_is_not_there_is_refused(host):
    (host.dev / "7").unlink()
    with pytest.raises(OpenVfioGroup, match="Failed to open .*/7 group") as refusal:
        check_group(str(host.folder))
    assert isinstance(refusal.value.__cause__, FileNotFoundError)


def test_group_that_somebody_has_open_is_left_to_qemu(host, monkeypatch):
    real = vfio.os.open

    def busy(path: str, flags: int) -> int:
        if path.endswith("/7"):
            raise OSError(vfio.errno.EBUSY, "busy")
        return real(path, flags)

    monkeypatch.setattr(vfio.os, "open", busy)
    check_group(str(host.folder))


def test_group_with_devices_of_the_host_is_refused_naming_them(host, answers):
    answers[vfio._VFIO_GROUP_GET_STATUS] = 0
    host.add_neighbour("0000:01:00.1", "snd_hda_intel")
    host.add_neighbour("0000:01:00.2", None)
    with pytest.raises(VfioGroupNotViable) as refusal:
        check_group(str(host.folder))
    assert str(refusal.value) == "Group is not viable: 0000:01:00.1 must be bound to vfio-pci or to nothing"


def test_host_without_vfio_is_refused(host):
    (host.dev / "vfio").unlink()
    with pytest.raises(OpenVfioContainer, match="Failed to open /dev/vfio/vfio container"):
        check_group(str(host.folder))


def test_host_without_the_iommu_driver_is_refused(host, answers):
    answers[vfio._VFIO_CHECK_EXTENSION] = 0
    with pytest.raises(NoVfioType1, match="load the module vfio_iommu_type1"):
        check_group(str(host.folder))


def test_iommufd_needs_an_entry_for_the_device(host):
    with pytest.raises(NoVfioCdev, match=r"0000:01:00\.0 has no entry"):
        check_cdev(str(host.folder))
    (host.folder / "vfio-dev" / "vfio0").mkdir(parents=True)
    with pytest.raises(NoVfioCdev):
        check_cdev(str(host.folder))
    (host.dev / "devices" / "vfio0").touch()
    check_cdev(str(host.folder))


def test_iommufd_needs_its_device(host, tmp_path):
    with pytest.raises(OpenIommufd):
        check_iommu()
    (tmp_path / "iommu").touch()
    check_iommu()


@pytest.mark.parametrize(
    ("limit", "may_lock_all", "is_refused"),
    [
        (8 * MIB, False, True),
        (8 * MIB, True, False),
        (64 * MIB, False, False),
        (resource.RLIM_INFINITY, False, False),
    ],
)
def test_guests_memory_must_fit_below_the_limit_of_locked_memory(
    monkeypatch, limit, may_lock_all, is_refused
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(vfio, "_may_lock_all", lambda: may_lock_all)
    if not is_refused:
        check_memory_lock(64 * MIB)
        return
    with pytest.raises(MemoryLockLimit) as refusal:
        check_memory_lock(64 * MIB)
    assert str(refusal.value) == (
        "The limit of locked memory (RLIMIT_MEMLOCK) is 8388608 bytes, "
        "below the guest's memory of 67108864 bytes"
    )


@pytest.mark.root
def test_root_may_lock_all():
    assert vfio._may_lock_all()
