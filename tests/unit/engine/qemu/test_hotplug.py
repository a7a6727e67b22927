"""Plugging into a QEMU that is played: all or nothing, and what is released when."""

from __future__ import annotations

import os
import resource
import socket
import threading

import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.device import DeviceConfig, PmemConfig, VdpaConfig, VsockConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import (
    ConsoleSink,
    DeviceError,
    EngineError,
    EngineTimeout,
    ImageLocked,
    MachineGone,
    MachineSpec,
    NotSupportedYet,
    SinkKind,
    SlotError,
)
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.hotplug import DeviceCannotGo, DeviceIdInUse, DeviceUnknown, Hotplug
from cloudvmm.engine.qemu.kind import QemuLacksDevice
from cloudvmm.engine.qemu.memory import NoRoomForMemory
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.plan import NulCharacter
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.text import TextNotUtf8
from cloudvmm.engine.qemu.vfio import VfioCreateError
from cloudvmm.engine.qemu.vhost_user_disk import VhostUserDiskError
from cloudvmm.errors import error_chain
from cloudvmm.host.lock import lock_file
from support.leak import Holdings
from support.lock import is_locked

OFF = ConsoleSink(kind=SinkKind.OFF)
SLOTS = {"__rng": 2}
SLOT = 5


LENT_SET, LENT_FD = 77, 88  # what QEMU says of a descriptor that it is lent


class PlayedQemu:
    """Takes every command but those in `refuses`, and keeps their names with the inodes sent beside them."""

    def __init__(self):
        self.commands = []
        self.told = []  # those whose answer nobody awaits
        self.files = []
        self.refuses = {}
        self.kept = None  # or a list: then it has descriptors of its own for as long as it likes
        self.pci_devices = []
        self.observers = {}  # called when the command of that name is carried out

    def execute(self, command, arguments=None, *, timeout_s=None, fds=()):
        self.commands.append((command, arguments))
        self.files += [os.fstat(fd).st_ino for fd in fds]
        if self.kept is not None:
            self.kept += [os.dup(fd) for fd in fds]
        if command in self.refuses:
            raise self.refuses[command]
        self.observers.get(command, lambda: None)()
        if command == "query-pci":
            return [{"bus": 0, "devices": self.pci_devices}]
        return {"fdset-id": LENT_SET, "fd": LENT_FD} if command == "add-fd" else {}

    def tell(self, commands):
        for command, arguments in commands:
            self.execute(command, arguments)
            self.told.append(command)

    def names(self):
        return [name for name, _ in self.commands]


@pytest.fixture
def qemu():
    return PlayedQemu()


@pytest.fixture
def resources():
    resources = Resources(memory=memory_of(VmConfig(memory=MemoryConfig(size=128 * MIB))))
    yield resources
    resources.close()


@pytest.fixture
def leaving():
    """What is to go, as it is on record before a removal is asked for."""
    return []


@pytest.fixture
def hotplug(qemu, resources, leaving):
    vm_config = VmConfig(
        memory=MemoryConfig(size=128 * MIB, mergeable=True), console=ConsoleConfig(mode=ConsoleOutputMode.OFF)
    )
    spec = MachineSpec(vm_config=vm_config, slots=SLOTS, serial=OFF, console=OFF, debug_console=OFF)
    facts = QemuFacts(binary="/qemu", version=(10, 0, 2))
    found = Hotplug(spec, resources, qemu, facts, on_leaving=lambda: leaving.append(told(found)[1]))
    return found


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def disk(image):
    return DiskConfig(id="new", path=str(image), image_type=ImageType.RAW)


@pytest.fixture
def net():
    """A network device on a descriptor that stands for a queue."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield NetConfig(id="new", fds=[theirs.fileno()])


def refusal(command, words="no"):
    return QmpError(command, "GenericError", words)


def told(hotplug):
    """Return the devices that the guest was told of and has not taken up, and those that are to go."""
    ejections = hotplug.state().ejections
    return set(ejections.unseen), set(ejections.asked)


def test_disk_is_made_in_order_with_its_descriptor_and_stays_locked(hotplug, qemu, resources, disk, image):
    hotplug.plug(disk, SLOT)
    assert qemu.names() == ["add-fd", "blockdev-add", "device_add", "block-latency-histogram-set"]
    assert qemu.told == ["block-latency-histogram-set"]
    assert qemu.files == [image.stat().st_ino]
    assert is_locked(image)
    assert resources.image_types == {"new": ImageType.RAW}


@pytest.mark.parametrize(
    ("refused", "undone"),
    [
        ("add-fd", ["remove-fd"]),
        ("blockdev-add", ["blockdev-del", "remove-fd"]),
        ("device_add", ["device_del", "blockdev-del", "remove-fd"]),
    ],
)
def test_disk_that_qemu_refuses_is_undone_backwards(hotplug, qemu, resources, disk, image, refused, undone):
    before = Holdings()
    qemu.refuses[refused] = refusal(refused, "QEMU's words")
    with pytest.raises(DeviceError) as failure:
        hotplug.plug(disk, SLOT)
    assert error_chain(failure.value) == ["QEMU's words"]
    names = qemu.names()
    assert names[names.index(refused) + 1 :] == undone
    assert not is_locked(image)
    assert resources.image_types == {}
    assert hotplug.remains_of("new") is None
    before.assert_nothing_added()


@pytest.mark.parametrize(
    ("refused", "undone"),
    [("netdev_add", ["netdev_del", "closefd"]), ("device_add", ["device_del", "netdev_del", "closefd"])],
)
def test_network_device_that_qemu_refuses_is_undone_backwards(hotplug, qemu, net, refused, undone):
    before = Holdings()
    qemu.refuses = {name: refusal(name) for name in (refused, "closefd")}
    with pytest.raises(DeviceError):
        hotplug.plug(net, SLOT)
    names = qemu.names()
    assert names[names.index(refused) + 1 :] == undone
    before.assert_nothing_added()


def test_what_fails_in_qemu_can_be_tried_again(hotplug, qemu, disk):
    qemu.refuses["device_add"] = refusal("device_add")
    with pytest.raises(DeviceError):
        hotplug.plug(disk, SLOT)
    qemu.refuses.clear()
    hotplug.plug(disk, SLOT)
    fdsets = [arguments["fdset-id"] for name, arguments in qemu.commands if name == "add-fd"]
    assert len(set(fdsets)) == 2


def late(command):
    return EngineTimeout(f"QEMU did not answer in time ({command})")


def not_found():
    return QmpError("device_del", "DeviceNotFound", "Device 'new' not found")


def test_disk_that_qemu_has_all_the_same_is_cleared_up_when_the_guest_lets_go(hotplug, qemu, resources, disk):
    before = Holdings()
    qemu.refuses = {"device_add": late("device_add"), "blockdev-del": refusal("blockdev-del", "in use")}
    with pytest.raises(EngineTimeout):
        hotplug.plug(disk, SLOT)
    assert qemu.names()[-4:] == ["device_del", "blockdev-del", "remove-fd", "device_del"]
    before.assert_nothing_added()
    qemu.refuses.clear()
    with pytest.raises(DeviceIdInUse):
        hotplug.plug(disk, SLOT)

    assert [command.name for command in hotplug.remains_of("new")] == ["blockdev-del", "remove-fd"]
    hotplug.forget("new")

    hotplug.plug(disk, SLOT)
    assert list(resources.backings) == ["new"]


def test_disk_that_qemu_never_made_frees_its_id_once_qemu_says_so(hotplug, qemu, disk):
    qemu.refuses = dict.fromkeys(
        ("device_add", "device_del", "blockdev-del", "remove-fd"), late("device_add")
    )
    with pytest.raises(EngineTimeout):
        hotplug.plug(disk, SLOT)
    qemu.refuses = {"device_del": not_found()}
    with pytest.raises(DeviceIdInUse):
        hotplug.plug(disk, SLOT)
    assert qemu.names()[-3:] == ["device_del", "blockdev-del", "remove-fd"]
    hotplug.plug(disk, SLOT)


@pytest.fixture
def doubtful(hotplug, qemu, disk):
    """A disk of which nobody knows whether QEMU has it."""
    qemu.refuses = dict.fromkeys(
        ("device_add", "device_del", "blockdev-del", "remove-fd"), late("device_add")
    )
    with pytest.raises(EngineTimeout):
        hotplug.plug(disk, SLOT)
    qemu.refuses.clear()


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(bytes(MIB))
    return DiskConfig(id="other", path=str(path), image_type=ImageType.RAW)


@pytest.mark.usefixtures("doubtful")
def test_slot_of_a_disk_that_qemu_never_made_is_free_at_once(hotplug, qemu, other):
    qemu.refuses = {"device_del": not_found()}
    hotplug.plug(other, SLOT)
    assert hotplug.find_owed() == []


@pytest.mark.usefixtures("doubtful")
def test_slot_of_a_disk_that_qemu_has_all_the_same_is_free_once_the_guest_lets_go(hotplug, qemu, other):
    leaving = threading.Timer(0.1, hotplug.forget, ["new"])
    qemu.observers["device_del"] = leaving.start
    hotplug.plug(other, SLOT)
    leaving.join()


@pytest.mark.usefixtures("doubtful")
def test_slot_of_a_disk_that_the_guest_keeps_is_taken(hotplug, other, monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.hotplug._LEAVE_S", 0.05)
    with pytest.raises(SlotError):
        hotplug.plug(other, SLOT)
    assert hotplug.find_owed() == ["new"]
    hotplug.plug(other, SLOT + 1)


@pytest.mark.usefixtures("doubtful")
def test_wait_for_a_slot_ends_with_the_machine(hotplug, other):
    hotplug.abort()
    with pytest.raises(MachineGone):
        hotplug.plug(other, SLOT)


@pytest.mark.usefixtures("doubtful")
def test_disk_that_qemu_never_made_is_owed_no_more_when_the_guest_runs_or_is_saved(hotplug, qemu):
    assert hotplug.find_owed() == ["new"]
    qemu.refuses = {"device_del": not_found()}
    hotplug.sweep()
    assert hotplug.find_owed() == []


def test_image_that_takes_too_long_to_open_is_undone_at_once(hotplug, qemu, disk):
    qemu.refuses = {"blockdev-add": late("blockdev-add"), "device_del": not_found()}
    with pytest.raises(EngineTimeout):
        hotplug.plug(disk, SLOT)
    qemu.refuses.clear()
    hotplug.plug(disk, SLOT)


def test_descriptors_of_failed_additions_are_dropped_once_more_when_the_guest_runs(hotplug, qemu, disk):
    qemu.refuses["device_add"] = refusal("device_add")
    with pytest.raises(DeviceError):
        hotplug.plug(disk, SLOT)
    qemu.commands.clear()
    hotplug.sweep()
    hotplug.sweep()
    assert [name for name, _ in qemu.commands] == ["remove-fd"]


def test_refused_disk_is_unlocked_where_qemu_keeps_its_descriptor(hotplug, qemu, disk, image):
    qemu.kept = []
    qemu.refuses["device_add"] = refusal("device_add")
    with pytest.raises(DeviceError):
        hotplug.plug(disk, SLOT)
    was_locked = is_locked(image)
    for fd in qemu.kept:
        os.close(fd)
    assert len(qemu.kept) == 1
    assert not was_locked


def test_qemu_that_is_gone_leaves_nothing_here(hotplug, qemu, disk, image):
    before = Holdings()
    for command in ("blockdev-add", "blockdev-del", "remove-fd"):
        qemu.refuses[command] = MachineGone("gone")
    with pytest.raises(MachineGone):
        hotplug.plug(disk, SLOT)
    assert not is_locked(image)
    before.assert_nothing_added()


@pytest.mark.parametrize(
    ("device", "slot", "error"),
    [
        (DiskConfig(id="new", vhost_user=True), SLOT, VhostUserDiskError),
        (DiskConfig(id="new", vhost_user=True, vhost_socket="/none"), SLOT, VhostUserDiskError),
        (VdpaConfig(id="new", path="/none"), SLOT, QemuLacksDevice),
        (DeviceConfig(id="new", path="/none"), SLOT, VfioCreateError),
        (DiskConfig(id="new", path="/d", serial="\udcff"), SLOT, TextNotUtf8),
        (DiskConfig(id="new"), SLOT, DeviceError),
        (DiskConfig(path="/d"), SLOT, DeviceError),
        (DiskConfig(id="new", path="/d"), 2, SlotError),
        (DiskConfig(id="new", path="/d"), 32, SlotError),
        (DiskConfig(id="__rng", path="/d"), SLOT, DeviceIdInUse),
    ],
)
def test_what_cannot_be_is_refused_before_qemu_is_asked(hotplug, qemu, device, slot, error):
    with pytest.raises(error):
        hotplug.plug(device, slot)
    assert qemu.commands == []


def test_locked_image_and_nul_are_refused_before_qemu_is_asked(hotplug, qemu, disk, image):
    disk.serial = "a\0b"
    with pytest.raises(NulCharacter):
        hotplug.plug(disk, SLOT)
    with image.open("r+b") as other:
        lock_file(other.fileno(), path=str(image), write=False)
        with pytest.raises(ImageLocked):
            hotplug.plug(disk, SLOT)
    assert qemu.commands == []


def test_slot_that_qemu_has_something_in_is_a_slot_error(hotplug, qemu, disk):
    qemu.refuses["device_add"] = refusal("device_add", "PCI: slot 5 function 0 not available for x, in use")
    with pytest.raises(SlotError):
        hotplug.plug(disk, SLOT)


def test_latencies_that_qemu_does_not_keep_are_no_reason_to_refuse(hotplug, qemu, disk):
    qemu.refuses["block-latency-histogram-set"] = EngineTimeout("late")
    hotplug.plug(disk, SLOT)
    assert hotplug.remains_of("new")


def test_removal_unlocks_at_once_and_forgetting_frees_slot_and_id(hotplug, qemu, resources, disk, image):
    held = os.dup(hotplug.plug(disk, SLOT).image.fd)  # as QEMU has it
    assert is_locked(image)
    for _ in range(2):
        hotplug.ask_removal("new")
        assert not is_locked(image)
    with pytest.raises(DeviceIdInUse):
        hotplug.plug(disk, SLOT)
    assert [command.name for command in hotplug.remains_of("new")] == ["blockdev-del", "remove-fd"]
    os.close(held)
    hotplug.forget("new")
    assert resources.disks == []
    hotplug.plug(disk, SLOT)


def test_device_for_which_the_host_has_nothing_left_is_refused_as_at_a_boot(hotplug, qemu, tmp_path):
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(EngineError) as caught:
            hotplug.plug(VsockConfig(cid=3, socket=str(tmp_path / "vsock"), id="new"), SLOT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert error_chain(caught.value) == [
        "The host did not give what a machine needs",
        "Too many open files (os error 24)",
    ]
    assert qemu.names() == []


def test_passed_queue_is_closed_when_the_removal_is_asked_for(hotplug, resources, net):
    before = Holdings()
    hotplug.plug(net, SLOT)
    assert len(resources.backings["new"].fds) == 1
    hotplug.ask_removal("new")
    before.assert_nothing_added()
    hotplug.forget("new")
    assert resources.backings == {}


def test_disk_that_goes_without_being_asked_is_unlocked_and_closed(hotplug, disk, image):
    before = Holdings()
    hotplug.plug(disk, SLOT)
    hotplug.forget("new")
    assert not is_locked(image)
    before.assert_nothing_added()


def test_network_device_that_goes_without_being_asked_is_closed(hotplug, net):
    before = Holdings()
    hotplug.plug(net, SLOT)
    hotplug.forget("new")
    before.assert_nothing_added()


def test_device_that_goes_while_it_is_asked_is_unlocked_and_closed(hotplug, qemu, disk, image):
    before = Holdings()
    hotplug.plug(disk, SLOT)
    qemu.observers["device_del"] = lambda: hotplug.forget("new")
    hotplug.ask_removal("new")
    assert not is_locked(image)
    before.assert_nothing_added()


@pytest.mark.parametrize(
    "answer",
    [
        QmpError("device_del", "DeviceNotFound", "Device 'dnew' not found"),
        refusal("device_del", "Device dnew is already in the process of unplug"),
    ],
)
def test_removal_that_is_under_way_may_be_asked_for(hotplug, qemu, disk, answer):
    hotplug.plug(disk, SLOT)
    qemu.refuses["device_del"] = answer
    hotplug.ask_removal("new")


def test_removal_that_qemu_refuses_leaves_the_image_locked(hotplug, qemu, disk, image):
    hotplug.plug(disk, SLOT)
    qemu.refuses["device_del"] = refusal("device_del", "not now")
    with pytest.raises(DeviceError, match="not now"):
        hotplug.ask_removal("new")
    assert is_locked(image)


def test_slot_that_the_guest_left_before_it_took_the_device_up_is_unsettled(hotplug, disk):
    hotplug.plug(disk, SLOT)
    hotplug.ask_removal("new")
    assert hotplug.unsettled_slots == frozenset()
    hotplug.forget("new")
    assert hotplug.unsettled_slots == {SLOT}
    hotplug.plug(disk, SLOT)
    assert hotplug.unsettled_slots == frozenset()  # it is taken


def test_slot_of_a_device_whose_bars_the_guest_has_placed_is_settled(hotplug, qemu, disk):
    hotplug.plug(disk, SLOT)
    bar = {"bar": 0, "address": 0xFE000000, "size": 4096, "type": "memory"}
    qemu.pci_devices = [{"qdev_id": qdev_id("new"), "regions": [bar]}]
    hotplug.ask_removal("new")
    hotplug.forget("new")
    assert hotplug.unsettled_slots == frozenset()


@pytest.mark.parametrize("failure", [refusal("device_add"), EngineError("no"), None])
def test_addition_that_fails_is_nothing_that_the_guest_was_told(hotplug, qemu, disk, failure):
    qemu.refuses = {"device_add": failure} if failure else {}
    disk.serial = "a" if failure else "a\0b"
    with pytest.raises(EngineError):
        hotplug.plug(disk, SLOT)
    assert told(hotplug) == (set(), set())


def test_addition_that_never_was_settles_no_slot(hotplug, qemu, disk):
    hotplug.plug(disk, SLOT)
    hotplug.ask_removal("new")
    hotplug.forget("new")
    qemu.refuses = {"blockdev-add": late("blockdev-add"), "device_del": not_found()}
    with pytest.raises(EngineTimeout):
        hotplug.plug(disk, SLOT + 1)
    assert hotplug.unsettled_slots == {SLOT}
    assert told(hotplug) == (set(), set())


def test_removal_is_on_record_before_qemu_hears_of_it(hotplug, qemu, leaving, disk):
    hotplug.plug(disk, SLOT)
    qemu.observers["device_del"] = lambda: leaving.append("device_del")
    hotplug.ask_removal("new")
    assert leaving == [{"new"}, "device_del"]


def test_removal_that_is_refused_is_nothing_that_the_guest_was_told(hotplug, qemu, disk):
    hotplug.plug(disk, SLOT)
    qemu.refuses["device_del"] = refusal("device_del", "not now")
    with pytest.raises(DeviceError, match="not now"):
        hotplug.ask_removal("new")
    assert told(hotplug) == ({"new"}, set())


def test_device_that_goes_while_its_removal_is_prepared_is_asked_for_no_more(hotplug, qemu, disk):
    hotplug.plug(disk, SLOT)
    qemu.observers["query-pci"] = lambda: hotplug.forget("new")
    hotplug.ask_removal("new")
    assert "device_del" not in qemu.names()
    assert told(hotplug) == (set(), set())


@pytest.mark.parametrize("failure", [EngineTimeout("late"), refusal("query-pci")])
def test_removal_does_not_fail_for_want_of_a_look_at_the_bus(hotplug, qemu, disk, failure):
    hotplug.plug(disk, SLOT)
    qemu.refuses["query-pci"] = failure
    hotplug.ask_removal("new")
    assert qemu.names()[-1] == "device_del"


def test_only_what_is_there_and_can_go_is_removed(hotplug, qemu):
    with pytest.raises(DeviceUnknown):
        hotplug.ask_removal("none")
    with pytest.raises(NotSupportedYet):
        hotplug.ask_removal("__rng")
    assert qemu.commands == []


def test_persistent_memory_is_added_by_our_descriptor_and_cannot_go(hotplug, qemu, resources, tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(2 * MIB))
    backing = hotplug.plug(PmemConfig(id="new", file=str(path)), SLOT)
    assert qemu.names() == ["add-fd", "object-add", "remove-fd", "device_add"]
    assert qemu.files == [path.stat().st_ino]
    assert qemu.commands[1][1]["mem-path"] == f"/proc/self/fd/{LENT_FD}"
    assert qemu.commands[2][1] == {"fdset-id": LENT_SET}
    with pytest.raises(DeviceCannotGo, match="new cannot be removed while the VM runs: QEMU cannot unplug"):
        hotplug.ask_removal("new")
    assert "device_del" not in qemu.names()
    assert resources.backings["new"] is backing


def test_memory_that_is_refused_leaves_no_descriptor(hotplug, qemu, tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(2 * MIB))
    qemu.refuses["device_add"] = refusal("device_add", "not enough space, currently 0x0 in use")
    holdings = Holdings()
    with pytest.raises(DeviceError, match="not enough space"):
        hotplug.plug(PmemConfig(id="new", file=str(path)), SLOT)
    assert qemu.names()[-2:] == ["device_del", "object-del"]
    holdings.assert_nothing_added()


def test_machine_without_room_says_what_would_have_made_some(hotplug, qemu, tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(bytes(2 * MIB))
    words = "memory devices (e.g. for memory hotplug) are not enabled, please specify the maxmem option"
    qemu.refuses["device_add"] = refusal("device_add", words)
    with pytest.raises(NoRoomForMemory, match=r"boot it with memory\.hotplug_size"):
        hotplug.plug(PmemConfig(id="new", file=str(path)), SLOT)
