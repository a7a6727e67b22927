"""Limits on an interface, in a network namespace of their own: made whole, taken away, refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from cloudvmm.host.limit import Bucket, Limit, LimitError, NoTrafficControl, TrafficControlInUse, clear
from support.namespace import network_namespace, open_tap, run

pytestmark = pytest.mark.root

BUCKET = Bucket(bytes_per_s=1 << 20, size_bytes=200_000)


@pytest.fixture
def tap() -> Iterator[str]:
    with network_namespace():
        (fd,) = open_tap("t0")
        run("ip link set t0 up")
        yield "t0"
        os.close(fd)


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def helper() -> str:
    return f"cvlim{socket.if_nametoindex('t0')}"


def test_limit_is_in_both_directions_and_goes_without_a_trace(tap):
    before = run("tc qdisc show"), interfaces()
    limit = Limit(tap, BUCKET)
    shown = run("tc qdisc show")
    assert shown.count("tbf") == 2
    assert "rate 8388Kbit" in shown
    assert helper() in run("tc filter show dev t0 ingress")
    limit.close()
    assert run("tc qdisc show dev t0").split()[1] == "pfifo_fast"
    assert run("tc filter show dev t0 ingress") == ""
    assert interfaces() == before[1]
    limit.close()


def test_frame_can_count_as_more_than_it_has(tap):
    limit = Limit(tap, Bucket(bytes_per_s=1000, size_bytes=1000, least_bytes=500))
    assert run("tc -details qdisc show dev t0").count("mpu 500b") == 1
    limit.close()


def test_what_a_killed_manager_left_is_cleared_away(tap):
    Limit(tap, BUCKET)
    run("ip link add cvlim4711 type ifb")
    limit = Limit(tap, Bucket(bytes_per_s=1 << 21, size_bytes=200_000))
    assert "rate 16777Kbit" in run("tc qdisc show dev t0")
    assert interfaces() == ["lo", "t0", helper()]
    limit.close()


def test_what_a_killed_manager_left_is_cleared_from_an_interface_without_a_limit(tap):
    before = run("tc qdisc show dev t0").split()[1], interfaces()
    clear(tap)
    Limit(tap, BUCKET)
    clear(tap)
    clear("t1")
    assert (run("tc qdisc show dev t0").split()[1], interfaces()) == before


def test_clearing_leaves_the_traffic_control_of_others(tap):
    run("tc qdisc add dev t0 root pfifo")
    before = run("tc qdisc show dev t0")
    clear(tap)
    assert run("tc qdisc show dev t0") == before


@pytest.mark.parametrize("where", ["ingress", "root pfifo"])
def test_traffic_control_of_others_stays_and_is_in_the_way(tap, where):
    run(f"tc qdisc add dev t0 {where}")
    before = run("tc qdisc show dev t0")
    with pytest.raises(TrafficControlInUse, match="t0 has a traffic control of its own"):
        Limit(tap, BUCKET)
    assert run("tc qdisc show dev t0") == before
    assert interfaces() == ["lo", "t0"]


def test_interface_that_is_not_there_is_refused(tap):
    with pytest.raises(LimitError, match="There is no interface t1"):
        Limit("t1", BUCKET)


def test_missing_program_names_its_package(tap, monkeypatch):
    monkeypatch.setattr("cloudvmm.host.limit._FOLDERS", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoTrafficControl, match="There is no program tc on this host: install the package"):
        Limit(tap, BUCKET)
