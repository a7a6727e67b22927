"""Where the bus is, and what reaches us from a peer that is no bus."""

import contextlib
import socket

import pytest
from jeepney import DBusAddress, new_method_call

from cloudvmm.dbus.bus import Bus, bus_address
from cloudvmm.dbus.error import BusLost, InvalidArgs, NoBus
from cloudvmm.dbus.message import dbus_text

ENVIRONMENT = ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS", "XDG_RUNTIME_DIR")
CALL = new_method_call(DBusAddress("/a", bus_name="a.b", interface="a.b"), "M", "ss", ("x", "y"))


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Bus(ours)) as bus:
        yield bus, theirs


@pytest.mark.parametrize(
    ("environment", "system_bus", "address"),
    [
        ({"DBUS_SESSION_BUS_ADDRESS": "unix:path=/s"}, False, "unix:path=/s"),
        ({"XDG_RUNTIME_DIR": "/run/user/1"}, False, "unix:path=/run/user/1/bus"),
        ({"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/y"}, True, "unix:path=/y"),
        ({}, True, "unix:path=/var/run/dbus/system_bus_socket"),
    ],
)
def test_address_comes_from_the_environment_or_the_usual_place(monkeypatch, environment, system_bus, address):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bus_address(system_bus=system_bus) == address


def test_session_without_any_address_is_refused(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NoBus, match="^No address of a message bus is known$"):
        bus_address(system_bus=False)


def test_messages_are_found_however_they_are_cut(ends):
    bus, theirs = ends
    raw = CALL.serialise(serial=7) * 2
    received = bus.receive()
    for at in range(0, len(raw), 16):
        theirs.sendall(raw[at : at + 16])
    assert [next(received).strings("ss") for _ in range(2)] == [("x", "y")] * 2


def test_message_of_an_unknown_kind_is_skipped(ends):
    bus, theirs = ends
    raw = CALL.serialise(serial=7)
    theirs.sendall(raw[:1] + b"\x09" + raw[2:] + raw)
    received = bus.receive()
    assert next(received) is None
    assert next(received).member == "M"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "The message bus does not speak D-Bus"),
        (b"l\1\0\1" + b"\xff" * 12, "The message bus does not speak D-Bus"),
        (b"l\1", "The message bus has closed the connection"),
    ],
)
def test_what_is_no_dbus_is_the_loss_of_the_bus(ends, raw, text):
    bus, theirs = ends
    theirs.sendall(raw)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(BusLost, match=f"^{text}$"):
        next(bus.receive())


def test_arguments_of_another_signature_are_not_even_parsed(ends):
    bus, theirs = ends
    theirs.sendall(CALL.serialise(serial=7)[:-4] + b"\xff" * 4)
    with pytest.raises(InvalidArgs, match="^M takes 's', not 'ss'$"):
        next(bus.receive()).strings("s")


def test_serials_go_round_and_leave_out_zero(ends):
    bus, _ = ends
    bus._last_serial = 0xFFFF_FFFF
    assert bus.next_serial() == 1


def test_text_becomes_what_dbus_can_carry():
    assert dbus_text("a\0\udcff") == "a\N{REPLACEMENT CHARACTER}?"
