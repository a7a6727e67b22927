"""vm.send-migration and vm.receive-migration between two VMMs on the fake engine.

`Peer` plays the other side where a test wants it to fail at a certain step.
"""

from __future__ import annotations

import os
import socket

import msgspec
import pytest

import support.wait
from cloudvmm import api
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import (
    MemoryZoneUpdate,
    MigrationMemoryMode,
    RestoredNetConfig,
    RestoredVfioConfig,
)
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineError, ImageLocked, LinkLost, NotSupportedYet, ResetRequested
from cloudvmm.engine.fake import Delay, Die, Fail, FakeEngine, Hang
from cloudvmm.engine.fake.phase import Phase
from cloudvmm.errors import error_chain
from cloudvmm.migration.error import PeerRefused
from cloudvmm.migration.link import Link
from cloudvmm.migration.listener import greet
from cloudvmm.migration.message import (
    Accept,
    Complete,
    Done,
    Hello,
    Offer,
    Ready,
    Refuse,
    Welcome,
    encode_message,
)
from support.leak import Holdings

from .conftest import DEADLINE_S, Caller
from .peer import record

LONG_S = 60.0


@pytest.fixture
def listening(other, url):
    """The other VMM, which waits for a VM."""
    other.answer = other.beside(api.vm_receive_migration, receive(url))
    other.wait_for_event("vm/migration-receive-ready")
    return other


def receive(url: str, **options) -> api.VmReceiveMigrationData:
    return api.VmReceiveMigrationData(receiver_url=url, **options)


def send(url: str, **options) -> api.VmSendMigrationData:
    return api.VmSendMigrationData(destination_url=url, **options)


def refusal_of(error: object) -> list[str]:
    assert isinstance(error, api.ApiError), error
    return error_chain(error)


def wait_until(condition, what: str) -> None:
    support.wait.wait_until(condition, what, timeout_s=DEADLINE_S)


def is_running(caller: Caller) -> bool:
    machine = caller.engine.last_machine
    return machine is not None and machine.phase is Phase.RUNNING


# The whole way


@pytest.mark.parametrize("kind", ["unix", "tcp", "tcp6"])
def test_vm_moves_and_its_old_vmm_ends(booted, other, url, kind):
    if kind != "unix":
        url = free_tcp_url("127.0.0.1" if kind == "tcp" else "::1")
    answer = other.beside(api.vm_receive_migration, receive(url))
    other.wait_for_event("vm/migration-receive-ready")
    before = booted(api.vm_info)

    booted(api.vm_send_migration, send(url))

    assert answer.result() is None
    assert booted.vmm.join(DEADLINE_S)
    assert booted.vmm.failure is None
    after = other(api.vm_info)
    assert (after.config, after.state) == (before.config, api.VmState.RUNNING)
    assert after.device_tree.keys() == before.device_tree.keys()
    assert is_running(other)
    assert not is_running(booted)


def free_tcp_url(host: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as sock:
            sock.bind((host, 0))
            port = sock.getsockname()[1]
    except OSError:
        pytest.skip(f"The address {host} is missing")
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def test_events_of_both_sides_come_at_their_moments(booted, listening, url):
    booted(api.vm_send_migration, send(url))

    assert booted.vmm.join(DEADLINE_S)
    assert booted.names()[2:] == [
        "vm/migration-started",
        "vm/migration-memory-iteration",
        "vm/pausing",
        "vm/paused",
        "vm/snapshotting",
        "vm/snapshotted",
        "vm/migration-finished",
        "vm/deleted",
        "vmm/shutdown",
    ]
    passes = [event for event in booted.events if event.event == "migration-memory-iteration"]
    assert [event.properties for event in passes] == [{"id": "0"}]
    listening.answer.result()
    assert listening.names() == [
        "vm/migration-receive-ready",
        "vm/migration-receive-started",
        "vm/restoring",
        "vm/restored",
        "vm/resuming",
        "vm/resumed",
        "vm/migration-receive-finished",
    ]


def test_guest_s_time_goes_on_where_it_stood(booted, listening, url):
    wait_until(lambda: booted.engine.last_machine.guest.tick > 20, "the guest runs")
    booted(api.vm_pause)
    tick = booted.engine.last_machine.guest.tick

    booted(api.vm_send_migration, send(url))
    listening.answer.result()

    assert listening.engine.last_machine.guest.tick == tick


def test_downtime_that_is_asked_for_reaches_the_engine(booted, listening, url, monkeypatch):
    machine, targets = booted.engine.last_machine, []
    real = machine.send
    monkeypatch.setattr(machine, "send", lambda target: targets.append(target) or real(target))

    booted(api.vm_send_migration, send(url, downtime_ms=17))

    assert listening.answer.result() is None
    assert [target.downtime_ms for target in targets] == [17]


def test_paused_vm_arrives_paused(booted, listening, url):
    booted(api.vm_pause)

    booted(api.vm_send_migration, send(url))

    assert listening.answer.result() is None
    assert listening(api.vm_info).state is api.VmState.PAUSED
    assert not is_running(listening)
    listening(api.vm_resume)
    assert "vm/pausing" not in booted.names()[booted.names().index("vm/migration-started") :]


def test_numbering_goes_on_at_the_destination(booted, listening, url, tmp_path):
    booted(api.vm_send_migration, send(url))
    listening.answer.result()
    listening(api.vm_pause)

    listening(api.vm_snapshot, api.VmSnapshotConfig(destination_url=f"file://{tmp_path}"))

    state = msgspec.json.decode((tmp_path / "state.json").read_bytes())["state"]
    assert state["vm"]["slots"] == {"__rng": 1}


def test_config_that_waited_is_overwritten(booted, other, url, vm_config):
    other(api.vm_create, VmConfig(memory=MemoryConfig(size=1 << 30)))
    answer = other.beside(api.vm_receive_migration, receive(url))
    other.wait_for_event("vm/migration-receive-ready")

    booted(api.vm_send_migration, send(url))

    assert answer.result() is None
    assert other(api.vm_info).config.memory.size == vm_config.memory.size
    assert "warn: The existing VM config will be overwritten" in other.logged


def test_preserved_source_is_paused_and_stays(caller, listening, vm_config, url):
    vm_config.memory.shared = True
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    caller(api.vm_send_migration, send(url, local=True, preserve_source=True))

    assert listening.answer.result() is None
    caller.wait_for_event("vm/migration-finished")
    wait_until(lambda: caller(api.vm_info).state is api.VmState.PAUSED, "the source is paused")
    assert caller.vmm.is_running
    caller(api.vm_delete)


def test_a_vm_goes_to_and_fro(booted, other, url):
    callers = [booted, other]
    for _ in range(3):
        source, destination = callers
        answer = destination.beside(api.vm_receive_migration, receive(url))
        destination.wait_for_event("vm/migration-receive-ready")
        source(api.vm_send_migration, send(url))
        assert answer.result() is None
        assert source.vmm.join(DEADLINE_S)
        source.close()
        callers = [destination, Caller(FakeEngine())]
    assert is_running(callers[0])
    for caller in callers:
        caller.close()


def test_receiving_removes_its_socket(booted, listening, url):
    booted(api.vm_send_migration, send(url))
    listening.answer.result()

    assert not os.path.exists(url.removeprefix("unix:"))


# What is refused before anything happens


def test_send_needs_a_vm(caller, url):
    assert caller.refusal(api.vm_send_migration, send(url)) == [
        "Error dispatching the migration worker",
        "Failed to send migratable component snapshot",
        "VM is not running",
    ]


def test_send_needs_a_vm_that_ran(caller, vm_config, url):
    vm_config.payload.kernel = "/nonexistent"
    caller(api.vm_create, vm_config)
    caller.refusal(api.vm_boot)

    assert caller.refusal(api.vm_send_migration, send(url))[-1] == "VM is not running or paused: Created"


def test_local_needs_shared_memory(booted, url):
    assert booted.refusal(api.vm_send_migration, send(url, local=True))[-1] == (
        "Local migration requires shared memory or hugepages enabled"
    )


def test_option_that_does_not_go_is_refused(booted):
    assert booted.refusal(api.vm_send_migration, send("unix:")) == [
        "Error dispatching the migration worker",
        "Failed to send migratable component snapshot",
        "Invalid send migration configuration",
        "Error validating send migration parameters: "
        "destination_url must use tcp:<host>:<port> or unix:<path>.",
    ]


def test_send_without_means_is_refused_and_the_guest_runs_on(booted):
    booted.engine.faults.set("check_postcopy", Fail(NotSupportedYet, "No means"))
    data = send("tcp:localhost:1", memory_mode=MigrationMemoryMode.POSTCOPY)

    assert booted.refusal(api.vm_send_migration, data)[-1] == "No means"
    assert is_running(booted)
    assert "vm/migration-started" not in booted.names()


def test_receive_needs_no_vm(booted, url):
    assert booted.refusal(api.vm_receive_migration, receive(url)) == [
        "Error receiving migration",
        "Failed to receive migratable component snapshot",
        "Can't receive a migration when a VM is already created",
    ]


def test_receive_of_what_does_not_go_is_refused(caller):
    assert caller.refusal(api.vm_receive_migration, receive("ftp:x")) == [
        "Error receiving migration",
        "Failed to receive migratable component snapshot",
        "Invalid receive migration configuration",
        "Expected receiver_url to either use `tcp` or `unix` prefix",
    ]


def test_receive_without_means_is_refused_before_it_listens(caller, url):
    caller.engine.faults.set("check_postcopy", Fail(NotSupportedYet, "No means"))
    data = receive(url, memory_mode=MigrationMemoryMode.POSTCOPY)

    assert caller.refusal(api.vm_receive_migration, data)[-1] == "No means"
    assert caller.names() == []


def test_receive_at_an_address_that_is_taken_is_refused_and_the_config_stays(caller, vm_config, url):
    open(url.removeprefix("unix:"), "w").close()
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_receive_migration, receive(url))[1:] == [
        "Failed to receive migratable component snapshot",
        "Error binding to UNIX socket",
        "Address already in use (os error 98)",
    ]
    assert caller(api.vm_info).state is api.VmState.CREATED


# While it goes on


@pytest.fixture
def migrating(booted, listening, url):
    """A VM that is lent: its engine takes long to send."""
    booted.engine.faults.set("send", Delay(LONG_S), times=1)
    booted(api.vm_send_migration, send(url))
    wait_until(lambda: not booted.engine.faults.has("send"), "the engine sends")
    return booted


def test_info_of_a_lent_vm_is_what_it_was(migrating):
    info = migrating(api.vm_info)

    assert info.state is api.VmState.RUNNING
    assert migrating(api.vm_info) is info
    assert migrating(api.vmm_ping).version


def test_second_send_says_that_one_is_under_way(migrating, url):
    assert migrating.refusal(api.vm_send_migration, send(url)) == [
        "Error dispatching the migration worker",
        "Failed to send migratable component snapshot",
        "There is already an ongoing migration",
    ]


def test_broken_rule_wins_over_the_migration(migrating):
    chain = migrating.refusal(api.vm_add_disk, DiskConfig(path="/d", id="__x"))
    assert chain[1] == "Failed to validate config"
    assert migrating.refusal(api.vm_add_disk, DiskConfig(path="/d"))[1:] == [
        "VM is currently migrating and can't be modified"
    ]


def test_receiver_that_waits_answers_ping_and_info(listening):
    assert listening(api.vmm_ping).version
    assert listening.refusal(api.vm_info)[-1] == "VM is not created"
    assert not listening.answer.is_done


def test_shutdown_of_a_receiver_that_waits(listening, url):
    listening(api.vmm_shutdown)

    assert refusal_of(listening.answer.result())[-1] != ""
    assert listening.vmm.join(DEADLINE_S)
    assert listening.vmm.failure is None
    assert not os.path.exists(url.removeprefix("unix:"))


def test_vmm_shutdown_while_lent_is_refused_and_ends_in_order(migrating, listening):
    assert migrating.refusal(api.vmm_shutdown) == [
        "The VMM could not shutdown",
        "VM is currently migrating and can't be modified",
    ]

    assert migrating.vmm.join(DEADLINE_S)
    assert migrating.vmm.failure is None
    assert migrating.names()[-4:] == ["vm/migration-failed", "vm/shutdown", "vm/deleted", "vmm/shutdown"]
    refusal_of(listening.answer.result())
    assert_holds_nothing(listening)


def test_signal_while_lent_ends_in_order(migrating, listening):
    migrating.vmm.exit_evt.write()

    assert migrating.vmm.join(DEADLINE_S)
    assert migrating.vmm.failure is None
    refusal_of(listening.answer.result())
    assert_holds_nothing(listening)


def test_guest_reset_while_lent_ends_the_migration_and_is_carried_out(booted, listening, url):
    booted.engine.faults.set("send", Delay(LONG_S), times=1)
    booted(api.vm_send_migration, send(url))
    first = booted.engine.last_machine

    first.guest.reset()

    booted.wait_for_event("vm/rebooted")
    assert booted.engine.last_machine is not first
    assert is_running(booted)
    assert booted(api.vm_info).state is api.VmState.RUNNING
    assert "vm/migration-failed" in booted.names()
    refusal_of(listening.answer.result())
    assert_holds_nothing(listening)


def test_guest_power_off_while_lent_ends_both(migrating, listening):
    migrating.engine.last_machine.guest.power_off()

    assert migrating.vmm.join(DEADLINE_S)
    assert migrating.vmm.failure is None
    refusal_of(listening.answer.result())
    assert_holds_nothing(listening)


def test_machine_that_dies_while_lent_is_reported(booted, listening, url):
    booted.engine.faults.set("send", Die("struck down"))

    booted(api.vm_send_migration, send(url))

    assert booted.vmm.join(DEADLINE_S)
    assert "struck down" in str(booted.vmm.failure)
    refusal_of(listening.answer.result())
    assert_holds_nothing(listening)


def assert_holds_nothing(caller: Caller) -> None:
    assert caller.refusal(api.vm_info)[-1] == "VM is not created"
    assert caller.names()[-1] == "vm/migration-receive-failed"
    assert not is_running(caller)


# Failures of the destination, seen by the source


def is_answered(caller: Caller, function) -> bool:
    try:
        caller(function)
    except api.ApiError:
        return False
    return True


def assert_goes_on(caller: Caller, words: str) -> None:
    """The migration has failed, the VM is back and runs."""
    caller.wait_for_event("vm/migration-failed")
    # Until the VM is back vm.info tells what was true before, while counters are refused.
    wait_until(lambda: is_answered(caller, api.vm_counters), "the VM is back")
    assert caller(api.vm_info).state is api.VmState.RUNNING
    assert is_running(caller)
    assert any(words in text for text in caller.logged), caller.logged
    caller(api.vm_pause)


def test_nobody_there_is_told_by_events_alone(booted, url):
    booted(api.vm_send_migration, send(url))

    assert_goes_on(booted, "Error connecting to UNIX socket: No such file or directory (os error 2)")


def test_nobody_at_a_tcp_port(booted):
    booted(api.vm_send_migration, send(free_tcp_url("127.0.0.1")))

    assert_goes_on(booted, "Error connecting to TCP socket: Connection refused (os error 111)")


def test_destination_that_hangs_up_at_once(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.control = peer.listener.accept_sender()
    peer.close()

    assert_goes_on(booted, "The other VMM closed the connection")


def test_destination_that_is_something_else(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    link = peer.control = peer.listener.accept_sender()
    with socket.socket(fileno=os.dup(link.fileno())) as sock:
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    assert_goes_on(booted, "does not speak the migration protocol")


def test_destination_that_refuses_the_offer(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.control = peer.listener.accept_sender()
    greet(peer.control)
    peer.control.receive(Offer)
    peer.control.send(Refuse(reasons=["No room", "Disk full"]))

    assert_goes_on(booted, "The other VMM refused: No room: Disk full")


def test_destination_that_is_gone_before_the_state(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.close()

    assert_goes_on(booted, "The migration failed")


def test_destination_that_is_gone_after_the_state(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.close()

    assert_goes_on(booted, "The other VMM closed the connection")


def test_destination_that_refuses_after_the_state(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.control.send(Refuse(reasons=["No"]))

    assert_goes_on(booted, "The other VMM refused: No")


def test_destination_that_refuses_to_complete(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.control.send(Ready())
    assert not peer.control.receive(Complete).is_paused
    peer.control.send(Refuse(reasons=["It does not run"]))

    assert_goes_on(booted, "It does not run")


def test_destination_that_cannot_be_told_to_complete_has_nothing(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    with socket.socket(fileno=os.dup(peer.control.fileno())) as sock:
        sock.shutdown(socket.SHUT_RD)  # as one that dies now, but no earlier
    peer.control.send(Ready())

    assert_goes_on(booted, "The other VMM closed the connection")


def test_answer_that_is_lost_leaves_the_vm_paused_and_says_what_to_do(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.control.send(Ready())
    peer.control.receive(Complete)
    peer.close()

    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "the VM is back, paused")
    assert "call vm.resume" in booted.logged[0]
    assert not is_running(booted)
    booted(api.vm_resume)
    assert is_running(booted)


def test_reset_that_is_heard_of_too_late_starts_no_second_vm(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.control.send(Ready())
    peer.control.receive(Complete)

    booted.engine.last_machine._report(ResetRequested())  # it was in the queue all the time

    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "the VM is back, paused")
    booted(api.vm_power_button)  # what was to be done before is done
    assert "vm/rebooting" not in booted.names()
    assert not is_running(booted)


def test_message_out_of_turn_is_a_failure(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.control = peer.listener.accept_sender()
    greet(peer.control)
    peer.control.receive(Offer)
    peer.control.send(Done())

    assert_goes_on(booted, "sent Done instead of Accept")


def test_paused_source_stays_paused_after_a_failure(booted, url):
    booted(api.vm_pause)
    booted(api.vm_send_migration, send(url))

    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "the VM is back")
    booted(api.vm_resume)
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_engine_that_cannot_send_gives_the_vm_back_running(booted, listening, url):
    booted.engine.faults.set("send", Fail(EngineError, "No"))

    booted(api.vm_send_migration, send(url))

    assert_goes_on(booted, "The migration failed: No")
    assert refusal_of(listening.answer.result())[1] in (
        "Failed to complete migration for migratable component",
        "Socket error",
    )
    assert_holds_nothing(listening)


def test_guest_that_stood_still_for_nothing_is_told_by_events(booted, listening, url):
    booted.engine.faults.set("send", Fail(EngineError, "No"))

    booted(api.vm_send_migration, send(url))

    booted.wait_for_event("vm/resumed")
    assert booted.names()[-5:] == [
        "vm/pausing",
        "vm/paused",
        "vm/migration-failed",
        "vm/resuming",
        "vm/resumed",
    ]


def test_vm_waits_for_its_images_where_the_other_vmm_holds_them_yet(booted, url, peer):
    booted.engine.faults.set("resume", Fail(ImageLocked), times=3)
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.close()

    booted.wait_for_event("vm/resumed")
    assert not any("stays paused" in text for text in booted.logged)
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_vm_that_cannot_go_on_stays_paused(booted, url, peer):
    booted.engine.faults.set("resume", Fail(EngineError, "No"), times=1)
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.close()

    booted.wait_for_event("vm/resuming")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "the VM is back, paused")
    assert any("The VM stays paused: No; call vm.resume" in text for text in booted.logged)
    booted(api.vm_resume)


def test_send_that_takes_too_long_is_given_up(booted, listening, url):
    booted.engine.faults.set("send", Delay(1.5))

    booted(api.vm_send_migration, send(url, timeout_s=1))

    assert_goes_on(booted, "The migration did not come to its end within 1 s")


# Failures of the source, seen by the destination


def assert_failed(listening: Caller, first: str, *words: str) -> None:
    chain = refusal_of(listening.answer.result())
    assert chain[:2] == ["Error receiving migration", first]
    assert all(any(word in text for text in chain) for word in words), chain
    assert_holds_nothing(listening)
    assert listening.vmm.is_running


ABORTED = "Failed to complete migration for migratable component"


@pytest.mark.parametrize(
    ("raw", "first", "word"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", ABORTED, "does not speak the migration protocol"),
        (b"CVMg\0\x01\0\0\xff\xff\xff\xff", ABORTED, "Hello is too large"),
        (b"CVMg\0\x63\0\0\0\0\0\0", ABORTED, "unknown message: 99"),
        (b"CVMg\0\x01\0\0\0\0\0\x02{}", ABORTED, "Hello is malformed"),
        (b"CVMg\0\x05\0\0\0\0\0\x02{}", ABORTED, "sent Ready instead of Hello"),
        (b"CVMg", "Socket error", "closed the connection"),
        (b"", "Socket error", "closed the connection"),
    ],
)
def test_stranger_is_refused_and_nothing_is_held(listening, url, raw, first, word):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(url.removeprefix("unix:"))
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)

        assert_failed(listening, first, word)


def test_sender_of_another_version_is_told(listening, peer, url):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(url.removeprefix("unix:"))
    peer.control = Link(sock, peer.cut)
    peer.control.send(Hello(program="cloudvmm 99", versions=[7, 8], role="control"))

    with pytest.raises(PeerRefused, match="speaks version 7, 8 of the migration protocol"):
        peer.control.receive(Welcome)
    assert_failed(listening, ABORTED, "Migration was aborted")


def test_receiver_that_chooses_another_version_is_left(booted, url, peer):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.control = peer.listener.accept_sender()
    peer.control.receive(Hello)
    peer.control.send(Welcome(version=7))

    booted.wait_for_event("vm/migration-failed")
    assert any("answered with version 7 of the migration protocol" in text for text in booted.logged)
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_name_of_a_sender_does_not_break_the_line(listening, url):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(url.removeprefix("unix:"))
        sock.sendall(encode_message(Hello(program="a\nb\x1b" + "c" * 500, versions=[7], role="control")))

        assert_failed(listening, ABORTED, f"The other VMM (a?b?{'c' * 76}) speaks version 7 ")


def test_offer_that_breaks_a_rule_is_refused_before_the_source_sends(listening, peer):
    peer.connect(VmConfig())

    with pytest.raises(PeerRefused, match="No bootitem provided"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED, "Migration was aborted", "Failed to validate config")


@pytest.mark.parametrize("vm", [b"[]", b"{}", b'{"slots":1}'])
def test_offer_without_a_record_is_refused(listening, peer, vm_config, vm):
    peer.connect(vm_config, vm=msgspec.Raw(vm))

    with pytest.raises(PeerRefused, match="What the VMM knew about the VM is not complete"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED)


def test_offer_of_another_engine_is_refused(listening, peer, vm_config):
    peer.connect(vm_config, engine="QEMU")

    with pytest.raises(PeerRefused, match="engine QEMU cannot be received by fake"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED)


def test_offer_that_is_no_config_is_refused(listening, peer, vm_config):
    peer.connect(vm_config, config=msgspec.Raw(b"[]"))

    with pytest.raises(PeerRefused, match="configuration is malformed"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED)


@pytest.mark.parametrize("step", ["offer", "accept", "state", "ready"])
def test_source_that_is_gone_leaves_nothing_running(listening, peer, vm_config, step):
    peer.connect(vm_config)
    if step in ("state", "ready"):
        peer.send_state(vm_config)
    elif step == "accept":
        peer.control.receive(Accept)
    if step == "ready":
        peer.control.receive(Ready)
    peer.close()

    chain = refusal_of(listening.answer.result())
    assert chain[1] in (ABORTED, "Socket error")
    assert_holds_nothing(listening)


def test_source_that_abandons_is_quoted(listening, peer, vm_config):
    peer.connect(vm_config)
    peer.control.receive(Accept)
    peer.control.send(Refuse(reasons=["Changed my mind"]))

    assert_failed(listening, ABORTED, "The other VMM refused: Changed my mind")


STRANGERS = {
    "guesses": Hello(program="p", versions=[1], role="state", token="guessed"),
    "second sender": Hello(program="p", versions=[1], role="control"),
    "refuses": Refuse(reasons=["No"]),
    "out of turn": Done(),
}


@pytest.mark.parametrize("message", STRANGERS.values(), ids=list(STRANGERS))
def test_stranger_in_place_of_the_state_is_sent_away(listening, peer, vm_config, message):
    peer.connect(vm_config)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(DEADLINE_S)
        stranger.connect(peer.url.removeprefix("unix:"))
        stranger.sendall(encode_message(message))
        assert stranger.recv(1) == b""

    peer.send_state(vm_config)
    peer.control.receive(Ready)
    peer.control.send(Complete(is_paused=True))

    peer.control.receive(Done)
    assert listening.answer.result() is None
    assert listening.engine.last_machine.guest.tick == 7


def test_source_gone_after_complete_leaves_the_vm_running_here(listening, peer, vm_config):
    listening.engine.faults.set("resume", Delay(0.2))
    peer.connect(vm_config)
    peer.send_state(vm_config)
    peer.control.receive(Ready)
    peer.control.send(Complete(is_paused=False))
    peer.close()

    assert listening.answer.result() is None
    assert is_running(listening)


def test_vm_that_does_not_run_here_is_dropped_before_the_source_is_told(listening, peer, vm_config):
    listening.engine.faults.set("resume", Fail(EngineError, "No"))
    peer.connect(vm_config)
    peer.send_state(vm_config)
    peer.control.receive(Ready)
    peer.control.send(Complete(is_paused=False))

    with pytest.raises(PeerRefused):
        peer.control.receive(Done)
    assert listening.engine.last_machine.phase is Phase.GONE
    assert_failed(listening, ABORTED, "Cannot resume VM")


def test_vm_whose_end_is_not_certain_is_not_given_back(booted, listening, url):
    listening.engine.faults.set("resume", Fail(EngineError, "No"))
    listening.engine.faults.set("close", Fail(EngineError, "It does not end"))

    booted(api.vm_send_migration, send(url))

    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "the VM is back, paused")
    assert "call vm.resume" in booted.logged[0]
    assert "vm/resuming" not in booted.names()
    listening.engine.faults.clear("close")
    refusal_of(listening.answer.result())


def test_engine_that_cannot_build_is_told_to_the_source(booted, listening, url):
    listening.engine.faults.set("build", Fail(LinkLost, "No room"))

    booted(api.vm_send_migration, send(url))

    assert_goes_on(booted, "No room")
    assert_failed(listening, ABORTED, "Failed to restore migratable component", "No room")


@pytest.mark.parametrize("operation", ["build", "resume"])
def test_shutdown_of_the_destination_at_work(booted, listening, url, operation):
    listening.engine.faults.set(operation, Hang())
    booted(api.vm_send_migration, send(url))
    listening.wait_for_event("vm/restoring" if operation == "build" else "vm/resuming")

    listening(api.vmm_shutdown)

    refusal_of(listening.answer.result())
    assert listening.vmm.join(DEADLINE_S)
    booted.wait_for_event("vm/migration-failed")
    assert not is_running(listening)
    wait_until(lambda: booted(api.vm_info).state is api.VmState.RUNNING, "the VM is back and runs")
    assert any("The other VMM refused" in text for text in booted.logged), booted.logged


@pytest.mark.parametrize("slots", [{"__rng": 99}, {"__rng": 1, "other": 1}, {"__rng": -1}])
def test_offer_with_slots_that_cannot_be_is_refused(listening, peer, vm_config, slots):
    peer.connect(vm_config, vm=record(slots=slots))

    with pytest.raises(PeerRefused, match="PCI slots that they cannot have"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED, "Migration was aborted")


def test_offer_that_lacks_a_device_of_its_config_is_refused(listening, peer, vm_config):
    peer.connect(vm_config, vm=record(slots={}))

    with pytest.raises(PeerRefused, match="devices that the saved state lacks: __rng"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED, "Migration was aborted")


def test_offer_with_descriptors_cannot_be_had(listening, peer, vm_config):
    vm_config.net = [NetConfig(id="n0", fds=[7])]
    peer.connect(vm_config, vm=record(slots={"__rng": 1, "n0": 2}))

    with pytest.raises(PeerRefused, match="Failed to validate config"):
        peer.control.receive(Accept)
    assert_failed(listening, ABORTED)


# What the receiver replaces


def test_zone_update_of_a_received_vm(caller, other, vm_config, url):
    vm_config.memory = MemoryConfig(size=0, zones=[MemoryZoneConfig(id="z0", size=1 << 28)])
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    data = receive(url, zone_updates=[MemoryZoneUpdate(id="z0", host_numa_node=3)])
    answer = other.beside(api.vm_receive_migration, data)
    other.wait_for_event("vm/migration-receive-ready")

    caller(api.vm_send_migration, send(url))

    assert answer.result() is None
    assert other(api.vm_info).config.memory.zones[0].host_numa_node == 3


def test_zone_update_that_does_not_fit_is_refused(booted, other, url):
    data = receive(url, zone_updates=[MemoryZoneUpdate(id="z0", host_numa_node=3)])
    other.answer = other.beside(api.vm_receive_migration, data)
    other.wait_for_event("vm/migration-receive-ready")

    booted(api.vm_send_migration, send(url))

    assert_goes_on(booted, "No zones specified in original config")
    assert_failed(other, ABORTED, "Error applying memory zone updates")


def with_net(caller, vm_config) -> None:
    """Boot a VM whose network device has descriptors."""
    vm_config.net = [NetConfig(id="n0", num_queues=2, fds=[os.open("/dev/null", os.O_RDWR)])]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)


def test_network_device_gets_new_descriptors(caller, other, vm_config, url):
    with_net(caller, vm_config)
    fd = os.open("/dev/null", os.O_RDWR)
    nets = [RestoredNetConfig(id="n0", num_fds=1, fds=[fd])]
    answer = other.beside(api.vm_receive_migration, receive(url, net_fds=nets))
    other.wait_for_event("vm/migration-receive-ready")

    caller(api.vm_send_migration, send(url))

    assert answer.result() is None
    assert other(api.vm_info).config.net[0].fds == [fd]
    other(api.vm_delete)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("net_id", "count", "words"),
    [
        (None, 0, "Net id n0 is associated with FDs and is required"),
        ("n0", 2, "Number of Net FDs passed for 'n0' during Restore: 2. Expected: 1"),
    ],
)
def test_network_device_without_its_descriptors_is_refused(
    caller, other, vm_config, url, net_id, count, words
):
    with_net(caller, vm_config)
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
    nets = [] if net_id is None else [RestoredNetConfig(id=net_id, num_fds=count, fds=fds)]
    answer = other.beside(api.vm_receive_migration, receive(url, net_fds=nets))
    other.wait_for_event("vm/migration-receive-ready")

    caller(api.vm_send_migration, send(url))

    assert refusal_of(answer.result())[-2:] == ["Failed to validate config", words]
    assert_goes_on(caller, words)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_descriptors_that_nothing_needs_are_refused_and_closed(booted, other, url):
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(2)]
    data = receive(url, vfio_fds=[RestoredVfioConfig(id="v", fd=fds[0])], iommufd_fd=fds[1])
    other.answer = other.beside(api.vm_receive_migration, data)
    other.wait_for_event("vm/migration-receive-ready")

    booted(api.vm_send_migration, send(url))

    assert_goes_on(booted, "requires `iommufd=on`")
    assert_failed(other, ABORTED)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


# What is left


@pytest.mark.parametrize("fault", [None, Fail(EngineError, "No")])
def test_nothing_is_left_of_a_migration_and_its_vmms(vm_config, url, fault):
    holdings = Holdings()
    source, destination = Caller(FakeEngine()), Caller(FakeEngine())
    destination.engine.faults.set("resume", fault or Delay(0))
    source(api.vm_create, vm_config)
    source(api.vm_boot)
    answer = destination.beside(api.vm_receive_migration, receive(url))
    destination.wait_for_event("vm/migration-receive-ready")

    source(api.vm_send_migration, send(url))
    answer.result()

    source.close()
    destination.close()
    holdings.assert_nothing_added()


def test_journal_knows_that_a_migration_is_under_way_and_how_it_ended(vm_config, url, tmp_path):
    caller = Caller(FakeEngine(), state_dir=str(tmp_path / "state"))
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    caller(api.vm_send_migration, send(url))

    caller.wait_for_event("vm/migration-failed")
    caller.close()
    lines = (tmp_path / "state" / "journal").read_bytes().splitlines()
    entries = [msgspec.json.decode(line) for line in lines]
    ours = [entry for entry in entries if entry["command"] == "outgoing migration"]
    assert [entry["phase"] for entry in ours] == ["begin", "failed"]
    assert ours[1]["errors"][0] == "Error connecting to UNIX socket"
