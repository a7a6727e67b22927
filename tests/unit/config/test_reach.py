"""Which paths a configuration names, each kind of member once."""

from __future__ import annotations

import msgspec
import pytest

from cloudvmm.config import form
from cloudvmm.config.reach import Use, named_paths
from cloudvmm.config.vm import VmConfig

READ, CHANGE, SOCKET = Use.READ, Use.CHANGE, Use.SOCKET
DEFAULT = {("/dev/urandom", READ)}  # the entropy source, which every VM has


def named(**members) -> set[tuple[str, Use]]:
    return set(named_paths(form.decode(msgspec.json.encode(members), VmConfig)))


@pytest.mark.parametrize(
    ("members", "paths"),
    [
        ({"payload": {"kernel": "/k", "initramfs": "/i"}}, {("/k", READ), ("/i", READ)}),
        ({"payload": {"firmware": "/f", "igvm": "/g"}}, {("/f", READ), ("/g", READ)}),
        (
            {"payload": {"fw_cfg_config": {"items": {"item_list": [{"name": "n", "file": "/w"}]}}}},
            {("/w", READ)},
        ),
        ({"memory": {"size": 0, "zones": [{"id": "z", "size": 1, "file": "/z"}]}}, {("/z", CHANGE)}),
        ({"disks": [{"path": "/a"}, {"vhost_user": True, "vhost_socket": "/v"}]}, {("/a", CHANGE)}),
        (
            {"pmem": [{"file": "/p"}, {"file": "/q", "discard_writes": True}]},
            {("/p", CHANGE), ("/q", READ)},
        ),
        (
            {"fs": [{"tag": "t", "socket": "/s"}, {"tag": "u", "shared_dir": "/d"}]},
            {("/s", CHANGE), ("/d", CHANGE)},
        ),
        (
            {"generic_vhost_user": [{"socket": "/g", "queue_sizes": [1], "device_type": 1}]},
            {("/g", CHANGE)},
        ),
        ({"user_devices": [{"socket": "/u"}]}, {("/u", CHANGE)}),
        ({"vdpa": [{"path": "/dev/vhost-vdpa-0"}]}, {("/dev/vhost-vdpa-0", CHANGE)}),
        ({"tpm": {"socket": "/t"}}, {("/t", CHANGE)}),
        ({"tpm": {"state_dir": "/t"}}, {("/t", CHANGE)}),
        ({"vsock": {"cid": 3, "socket": "/run/v/s"}}, {("/run/v", SOCKET)}),
        ({"net": [{}]}, {("/dev/net/tun", CHANGE)}),
        ({"ivshmem": {"path": "/m", "size": 4096}}, {("/m", CHANGE)}),
        ({"console": {"mode": "Pty"}}, {("/dev/pts", CHANGE), ("/dev/ptmx", CHANGE)}),
        ({"debug_console": {"mode": "File", "file": "/c"}}, {("/c", CHANGE)}),
        ({"serial": {"mode": "Socket", "socket": "/run/c/s"}}, {("/run/c", SOCKET)}),
        ({"serial": {"mode": "Null", "file": "/left"}}, set()),
        ({"landlock_rules": [{"path": "/r", "access": "r"}]}, set()),
    ],
)
def test_each_member_with_a_path_is_named_with_its_use(members, paths):
    assert named(**members) - DEFAULT == paths


def test_entropy_comes_from_where_the_configuration_says():
    assert named(rng={"src": "/dev/hwrng"}) == {("/dev/hwrng", READ)}
