"""The D-Bus front end under clients, and a bus, that misbehave; before a VMM thread that follows a script."""

import contextlib
import os
import signal

import pytest
from jeepney import DBusAddress, HeaderFields, MessageFlag, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, prep_socket
from jeepney.low_level import Header

from cloudvmm import api
from cloudvmm.api import Effect, Empty
from cloudvmm.dbus.bus import HEAD_LIMIT_BYTES
from cloudvmm.dbus.message import BODY_LIMIT_BYTES
from cloudvmm.dbus.server import MAX_CALLS
from cloudvmm.events.hub import KEPT_EVENTS, EventHub
from support.bus import FAILED, INTERFACE, OBJECT, SERVICE, CallFailed, PrivateBus, gdbus_monitor
from support.deadline import HOST_S
from support.leak import Holdings
from support.rest import ScriptedVmm
from support.wait import wait_until

API = DBusAddress(OBJECT, bus_name=SERVICE, interface=INTERFACE)
INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"


class Served:
    """A scripted VMM on a private bus."""

    def __init__(self, folder):
        self.bus = PrivateBus(folder)
        self.vmm = ScriptedVmm()
        self.events = EventHub()
        self.log = []
        self.server = None
        self._clients = []

    def client(self):
        """Return a raw client, closed at the end of the test."""
        connected = DBusConnection(prep_socket(self.bus.address.removeprefix("unix:path=")))
        self._clients.append(connected)
        return connected

    def close(self):
        for connected in self._clients:
            connected.close()
        self.vmm.leave()
        self.server.close(deadline_s=1.0)
        self.vmm.close()
        self.bus.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    holdings = Holdings()
    both = Served(tmp_path / "b")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", both.bus.address)
    with contextlib.closing(both):
        both.server = api.start_dbus_thread(
            SERVICE,
            OBJECT,
            both.vmm.event,
            both.vmm.sender,
            events=both.events,
            log=lambda level, text: both.log.append((level, text)),
        )
        yield both
    holdings.assert_nothing_added()


def call(member, signature=None, body=()):
    return new_method_call(API, member, signature, body)


def error_of(reply):
    assert reply.header.message_type is MessageType.error
    return reply.header.fields[HeaderFields.error_name]


def next_reply(client):
    """Return the next message that is no signal; the bus greets each client with one."""
    while (message := client.receive(timeout=30)).header.message_type is MessageType.signal:
        pass
    return message


def hold(served, name):
    """Let the VMM thread take the command `name` and not answer it."""
    served.vmm.answer(name, lambda _request: None)


@pytest.mark.parametrize(
    ("member", "signature", "body"),
    [
        ("VmBoot", "s", ("{}",)),
        ("VmmPing", "u", (1,)),
        ("VmCreate", None, ()),
        ("VmCreate", "i", (5,)),
        ("VmCreate", "ss", ("{}", "{}")),
        ("VmCreate", "as", (["{}"],)),
        ("VmCreate", "v", (("s", "{}"),)),
        ("VmCreate", "ay", (b"{}" * 1_000_000,)),
        ("VmCreate", "a(yv)", ([(1, ("s", "x"))] * 20_000,)),
    ],
)
def test_arguments_of_another_type_are_invalid(served, member, signature, body):
    reply = served.client().send_and_get_reply(call(member, signature, body), timeout=30)
    assert error_of(reply) == INVALID_ARGS
    assert served.vmm.names() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        '{"payload":{"kernel":"\\u0000"},"cpus":{"boot_vcpus":"\\u0000"}}',
        '{"memory":{"size":"' + "\U0001f600" * 1000 + '"}}',
        '{"payload":' + " " * 4_000_000,
    ],
    ids=["empty", "null", "deep", "nul", "emoji", "long"],
)
def test_text_that_is_no_config_is_refused_in_words(served, text):
    client = served.client()
    reply = client.send_and_get_reply(call("VmCreate", "s", (text,)), timeout=30)
    assert error_of(reply) == FAILED
    assert reply.body[0]
    assert (
        client.send_and_get_reply(call("VmmPing"), timeout=30).header.message_type
        is MessageType.method_return
    )


@pytest.mark.parametrize("size", [BODY_LIMIT_BYTES + HEAD_LIMIT_BYTES, 30_000_000])
def test_text_that_is_too_long_is_not_kept(served, size):
    client = served.client()
    reply = client.send_and_get_reply(call("VmCreate", "s", ("x" * size,)), timeout=30)
    assert error_of(reply) == "org.freedesktop.DBus.Error.LimitsExceeded"
    assert reply.body == ("The arguments of VmCreate are longer than 4194304 bytes",)
    assert (
        client.send_and_get_reply(call("VmmPing"), timeout=30).header.message_type
        is MessageType.method_return
    )


def test_long_config_arrives_whole(served):
    cmdline = "x" * 4_000_000
    text = f'{{"payload":{{"kernel":"/k","cmdline":"{cmdline}"}}}}'
    served.client().send_and_get_reply(call("VmCreate", "s", (text,)), timeout=30)
    assert served.vmm.await_request("vm.create").data.payload.cmdline == cmdline


def test_descriptors_in_json_are_dropped(served):
    served.client().send_and_get_reply(call("VmAddNet", "s", ('{"fds":[0,1],"tap":"t"}',)), timeout=30)
    assert served.vmm.await_request("vm.add-net").data.fds is None


def test_descriptor_beside_a_call_does_not_reach_us(served):
    path = served.bus.address.removeprefix("unix:path=")
    with DBusConnection(prep_socket(path, enable_fds=True), enable_fds=True) as client:
        reply = client.send_and_get_reply(call("VmCreate", "h", (0,)), timeout=30)
    assert error_of(reply) == "org.freedesktop.DBus.Error.NotSupported"
    assert served.bus.call("VmmPing")


def test_text_of_an_error_never_breaks_the_bus_rules(served):
    served.vmm.answer("vm.boot", api.VmBootError("a\0b \udcff"))
    with pytest.raises(CallFailed) as failure:
        served.bus.gdbus(f"{INTERFACE}.VmBoot")
    assert failure.value.text == "a\N{REPLACEMENT CHARACTER}b ?"
    assert served.bus.call("VmmPing")


def test_long_command_keeps_nobody_waiting(served):
    hold(served, "vm.snapshot")
    client = served.client()
    serial = next(client.outgoing_serial)
    client.send(call("VmSnapshot", "s", ('{"destination_url":"file:///d"}',)), serial=serial)
    request = served.vmm.await_request("vm.snapshot")
    assert served.bus.call("VmmPing")
    assert client.send_and_get_reply(call("VmInfo"), timeout=30).body[0].startswith('{"config"')
    request.reply.send(Empty())
    reply = next_reply(client)
    assert reply.header.fields[HeaderFields.reply_serial] == serial
    assert reply.header.message_type is MessageType.method_return


def test_answers_in_any_order_find_their_calls(served):
    waiting = {}
    for name in ("vm.boot", "vm.pause", "vm.resume"):
        served.vmm.answer(name, lambda request: waiting.__setitem__(request.name, request.reply))
    client = served.client()
    serials = {}
    for member, name in (("VmBoot", "vm.boot"), ("VmPause", "vm.pause"), ("VmResume", "vm.resume")):
        serials[name] = next(client.outgoing_serial)
        client.send(call(member), serial=serials[name])
    wait_until(lambda: len(waiting) == 3, "all three are under way", timeout_s=HOST_S)
    for name in ("vm.resume", "vm.boot", "vm.pause"):
        waiting[name].send(Empty())
        reply = next_reply(client)
        assert reply.header.fields[HeaderFields.reply_serial] == serials[name]


def test_too_many_calls_under_way_are_refused_and_reads_still_answered(served):
    hold(served, "vm.pause")
    client = served.client()
    for _ in range(MAX_CALLS[Effect.CHANGES]):
        client.send(call("VmPause"))
    reply = client.send_and_get_reply(call("VmPause"), timeout=30)
    assert error_of(reply) == "org.freedesktop.DBus.Error.LimitsExceeded"
    assert (
        client.send_and_get_reply(call("VmmPing"), timeout=30).header.message_type
        is MessageType.method_return
    )


def test_many_clients_at_once_each_get_their_own_answer(served):
    clients = [served.client() for _ in range(40)]
    serials = []
    for client in clients:
        serials.append([next(client.outgoing_serial) for _ in range(5)])
        for serial in serials[-1]:
            client.send(call("VmmPing"), serial=serial)
    for client, sent in zip(clients, serials, strict=True):
        replies = [next_reply(client) for _ in sent]
        assert sorted(reply.header.fields[HeaderFields.reply_serial] for reply in replies) == sent
        assert {reply.header.message_type for reply in replies} == {MessageType.method_return}


def test_client_that_leaves_during_its_call_harms_nobody(served):
    hold(served, "vm.boot")
    left = served.bus.spawn_busctl("VmBoot")
    request = served.vmm.await_request("vm.boot")
    left.kill()
    left.communicate()
    request.reply.send(Empty())
    assert served.bus.call("VmmPing")
    assert served.log == []


def test_call_without_reply_is_carried_out_and_not_answered(served):
    client = served.client()
    message = call("VmBoot")
    message.header.flags |= MessageFlag.no_reply_expected
    client.send(message)
    served.vmm.await_request("vm.boot")
    ping = next(client.outgoing_serial)
    client.send(call("VmmPing"), serial=ping)
    assert next_reply(client).header.fields[HeaderFields.reply_serial] == ping


def test_call_that_names_no_interface_finds_the_method(served):
    reply = served.client().send_and_get_reply(
        new_method_call(DBusAddress(OBJECT, bus_name=SERVICE), "VmBoot"), timeout=30
    )
    assert reply.header.message_type is MessageType.method_return


def test_header_that_nobody_knows_is_ignored(served, monkeypatch):
    client = served.client()
    monkeypatch.setattr(Header, "serialise", _with_unknown_field(Header.serialise))
    client.send(call("VmmPing"))
    monkeypatch.undo()
    assert served.client().send_and_get_reply(call("VmmPing"), timeout=30)


def test_lost_bus_is_logged_and_the_vmm_goes_on(served):
    served.bus.daemon.terminate()
    wait_until(lambda: served.log, "the loss is logged", timeout_s=HOST_S)
    assert served.log[0] == (
        "error",
        "The D-Bus API is gone, the VM is not: The message bus has closed the connection",
    )
    served.events.emit("vm", "paused")
    assert api.vmm_ping(served.vmm.event, served.vmm.sender).version
    assert served.server.close()


def test_bus_that_stands_still_blocks_neither_events_nor_the_end(served):
    os.kill(served.bus.daemon.pid, signal.SIGSTOP)
    for _ in range(2 * KEPT_EVENTS):
        served.events.emit("vm", "paused", {"id": "x" * 100})
    assert not served.server.close(deadline_s=0.2)
    os.kill(served.bus.daemon.pid, signal.SIGCONT)


def test_events_that_a_slow_bus_missed_are_counted_and_the_newest_still_come(served):
    with contextlib.closing(gdbus_monitor(served.bus)) as monitor:
        os.kill(served.bus.daemon.pid, signal.SIGSTOP)
        for number in range(3 * KEPT_EVENTS):
            served.events.emit("vm", "paused", {"id": f"{number}-" + "x" * 100})
        os.kill(served.bus.daemon.pid, signal.SIGCONT)
        served.events.emit("vm", "last")
        monitor.read_until('"event": "last"')
    assert served.log[0][0] == "warn"
    assert "events are lost to it" in served.log[0][1]


def test_vmm_thread_that_has_ended_is_told(served):
    served.vmm.leave()
    with pytest.raises(CallFailed) as failure:
        served.bus.gdbus(f"{INTERFACE}.VmBoot")
    assert failure.value.name == FAILED


def _with_unknown_field(serialise):
    """Add a header field of code 200, which the specification wants ignored."""

    def wrapped(header, serial=None):
        raw = serialise(header, serial)
        length = int.from_bytes(raw[12:16], "little")
        pad = -len(raw) % 8
        field = bytes((200, 1)) + b"y\0" + b"\1"
        return raw[:12] + (length + pad + len(field)).to_bytes(4, "little") + raw[16:] + bytes(pad) + field

    return wrapped
