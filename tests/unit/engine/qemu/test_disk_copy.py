"""The sender's side of a disk that goes along: what QEMU is told, and when it is left alone with its link."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from cloudvmm.engine.base import LinkLost
from cloudvmm.engine.qemu.disk_copy import CopyFailed, DiskSender
from cloudvmm.engine.qemu.name import part_id


class Qemu:
    """Notes what it is told; its jobs are all in the state `status`."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.status = "ready"
        self.io_status = "ok"

    def execute(self, command: str, arguments: object = None, **_: object) -> Any:
        self.told.append(command)
        if command == "query-jobs":
            return [{"id": part_id("d", "copy"), "status": self.status, "current-progress": 0}]
        if command == "query-block-jobs":
            return [{"device": part_id("d", "copy"), "io-status": self.io_status}]
        if command == "block-job-cancel":
            self.status = "concluded"
        return {}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def sender_of(qemu: Qemu, near: socket.socket) -> DiskSender:
    return DiskSender(qemu, {"d": near.fileno()}, stop=lambda: qemu.told.append("the guest stops"))


def test_other_side_that_is_gone_keeps_qemu_from_its_link(pair):
    near, far = pair
    qemu = Qemu()
    far.close()

    with pytest.raises(LinkLost):
        sender_of(qemu, near).copy()

    assert qemu.told == []


def test_copy_that_is_given_up_hangs_up(pair):
    near, far = pair
    far.send(b"NBDMAGIC")
    sender = sender_of(Qemu(), near)
    sender.copy()

    sender.close()

    far.setblocking(False)
    assert far.recv(1) == b""


@pytest.mark.parametrize(
    ("io_status", "words"), [("failed", "Input/output error"), ("nospace", "No space left on device")]
)
def test_copy_that_fails_goes_on_until_the_guest_stands_still(pair, io_status, words):
    near, far = pair
    far.send(b"NBDMAGIC")
    qemu = Qemu()
    sender = sender_of(qemu, near)
    qemu.io_status = io_status

    with pytest.raises(CopyFailed, match=words):
        sender.copy()
    assert "block-job-cancel" not in qemu.told
    sender.close()

    assert qemu.told.index("the guest stops") < qemu.told.index("block-job-cancel")


def test_copy_that_is_finished_leaves_the_link_alone(pair):
    near, far = pair
    far.send(b"NBDMAGIC")
    qemu = Qemu()
    sender = sender_of(qemu, near)
    sender.copy()

    sender.finish()
    sender.close()

    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    assert qemu.told[-2:] == ["job-dismiss", "blockdev-del"]
    assert "the guest stops" not in qemu.told
