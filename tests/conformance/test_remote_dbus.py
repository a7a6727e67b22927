"""`cloudvmm-remote` on a private bus: the same sub-commands, shown as the reference's own shows them."""

import pytest

from cloudvmm.api import VmActionPayload, VmInfoError, VmNotCreated, start_dbus_thread
from cloudvmm.cli.remote.bus import ABSENT
from cloudvmm.cli.remote.command import SUBCOMMANDS
from support.bus import FAILED, OBJECT, SERVICE, PrivateBus
from support.remote import Remote

HEAD = "Error: ch-remote exited with the following chain of errors:\n"
ADDED = '{"id":"_disk0","bdf":"0000:00:01.0"}\n'
BUS_FLAGS = ["--dbus-service-name", SERVICE, "--dbus-object-path", OBJECT]

WORDS = {
    "add-device": ["path=/sys/d"],
    "add-disk": ["path=/x,id=d"],
    "add-fs": ["tag=t,socket=/s"],
    "add-generic-vhost-user": ["device_type=26,socket=/s,queue_sizes=[1024]"],
    "add-net": ["tap=t"],
    "add-pmem": ["file=/p"],
    "add-user-device": ["socket=/s"],
    "add-vdpa": ["path=/v"],
    "add-vsock": ["cid=3,socket=/s"],
    "coredump": ["file:///c"],
    "remove-device": ["x"],
    "resize": ["--cpus", "1"],
    "resize-zone": ["--id", "z", "--size", "1G"],
    "restore": ["source_url=file:///s"],
    "receive-migration": ["receiver_url=unix:/m"],
    "send-migration": ["unix:/m"],
    "snapshot": ["file:///s"],
}
SERVED = [subcommand for subcommand in SUBCOMMANDS if subcommand.name not in ABSENT]
ANSWERING = {"counters", "info", "ping"} | {one.name for one in SERVED if one.name.startswith("add-")}


@pytest.fixture
def bus(tmp_path, monkeypatch):
    private = PrivateBus(tmp_path / "bus")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", private.address)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere/system")
    yield private
    private.close()


@pytest.fixture
def service(bus, vmm):
    running = start_dbus_thread(SERVICE, OBJECT, vmm.event, vmm.sender)
    yield running
    running.close()


@pytest.fixture
def remote(tmp_path, bus):
    return Remote(tmp_path, *BUS_FLAGS)


@pytest.mark.parametrize("subcommand", SERVED, ids=lambda subcommand: subcommand.name)
def test_every_method_is_called(subcommand, remote, service, vmm):
    outcome = remote(subcommand.name, *WORDS.get(subcommand.name, []), stdin=b"{}")
    assert (outcome.status, outcome.err) == (0, "")
    assert vmm.names() == [subcommand.api_command]
    assert bool(outcome.out) is (subcommand.name in ANSWERING)


def test_the_text_of_an_answer_is_printed(remote, service, vmm):
    assert remote("add-disk", "path=/x,id=d").out == ADDED
    assert vmm.await_request("vm.add-disk").data.id == "d"


def test_an_answer_that_is_not_there_prints_nothing(remote, service, vmm):
    vmm.answer("vm.add-disk", VmActionPayload(None))
    assert remote("add-disk", "path=/x") == (0, "", "")


def test_an_error_has_the_buses_name_and_the_outermost_text(remote, service, vmm):
    error = VmInfoError()
    error.__cause__ = VmNotCreated()
    vmm.answer("vm.info", error)
    outcome = remote("info")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.endswith(
        f"{HEAD}  0: dbus api client error\n  1: {FAILED}: The VM info is not available\n"
    )


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_the_interface_lacks_is_refused(name, remote, service):
    words = {"cancel-job": ["7"], "fork": ["/c"], "resize-disk": ["--disk", "d", "--size", "1G"]}
    outcome = remote(name, *words.get(name, []))
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.endswith(
        "Error: ch-remote exited with the following error:\n"
        f"  {name} is not available over D-Bus; use --api-socket\n"
    )


def test_descriptors_are_dropped_and_that_is_said(remote, service, vmm):
    outcome = remote("add-net", "fd=[0],num_queues=2")
    text = "warning: File descriptors cannot be passed over D-Bus; they are dropped\n"
    assert (outcome.status, outcome.out, outcome.err) == (0, ADDED, text)
    assert vmm.await_request("vm.add-net").data.fds is None


def test_a_service_that_is_not_there(remote):
    outcome = remote("ping")
    assert outcome.status == 1
    assert outcome.chain()[0] == "dbus api client error"
    assert outcome.chain()[1].startswith("org.freedesktop.DBus.Error.ServiceUnknown: ")


def test_a_wrong_option_string_is_refused_before_the_bus_is_asked(remote):
    assert remote("add-disk", "x").chain()[0] == "Error parsing disk syntax"


def test_no_bus(remote):
    outcome = remote("--dbus-system-bus", "ping")
    assert outcome == (
        1,
        "",
        "[TIME ERROR ch_remote] Error creating D-Bus proxy: dbus api client error: "
        "No such file or directory (os error 2)\n",
    )


def test_nobody_says_where_the_bus_is(remote, monkeypatch):
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert remote("ping").err.startswith("[TIME ERROR ch_remote] Error creating D-Bus proxy: ")


def test_a_name_that_cannot_be_one(tmp_path, bus):
    remote = Remote(tmp_path, "--dbus-service-name", "x", "--dbus-object-path", OBJECT)
    assert remote("ping") == (
        1,
        "",
        "[TIME ERROR ch_remote] Error creating D-Bus proxy: dbus api client error: "
        "Bus name ('x') is not valid\n",
    )


def test_timeout(tmp_path, service, vmm):
    vmm.answer("vm.boot", lambda request: None)
    outcome = Remote(tmp_path, *BUS_FLAGS, "--timeout", "0.3")("boot")
    assert outcome.status == 1
    assert outcome.chain()[0] == "dbus api client error"
    assert outcome.chain()[1].startswith("I/O error: ")
