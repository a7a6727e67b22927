"""Helper programs: found or missed by name, ended with what they serve."""

from __future__ import annotations

import os
import socket

import pytest

from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.companion import (
    Companion,
    CompanionFailed,
    NoProgram,
    connected_pair,
    find_program,
)
from cloudvmm.engine.qemu.vhost_user import (
    MemoryNotShared,
    VhostUserBacking,
    vhost_user_chardev,
)
from support.deadline import HOST_S
from support.wait import wait_until


def test_program_is_found_on_the_path_and_in_folders(tmp_path):
    program = tmp_path / "odd-helper"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert os.path.basename(find_program("sh", package="dash")) == "sh"
    assert find_program("odd-helper", package="odd", folders=[str(tmp_path)]) == str(program)


def test_missing_program_names_its_package():
    with pytest.raises(NoProgram, match="There is no odd-helper on this host: install the package odd"):
        find_program("odd-helper", package="odd")


def test_companion_is_gone_when_it_is_closed():
    companion = Companion(["/bin/sleep", "1000"], name="sleep", attempt=Attempt())
    companion.check()
    companion.close()
    assert not os.path.exists(f"/proc/{companion.pid}")
    companion.close()


def test_companion_that_ended_is_told_in_its_own_words():
    companion = Companion(
        ["/bin/sh", "-c", "echo no such share >&2; exit 3"], name="virtiofsd", attempt=Attempt()
    )

    def words():
        try:
            companion.check()
        except CompanionFailed as error:
            return str(error)
        return None

    wait_until(words, "it has ended", timeout_s=HOST_S)
    assert words() == "virtiofsd exited with status 3: no such share"
    companion.close()


def test_program_that_is_none_is_a_device_error(tmp_path):
    with pytest.raises(DeviceError, match="helper could not be started"):
        Companion([str(tmp_path / "none")], name="helper", attempt=Attempt())


def test_connected_pair_is_a_connection_with_no_path_left():
    listening, near = connected_pair()
    with socket.socket(fileno=listening) as listener, socket.socket(fileno=near) as end:
        assert not os.path.exists(listener.getsockname())
        far, _ = listener.accept()
        with far:
            end.sendall(b"hello")
            assert far.recv(5) == b"hello"


def test_vhost_user_connection_is_a_path_or_a_descriptor():
    by_path = VhostUserBacking(device_id="a", path="/run/back end")
    assert by_path.fds == []
    assert vhost_user_chardev(by_path)["backend"]["data"]["addr"] == {
        "type": "unix",
        "data": {"path": "/run/back end"},
    }
    near, far = socket.socketpair()
    fd = near.detach()
    by_fd = VhostUserBacking(device_id="a", fd=fd)
    assert by_fd.fds == [fd]
    assert vhost_user_chardev(by_fd)["backend"]["data"]["addr"]["data"] == {"str": str(fd)}
    by_fd.close()
    by_fd.close()
    far.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_back_end_takes_memory_that_is_shared():
    VhostUserBacking(device_id="x").check_in(VmConfig(memory=MemoryConfig(size=128 * MIB)))


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(size=128 * MIB, mergeable=True),
        MemoryConfig(
            size=0,
            zones=[
                MemoryZoneConfig(id="a", size=128 * MIB),
                MemoryZoneConfig(id="b", size=128 * MIB, file="/ram"),
            ],
        ),
    ],
)
def test_back_end_refuses_memory_of_which_a_part_is_not_shared(memory):
    with pytest.raises(MemoryNotShared, match="mergeable, or a file that is not shared"):
        VhostUserBacking(device_id="x").check_in(VmConfig(memory=memory))
