"""What each command does to the state, which events it emits, and how it refuses."""

from __future__ import annotations

import msgspec
import pytest

from cloudvmm import api
from cloudvmm.config.device import VsockConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineError, ImageLocked, PayloadError, RamError
from cloudvmm.engine.fake import Fail, FakeEngine
from cloudvmm.engine.fake.machine import Phase
from cloudvmm.errors import error_chain
from support.wait import wait_until

from .conftest import DEADLINE_S, Beside, Caller, Gate


def test_info_of_nothing_is_refused(caller):
    assert caller.refusal(api.vm_info) == ["The VM info is not available", "VM is not created"]


def test_create_stores_a_config_without_checking_it(caller):
    caller(api.vm_create, VmConfig())

    info = caller(api.vm_info)

    assert (info.state, info.memory_actual_size, info.device_tree) == (api.VmState.CREATED, 512 << 20, None)


def test_sum_of_more_memory_than_64_bits_can_tell_is_told_as_the_reference_does(caller, vm_config):
    vm_config.memory = MemoryConfig(size=1, zones=[MemoryZoneConfig(id="a", size=2**64 - 1)])
    caller(api.vm_create, vm_config)
    assert caller(api.vm_info).memory_actual_size == 0


def test_create_twice_is_refused(caller, vm_config):
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_create, vm_config) == [
        "The VM could not be created",
        "VM is already created",
    ]


def test_a_created_config_is_the_vmms_own(caller, vm_config):
    caller(api.vm_create, vm_config)
    vm_config.cpus.boot_vcpus = 77

    assert caller(api.vm_info).config.cpus.boot_vcpus == 1


def test_boot_of_nothing_emits_booting_and_is_refused(caller):
    assert caller.refusal(api.vm_boot) == ["The VM could not boot", "VM config is missing"]
    assert caller.names() == ["vm/booting"]


def test_boot_checks_the_config(caller):
    caller(api.vm_create, VmConfig())

    assert caller.refusal(api.vm_boot) == [
        "The VM could not boot",
        "Failed to validate config",
        "Payload configuration is not bootable",
        "No bootitem provided: neither firmware nor kernel",
    ]
    assert caller(api.vm_info).device_tree is None


def test_boot_fills_in_ids_and_the_device_tree(caller, vm_config, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(512))
    vm_config.disks = [DiskConfig(path=str(image))]

    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    info = caller(api.vm_info)

    assert info.state is api.VmState.RUNNING
    assert info.config.disks[0].id == "_disk0"
    assert info.device_tree["_disk0"].parent == "_virtio-pci-_disk0"
    assert info.device_tree["_virtio-pci-_disk0"].pci_bdf == "0000:00:01.0"
    assert caller.names() == ["vm/booting", "vm/booted"]


def test_boot_with_a_missing_disk_leaves_the_config_alone(caller, vm_config):
    vm_config.disks = [DiskConfig(path="/nonexistent/disk")]
    caller(api.vm_create, vm_config)

    chain = caller.refusal(api.vm_boot)

    assert chain[:2] == ["The VM could not boot", "Error from device manager"]
    assert caller(api.vm_info).device_tree is None


def test_boot_with_a_missing_initramfs_leaves_the_config_alone(caller, engine, vm_config):
    vm_config.payload.initramfs = "/nonexistent/initramfs"
    caller(api.vm_create, vm_config)

    for _ in range(2):
        assert caller.refusal(api.vm_boot) == [
            "The VM could not boot",
            "Cannot open initramfs file",
            "No such file or directory: /nonexistent/initramfs (os error 2)",
        ]
        assert caller(api.vm_info).device_tree is None
        assert engine.last_machine.phase is Phase.GONE


def test_boot_with_a_kernel_that_is_none_says_so(caller, vm_config):
    with open(vm_config.payload.kernel, "wb"):
        pass
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot)[:2] == ["The VM could not boot", "Cannot load the kernel into memory"]


def test_boot_with_a_missing_firmware_says_so(caller, vm_config):
    vm_config.payload.kernel, vm_config.payload.firmware = None, "/nonexistent/firmware"
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot)[1] == "Error manipulating firmware file"


def test_boot_with_a_missing_kernel_leaves_a_vm_in_created(caller, vm_config):
    vm_config.payload.kernel = "/nonexistent/kernel"
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot) == [
        "The VM could not boot",
        "Cannot open kernel file",
        "No such file or directory: /nonexistent/kernel (os error 2)",
    ]
    assert caller(api.vm_info).device_tree is not None
    assert caller(api.vm_info).state is api.VmState.CREATED
    assert caller.refusal(api.vm_boot) == ["The VM could not boot", "VM is already created"]
    caller(api.vm_shutdown)
    assert caller(api.vm_info).device_tree is None


def test_boot_with_a_locked_image_says_so(caller, vm_config, engine):
    engine.faults.set("boot", Fail(ImageLocked, "The image is locked"))
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot)[1:] == [
        "Error locking disk images: Another instance likely holds a lock",
        "The image is locked",
    ]


def test_boot_that_finds_a_locked_image_has_the_whole_chain(caller, vm_config, engine):
    engine.faults.set("boot", Fail(ImageLocked))
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot)[1:] == [
        "Error locking disk images: Another instance likely holds a lock",
        "Cannot lock images of all block devices",
    ]


def test_boot_without_the_memory_is_the_memory_managers_failure(caller, vm_config, engine):
    engine.faults.set("build", Fail(RamError, "Too few huge pages"))
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot)[1:] == ["Memory manager error", "Too few huge pages"]
    assert caller(api.vm_info).device_tree is None


def test_boot_of_a_booted_vm_is_refused_without_an_event(booted):
    before = booted.names()

    assert booted.refusal(api.vm_boot) == ["The VM could not boot", "VM is already created"]
    assert booted.names() == before


def test_pause_and_resume(booted):
    booted(api.vm_pause)
    assert booted(api.vm_info).state is api.VmState.PAUSED

    booted(api.vm_resume)
    assert booted(api.vm_info).state is api.VmState.RUNNING
    assert booted.names()[-4:] == ["vm/pausing", "vm/paused", "vm/resuming", "vm/resumed"]


def test_pause_of_a_paused_vm_names_the_transition(booted):
    booted(api.vm_pause)

    assert booted.refusal(api.vm_pause) == [
        "The VM could not be paused",
        "Cannot pause VM",
        "Failed to pause migratable component",
        "Invalid transition: InvalidStateTransition(Paused, Paused)",
    ]
    assert booted.names()[-1] == "vm/pausing"


def test_resume_of_a_running_vm_names_the_transition(booted):
    assert booted.refusal(api.vm_resume)[-1] == "Invalid transition: InvalidStateTransition(Running, Running)"


@pytest.mark.parametrize(
    ("function", "outer"),
    [
        (api.vm_pause, "The VM could not be paused"),
        (api.vm_resume, "The VM could not resume"),
        (api.vm_shutdown, "The VM could not shutdown"),
        (api.vm_power_button, "Error triggering power button"),
        (api.vm_nmi, "Error triggering NMI"),
        (api.vm_counters, "The VM info is not available"),
    ],
)
@pytest.mark.parametrize("is_created", [False, True])
def test_without_a_vm_object_it_is_not_running(caller, vm_config, function, outer, is_created):
    if is_created:
        caller(api.vm_create, vm_config)

    assert caller.refusal(function) == [outer, "VM is not running"]


def test_shutdown_keeps_the_config_and_forgets_the_vm(booted):
    booted(api.vm_shutdown)

    info = booted(api.vm_info)
    assert (info.state, info.device_tree) == (api.VmState.CREATED, None)
    booted(api.vm_boot)
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_delete_of_a_running_vm_shuts_it_down_first(booted):
    booted(api.vm_delete)

    assert booted.names()[-2:] == ["vm/shutdown", "vm/deleted"]
    assert booted.refusal(api.vm_info)[-1] == "VM is not created"


def test_delete_of_nothing_succeeds_in_silence(caller):
    caller(api.vm_delete)

    assert caller.names() == []


def test_reboot_builds_a_new_machine_and_keeps_the_config(booted, engine):
    first = engine.last_machine

    booted(api.vm_reboot)

    assert engine.last_machine is not first
    assert booted(api.vm_info).state is api.VmState.RUNNING
    assert booted.names()[-2:] == ["vm/rebooting", "vm/rebooted"]


def test_reboot_without_a_vm_object_is_refused(caller, vm_config):
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_reboot) == ["The VM could not reboot", "VM is not created"]
    assert caller.names() == ["vm/rebooting"]


def test_a_reboot_that_fails_leaves_the_config_only(booted, engine):
    engine.faults.set("boot", Fail(EngineError, "no vCPU"), times=1)

    assert booted.refusal(api.vm_reboot)[-1] == "no vCPU"
    assert booted(api.vm_info).device_tree is None
    booted(api.vm_boot)


@pytest.fixture
def slow_build(engine):
    """Tells when a machine is about to be built, and builds it once that is allowed."""
    gate = Gate(engine, "build")
    yield gate
    gate.open()


def asked_for_counters(caller: Caller) -> Beside:
    """Ask, and wait until the VMM has taken the question."""
    answer = caller.beside(api.vm_counters)
    wait_until(lambda: "VmCounters" in str(caller.requests), "the question", timeout_s=DEADLINE_S)
    return answer


def test_who_looks_at_a_vm_that_is_being_rebooted_finds_it_running(booted, slow_build):
    before = booted.settled_info()
    reboot = booted.beside(api.vm_reboot)
    slow_build.await_begin()

    counters = asked_for_counters(booted)
    assert booted(api.vm_info) == before
    assert not counters.is_done
    slow_build.open()

    assert reboot.result() is None
    assert isinstance(counters.result(), bytes)


def test_counters_of_a_vm_whose_reboot_fails_are_refused(booted, engine, slow_build):
    engine.faults.set("boot", Fail(EngineError, "no vCPU"), times=1)
    reboot = booted.beside(api.vm_reboot)
    slow_build.await_begin()

    counters = asked_for_counters(booted)
    slow_build.open()

    assert error_chain(reboot.result())[-1] == "no vCPU"
    assert error_chain(counters.result())[-1] == "VM is not running"


def test_counters_that_wait_for_a_reboot_are_refused_when_the_vmm_ends(booted, slow_build):
    booted.beside(api.vm_reboot)
    slow_build.await_begin()
    counters = asked_for_counters(booted)

    end = booted.beside(api.vmm_shutdown)
    slow_build.open()

    assert isinstance(counters.result(), api.ApiError)
    assert end.result() is None


def test_power_button_and_nmi_reach_the_guest(booted, engine):
    booted(api.vm_power_button)
    booted(api.vm_nmi)

    seen = engine.last_machine.guest.press_seen()
    assert (seen.power_button, seen.nmi) == (1, 1)


def test_counters_are_json_per_device(caller, vm_config, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(512))
    vm_config.disks = [DiskConfig(path=str(image))]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    counters = msgspec.json.decode(caller(api.vm_counters))

    assert counters["_disk0"]["read_latency_min"] in (50, (1 << 64) - 1)


def test_coredump_of_a_running_vm_pauses_around_it(booted, tmp_path):
    core = tmp_path / "core"

    booted(api.vm_coredump, api.VmCoredumpData(destination_url=f"file://{core}"))

    assert core.read_bytes()[:4] == b"\x7fELF"
    assert booted(api.vm_info).state is api.VmState.RUNNING
    assert booted.names()[-5:] == [
        "vm/coredumping",
        "vm/pausing",
        "vm/paused",
        "vm/resuming",
        "vm/resumed",
    ]


def test_coredump_of_a_paused_vm_leaves_it_paused(booted, tmp_path):
    booted(api.vm_pause)

    booted(api.vm_coredump, api.VmCoredumpData(destination_url=f"file://{tmp_path / 'core'}"))

    assert booted(api.vm_info).state is api.VmState.PAUSED


def test_coredump_onto_an_existing_file_is_refused_and_leaves_it(booted, tmp_path):
    core = tmp_path / "core"
    core.write_bytes(b"mine")

    chain = booted.refusal(api.vm_coredump, api.VmCoredumpData(destination_url=f"file://{core}"))

    assert chain[:3] == ["The VM could not be coredumped", "Error coredumping VM", "coredump file"]
    assert core.read_bytes() == b"mine"
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_coredump_that_fails_leaves_no_file_and_a_running_guest(booted, engine, tmp_path):
    engine.faults.set("coredump", Fail(EngineError, "disk full"))
    core = tmp_path / "core"

    chain = booted.refusal(api.vm_coredump, api.VmCoredumpData(destination_url=f"file://{core}"))

    assert chain[-1] == "disk full"
    assert not core.exists()
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_coredump_to_an_impossible_path_leaves_a_running_guest(booted):
    chain = booted.refusal(api.vm_coredump, api.VmCoredumpData(destination_url="file:///tmp/a\0b"))

    assert chain[1] == "Error coredumping VM"
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_an_added_device_is_the_vmms_own(caller, vm_config):
    disk = DiskConfig(path="/d")
    caller(api.vm_create, vm_config)
    caller(api.vm_add_disk, disk)
    disk.path = "/other"

    assert caller(api.vm_info).config.disks[0].path == "/d"


def test_cold_add_appends_without_an_id(caller, vm_config):
    caller(api.vm_create, vm_config)

    assert caller(api.vm_add_disk, DiskConfig(path="/d")) is None
    assert caller(api.vm_info).config.disks[0].id is None


def test_cold_add_checks_the_rules(caller, vm_config):
    caller(api.vm_create, vm_config)
    caller(api.vm_add_disk, DiskConfig(path="/d", id="d0"))

    assert caller.refusal(api.vm_add_disk, DiskConfig(path="/e", id="d0")) == [
        "The disk could not be added to the VM",
        "Failed to validate config",
        "Identifier d0 is not unique",
    ]
    assert len(caller(api.vm_info).config.disks) == 1


def test_a_second_vsock_is_refused(caller, vm_config):
    caller(api.vm_create, vm_config)
    caller(api.vm_add_vsock, VsockConfig(cid=3, socket="/s"))

    assert (
        caller.refusal(api.vm_add_vsock, VsockConfig(cid=4, socket="/t"))[-1]
        == "Too many virtio-vsock devices"
    )


def test_cold_remove_drops_the_device(caller, vm_config):
    caller(api.vm_create, vm_config)
    caller(api.vm_add_disk, DiskConfig(path="/d", id="d0"))

    caller(api.vm_remove_device, api.VmRemoveDeviceData(id="d0"))

    assert caller(api.vm_info).config.disks == []
    assert caller.refusal(api.vm_remove_device, api.VmRemoveDeviceData(id="d0"))[-1] == (
        'No device with id "d0" to remove'
    )


def test_hot_remove_of_an_unknown_device_names_it(booted):
    assert booted.refusal(api.vm_remove_device, api.VmRemoveDeviceData(id="x")) == [
        "The device could not be removed from the VM",
        "Error from device manager",
        "Failed to find device corresponding to the given identifier: x",
    ]


def test_cold_resize_edits_the_config_unchecked(caller, vm_config):
    caller(api.vm_create, vm_config)

    caller(api.vm_resize, api.VmResizeData(desired_vcpus=9, desired_ram=1 << 30))

    info = caller(api.vm_info)
    assert (info.config.cpus.boot_vcpus, info.memory_actual_size) == (9, 1 << 30)


def test_vm_action_carries_out_any_action(engine):
    caller = Caller(engine)

    with pytest.raises(api.VmPauseError):
        caller(api.vm_action, api.VmAction.PAUSE)
    assert caller(api.vm_action, api.VmAction.DELETE) is None
    caller.close()


def test_two_vmms_in_one_process_do_not_know_each_other(caller, vm_config):
    other = Caller(FakeEngine())
    caller(api.vm_create, vm_config)

    assert other.refusal(api.vm_info)[-1] == "VM is not created"
    other.close()


def test_boot_logs_what_the_configuration_is_warned_of(caller, vm_config):
    vm_config.payload = PayloadConfig(firmware=vm_config.payload.kernel, cmdline="quiet")
    caller(api.vm_create, vm_config)
    warning = "warn: Ignoring cmdline parameter as firmware is provided as the payload"
    assert caller.logged.count(warning) == 0

    caller(api.vm_boot)

    assert caller.logged.count(warning) == 1
    assert caller(api.vm_info).config.payload.cmdline is None


def test_boot_that_fails_with_a_kind_of_payload_error_says_it_once(caller, engine, vm_config):
    class KernelLacksThis(PayloadError):
        """Kernel lacks this"""

    engine.faults.set("boot", Fail(KernelLacksThis))
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_boot) == ["The VM could not boot", "Kernel lacks this"]
