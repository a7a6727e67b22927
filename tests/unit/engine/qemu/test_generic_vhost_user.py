"""What a generic vhost-user device is told by its back end."""

from __future__ import annotations

import pytest

from cloudvmm.config.device import GenericVhostUserConfig
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.generic_vhost_user import (
    NATIVES,
    generic_vhost_user_parts,
    open_generic_vhost_user,
)
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking
from support.vhost_user import back_end

QEMU = QemuFacts(binary="/qemu", version=(10, 0, 2))


def device(socket="/s", device_type=26, queues=2):
    return GenericVhostUserConfig(
        id="one", socket=str(socket), device_type=device_type, queue_sizes=[64] * queues
    )


@pytest.mark.parametrize(
    ("config", "tag"),
    [(b"share".ljust(36, b"\0"), "share"), (b"x" * 36, "x" * 36), (bytes(36), "one"), (b"", "one")],
)
def test_tag_of_a_file_system_is_its_back_ends_or_its_id(config, tag):
    backing = VhostUserBacking(device_id="one", config=config)
    (made,) = generic_vhost_user_parts(device(), backing, Seat(slots={"one": 5}, facts=QEMU)).devices
    assert made["tag"] == tag


def test_tag_is_asked_for(tmp_path):
    with back_end(tmp_path / "s", config=b"told".ljust(40, b"\0")):
        backing = open_generic_vhost_user(device(tmp_path / "s"))
    assert backing.config == b"told".ljust(36, b"\0")
    backing.close()


@pytest.mark.parametrize("device_type", NATIVES)
def test_back_end_needs_the_queues_that_are_its_own(tmp_path, device_type):
    native = NATIVES[device_type]
    queues = native.queues + bool(native.count)
    with back_end(tmp_path / "s", queues=queues - native.own_queues):
        open_generic_vhost_user(device(tmp_path / "s", device_type, queues)).close()
