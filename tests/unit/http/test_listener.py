"""The API socket's path, and who has it."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from cloudvmm.http import listener
from cloudvmm.http.error import ApiSocketInUse
from cloudvmm.http.listener import Listener


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "api")


def is_served_by(server: Listener, path: str) -> bool:
    """Connect to `path` and say whether it is `server` that is asked."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        try:
            accepted, _ = server.socket.accept()
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


def test_place_is_taken_though_an_older_server_is_still_kept(path):
    oldest, old, new = Listener.at_path(path), Listener.beside(path), Listener.beside(f"{path}.")
    first = old.take_place(path)
    assert not old.claim()  # the oldest does not end

    second = new.take_place(path)

    assert is_served_by(new, path)
    assert is_served_by(old, second)
    assert is_served_by(oldest, first)
    for server in (old, oldest, new):
        server.close(remove_socket=True)
    assert os.path.exists(first)  # the oldest does not know of it


def test_file_that_is_in_the_way_is_left_alone_and_a_dead_socket_is_not(path):
    old, new, newer = Listener.at_path(path), Listener.beside(path), Listener.beside(f"{path}.")
    with open(f"{path}.previous", "w") as file:
        file.write("another's")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{path}.previous.2")

    assert is_served_by(old, new.take_place(path))

    with open(f"{path}.previous") as file:
        assert file.read() == "another's"
    assert is_served_by(old, f"{path}.previous.2")
    for server in (old, new, newer):
        server.close(remove_socket=True)


def test_server_beside_another_leaves_nothing_there(path, tmp_path):
    old = Listener.at_path(path)
    with contextlib.closing(old.socket):
        Listener.beside(path).close(remove_socket=True)

        assert sorted(os.listdir(tmp_path)) == ["api", "api.lock"]
        assert is_served_by(old, path)
        old.close(remove_socket=True)


def test_lock_that_goes_with_its_server_is_removed_while_it_is_held(path, tmp_path, monkeypatch):
    server = Listener.at_path(path, removes_lock=True)
    others: list[str] = []

    def look(name: str) -> None:
        if name == f"{path}.lock":
            with pytest.raises(ApiSocketInUse):
                Listener.at_path(path)
            others.append(name)
        os.remove(name)

    monkeypatch.setattr("cloudvmm.http.listener.os.unlink", look)
    server.close(remove_socket=True)
    assert others == [f"{path}.lock"]
    assert os.listdir(tmp_path) == []


def test_lock_that_is_removed_before_it_is_had_is_no_lock(path, monkeypatch):
    first, lock = Listener.at_path(path, removes_lock=True), listener.lock_file

    def late(fd: int, **options: object) -> None:
        first.close(remove_socket=True)
        lock(fd, **options)

    monkeypatch.setattr(listener, "lock_file", late)
    second = Listener.at_path(path, removes_lock=True)
    with pytest.raises(ApiSocketInUse):
        Listener.at_path(path)
    second.close(remove_socket=True)
