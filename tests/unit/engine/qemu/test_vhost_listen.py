"""The look at a vhost-user back end before QEMU connects to it."""

from __future__ import annotations

import socket

import pytest

from cloudvmm.engine.qemu.vhost_user import VhostUserConnectError, check_listens


def test_living_back_end_passes_and_notices_nothing(tmp_path):
    path = str(tmp_path / "socket")
    with socket.create_server(path, family=socket.AF_UNIX) as listener:
        listener.settimeout(0)
        check_listens(path)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_dead_socket_is_refused_with_the_reason(tmp_path):
    path = str(tmp_path / "socket")
    socket.create_server(path, family=socket.AF_UNIX).close()
    with pytest.raises(VhostUserConnectError) as caught:
        check_listens(path)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_datagram_socket_is_no_back_end(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(VhostUserConnectError) as caught:
            check_listens(path)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("path", ["", "/none", "/with\0nul", "/" + "x" * 200, "/tmp", "/etc/passwd"])
def test_what_is_no_socket_is_refused(path):
    with pytest.raises(VhostUserConnectError):
        check_listens(path)
