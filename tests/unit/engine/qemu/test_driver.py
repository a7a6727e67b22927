"""The watch over the guest's drivers: when it looks, and what it makes of the answers."""

import select
import threading

import pytest

from cloudvmm.engine.base import DriverChanged, DriverKind, EngineTimeout, MachineGone
from cloudvmm.engine.qemu.driver import (
    LONGEST_PAUSE_S,
    DriverWatch,
    NoThread,
    device_paths,
    is_active,
    pause_s,
)
from cloudvmm.engine.qemu.qmp import QmpError
from support.watch import Watch

TIMEOUT_S = 10.0
OK = ["VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid virtio device found", "VIRTIO_CONFIG_S_DRIVER_OK: Driver setup"]
BARE = ["VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid virtio device found"]


def path_of(qdev_id):
    return f"/machine/peripheral/{qdev_id}/virtio-backend"


class ScriptedClient:
    """Answers as `statuses` says, by QEMU's id; an error there is raised. `fault` is raised once, first."""

    def __init__(self, statuses):
        self.statuses = statuses
        self.looks = 0
        self.looked = threading.Condition()
        self.fault = None
        self.during_status = lambda: None

    def execute(self, command, arguments, *, timeout_s):
        if command == "x-query-virtio":
            with self.looked:
                self.looks += 1
                self.looked.notify_all()
            fault, self.fault = self.fault, None
            if fault is not None:
                raise fault
            return [{"name": "virtio-x", "path": path_of(one)} for one in self.statuses]
        assert command == "x-query-virtio-status"
        answer = self.statuses[arguments["path"].split("/")[3]]
        self.during_status()
        if isinstance(answer, Exception):
            raise answer
        return {"status": {"statuses": answer}}

    def await_looks(self, count):
        with self.looked:
            assert self.looked.wait_for(lambda: self.looks >= count, TIMEOUT_S)


@pytest.fixture
def client():
    return ScriptedClient({"d_disk0": BARE, "d_net1": OK})


@pytest.fixture
def watch(client):
    made = DriverWatch(client)
    yield made
    made.close()


def take(watch, count):
    """Wait for `count` changes."""
    changes = []
    while len(changes) < count:
        ready, _, _ = select.select([watch], [], [], TIMEOUT_S)
        assert ready, f"Only {changes} came"
        changes += watch.take()
    return changes


@pytest.mark.parametrize(
    ("quiet_s", "is_settled", "expected_s"),
    [(0, False, 0.1), (1, False, 0.1), (5, False, 0.5), (20, False, 2), (3600, False, 2), (0, True, 2)],
)
def test_pause_grows_with_the_quiet_and_is_long_once_all_is_up(quiet_s, is_settled, expected_s):
    assert pause_s(quiet_s, is_settled=is_settled) == pytest.approx(expected_s)


def test_quiet_guest_without_drivers_is_looked_at_at_most_35_times_in_the_first_ten_seconds():
    now_s, looks = 0.0, 0
    while now_s < 10:
        now_s += pause_s(now_s, is_settled=False)
        looks += 1
    assert looks <= 35


def test_devices_that_are_not_ours_are_passed_over():
    devices = [{"path": path_of("d_disk0")}, {"path": "/machine/unattached/device[3]/virtio-backend"}]
    assert device_paths([*devices, {"path": path_of("other")}]) == {"_disk0": path_of("d_disk0")}


def test_device_whose_question_ends_qemu_is_passed_over():
    assert device_paths([{"path": path_of("dbus"), "name": "vhost-user-i2c"}]) == {}


@pytest.mark.parametrize(("statuses", "active"), [([], False), (BARE, False), (OK, True)])
def test_device_is_active_once_its_driver_is_ready(statuses, active):
    assert is_active({"status": {"statuses": statuses}}) is active


def test_what_is_active_is_told_once(watch, client):
    watch.run()
    assert take(watch, 1) == [DriverChanged("_net1", is_active=True)]
    client.await_looks(client.looks + 2)
    assert watch.take() == []


def test_changes_are_told_as_they_are_found(watch, client):
    watch.run()
    take(watch, 1)
    client.statuses = {"d_disk0": OK, "d_net1": BARE}
    assert take(watch, 2) == [
        DriverChanged("_net1", is_active=False),
        DriverChanged("_disk0", is_active=True),
    ]


def test_device_that_is_plugged_later_is_told_and_one_that_is_gone_is_reset(watch, client):
    watch.run()
    take(watch, 1)
    client.statuses = {"d_disk0": BARE, "d_new": OK}
    assert take(watch, 2) == [DriverChanged("_net1", is_active=False), DriverChanged("_new", is_active=True)]


def test_device_that_tells_by_itself_is_not_asked_about_and_told_as_what_it_is(client):
    client.statuses["d_vdpa0"] = AssertionError("QEMU was asked")
    kinds = {"_vdpa0": DriverKind.VDPA}
    watch = DriverWatch(
        client,
        kind_of=lambda name: kinds.get(name, DriverKind.VIRTIO),
        has_driver=lambda name: True if name in kinds else None,
    )
    try:
        watch.run()
        assert take(watch, 2) == [
            DriverChanged("_net1", is_active=True),
            DriverChanged("_vdpa0", is_active=True, kind=DriverKind.VDPA),
        ]
    finally:
        watch.close()


def test_watch_that_is_hurried_looks_often_again(watch, client):
    client.statuses = {"d_net1": OK}
    watch.run()
    take(watch, 1)
    client.await_looks(client.looks + 1)  # all is up: the next look would be far away
    client.statuses = {"d_net1": OK, "d_new": OK}
    with Watch() as time_taken:
        watch.hurry()
        assert take(watch, 1) == [DriverChanged("_new", is_active=True)]
    assert time_taken.elapsed_s < LONGEST_PAUSE_S


def test_device_unplugged_between_the_questions_counts_as_inactive(watch, client):
    client.statuses["d_net1"] = QmpError(
        "x-query-virtio-status", "GenericError", "Path is not a VirtIODevice"
    )
    watch.run()
    client.await_looks(2)
    assert watch.take() == []


def test_forgotten_device_is_told_no_more(watch, client):
    watch.run()
    take(watch, 1)
    client.statuses = {"d_disk0": BARE}
    assert (watch.forget("_net1"), watch.forget("_disk0"), watch.forget("_net1")) == (True, False, False)
    client.await_looks(client.looks + 2)
    assert watch.take() == []


def test_device_that_goes_while_it_is_looked_at_does_not_come_back(watch, client):
    watch.run()
    take(watch, 1)
    client.during_status = lambda: watch.forget("_net1")
    client.await_looks(client.looks + 2)
    assert watch.take() == []


def test_device_that_goes_before_the_first_look_is_told_where_it_is_looked_at_before(watch):
    watch.look_at("_net1")
    watch.look_at("_disk0")
    assert watch.take() == [DriverChanged("_net1", is_active=True)]
    assert (watch.forget("_net1"), watch.forget("_disk0")) == (True, False)


def test_device_that_is_looked_at_is_told_once(watch, client):
    watch.run()
    take(watch, 1)
    client.await_looks(client.looks + 1)
    watch.look_at("_net1")
    client.statuses = {"d_disk0": OK, "d_net1": OK}
    watch.look_at("_disk0")
    client.await_looks(client.looks + 3)
    assert watch.take() == [DriverChanged("_disk0", is_active=True)]


def test_device_that_is_looked_at_during_a_look_stays_known(watch, client):
    paused, seen = threading.Event(), threading.Event()

    def see_meanwhile():
        client.during_status = lambda: None
        paused.set()
        assert seen.wait(TIMEOUT_S)

    client.statuses = {"d_disk0": BARE}
    client.during_status = see_meanwhile
    watch.run()
    assert paused.wait(TIMEOUT_S)
    client.statuses = {"d_disk0": OK}
    watch.look_at("_disk0")
    seen.set()
    client.await_looks(client.looks + 2)
    assert watch.take() == [DriverChanged("_disk0", is_active=True)]


@pytest.mark.parametrize(
    "fault",
    [
        EngineTimeout("QEMU did not answer in time"),
        MachineGone("over"),
        QmpError("x-query-virtio", "CommandNotFound", "not there"),
    ],
)
def test_qemu_that_does_not_say_keeps_no_device_from_going(watch, client, fault):
    client.fault = fault
    watch.look_at("_net1")
    assert watch.forget("_net1") is False


def test_guest_that_stands_still_is_not_looked_at(watch, client):
    watch.run()
    client.await_looks(1)
    watch.rest()
    settled = client.looks + 1  # one may be under way
    with client.looked:
        assert not client.looked.wait_for(lambda: client.looks > settled, 0.5)
    watch.run()
    client.await_looks(settled + 1)


def test_qemu_that_is_busy_is_asked_again(watch, client):
    client.fault = EngineTimeout("QEMU did not answer in time")
    watch.run()
    assert take(watch, 1) == [DriverChanged("_net1", is_active=True)]


@pytest.mark.parametrize(
    "fault", [MachineGone("over"), QmpError("x-query-virtio", "CommandNotFound", "not there")]
)
def test_qemu_that_cannot_be_asked_is_left_alone(watch, client, fault):
    client.fault = fault
    watch.run()
    client.await_looks(1)
    watch.run()
    with client.looked:
        assert not client.looked.wait_for(lambda: client.looks > 1, 0.5)


def test_closing_ends_the_thread_and_is_no_sin_twice(watch):
    watch.run()
    before = [thread.name for thread in threading.enumerate()]
    watch.close()
    watch.close()
    assert "driver-watch" in before
    assert "driver-watch" not in [thread.name for thread in threading.enumerate()]
    assert watch.take() == []


def test_host_without_a_thread_is_told(watch, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(NoThread):
        watch.run()


def test_changes_are_told_in_the_way_of_their_device_and_each_look_takes_others_along(client):
    looks = []
    watch = DriverWatch(
        client,
        kind_of=lambda name: DriverKind.VHOST_USER if name == "_net1" else DriverKind.VIRTIO,
        beside=lambda: looks.append(client.looks),
    )
    try:
        watch.run()
        assert take(watch, 1) == [DriverChanged("_net1", is_active=True, kind=DriverKind.VHOST_USER)]
        client.await_looks(2)
        assert looks[:2] == [0, 1]
    finally:
        watch.close()


class Qemu11:
    """Answers for queues alone; `rings` has the address of each device's first queue."""

    def __init__(self, rings):
        self.rings = rings
        self.started = set()

    def execute(self, command, arguments, *, timeout_s):
        if command == "x-query-virtio":
            return [{"name": "virtio-x", "path": path_of(one)} for one in self.rings]
        assert arguments["queue"] == 0
        name = arguments["path"].split("/")[3]
        if command == "x-query-virtio-vhost-queue-status":
            if name not in self.started:
                raise QmpError(command, "GenericError", "Error: vhost device has not started yet")
            return {"num": 128}
        assert command == "x-query-virtio-queue-status"
        assert name != "d_fs2"  # its back end would stop the queue
        return {"vring-desc": self.rings[name]}


def test_qemu_11_is_asked_for_queues_since_a_status_kills_it():
    client = Qemu11({"d_disk0": 0, "d_net1": 0x1000, "d_fs2": 0})
    watch = DriverWatch(client, dies_of_status=True, is_vhost_user=lambda name: name == "_fs2")
    try:
        watch.run()
        assert take(watch, 1) == [DriverChanged("_net1", is_active=True)]

        client.rings |= {"d_disk0": 0x2000, "d_net1": 0}
        client.started.add("d_fs2")
        assert take(watch, 3) == [
            DriverChanged("_net1", is_active=False),
            DriverChanged("_disk0", is_active=True),
            DriverChanged("_fs2", is_active=True),
        ]
    finally:
        watch.close()
