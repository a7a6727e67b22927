"""vDPA devices, on made-up answers of the kernel."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.host import vdpa
from cloudvmm.host.vdpa import NoAccessPlatform, NotVdpa, OpenVdpa, TooFewVdpaQueues, is_driven, open_vdpa

BLOCK = 2


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[int, bytes]:
    """A block device with two queues that no driver has."""
    found = {
        vdpa._VHOST_VDPA_GET_DEVICE_ID: struct.pack("I", BLOCK),
        vdpa._VHOST_GET_FEATURES: struct.pack("Q", 1 << 33 | 1 << 32),
        vdpa._VHOST_VDPA_GET_VQS_COUNT: struct.pack("I", 2),
        vdpa._VHOST_VDPA_GET_STATUS: b"\x03",
    }

    def ioctl(_fd: int, request: int, buffer: Any) -> int:
        buffer[:] = found[request]
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return found


@pytest.fixture
def node(tmp_path: Path) -> str:
    path = tmp_path / "vhost-vdpa-0"
    path.touch()
    return str(path)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_device_is_opened_and_not_inherited(answers, node):
    fd = open_vdpa(node, queues=2)
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == node
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("changes", "error_class", "words"),
    [
        ({vdpa._VHOST_GET_FEATURES: struct.pack("Q", 1 << 32)}, NoAccessPlatform, "VIRTIO_F_ACCESS_PLATFORM"),
        (
            {vdpa._VHOST_VDPA_GET_VQS_COUNT: struct.pack("I", 1)},
            TooFewVdpaQueues,
            "The vDPA device has 1 queues, and 2 are asked for",
        ),
    ],
)
def test_device_that_cannot_serve_is_refused_and_closed(answers, node, changes, error_class, words):
    answers.update(changes)
    before = open_fds()
    with pytest.raises(error_class, match=words):
        open_vdpa(node, queues=2)
    assert open_fds() == before


@pytest.mark.parametrize("path", ["/no/such/device", "/", "/a\0b"])
def test_path_that_does_not_open_is_refused(path):
    with pytest.raises(OpenVdpa, match="Failed to create vhost-vdpa") as refusal:
        open_vdpa(path, queues=1)
    assert isinstance(refusal.value.__cause__, OSError | ValueError)


def test_other_devices_are_refused():
    before = open_fds()
    with pytest.raises(NotVdpa, match="/dev/null is no vDPA device"):
        open_vdpa("/dev/null", queues=1)
    assert open_fds() == before


def test_driver_is_told_by_the_devices_status(answers):
    assert not is_driven(0)
    answers[vdpa._VHOST_VDPA_GET_STATUS] = b"\x0f"
    assert is_driven(0)
