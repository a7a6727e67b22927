"""Every event at its moment and in order (reference: lifecycle.md section 11), one row per moment.

A row says what was done before, what is done now, and which events come of that; the guest's drivers have
their share. A later command adds its rows.
"""

from __future__ import annotations

import copy

import pytest

from cloudvmm import api
from cloudvmm.config.device import BalloonConfig, VdpaConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.fake import Delay, FakeEngine
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller

ACTIVATED, RESET = "virtio-device/activated", "virtio-device/reset"
VDPA = VdpaConfig(path="/dev/vhost-vdpa-0", id="vdpa")
VHOST_NET = NetConfig(vhost_user=True, vhost_socket="/s", id="net")
VHOST_DISK = DiskConfig(vhost_user=True, vhost_socket="/s", id="disk")
BOOT = ["vm/booting", "vm/booted", ACTIVATED, ACTIVATED]
VDPA_ACTIVATED, VDPA_RESET = "vdpa/activated", "vdpa/reset"
REMOVED = "vm/device-removed"
LET_GO = [VDPA_RESET, REMOVED, RESET, REMOVED, RESET, REMOVED]
REBOOT = ["vm/rebooting", "vm/rebooted", ACTIVATED, ACTIVATED]
END = ["vm/shutdown", "vm/deleted", "vmm/shutdown"]


class Stage:
    """The caller, and what rows do with it."""

    def __init__(self, caller: Caller, vm_config: VmConfig, folder) -> None:
        self.caller = caller
        self.vm_config = vm_config
        self.folder_url = f"file://{folder}/snapshot"
        (folder / "snapshot").mkdir()
        self.core = api.VmCoredumpData(destination_url=f"file://{folder}/core")

    @property
    def machine(self):
        return self.caller.engine.last_machine

    def call(self, function, *data):
        """Call a command that may be refused."""
        try:
            self.caller(function, *data)
        except api.ApiError:
            return

    def create(self):
        self.caller(api.vm_create, self.vm_config)

    def create_bad(self):
        self.caller(api.vm_create, VmConfig())

    def boot(self):
        self.call(api.vm_boot)

    def pause(self):
        self.call(api.vm_pause)

    def resume(self):
        self.call(api.vm_resume)

    def coredump(self):
        self.call(api.vm_coredump, self.core)

    def reboot(self):
        self.call(api.vm_reboot)

    def shutdown(self):
        self.call(api.vm_shutdown)

    def delete(self):
        self.call(api.vm_delete)

    def end(self):
        self.caller(api.vmm_shutdown)

    def signal(self):
        self.caller.vmm.exit_evt.write()
        assert self.caller.vmm.join(DEADLINE_S)

    def power_button(self):
        self.call(api.vm_power_button)

    def nmi(self):
        self.call(api.vm_nmi)

    def guest_power_off(self):
        self.machine.guest.power_off()

    def guest_reset(self):
        self.machine.guest.reset()

    def guest_panic(self):
        self.machine.guest.panic("crash_loaded")

    def guest_unbind(self):
        self.machine.drivers.unbind("__rng")

    def guest_rebind(self):
        self.machine.drivers.unbind("__balloon")
        self.machine.drivers.bind("__balloon")

    def add_vdpa(self):
        self.caller(api.vm_add_vdpa, copy.copy(VDPA))

    def add_vhost_net(self):
        self.caller(api.vm_add_net, copy.copy(VHOST_NET))

    def add_vhost_disk(self):
        self.caller(api.vm_add_disk, copy.copy(VHOST_DISK))

    def configure(self):
        """Have each of the three in the configuration."""
        self.vm_config.vdpa = [copy.copy(VDPA)]
        self.vm_config.net = [copy.copy(VHOST_NET)]
        self.vm_config.disks = [copy.copy(VHOST_DISK)]

    def remove(self):
        for device_id in ("vdpa", "net", "disk"):
            self.call(api.vm_remove_device, api.VmRemoveDeviceData(id=device_id))

    def guest_keeps(self):
        self.machine.guest.refuse("device")

    def guest_lets_go(self):
        self.machine.guest.obey("device")

    def guest_rebind_all(self):
        for device_id in ("vdpa", "net", "disk"):
            self.machine.drivers.unbind(device_id)
            self.machine.drivers.bind(device_id)

    def snapshot(self):
        self.caller(api.vm_snapshot, api.VmSnapshotConfig(destination_url=self.folder_url))

    def restore(self):
        self.caller(api.vm_restore, api.RestoreConfig(source_url=self.folder_url))


ROWS = {
    "create": ("", "create", []),
    "boot": ("create", "boot", BOOT),
    "boot of nothing": ("", "boot", ["vm/booting"]),
    "boot that fails": ("create_bad", "boot", ["vm/booting"]),
    "boot twice": ("create boot", "boot", []),
    "pause": ("create boot", "pause", ["vm/pausing", "vm/paused"]),
    "pause when paused": ("create boot pause", "pause", ["vm/pausing"]),
    "pause of nothing": ("", "pause", []),
    "resume": ("create boot pause", "resume", ["vm/resuming", "vm/resumed"]),
    "resume when running": ("create boot", "resume", ["vm/resuming"]),
    "coredump when paused": ("create boot pause", "coredump", ["vm/coredumping"]),
    "coredump when running": (
        "create boot",
        "coredump",
        ["vm/coredumping", "vm/pausing", "vm/paused", "vm/resuming", "vm/resumed"],
    ),
    "reboot": ("create boot", "reboot", REBOOT),
    "reboot of nothing": ("", "reboot", ["vm/rebooting"]),
    "reboot before a boot": ("create", "reboot", ["vm/rebooting"]),
    "shutdown": ("create boot", "shutdown", ["vm/shutdown"]),
    "shutdown before a boot": ("create", "shutdown", []),
    "boot after a shutdown": ("create boot shutdown", "boot", BOOT),
    "delete of a VM": ("create boot", "delete", ["vm/shutdown", "vm/deleted"]),
    "delete of a config": ("create", "delete", ["vm/deleted"]),
    "delete of nothing": ("", "delete", []),
    "power button and NMI": ("create boot power_button", "nmi", []),
    "end with nothing": ("", "end", ["vmm/shutdown"]),
    "end with a config": ("create", "end", ["vm/deleted", "vmm/shutdown"]),
    "end with a VM": ("create boot", "end", END),
    "end with a paused VM": ("create boot pause", "end", END),
    "signal": ("create boot", "signal", END),
    "guest powers off": ("create boot", "guest_power_off", END),
    "guest resets": ("create boot", "guest_reset", REBOOT),
    "guest panics": ("create boot", "guest_panic", ["guest/panic"]),
    "driver lets go": ("create boot", "guest_unbind", [RESET]),
    "driver comes back": ("create boot", "guest_rebind", [RESET, ACTIVATED]),
    "boot with vDPA and vhost-user": (
        "configure create",
        "boot",
        ["vm/booting", "vm/booted", ACTIVATED, ACTIVATED, VDPA_ACTIVATED],
    ),
    "vDPA is added": ("create boot", "add_vdpa", [VDPA_ACTIVATED]),
    "vhost-user net is added": ("create boot", "add_vhost_net", []),
    "vhost-user disk is added": ("create boot", "add_vhost_disk", []),
    "drivers of vDPA and vhost-user come back": (
        "configure create boot",
        "guest_rebind_all",
        [VDPA_RESET, VDPA_ACTIVATED, RESET, RESET],
    ),
    "vDPA and vhost-user are removed": ("configure create boot", "remove", LET_GO),
    "added vDPA and vhost-user are removed": (
        "create boot add_vdpa add_vhost_net add_vhost_disk",
        "remove",
        LET_GO,
    ),
    "removal of vDPA and vhost-user waits": (
        "configure create boot guest_keeps remove",
        "guest_lets_go",
        LET_GO,
    ),
    "restore with vDPA and vhost-user": (
        "configure create boot pause snapshot delete",
        "restore",
        ["vm/restoring", "vm/restored", ACTIVATED, ACTIVATED, VDPA_ACTIVATED],
    ),
    "removal that waits in a snapshot": (
        "configure create boot guest_keeps remove pause snapshot delete restore",
        "resume",
        ["vm/resuming", *LET_GO, "vm/resumed"],
    ),
}


@pytest.fixture
def stage(caller, vm_config, tmp_path):
    vm_config.balloon = BalloonConfig(size=0)
    vm_config.memory.shared = True  # as vhost-user wants it
    return Stage(caller, vm_config, tmp_path)


def play(stage, names):
    for name in names.split():
        getattr(stage, name)()


@pytest.mark.parametrize(("before", "act", "expected"), list(ROWS.values()), ids=list(ROWS))
def test_events_come_at_their_moment_in_order(stage, before, act, expected):
    play(stage, before)
    settle(stage)
    start = len(stage.caller.events)
    play(stage, act)
    settle(stage)
    assert stage.caller.vmm.join(DEADLINE_S if "vmm/shutdown" in expected else 0) is (
        "vmm/shutdown" in expected
    )
    assert stage.caller.all_names()[start:] == expected


def test_drivers_of_a_boot_are_told_of_before_the_command_that_waited_for_it(stage):
    stage.create()
    stage.caller.engine.faults.set("boot", Delay(5.0))  # longer than a host stands still
    booting = stage.caller.beside(api.vm_boot)
    stage.caller.wait_for_event("vm/booting")
    pausing = stage.caller.beside(api.vm_pause)
    wait_until(
        lambda: "info: API request event: VmPause" in stage.caller.requests,
        "the pause is queued",
        timeout_s=DEADLINE_S,
    )
    assert "vm/booted" not in stage.caller.all_names()
    assert booting.result() is pausing.result() is None
    assert stage.caller.all_names() == [*BOOT, "vm/pausing", "vm/paused"]


def settle(stage):
    """Return once the loop has done what was under way, and has heard what the machine has to tell."""
    for _ in range(2):
        # Changes nothing, behind all that is queued. Twice, because one may overtake the machine's news; what
        # comes of a command that the news cause is told before the second is answered.
        stage.call(api.vm_resize_disk, api.VmResizeDiskData(id="none", desired_size=1))


def test_no_shutdown_keeps_the_vmm_when_the_guest_powers_off(vm_config):
    caller = Caller(FakeEngine(), no_shutdown=True)
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    caller.engine.last_machine.guest.power_off()
    caller.wait_for_event("vm/shutdown")
    assert caller.names() == ["vm/booting", "vm/booted", "vm/shutdown"]
    caller.close()


@pytest.mark.parametrize(
    ("act", "name", "properties"),
    [
        ("guest_panic", "guest/panic", {"event": "crash_loaded"}),
        ("guest_unbind", RESET, {"id": "__rng"}),
        ("guest_rebind", RESET, {"id": "__balloon"}),
    ],
)
def test_properties_tell_of_what(stage, act, name, properties):
    play(stage, f"create boot {act}")
    stage.caller.wait_for_event(name)
    (event,) = (event for event in stage.caller.events if f"{event.source}/{event.event}" == name)
    assert event.properties == properties


def test_each_virtio_device_is_named(stage):
    play(stage, "create boot")
    stage.caller.wait_for_event(ACTIVATED, count=2)
    named = [event.properties for event in stage.caller.events if event.event == "activated"]
    assert named == [{"id": "__rng"}, {"id": "__balloon"}]
