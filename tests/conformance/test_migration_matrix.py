"""The column M of the preconditions matrix (reference: rest.md section 8): each command while the VM is lent.

Two servers in this process run on the fake engine. The source's engine takes long to send, so its VM is lent
for as long as a test needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from cloudvmm.api import COMMANDS
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.form import encode
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.vmm import VmmThread
from cloudvmm.engine.fake import Delay, FakeEngine
from cloudvmm.http import start_http_path_thread
from support.rest import RestClient, request_bytes
from support.wait import wait_until

LONG_S = 60.0
SOON_S = 10.0
LENT = "VM is currently migrating and can't be modified"
UNDER_WAY = "There is already an ongoing migration"

# command, body, second sentence of the answer; the last is LENT for all of these
REFUSED = [
    ("vm.create", {"payload": {}}, "The VM could not be created"),
    ("vm.boot", None, "The VM could not boot"),
    ("vm.delete", None, "The VM could not be deleted"),
    ("vm.shutdown", None, "The VM could not shutdown"),
    ("vm.reboot", None, "The VM could not reboot"),
    ("vm.pause", None, "The VM could not be paused"),
    ("vm.resume", None, "The VM could not resume"),
    ("vm.snapshot", {"destination_url": "file:///tmp"}, "The VM could not be snapshotted"),
    ("vm.fork", {"directory": "/tmp"}, "The VM could not be forked"),
    ("vm.coredump", {"destination_url": "file:///tmp/x"}, "The VM could not be coredumped"),
    ("vm.counters", None, "The VM info is not available"),
    ("vm.power-button", None, "Error triggering power button"),
    ("vm.nmi", None, "Error triggering NMI"),
    ("vm.resize", {"desired_vcpus": 1}, "The VM could not be resized"),
    ("vm.resize-zone", {"id": "z", "desired_ram": 1}, "The memory zone could not be resized"),
    ("vm.resize-disk", {"id": "d", "desired_size": 512}, "The disk could not be resized"),
    ("vm.add-device", {"path": "/d"}, "The device could not be added to the VM"),
    ("vm.add-disk", {"path": "/d"}, "The disk could not be added to the VM"),
    ("vm.add-net", {"tap": "t"}, "The network device could not be added to the VM"),
    ("vm.add-pmem", {"file": "/d"}, "The pmem device could not be added to the VM"),
    ("vm.add-vdpa", {"path": "/d"}, "The vDPA device could not be added to the VM"),
    ("vm.add-vsock", {"cid": 3, "socket": "/s"}, "The vsock device could not be added to the VM"),
    ("vm.add-fs", {"tag": "t", "socket": "/s"}, "The fs could not be added to the VM"),
    (
        "vm.add-generic-vhost-user",
        {"socket": "/s", "device_type": 26, "queue_sizes": [64]},
        "The generic vhost-user device could not be added to the VM",
    ),
    ("vm.add-user-device", {"socket": "/s"}, "The user device could not be added to the VM"),
    ("vm.remove-device", {"id": "d"}, "The device could not be removed from the VM"),
    ("vm.restore", {"source_url": "file:///tmp"}, "The VM could not be restored"),
    ("vmm.shutdown", None, "The VMM could not shutdown"),
]

# What breaks a rule says so although the VM is lent: the rule is looked at first.
BROKEN = [
    ("vm.add-disk", {"path": "/d", "id": "__x"}, 400, "Identifier __x is not valid"),
    ("vm.add-net", {"tap": "t", "id": "__x"}, 400, "Identifier __x is not valid"),
    ("vm.add-disk", {"path": "/d", "id": "taken"}, 409, "Identifier taken is not unique"),
]


class Side:
    """A VMM, its engine and a client of its server."""

    def __init__(self, path: str) -> None:
        self.engine = FakeEngine()
        self.vmm = VmmThread(self.engine)
        self.events: list[str] = []
        self.vmm.events.subscribe(lambda event: self.events.append(event.event))
        self._server = start_http_path_thread(path, self.vmm.api_evt, self.vmm.api_sender)
        self.client = RestClient(path)

    def close(self) -> None:
        self.client.close()
        self.vmm.exit_evt.write()
        assert self.vmm.join(SOON_S)
        self._server.close(deadline_s=2.0)
        self.vmm.close()


@pytest.fixture
def sides(tmp_path) -> Iterator[tuple[Side, Side]]:
    source, destination = Side(f"{tmp_path}/source"), Side(f"{tmp_path}/destination")
    yield source, destination
    source.close()
    destination.close()


@pytest.fixture
def source(sides) -> Side:
    return sides[0]


@pytest.fixture
def lent(sides, tmp_path) -> RestClient:
    """A client of the source, whose VM is lent."""
    source, destination = sides
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "disk").write_bytes(bytes(512))
    config = VmConfig(
        payload=PayloadConfig(kernel=str(tmp_path / "kernel")),
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )
    config.memory.shared = True
    url = f"unix:{tmp_path}/migration"
    assert source.client.ask("PUT", "vm.create", encode(config)).status == 204
    disk = {"path": str(tmp_path / "disk"), "id": "taken"}
    assert source.client.ask("PUT", "vm.add-disk", disk).status == 204
    assert source.client.ask("PUT", "vm.boot").status == 204
    destination.engine.faults.set("build", Delay(LONG_S))
    body = {"receiver_url": url}
    destination.client.send(request_bytes("PUT", "/api/v1/vm.receive-migration", body))
    wait_until(
        lambda: "migration-receive-ready" in destination.events, "the destination listens", timeout_s=SOON_S
    )
    assert source.client.ask("PUT", "vm.send-migration", {"destination_url": url}).status == 204
    return source.client


def test_every_command_has_its_cell():
    tested = {command for command, *_ in REFUSED}
    answered = {"vmm.ping", "vm.info", "vm.send-migration", "vm.receive-migration"}
    answered |= {"vm.migration-progress", "vm.cancel-migration"}
    answered |= {"vmm.jobs", "vmm.cancel-job"}
    answered |= {"vm.snapshot-progress", "vm.cancel-snapshot"}  # whatever was saved before
    assert tested | answered == {command.name for command in COMMANDS}


def test_ping_is_answered(lent):
    assert lent.ask("GET", "vmm.ping").status == 200


def test_info_is_the_copy_taken_when_it_was_lent(lent):
    first = lent.ask("GET", "vm.info")
    assert (first.status, b'"state":"Running"' in first.body) == (200, True)
    assert lent.ask("GET", "vm.info").body == first.body


@pytest.mark.parametrize(("command", "body", "words"), REFUSED, ids=[command for command, *_ in REFUSED])
def test_command_is_refused_while_the_vm_is_lent(lent, command, body, words):
    reply = lent.ask("GET" if command == "vm.counters" else "PUT", command, body)

    assert (reply.status, reply.texts()) == (500, ["Error from API", words, LENT])


@pytest.mark.parametrize(("command", "body", "status", "words"), BROKEN)
def test_broken_rule_wins(lent, command, body, status, words):
    reply = lent.ask("PUT", command, body)

    assert (reply.status, reply.texts()[2:]) == (status, ["Failed to validate config", words])


def test_second_send_is_refused(lent):
    reply = lent.ask("PUT", "vm.send-migration", {"destination_url": "unix:/x"})

    assert (reply.status, reply.texts()) == (
        500,
        [
            "Error from API",
            "Error dispatching the migration worker",
            "Failed to send migratable component snapshot",
            UNDER_WAY,
        ],
    )


def test_receive_is_refused(lent):
    reply = lent.ask("PUT", "vm.receive-migration", {"receiver_url": "unix:/x"})

    assert (reply.status, reply.texts()) == (
        500,
        [
            "Error from API",
            "Error receiving migration",
            "Failed to receive migratable component snapshot",
            UNDER_WAY,
        ],
    )


def test_progress_is_told(lent):
    reply = lent.ask("GET", "vm.migration-progress")

    assert reply.status == 200
    assert b'"role":"Sender"' in reply.body


def jobs_of(client):
    return msgspec.json.decode(client.ask("GET", "vmm.jobs").body)["jobs"]


def test_it_is_a_job_that_can_be_called_off(lent):
    (sending,) = jobs_of(lent)
    assert (sending["command"], sending["state"], sending["can_cancel"]) == (
        "vm.send-migration",
        "Running",
        True,
    )

    assert lent.ask("PUT", "vmm.cancel-job", {"id": sending["id"]}).status == 204

    wait_until(lambda: jobs_of(lent) == [], "the VM is back", timeout_s=SOON_S)


def test_cancel_is_answered_at_once(lent):
    reply = lent.ask("PUT", "vm.cancel-migration")

    assert (reply.status, reply.body) == (204, b"")


def test_vmm_shutdown_is_refused_and_the_vmm_ends_all_the_same(lent, source):
    assert lent.ask("PUT", "vmm.shutdown").status == 500

    assert source.vmm.join(SOON_S)
    assert source.vmm.failure is None
    assert source.events[-3:] == ["shutdown", "deleted", "shutdown"]


def test_reboot_that_is_refused_emits_its_event(lent, source):
    lent.ask("PUT", "vm.reboot")

    assert source.events[-1] == "rebooting"
