"""Sockets that a manager had begun to make when it was killed: which of them go, and which are somebody's."""

from __future__ import annotations

import os
import socket

import pytest

from cloudvmm.engine.qemu.claim import claim_path, end_claim, sweep_claims


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path


@pytest.fixture
def state(folder):
    return str(folder / "state")


def dead_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()


def test_socket_that_nobody_serves_goes_with_its_claim(folder, state):
    claim_path(state, str(folder / "socket"))
    dead_socket(folder / "socket")

    sweep_claims(state)
    assert not os.path.lexists(folder / "socket")
    assert os.listdir(state) == []


def test_socket_that_is_served_stays(folder, state):
    claim_path(state, str(folder / "socket"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        sweep_claims(state)

    assert os.path.lexists(folder / "socket")
    assert os.listdir(state) == []


def test_file_that_somebody_put_there_stays(folder, state):
    claim_path(state, str(folder / "socket"))
    (folder / "socket").write_text("of somebody")

    sweep_claims(state)
    assert (folder / "socket").read_text() == "of somebody"


def test_claim_of_a_device_that_goes_on_stays_with_its_socket(folder, state):
    claim = claim_path(state, str(folder / "socket"))
    assert claim is not None
    dead_socket(folder / "socket")

    sweep_claims(state, kept=[claim])
    assert os.path.lexists(folder / "socket")
    end_claim(claim)
    assert os.listdir(state) == []


def test_what_is_there_already_is_not_claimed(folder, state):
    dead_socket(folder / "socket")

    assert claim_path(state, str(folder / "socket")) is None
    assert claim_path(None, str(folder / "other")) is None
    assert os.listdir(state) == []
