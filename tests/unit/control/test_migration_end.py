"""Either VMM is told to end, or its machine dies, at every moment of a migration.

Whatever happens: the guest runs on one side at most, at every moment that anybody hears of; and the VM
of a source that goes on is there, running or with a word in the log, unless it was given away.
"""

from __future__ import annotations

import socket

import pytest

import support.wait
from cloudvmm import api
from cloudvmm.engine.fake import Delay, FakeEngine
from cloudvmm.engine.fake.phase import Phase

from .conftest import DEADLINE_S, Caller

SENDER_MOMENTS = [
    "migration-started",
    "migration-memory-iteration",
    "pausing",
    "paused",
    "snapshotting",
    "snapshotted",
    "migration-finished",
]
RECEIVER_MOMENTS = [
    "migration-receive-ready",
    "migration-receive-started",
    "restoring",
    "restored",
    "resuming",
    "resumed",
    "migration-receive-finished",
]
MOMENTS = [("source", moment) for moment in SENDER_MOMENTS]
MOMENTS += [("destination", moment) for moment in RECEIVER_MOMENTS]
# The same moments, each side acting on what it hears of the other.
MOMENTS += [("source", moment) for moment in RECEIVER_MOMENTS[1:]]
MOMENTS += [("destination", moment) for moment in SENDER_MOMENTS]


class Pair:
    """Two VMMs; `strike` is called once, at `moment` of either."""

    def __init__(self, source: Caller, destination: Caller) -> None:
        self.source = source
        self.destination = destination
        self.both_ran_at: list[str] = []
        self.moment = ""
        self.strike = lambda: None
        for side in (source, destination):
            side.vmm.events.subscribe(self._hear)

    def _hear(self, event) -> None:
        if runs(self.source) and runs(self.destination):
            self.both_ran_at.append(event.event)
        if event.event == self.moment:
            self.moment = ""
            self.strike()

    def migrate(self, url: str) -> object:
        answer = self.destination.beside(
            api.vm_receive_migration, api.VmReceiveMigrationData(receiver_url=url)
        )
        support.wait.wait_until(
            lambda: "vm/migration-receive-ready" in self.destination.names() or answer.is_done,
            "the destination listens",
            timeout_s=DEADLINE_S,
        )
        self.source(api.vm_send_migration, api.VmSendMigrationData(destination_url=url))
        return answer.result()

    def wait_end_of_source(self) -> None:
        """Wait until the source's part is over: its VMM has ended, or has its VM back."""
        support.wait.wait_until(
            lambda: not self.source.vmm.is_running or has_vm_back(self.source),
            "the source's part is over",
            timeout_s=DEADLINE_S,
        )


def runs(caller: Caller) -> bool:
    machine = caller.engine.last_machine
    return machine is not None and machine.phase is Phase.RUNNING


def has_vm_back(caller: Caller) -> bool:
    try:
        caller(api.vm_counters)
    except api.ApiError:
        return False
    return True


@pytest.fixture
def pair(booted):
    destination = Caller(FakeEngine())
    yield Pair(booted, destination)
    destination.close()


@pytest.fixture(params=["unix", "tcp"])
def url(request, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return {"unix": f"unix:{tmp_path}/m", "tcp": f"tcp:127.0.0.1:{sock.getsockname()[1]}"}[request.param]


def check_one_at_most(pair: Pair) -> None:
    assert pair.both_ran_at == []
    assert not (runs(pair.source) and runs(pair.destination))


@pytest.mark.parametrize(("side", "moment"), MOMENTS)
def test_vmm_that_ends_at_a_moment_of_the_migration(pair, url, side, moment):
    ended = getattr(pair, side)
    pair.moment, pair.strike = moment, lambda: ended.vmm.exit_evt.write()

    pair.migrate(url)
    pair.wait_end_of_source()

    check_one_at_most(pair)
    if side == "destination":
        assert_not_lost(pair.source, pair.destination)


def assert_not_lost(source: Caller, destination: Caller) -> None:
    """The source has its VM, running or with a word in the log; or it had given it away before."""
    if source.vmm.is_running:
        assert runs(source) or any("call vm.resume" in text for text in source.logged), source.logged
    else:
        assert source.vmm.failure is None
        assert "vm/migration-finished" in source.names()
        assert "vm/resumed" in destination.names()


@pytest.mark.parametrize("moment", [*SENDER_MOMENTS[:6], *RECEIVER_MOMENTS[1:5]])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_machine_that_dies_at_a_moment_of_the_migration(pair, url, side, moment):
    struck = getattr(pair, side)

    def die() -> None:
        if struck.engine.last_machine is not None:
            struck.engine.last_machine.die("struck down")

    pair.moment, pair.strike = moment, die

    pair.migrate(url)
    pair.wait_end_of_source()

    check_one_at_most(pair)


@pytest.mark.parametrize("operation", ["build", "resume"])
def test_slow_destination_is_waited_for(pair, url, operation):
    pair.destination.engine.faults.set(operation, Delay(0.3))

    assert pair.migrate(url) is None
    pair.wait_end_of_source()

    check_one_at_most(pair)
    assert runs(pair.destination)
    assert pair.source.vmm.failure is None


@pytest.fixture
def surviving_pair(tmp_path, vm_config):
    """Two VMMs whose machines outlive them; `folders` are theirs."""
    sides, folders = [], {}
    for name in ("source", "destination"):
        engine = FakeEngine()
        engine.outlives_manager = True
        folders[name] = tmp_path / name
        sides.append(Caller(engine, state_dir=str(folders[name]), no_shutdown=True))
    sides[0](api.vm_create, vm_config)
    sides[0](api.vm_boot)
    pair = Pair(*sides)
    pair.folders = folders
    yield pair
    for side in sides:
        side.close()


@pytest.mark.parametrize(("side", "moment"), [("source", "snapshotted"), ("destination", "restored")])
def test_vm_stays_where_nobody_could_write_down_that_it_goes(surviving_pair, tmp_path, side, moment):
    pair, blocker = surviving_pair, surviving_pair.folders[side] / "vm.new"
    pair.moment, pair.strike = moment, blocker.mkdir

    assert isinstance(pair.migrate(f"unix:{tmp_path}/m"), api.ApiError)
    pair.wait_end_of_source()

    check_one_at_most(pair)
    assert pair.source(api.vm_info).state is api.VmState.RUNNING
    assert pair.destination.refusal(api.vm_info)[-1] == "VM is not created"
    blocker.rmdir()
