"""`org.cloudhypervisor.DBusApi1` on a private bus, called by busctl and gdbus; the VMM thread is real.

What each method must answer is what the same command answers in process, on a second VMM that has lived
through the same.
"""

import contextlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

from cloudvmm import api
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError
from cloudvmm.control.vmm import VmmThread
from cloudvmm.dbus import NameTaken, NoBus, StartingSession
from cloudvmm.dbus.method import METHODS
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.errors import error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.events.monitor import render_event
from support.bus import (
    FAILED,
    INTERFACE,
    OBJECT,
    SERVICE,
    CallFailed,
    PrivateBus,
    dbus_monitor,
    gdbus_monitor,
    signalled,
)
from support.deadline import HOST_S
from support.leak import Holdings
from support.wait import wait_until

PROPERTIES = "org.freedesktop.DBus.Properties"
CONFIG = '{"payload":{"kernel":"/bin/true"},"cpus":{"boot_vcpus":1,"max_vcpus":2},"console":{"mode":"Null"}}'

# In this order: each method at least once, where it can work and where it cannot.
STORY = (
    ("VmmPing", None),
    ("VmInfo", None),
    ("VmBoot", None),
    ("VmCounters", None),
    ("VmCreate", "{"),
    ("VmCreate", '{"cpus":{"boot_vcpus":"one"}}'),
    ("VmCreate", CONFIG),
    ("VmCreate", CONFIG),
    ("VmInfo", None),
    ("VmAddDisk", '{"path":"/dev/null","id":"early"}'),
    ("VmRemoveDevice", '{"id":"early"}'),
    ("VmRemoveDevice", '{"id":"nobody"}'),
    ("VmBoot", None),
    ("VmInfo", None),
    ("VmAddDevice", '{"path":"/nowhere"}'),
    ("VmAddDisk", '{"path":"/dev/null"}'),
    ("VmAddFs", '{"tag":"t","socket":"/s"}'),
    ("VmAddGenericVhostUser", '{"socket":"/s","virtio_id":26,"queue_sizes":[64]}'),
    ("VmAddNet", '{"fds":[3],"tap":"t0"}'),
    ("VmAddPmem", '{"file":"/dev/null","size":2097152}'),
    ("VmAddUserDevice", '{"socket":"/s"}'),
    ("VmAddVdpa", '{"path":"/v","num_queues":1}'),
    ("VmAddVsock", '{"cid":3,"socket":"/s"}'),
    ("VmResize", '{"desired_vcpus":2}'),
    ("VmResizeZone", '{"id":"z","desired_ram":1073741824}'),
    ("VmPause", None),
    ("VmPause", None),
    ("VmSnapshot", '{"destination_url":"nonsense"}'),
    ("VmCoredump", '{"destination_url":"nonsense"}'),
    ("VmSendMigration", '{"destination_url":"nonsense"}'),
    ("VmResume", None),
    ("VmReceiveMigration", '{"receiver_url":"nonsense"}'),
    ("VmRestore", '{"source_url":"nonsense"}'),
    ("VmReboot", None),
    ("VmShutdown", None),
    ("VmBoot", None),
    ("VmPowerButton", None),  # the guest takes its time; what follows answers alike before and after
    ("VmDelete", None),
    ("VmmShutdown", None),
)


class Vmms:
    """The VMM on the bus and its twin."""

    def __init__(self, events):
        self.served = VmmThread(FakeEngine(), events=events)
        self.twin = VmmThread(FakeEngine())
        self.server = None

    def close(self):
        for vmm in (self.served, self.twin):
            vmm.exit_evt.write()
            vmm.join()
        if self.server is not None:
            assert self.server.close()
        for vmm in (self.served, self.twin):
            vmm.close()


@pytest.fixture
def bus(tmp_path, monkeypatch):
    private = PrivateBus(tmp_path / "b")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", private.address)
    yield private
    private.close()


@pytest.fixture
def vmms(bus):
    holdings = Holdings()
    events = EventHub()
    both = Vmms(events)
    with contextlib.closing(both):
        both.server = api.start_dbus_thread(
            SERVICE, OBJECT, both.served.api_evt, both.served.api_sender, events=events
        )
        yield both
    holdings.assert_nothing_added()


def in_process(vmm, member, text):
    """Return what the command of `member` gives, as D-Bus would, or the outermost text of its error."""
    command = METHODS[member].command
    try:
        data = None if text is None else form.decode(text.encode(), command.body)
        payload = api.send_request(vmm.api_evt, vmm.api_sender, command, data)
    except (api.ApiError, DecodeError) as error:
        return error_chain(error)[0]
    match payload:
        case api.Empty():
            return []
        case api.VmActionPayload():
            return [(payload.body or b"").decode()]
        case _:
            return [form.encode(payload).decode()]


def test_story_tells_every_method():
    assert {member for member, _ in STORY} == set(METHODS)


def test_methods_answer_busctl_as_the_commands_answer_in_process(bus, vmms):
    answers, wanted = [], []
    for member, text in STORY:
        wanted.append((member, in_process(vmms.twin, member, text)))
        try:
            answers.append((member, bus.call(member, text)))
        except CallFailed as error:
            answers.append((member, error.text))
    assert answers == wanted


def test_methods_answer_gdbus_as_the_commands_answer_in_process(bus, vmms):
    answers, wanted = [], []
    for member, text in STORY:
        wanted.append((member, in_process(vmms.twin, member, text)))
        try:
            result = bus.gdbus(f"{INTERFACE}.{member}", *([] if text is None else [text]))
            answers.append((member, list(result)))
        except CallFailed as error:
            assert error.name == FAILED
            answers.append((member, error.text))
    assert answers == wanted


def test_every_event_is_signalled_in_the_monitors_form(bus, vmms):
    documents = []
    vmms.served.events.subscribe(lambda event: documents.append(render_event(event).decode().rstrip("\n")))
    monitors = (gdbus_monitor(bus), dbus_monitor(bus))
    with contextlib.ExitStack() as closing:
        for monitor in monitors:
            closing.callback(monitor.close)
        for member, text in (("VmCreate", CONFIG), ("VmBoot", None), ("VmPause", None), ("VmDelete", None)):
            bus.call(member, text)
        by_gdbus = monitors[0].read_until('"deleted",\\n  "properties": null\\n}\',)')
        by_dbus_monitor = monitors[1].read_until('"deleted",\n  "properties": null\n}"')
    assert [document for document in documents if '"booted"' in document]
    assert signalled(by_gdbus) == documents[: len(signalled(by_gdbus))]
    assert all(document in by_dbus_monitor for document in signalled(by_gdbus))
    assert '"deleted"' in signalled(by_gdbus)[-1]


def test_events_from_before_the_start_are_signalled_too(bus, vmms):
    vmms.twin.events.emit("vmm", "starting")
    with contextlib.closing(dbus_monitor(bus)) as monitor:
        server = api.start_dbus_thread(
            "org.example.Twin", "/x", vmms.twin.api_evt, vmms.twin.api_sender, events=vmms.twin.events
        )
        assert '"event": "starting"' in monitor.read_until('"starting"')
        assert server.close()


def test_busctl_introspects_the_object_and_walks_to_it(bus, vmms):
    listed = bus.busctl("introspect", SERVICE, OBJECT, INTERFACE).stdout
    assert ".VmAddDisk" in listed
    assert ".Event" in listed
    assert OBJECT in bus.busctl("tree", "--list", SERVICE).stdout.split()


def test_description_lists_the_references_methods_and_no_more(bus, vmms):
    (xml,) = bus.gdbus("org.freedesktop.DBus.Introspectable.Introspect")
    methods = ElementTree.fromstring(xml).findall(f"interface[@name='{INTERFACE}']/method")
    shown = {
        method.get("name"): [(arg.get("direction"), arg.get("type")) for arg in method] for method in methods
    }
    names = {
        "VmmPing VmmShutdown VmAddDevice VmAddDisk VmAddFs VmAddGenericVhostUser VmAddNet VmAddPmem "
        "VmAddUserDevice VmAddVdpa VmAddVsock VmBoot VmCoredump VmCounters VmCreate VmDelete VmInfo VmPause "
        "VmPowerButton VmReboot VmRemoveDevice VmResize VmResizeZone VmRestore VmReceiveMigration "
        "VmSendMigration VmResume VmShutdown VmSnapshot"
    }
    assert set(shown) == set(" ".join(names).split())
    assert shown["VmAddDisk"] == [("in", "s"), ("out", "s")]
    assert shown["VmCreate"] == [("in", "s")]
    assert shown["VmCounters"] == [("out", "s")]
    assert shown["VmBoot"] == []


def test_standard_interfaces_answer(bus, vmms):
    assert bus.gdbus("org.freedesktop.DBus.Peer.Ping") == ()
    assert bus.gdbus("org.freedesktop.DBus.Peer.Ping", path="/elsewhere") == ()
    listed = bus.busctl("call", SERVICE, OBJECT, PROPERTIES, "GetAll", "s", INTERFACE)
    assert listed.stdout == "a{sv} 0\n"


@pytest.mark.parametrize(
    ("path", "method", "args", "name", "text"),
    [
        (OBJECT, f"{INTERFACE}.VmNmi", [], "UnknownMethod", "Unknown method 'VmNmi'"),
        (OBJECT, f"{INTERFACE}.Ping", [], "UnknownMethod", "Unknown method 'Ping'"),
        (OBJECT, "org.example.Other.VmBoot", [], "UnknownInterface", "Unknown interface 'org.example.Other'"),
        ("/", f"{INTERFACE}.VmBoot", [], "UnknownInterface", f"Unknown interface '{INTERFACE}'"),
        ("/elsewhere", f"{INTERFACE}.VmBoot", [], "UnknownObject", "Unknown object '/elsewhere'"),
        (OBJECT, f"{PROPERTIES}.Get", [INTERFACE, "X"], "UnknownProperty", "Unknown property 'X'"),
        (OBJECT, f"{PROPERTIES}.GetAll", ["a.b"], "UnknownInterface", "Unknown interface 'a.b'"),
        (OBJECT, f"{PROPERTIES}.Set", [INTERFACE, "X", "<1>"], "UnknownProperty", "No property can be set"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_standard_error(bus, vmms, path, method, args, name, text):
    with pytest.raises(CallFailed) as failure:
        bus.gdbus(method, *args, path=path)
    assert (failure.value.name, failure.value.text) == (f"org.freedesktop.DBus.Error.{name}", text)


def test_name_of_another_is_not_taken(bus, vmms):
    with pytest.raises(StartingSession) as failure:
        api.start_dbus_thread(SERVICE, OBJECT, vmms.twin.api_evt, vmms.twin.api_sender)
    assert isinstance(failure.value.__cause__, NameTaken)
    assert bus.call("VmmPing")


@pytest.mark.parametrize(
    ("service_name", "object_path", "text"),
    [
        ("nodots", OBJECT, "'nodots' is no well-known bus name, such as org.example.Name"),
        (SERVICE, "relative", "'relative' is no object path, such as /org/example/Name"),
        (SERVICE, "/trailing/", "'/trailing/' is no object path, such as /org/example/Name"),
        ("org.example.Forbidden", OBJECT, "Connection .* is not allowed to own the service .*"),
    ],
)
def test_name_that_the_bus_would_refuse_is_refused_at_the_start(bus, vmms, service_name, object_path, text):
    with pytest.raises(StartingSession) as failure:
        api.start_dbus_thread(service_name, object_path, vmms.twin.api_evt, vmms.twin.api_sender)
    assert re.match(text, str(failure.value.__cause__))


@pytest.mark.parametrize(
    "address", ["unix:path=/nowhere", "tcp:host=h", "nonsense", "unix:guid=1", ""], ids=str
)
def test_bus_that_is_not_there_is_refused_at_the_start(vmms, monkeypatch, address):
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(StartingSession) as failure:
        api.start_dbus_thread(SERVICE, OBJECT, vmms.twin.api_evt, vmms.twin.api_sender)
    assert isinstance(failure.value.__cause__, NoBus)


def test_system_bus_is_used_when_asked_for(bus, monkeypatch):
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS")
    vmm = VmmThread(FakeEngine())
    server = api.start_dbus_thread(SERVICE, OBJECT, vmm.api_evt, vmm.api_sender, system_bus=True)
    assert bus.call("VmmPing")
    vmm.exit_evt.write()
    vmm.join()
    assert server.close()
    vmm.close()


def test_name_is_free_again_after_the_end(bus, vmms):
    bus.call("VmmShutdown")
    vmms.served.join()
    assert vmms.server.close()
    wait_until(
        lambda: SERVICE not in bus.busctl("list", "--acquired").stdout, "the name is free", timeout_s=HOST_S
    )
