"""The API socket's path, and who has it."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from cloudvmm.http.error import ApiSocketInUse
from cloudvmm.http.listener import Listener


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "api")


def is_served_by(listener: Listener, path: str) -> bool:
    """Connect to `path` and say whether it is `listener` that is asked."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        try:
            accepted, _ = listener.socket.accept()
        except BlockingIOError:
            return False
        accepted.close()
        return True


def test_place_of_a_living_server_is_taken_and_kept(path, tmp_path):
    old, new = Listener.at_path(path), Listener.beside(path)
    assert is_served_by(old, path)

    previous = new.take_place(path)

    assert is_served_by(new, path)
    assert is_served_by(old, previous)
    assert not new.claim()
    old.close(remove_socket=True)
    assert is_served_by(new, path)
    assert new.claim()
    assert not os.path.exists(previous)
    with pytest.raises(ApiSocketInUse):
        Listener.at_path(path)
    new.close(remove_socket=True)
    assert os.listdir(tmp_path) == ["api.lock"]


def test_place_is_taken_also_where_its_server_has_just_ended(path):
    old, new = Listener.at_path(path), Listener.beside(path)
    old.close(remove_socket=True)

    new.take_place(path)

    assert is_served_by(new, path)
    assert new.claim()
    new.close(remove_socket=True)


def test_server_beside_another_leaves_nothing_there(path, tmp_path):
    old = Listener.at_path(path)
    with contextlib.closing(old.socket):
        Listener.beside(path).close(remove_socket=True)

        assert sorted(os.listdir(tmp_path)) == ["api", "api.lock"]
        assert is_served_by(old, path)
        old.close(remove_socket=True)
