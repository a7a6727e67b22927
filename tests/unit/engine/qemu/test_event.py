"""What QEMU's events mean to the seam."""

from __future__ import annotations

import os
import select
import signal
import socket

import msgspec
import pytest

from cloudvmm.config.cpu import CpusConfig
from cloudvmm.engine.base import (
    BalloonChanged,
    DeviceRemoved,
    Exited,
    GuestPanicked,
    HelperEnded,
    MemoryPassSent,
    ModuleTaken,
    PciChanged,
    PoweredOff,
    RemovalRefused,
    ResetRequested,
    ResizeRefused,
    VcpusChanged,
    ZoneChanged,
)
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.codec import Event
from cloudvmm.engine.qemu.companion import Companion
from cloudvmm.engine.qemu.event import EventStream, translate
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.parts import Command
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec
from cloudvmm.engine.qemu.qmp import QmpClient
from cloudvmm.engine.qemu.vcpu import Vcpus

LONG_S = 20.0
REMAINS = {
    "disk": [Command("blockdev-del", {"node-name": "ddisk"}), Command("remove-fd", {"fdset-id": 4})],
    "net": [Command("netdev_del", {"id": "net.dnet"})],
    "rng": [],
}


def ost(slot_type, *, device, status=0, source=1):
    info = {"device": device, "slot": "0", "slot-type": slot_type, "source": source, "status": status}
    return {"info": info}


@pytest.mark.parametrize(
    ("name", "data", "event"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "guest-reset"}, ResetRequested()),
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, PoweredOff()),
        ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}, PoweredOff()),
        ("SHUTDOWN", {"guest": False, "reason": "host-signal"}, None),
        ("WATCHDOG", {"action": "pause"}, ResetRequested(by_watchdog=True)),
        ("GUEST_PANICKED", {"action": "run"}, GuestPanicked("panic")),
        ("GUEST_CRASHLOADED", {"action": "run"}, GuestPanicked("crash_loaded")),
        ("MIGRATION_PASS", {"pass": 1}, MemoryPassSent(0)),
        ("MEMORY_DEVICE_SIZE_CHANGE", {"id": "dz", "size": 4096, "qom-path": "/z"}, ZoneChanged("z", 4096)),
        ("MEMORY_DEVICE_SIZE_CHANGE", {"size": 4096, "qom-path": "/z"}, None),
        ("BALLOON_CHANGE", {"actual": 4096}, BalloonChanged(4096)),
        ("DEVICE_DELETED", {"device": "d0", "path": "/machine/peripheral/d0"}, PciChanged()),
        (
            "DEVICE_UNPLUG_GUEST_ERROR",
            {"device": "d0", "path": "/machine/peripheral/d0"},
            RemovalRefused("0"),
        ),
        ("DEVICE_UNPLUG_GUEST_ERROR", {"path": "/machine/unattached/device[1]"}, None),
        ("ACPI_DEVICE_OST", ost("DIMM", device="module3"), ModuleTaken(3)),
        ("ACPI_DEVICE_OST", ost("DIMM", device="module3", status=1), ResizeRefused("modules")),
        ("ACPI_DEVICE_OST", ost("DIMM", device="other"), None),
        ("ACPI_DEVICE_OST", ost("CPU", device="cpu-0-1-0"), None),
        ("STOP", {}, None),
        ("SOMETHING_NEW", {"x": 1}, None),
    ],
)
def test_translation(name, data, event):
    assert translate(Event(name, data)) == event


@pytest.fixture
def process():
    process = ChildProcess(ProcessSpec(["/bin/sleep", "300"]))
    yield process
    process.close()


@pytest.fixture
def far_and_stream(process):
    near, far = socket.socketpair()
    client = QmpClient(near)
    vcpus = Vcpus(
        client,
        CpusConfig(boot_vcpus=2, max_vcpus=2),
        QemuFacts(binary="/qemu", version=(10, 0, 0)),
        pid=process.pid,
    )
    stream = EventStream(client, process, remains_of=REMAINS.get, vcpus=vcpus)
    with far:
        yield far, stream
    stream.close()
    client.close()


def say(far, name, **data):
    far.sendall(msgspec.json.encode({"event": name, "data": data}) + b"\r\n")


def readable(stream, timeout_s=0.0):
    return bool(select.select([stream], [], [], timeout_s)[0])


def take_until_exited(stream):
    events = []
    while not any(isinstance(event, Exited) for event in events):
        assert readable(stream, LONG_S)
        events += stream.take()
    return events


def test_nothing_to_take_is_not_readable(far_and_stream):
    _, stream = far_and_stream

    assert not readable(stream)
    assert stream.take() == []


def test_events_come_in_order_and_once(far_and_stream):
    far, stream = far_and_stream
    say(far, "GUEST_PANICKED", action="run")
    say(far, "STOP")
    say(far, "SHUTDOWN", guest=True, reason="guest-reset")

    assert readable(stream, LONG_S)
    assert stream.take() == [GuestPanicked("panic"), ResetRequested()]
    assert not readable(stream)


def test_end_of_the_process_is_the_last_event_and_leaves_nothing_readable(far_and_stream, process):
    far, stream = far_and_stream
    say(far, "SHUTDOWN", guest=True, reason="guest-shutdown")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout_s=LONG_S)

    assert take_until_exited(stream) == [PoweredOff(), Exited("QEMU was killed by signal 9 (SIGKILL)")]
    assert not readable(stream)
    assert stream.take() == []


def test_closed_monitor_is_no_end_by_itself(far_and_stream):
    far, stream = far_and_stream
    far.close()

    assert stream.take() == []
    assert not readable(stream)


def test_garbage_ends_the_process(far_and_stream):
    far, stream = far_and_stream
    far.sendall(b"no QMP\n")

    assert take_until_exited(stream) == [Exited("QEMU was killed by signal 9 (SIGKILL)")]


@pytest.mark.parametrize(
    ("name", "data"),
    [("MIGRATION_PASS", {}), ("ACPI_DEVICE_OST", {})],
)
def test_event_without_what_belongs_to_it_ends_the_process(far_and_stream, name, data):
    far, stream = far_and_stream
    say(far, name, **data)

    (exited,) = take_until_exited(stream)
    assert exited.reason.startswith("QEMU told of something without what belongs to it: KeyError")


def test_expected_end_is_no_event(far_and_stream, process):
    _, stream = far_and_stream
    stream.expect_end()
    process.kill()
    process.wait(timeout_s=LONG_S)

    assert stream.take() == []
    assert not readable(stream)


def answer_status(far, status):
    """Take the question that a stop leads to, and answer it."""
    question = msgspec.json.decode(far.recv(4096))
    assert question["execute"] == "query-status"
    answer = {"return": {"status": status, "running": False}, "id": question["id"]}
    far.sendall(msgspec.json.encode(answer) + b"\r\n")


def test_stop_by_an_internal_error_ends_the_guest(far_and_stream):
    far, stream = far_and_stream
    far.settimeout(LONG_S)
    say(far, "STOP")
    assert stream.take() == []
    answer_status(far, "internal-error")

    assert take_until_exited(stream) == [Exited("QEMU cannot go on with the guest: internal-error")]


def test_stop_for_another_reason_is_left_alone(far_and_stream, process):
    far, stream = far_and_stream
    far.settimeout(LONG_S)
    say(far, "STOP")
    assert stream.take() == []
    answer_status(far, "paused")
    say(far, "GUEST_PANICKED", action="run")

    assert readable(stream, LONG_S)
    assert stream.take() == [GuestPanicked("panic")]
    assert not process.has_ended()


def test_status_that_cannot_be_asked_for_keeps_nobody_waiting(far_and_stream):
    far, stream = far_and_stream
    say(far, "STOP")
    far.shutdown(socket.SHUT_RD)

    assert stream.take() == []


def delete(far, qdev_id):
    """Say that a device is gone as QEMU does: first a part of it, which has no name."""
    say(far, "DEVICE_DELETED", path=f"/machine/peripheral/{qdev_id}/virtio-backend")
    say(far, "DEVICE_DELETED", device=qdev_id, path=f"/machine/peripheral/{qdev_id}")


def read_commands(far, count):
    data = b""
    while data.count(b"\n") < count:
        data += far.recv(4096)
    return [msgspec.json.decode(line) for line in data.splitlines()]


def test_removal_is_told_once_what_is_left_of_the_device_is_taken_away(far_and_stream):
    far, stream = far_and_stream
    far.settimeout(LONG_S)
    delete(far, "ddisk")
    assert stream.take() == [PciChanged(), PciChanged()]
    commands = read_commands(far, 2)
    assert [(each["execute"], each["arguments"]) for each in commands] == [
        ("blockdev-del", {"node-name": "ddisk"}),
        ("remove-fd", {"fdset-id": 4}),
    ]
    answers = [{"return": {}, "id": each["id"]} for each in commands]
    far.sendall(msgspec.json.encode(answers[0]) + b"\r\n")
    assert readable(stream, LONG_S)
    assert stream.take() == []
    far.sendall(msgspec.json.encode(answers[1]) + b"\r\n")
    assert readable(stream, LONG_S)
    assert stream.take() == [DeviceRemoved("disk")]


def test_removal_is_told_where_there_is_nothing_left_to_take_away(far_and_stream):
    far, stream = far_and_stream
    far.settimeout(LONG_S)
    delete(far, "dnet")
    assert stream.take() == [PciChanged(), PciChanged()]
    (command,) = read_commands(far, 1)
    error = {"class": "DeviceNotFound", "desc": "Device 'net.dnet' not found"}
    far.sendall(msgspec.json.encode({"error": error, "id": command["id"]}) + b"\r\n")
    assert readable(stream, LONG_S)
    assert stream.take() == [DeviceRemoved("net")]


def test_removal_of_what_is_not_ours_is_not_told(far_and_stream):
    far, stream = far_and_stream
    delete(far, "dother")
    assert stream.take() == [PciChanged(), PciChanged()]
    assert not readable(stream)


def test_removal_of_what_leaves_nothing_is_told_at_once(far_and_stream):
    far, stream = far_and_stream
    delete(far, "drng")
    assert stream.take() == [PciChanged(), PciChanged(), DeviceRemoved("rng")]


def test_removal_is_told_where_qemu_hears_nothing_more(far_and_stream):
    far, stream = far_and_stream
    delete(far, "dnet")
    far.shutdown(socket.SHUT_RD)
    assert stream.take() == [PciChanged(), PciChanged(), DeviceRemoved("net")]


@pytest.fixture
def helper(far_and_stream):
    """A program that serves the network device, and is watched."""
    _, stream = far_and_stream
    helper = Companion(["/bin/sleep", "300"], name="passt", attempt=Attempt())
    stream.watch_helper("net", helper)
    yield helper
    helper.close()


def end(helper):
    os.kill(helper.pid, signal.SIGKILL)
    assert select.select([helper], [], [], LONG_S)[0]


def test_helper_that_ends_is_told_once_and_no_zombie_stays(far_and_stream, helper):
    _, stream = far_and_stream
    assert (readable(stream), stream.take()) == (False, [])
    end(helper)
    assert readable(stream, LONG_S)
    assert stream.take() == [HelperEnded("net", "passt was killed by signal 9 (SIGKILL)")]
    assert not os.path.exists(f"/proc/{helper.pid}")
    assert (readable(stream), stream.take()) == (False, [])


def test_helper_that_ends_with_its_device_is_not_told(far_and_stream, helper):
    far, stream = far_and_stream
    far.settimeout(LONG_S)
    delete(far, "dnet")
    assert stream.take() == [PciChanged(), PciChanged()]
    (command,) = read_commands(far, 1)
    end(helper)
    far.sendall(msgspec.json.encode({"return": {}, "id": command["id"]}) + b"\r\n")
    assert stream.take() == [DeviceRemoved("net")]
    assert not readable(stream)


def test_helper_that_ends_while_its_device_is_cleared_up_is_not_told(far_and_stream, helper):
    far, stream = far_and_stream
    delete(far, "dnet")
    stream.take()
    end(helper)
    assert (stream.take(), readable(stream)) == ([], False)


def test_helper_that_is_left_is_not_told(far_and_stream, helper):
    _, stream = far_and_stream
    stream.leave_helper("net")
    stream.leave_helper("net")
    end(helper)
    assert (stream.take(), readable(stream)) == ([], False)


def test_helper_that_ends_with_qemu_is_not_told(far_and_stream, helper, process):
    far, stream = far_and_stream
    far.close()
    end(helper)
    process.kill()
    assert take_until_exited(stream) == [Exited("QEMU was killed by signal 9 (SIGKILL)")]


def test_helper_that_ends_with_a_machine_that_is_to_end_is_not_told(far_and_stream, helper):
    _, stream = far_and_stream
    stream.expect_end()
    end(helper)
    assert (stream.take(), readable(stream)) == ([], False)


def test_helper_that_is_closed_already_is_no_sin_to_watch(far_and_stream):
    _, stream = far_and_stream
    helper = Companion(["/bin/sleep", "300"], name="passt", attempt=Attempt())
    helper.close()
    stream.watch_helper("net", helper)
    stream.leave_helper("net")
    assert (stream.take(), readable(stream)) == ([], False)


class HearingVcpus:
    """Takes what it is told of as news of vCPUs, whose number it knows or not."""

    def __init__(self, places):
        self.heard = []
        self.known_places = places

    def is_told_by(self, event):
        self.heard.append(event.data["info"]["device"])
        return True

    def is_refused_by(self, event):
        return False

    def judge(self, places):
        return [VcpusChanged(len(places))]


@pytest.mark.parametrize(("places", "told"), [([{}, {}], [VcpusChanged(2)]), (None, [])])
def test_vcpus_hear_all_that_came_at_once_and_are_counted_at_once_if_they_can_be(process, places, told):
    near, far = socket.socketpair()
    vcpus = HearingVcpus(places)
    with near, far:
        stream = EventStream(QmpClient(near), process, remains_of=REMAINS.get, vcpus=vcpus)
        lines = [{"event": "ACPI_DEVICE_OST", "data": ost("CPU", device=name)} for name in ("one", "two")]
        far.sendall(b"".join(msgspec.json.encode(line) + b"\r\n" for line in lines))
        assert readable(stream, timeout_s=LONG_S)
        assert (stream.take(), vcpus.heard) == (told, ["one", "two"])
        assert bool(select.select([far], [], [], 0)[0]) is (places is None)
        stream.close()
