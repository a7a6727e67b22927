"""VFIO devices and the machine's iommufd: what the host is asked, what is duplicated, what is closed."""

from __future__ import annotations

import contextlib
import os

import msgspec
import pytest

from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.qemu import vfio
from cloudvmm.engine.qemu.vfio import (
    IommufdCreateError,
    VfioBacking,
    VfioCreateError,
    VfioFdError,
    VfioMapError,
    open_iommufd,
    open_vfio,
)
from cloudvmm.host.vfio import HostDeviceMissing, MemoryLockLimit, NoVfioCdev, OpenIommufd, VfioGroupNotViable

MIB = 1 << 20


@pytest.fixture(autouse=True)
def undo():
    before = sorted(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        yield stack
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def asked(monkeypatch):
    """Takes note of what the host is asked; each question has a good answer."""
    found = []
    for name in ("check_group", "check_cdev", "check_memory_lock"):
        monkeypatch.setattr(vfio, name, lambda argument, name=name: found.append((name, argument)))
    return found


def config_of(**members):
    return msgspec.convert({"memory": {"size": 64 * MIB}, **members}, VmConfig)


def test_device_goes_by_its_group(asked):
    VfioBacking(device_id="one", folder="/f").check_in(config_of())
    assert asked == [("check_group", "/f"), ("check_memory_lock", 64 * MIB)]


def test_device_goes_by_itself_where_there_is_an_iommufd(asked):
    VfioBacking(device_id="one", folder="/f").check_in(config_of(platform={"iommufd": True}))
    assert asked == [("check_cdev", "/f"), ("check_memory_lock", 64 * MIB)]


def test_open_device_is_taken_as_it_is(asked):
    VfioBacking(device_id="one", fd=-1).check_in(config_of(platform={"iommufd": True, "iommufd_fd": 3}))
    assert asked == [("check_memory_lock", 64 * MIB)]


@pytest.mark.parametrize(
    ("check", "cause", "platform", "expected"),
    [
        ("check_group", VfioGroupNotViable([]), None, (VfioCreateError, "Cannot create a VFIO device")),
        ("check_cdev", NoVfioCdev("x"), {"iommufd": True}, (VfioCreateError, "Cannot create a VFIO device")),
        ("check_memory_lock", MemoryLockLimit(1, 2), None, (VfioMapError, "Failed to DMA map VFIO device")),
    ],
)
def test_refusal_of_the_host_is_told_in_the_references_words(
    asked, monkeypatch, check, cause, platform, expected
):
    def refuse(_argument):
        raise cause

    monkeypatch.setattr(vfio, check, refuse)
    error_class, words = expected
    with pytest.raises(error_class, match=words) as refusal:
        VfioBacking(device_id="one", folder="/f").check_in(config_of(platform=platform))
    assert refusal.value.__cause__ is cause


def test_device_that_is_not_there_is_refused():
    with pytest.raises(VfioCreateError) as refusal:
        open_vfio(DeviceConfig(id="one", path="/no/such/device"))
    assert isinstance(refusal.value.__cause__, HostDeviceMissing)


def test_open_device_is_duplicated_and_closed_once():
    backing = open_vfio(DeviceConfig(id="one", fd=0))
    assert backing.fds != [0]
    assert os.path.sameopenfile(backing.fds[0], 0)
    backing.release()
    backing.close()
    assert backing.fds == []


@pytest.mark.parametrize("fd", [-1, 99999])
def test_device_that_is_not_open_is_refused(fd):
    with pytest.raises(VfioFdError, match="Failed to duplicate VFIO device FD") as refusal:
        open_vfio(DeviceConfig(id="one", fd=fd))
    assert isinstance(refusal.value.__cause__, OSError)


def test_passed_iommufd_is_duplicated():
    fd = open_iommufd(PlatformConfig(iommufd=True, iommufd_fd=0))
    assert fd is not None
    os.close(fd)


@pytest.mark.parametrize("platform", [None, PlatformConfig(), PlatformConfig(iommufd=False)])
def test_machine_without_iommufd_asks_for_none(platform, monkeypatch):
    monkeypatch.setattr(vfio, "check_iommu", lambda: pytest.fail("The host was asked"))
    assert open_iommufd(platform) is None


@pytest.mark.parametrize("fd", [None, -1])
def test_iommufd_that_cannot_be_had_is_refused(fd, monkeypatch):
    def refuse():
        raise OpenIommufd

    monkeypatch.setattr(vfio, "check_iommu", refuse)
    with pytest.raises(IommufdCreateError, match="Cannot create iommufd") as refusal:
        open_iommufd(PlatformConfig(iommufd=True, iommufd_fd=fd))
    assert isinstance(refusal.value.__cause__, OpenIommufd if fd is None else OSError)
