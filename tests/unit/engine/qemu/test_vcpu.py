"""vCPUs that come and go: which places are filled and emptied, and when the guest owes nothing any more."""

from __future__ import annotations

import contextlib
import copy

import pytest

from cloudvmm.config.cpu import CoreScheduling, CpusConfig
from cloudvmm.engine.base import EngineError, NotSupportedYet, RemovalPending, VcpusChanged, VcpusRemoved
from cloudvmm.engine.qemu import vcpu
from cloudvmm.engine.qemu.codec import Event
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.vcpu import CoreSchedulingFailed, NoVcpuThread, VcpuGone, VcpuRefused, Vcpus
from cloudvmm.errors import error_chain
from cloudvmm.host.core_scheduling import CoreSchedulingError

EJECTED = Event("ACPI_DEVICE_OST", {"info": {"slot-type": "CPU", "status": 0}})


class PlayedQemu:
    """Four places in two sockets, told in QEMU's order: the last first."""

    def __init__(self, taken):
        self.places = [
            {
                "type": "qemu64-x86_64-cpu",
                "vcpus-count": 1,
                "props": {"socket-id": number // 2, "core-id": number % 2, "thread-id": 0},
            }
            for number in range(4)
        ]
        for place in self.places[:taken]:
            self.fill(place, "unattached/device")
        self.asked = []
        self.queries = []
        self.refuses = {}

    def fill(self, place, folder):
        place["qom-path"] = f"/machine/{folder}[{self.places.index(place)}]"

    def execute(self, command, arguments=None):
        if command.startswith("query-"):
            self.queries.append(command)
        if command == "query-hotpluggable-cpus":
            return copy.deepcopy(self.places[::-1])
        if command == "query-cpus-fast":
            taken = [number for number, place in enumerate(self.places) if "qom-path" in place]
            return [{"cpu-index": number, "thread-id": 100 + number} for number in reversed(taken)]
        name = arguments["id"]
        self.asked.append((command, name))
        if name in self.refuses:
            raise QmpError(command, "GenericError", self.refuses[name])
        if command == "device_add":
            place = next(each for each in self.places if each["props"].items() <= arguments.items())
            self.fill(place, "peripheral")
        return {}

    def eject(self, *numbers):
        for number in numbers:
            del self.places[number]["qom-path"]


def vcpus_of(qemu, *, boot=2, accelerator="kvm", version=(10, 0, 2)):
    facts = QemuFacts(binary="/qemu", version=version, accelerator=accelerator)
    return Vcpus(qemu, CpusConfig(boot_vcpus=boot, max_vcpus=4), facts, pid=None)


def test_places_are_filled_from_the_first_one_on():
    qemu = PlayedQemu(taken=2)
    vcpus_of(qemu).resize(4)
    assert qemu.asked == [("device_add", "cpu-1-0-0"), ("device_add", "cpu-1-1-0")]


def ost(device, *, source, status):
    info = {"device": device, "slot-type": "CPU", "source": source, "status": status}
    return Event("ACPI_DEVICE_OST", {"info": info})


def test_vcpus_that_were_added_are_told_when_the_guest_takes_them_up():
    qemu = PlayedQemu(taken=2)
    vcpus = vcpus_of(qemu)
    vcpus.resize(4)
    assert not vcpus.is_told_by(ost("cpu-9-9-9", source=1, status=0))
    assert vcpus.is_told_by(ost("cpu-1-0-0", source=1, status=0))
    assert vcpus.judge(qemu.places) == [VcpusChanged(3)]
    assert vcpus.is_told_by(ost("cpu-1-1-0", source=1, status=0))
    assert vcpus.judge(qemu.places) == [VcpusChanged(4)]
    assert not vcpus.is_told_by(ost("cpu-1-1-0", source=1, status=0))


def test_places_are_asked_for_once_while_vcpus_only_come():
    qemu = PlayedQemu(taken=1)
    vcpus = vcpus_of(qemu, boot=1)
    assert vcpus.known_places is None
    for count in (2, 3, 4):
        vcpus.resize(count)
        assert vcpus.is_told_by(ost(qemu.asked[-1][1], source=1, status=0))
        assert vcpus.judge(vcpus.known_places) == [VcpusChanged(count)]
    assert qemu.asked == [("device_add", f"cpu-{number // 2}-{number % 2}-0") for number in (1, 2, 3)]
    assert qemu.queries.count("query-hotpluggable-cpus") == 1


def test_places_are_asked_for_again_when_a_guest_has_let_go_of_one_by_itself():
    qemu = PlayedQemu(taken=2)
    vcpus = vcpus_of(qemu)
    vcpus.resize(3)
    qemu.eject(2)
    assert not vcpus.is_told_by(Event("DEVICE_DELETED", {"device": "cpu-1-0-0"}))
    assert vcpus.known_places is None
    vcpus.resize(3)
    assert qemu.asked == [("device_add", "cpu-1-0-0")] * 2


def test_places_are_asked_for_again_after_one_could_not_be_filled():
    qemu = PlayedQemu(taken=3)
    qemu.refuses["cpu-1-1-0"] = "no such core"
    vcpus = vcpus_of(qemu, boot=3)
    with pytest.raises(VcpuRefused):
        vcpus.resize(4)
    qemu.refuses.clear()
    vcpus.resize(4)
    assert qemu.asked == [("device_add", "cpu-1-1-0")] * 2


def test_places_are_not_known_while_the_guest_owes_vcpus():
    qemu = PlayedQemu(taken=3)
    vcpus = vcpus_of(qemu, boot=3)
    vcpus.resize(2)
    assert vcpus.known_places is None
    qemu.eject(2)
    assert vcpus.is_told_by(EJECTED)
    assert vcpus.judge(qemu.places) == [VcpusChanged(2), VcpusRemoved(2)]
    vcpus.resize(3)
    assert qemu.asked[-1] == ("device_add", "cpu-1-0-0")


def test_guest_that_says_no_refuses_what_it_was_asked():
    qemu = PlayedQemu(taken=2)
    vcpus = vcpus_of(qemu)
    no, under_way = ost("cpu-1-0-0", source=1, status=1), ost("cpu-1-0-0", source=3, status=132)
    assert not vcpus.is_refused_by(no)
    vcpus.resize(3)
    assert vcpus.is_refused_by(no)
    assert not vcpus.is_refused_by(under_way)


def test_thread_of_each_vcpu_is_told_once():
    qemu = PlayedQemu(taken=2)
    vcpus = vcpus_of(qemu)
    vcpus.bind()
    assert vcpus.take_started() == [(0, 100), (1, 101)]
    vcpus.resize(3)
    assert vcpus.take_started() == [(2, 102)]
    assert vcpus.take_started() == []


def test_places_are_emptied_from_the_last_one():
    qemu = PlayedQemu(taken=4)
    vcpus_of(qemu, boot=4).resize(2)
    assert qemu.asked == [
        ("device_del", "/machine/unattached/device[3]"),
        ("device_del", "/machine/unattached/device[2]"),
    ]


def test_removal_is_told_once_when_the_guest_has_let_go_of_all():
    qemu = PlayedQemu(taken=4)
    vcpus = vcpus_of(qemu, boot=4)
    assert not vcpus.is_told_by(EJECTED)
    vcpus.resize(2)
    assert vcpus.is_told_by(EJECTED)
    assert not vcpus.is_told_by(Event("RESUME", {}))
    qemu.eject(3)
    assert vcpus.judge(qemu.places) == [VcpusChanged(3)]
    qemu.eject(2)
    assert vcpus.judge(qemu.places) == [VcpusChanged(2), VcpusRemoved(2)]
    assert vcpus.judge(qemu.places) == []
    assert not vcpus.is_told_by(EJECTED)


def test_what_the_guest_owes_keeps_others_from_changing():
    qemu = PlayedQemu(taken=4)
    vcpus = vcpus_of(qemu, boot=4)
    vcpus.resize(3)
    for count in (4, 3, 1):
        with pytest.raises(RemovalPending, match="still has 4 vCPUs and is to have 3"):
            vcpus.resize(count)
    qemu.eject(3)
    vcpus.resize(4)
    assert qemu.asked[-1] == ("device_add", "cpu-1-1-0")


def test_those_added_are_taken_back_when_another_cannot_be_added():
    qemu = PlayedQemu(taken=2)
    qemu.refuses["cpu-1-1-0"] = "no such core"
    with pytest.raises(VcpuRefused, match="no such core"):
        vcpus_of(qemu).resize(4)
    assert qemu.asked[-1] == ("device_del", "cpu-1-0-0")


def test_emulated_guest_that_has_lost_a_vcpu_is_not_saved():
    for accelerator in ("kvm", "tcg"):
        qemu = PlayedQemu(taken=2)
        vcpus = vcpus_of(qemu, accelerator=accelerator)
        vcpus.resize(4)
        vcpus.check_savable()
        vcpus.resize(3)
        qemu.eject(3)
        if accelerator == "kvm":
            vcpus.check_savable()
            continue
        with pytest.raises(VcpuGone):
            vcpus.check_savable()


def test_removal_that_is_refused_is_not_waited_for():
    qemu = PlayedQemu(taken=2)
    qemu.refuses["/machine/unattached/device[1]"] = "Boot CPU is unpluggable"
    vcpus = vcpus_of(qemu)
    with pytest.raises(VcpuRefused) as refusal:
        vcpus.resize(1)
    assert error_chain(refusal.value) == ["Boot CPU is unpluggable"]
    assert not vcpus.is_told_by(EJECTED)


def test_removal_that_is_refused_midway_is_waited_for_as_far_as_it_went():
    qemu = PlayedQemu(taken=4)
    qemu.refuses["/machine/unattached/device[2]"] = "not this one"
    vcpus = vcpus_of(qemu, boot=4)
    with pytest.raises(VcpuRefused):
        vcpus.resize(1)
    qemu.eject(3)
    assert vcpus.judge(qemu.places) == [VcpusChanged(3), VcpusRemoved(3)]


def test_emulation_has_vcpus_for_its_limit_only():
    qemu = PlayedQemu(taken=2)
    vcpus = vcpus_of(qemu, accelerator="tcg")
    vcpus.resize(3)
    vcpus.resize(2)
    qemu.eject(2)
    vcpus.resize(3)
    vcpus.resize(2)
    qemu.eject(2)
    with pytest.raises(NoVcpuThread, match="has had 4 vCPUs"):
        vcpus.resize(3)
    assert qemu.asked[-1] == ("device_del", "cpu-1-0-0")


def test_old_qemu_adds_under_emulation_and_does_not_remove():
    qemu = PlayedQemu(taken=2)
    vcpus = vcpus_of(qemu, accelerator="tcg", version=(7, 2, 22))
    vcpus.resize(3)
    with pytest.raises(NotSupportedYet, match=r"QEMU 7\.2\.22 can crash"):
        vcpus.resize(1)
    assert len(qemu.asked) == 1


def test_old_qemu_removes_under_kvm():
    qemu = PlayedQemu(taken=2)
    vcpus_of(qemu, version=(7, 2, 22)).resize(1)
    assert qemu.asked == [("device_del", "/machine/unattached/device[1]")]


class PlayedHost:
    """Which threads were given a cookie of their own, and which that of another."""

    def __init__(self, monkeypatch, *, has_smt=True):
        self.alone, self.shared = [], []
        monkeypatch.setattr(vcpu, "has_smt", lambda: has_smt)
        monkeypatch.setattr(vcpu, "isolate", lambda threads: self.alone.extend(threads))
        monkeypatch.setattr(vcpu, "share", lambda leader, followers: self.shared.append((leader, *followers)))


def scheduled(qemu, core_scheduling):
    facts = QemuFacts(binary="/qemu", version=(10, 0, 2), accelerator="kvm")
    cpus = CpusConfig(boot_vcpus=2, max_vcpus=4, core_scheduling=core_scheduling)
    return Vcpus(qemu, cpus, facts, pid=None)


def test_vcpus_of_a_vm_share_one_cookie_also_those_that_come_later(monkeypatch):
    host, qemu = PlayedHost(monkeypatch), PlayedQemu(taken=2)
    vcpus = scheduled(qemu, CoreScheduling.VM)
    vcpus.bind()
    vcpus.resize(3)
    assert (host.alone, host.shared) == ([100], [(100, 101), (100, 101, 102)])


def test_vcpus_that_share_with_nobody_each_have_a_cookie(monkeypatch):
    host, qemu = PlayedHost(monkeypatch), PlayedQemu(taken=2)
    scheduled(qemu, CoreScheduling.VCPU).bind()
    assert (host.alone, host.shared) == ([100, 101], [])


@pytest.mark.parametrize(
    ("core_scheduling", "has_smt"), [(CoreScheduling.OFF, True), (CoreScheduling.VM, False)]
)
def test_nobody_is_asked_where_cores_are_not_scheduled(monkeypatch, core_scheduling, has_smt):
    host, qemu = PlayedHost(monkeypatch, has_smt=has_smt), PlayedQemu(taken=2)
    scheduled(qemu, core_scheduling).bind()
    assert (host.alone, host.shared) == ([], [])


def test_kernel_that_refuses_is_told(monkeypatch):
    def refuse(_threads):
        raise CoreSchedulingError

    PlayedHost(monkeypatch)
    monkeypatch.setattr(vcpu, "isolate", refuse)
    with pytest.raises(CoreSchedulingFailed):
        scheduled(PlayedQemu(taken=2), CoreScheduling.VCPU).bind()


class KeptAt(Exception):
    """The manager ends here."""


def killed_while_adding(qemu, *, is_added):
    """Return what a manager has written down that is killed before the addition of a vCPU, or behind it."""
    facts = QemuFacts(binary="/qemu", version=(10, 0, 2), accelerator="tcg")
    kept = []

    def keep():
        kept.append(vcpus.state())
        if not is_added:
            raise KeptAt

    vcpus = Vcpus(qemu, CpusConfig(boot_vcpus=1, max_vcpus=2), facts, pid=None, on_coming=keep)
    with contextlib.suppress(KeptAt):
        vcpus.resize(2)
    return kept[0]


def next_manager(qemu, kept):
    facts = QemuFacts(binary="/qemu", version=(10, 0, 2), accelerator="tcg")
    vcpus = Vcpus(qemu, CpusConfig(boot_vcpus=1, max_vcpus=2), facts, pid=None)
    vcpus.go_on(kept)
    return vcpus


def test_vcpu_that_is_added_when_the_manager_is_killed_is_counted_by_the_next():
    """Emulation ends QEMU when it is to run more vCPUs in its life than there are places."""
    qemu = PlayedQemu(taken=1)
    vcpus = next_manager(qemu, killed_while_adding(qemu, is_added=True))
    assert vcpus.is_told_by(ost("cpu-0-1-0", source=1, status=0))
    qemu.eject(1)
    with pytest.raises(NoVcpuThread):
        vcpus.resize(2)


def test_vcpu_that_was_not_added_when_the_manager_was_killed_is_not_counted():
    qemu = PlayedQemu(taken=1)
    vcpus = next_manager(qemu, killed_while_adding(qemu, is_added=False))
    vcpus.resize(2)
    assert qemu.asked == [("device_add", "cpu-0-1-0")]


def test_vcpu_that_could_not_be_written_down_is_not_added():
    qemu = PlayedQemu(taken=1)
    vcpus = vcpus_of(qemu, boot=1)
    vcpus._on_coming = lambda: (_ for _ in ()).throw(EngineError("The disk is full"))
    with pytest.raises(EngineError, match="full"):
        vcpus.resize(2)
    vcpus._on_coming = lambda: None
    vcpus.resize(2)
    assert qemu.asked == [("device_add", "cpu-0-1-0")]
