"""What QEMU is given and told so that it goes on taking its memory over another way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from cloudvmm.engine.base import EngineError, EngineTimeout, MachineGone
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.spare import COUNT, Spares
from support.leak import Holdings


class Qemu:
    """Keeps what it is given by names, refuses to go on `refusals` times, and notes what it was told."""

    def __init__(self) -> None:
        self.ways: dict[str, socket.socket] = {}
        self.urgent: list[tuple[str, Any]] = []
        self.refusals = 0

    def execute(
        self, command: str, arguments: Any = None, *, fds: Any = (), is_urgent: bool = False, **_: object
    ) -> None:
        if command == "getfd":
            self.ways[arguments["fdname"]] = socket.socket(fileno=os.dup(fds[0]))
            return
        assert is_urgent
        self.urgent.append((command, arguments))
        if command == "migrate-pause" or self.refusals:
            self.refusals -= command == "migrate-recover"
            raise QmpError(command, "GenericError", "Not now")

    def poll_events(self) -> list[Any]:
        return []

    def wait_event(self, name: str, *, timeout_s: float) -> None:
        raise EngineTimeout(f"{name} in {timeout_s} s")

    def close(self) -> None:
        while self.ways:
            self.ways.popitem()[1].close()


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    holdings = Holdings()
    qemu = Qemu()
    yield qemu
    qemu.close()
    holdings.assert_nothing_added()


@pytest.fixture
def spares(qemu: Qemu) -> Iterator[Spares]:
    spares = Spares(qemu)  # type: ignore[arg-type]
    yield spares
    spares.close()


def is_well() -> None:
    pass


def test_qemu_goes_on_over_what_it_was_given_before(qemu, spares):
    spares.lay()
    assert len(qemu.ways) == COUNT

    with spares.take(is_well) as near:
        ((command, arguments),) = qemu.urgent
        assert command == "migrate-recover"
        near.send(b"memory")
        assert qemu.ways[arguments["uri"].removeprefix("fd:")].recv(64) == b"memory"


def test_qemu_that_has_not_seen_the_loss_is_told_to_pause_and_asked_again(qemu, spares):
    spares.lay()
    qemu.refusals = 2

    spares.take(is_well).close()

    told = [command for command, _ in qemu.urgent]
    assert told == ["migrate-recover", "migrate-pause"] * 2 + ["migrate-recover"]


def test_each_is_taken_once(qemu, spares):
    spares.lay()
    for _ in range(COUNT):
        spares.take(is_well).close()

    assert {arguments["uri"] for _, arguments in qemu.urgent} == {f"fd:{name}" for name in qemu.ways}
    with pytest.raises(EngineError, match=f"lost {COUNT} times"):
        spares.take(is_well)


def test_qemu_that_ends_is_not_asked_any_more(qemu, spares):
    spares.lay()
    qemu.refusals = 1000

    def check() -> None:
        raise MachineGone("QEMU ended")

    with pytest.raises(MachineGone):
        spares.take(check)
