"""Every fault at every operation of the engine that a command takes: told, survived, and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm import api
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import HotplugMethod, MemoryConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineError
from cloudvmm.engine.fake import Delay, Die, Fail, FakeEngine, Fault, Faults, Hang
from cloudvmm.errors import error_chain
from support.leak import Holdings
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller

MIB = 1 << 20
# Command to where it begins, and to the operations of the engine that it takes, in order.
COMMANDS = {
    "vm_boot": ("created", ["build", "boot"]),
    "vm_pause": ("booted", ["pause"]),
    "vm_resume": ("paused", ["resume"]),
    "vm_power_button": ("booted", ["power_button"]),
    "vm_nmi": ("booted", ["nmi"]),
    "vm_counters": ("booted", ["counters"]),
    "vm_add_disk": ("booted", ["add_device"]),
    "vm_remove_device": ("booted", ["remove_device"]),
    "vm_resize": ("booted", ["resize_vcpus", "add_memory"]),
    "vm_resize_disk": ("booted", ["resize_disk"]),
    "vm_snapshot": ("paused", ["save"]),
    "vm_restore": ("saved", ["build"]),
    "vm_coredump": ("booted", ["pause", "coredump", "resume"]),
    "vm_reboot": ("booted", ["close", "build", "boot"]),
    "vm_shutdown": ("booted", ["close"]),
    "vm_delete": ("booted", ["close"]),
}
STEPS = [(command, operation) for command, (_, operations) in COMMANDS.items() for operation in operations]
FAULTS = [Fail(EngineError, "A fault of the test"), Delay(0.02), Die()]


class CountedFaults(Faults):
    """Notes which operations began."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def take(self, operation: str) -> Fault | None:
        if operation != "pci_resources":  # the guest's BARs are looked at beside any command
            self.begun.append(operation)
        return super().take(operation)


class Life:
    """A VMM that stays when its VM is gone, and VMs in it. `folder` is for their files."""

    def __init__(self, vm_config: VmConfig, folder: Path) -> None:
        self.faults = CountedFaults()
        self.caller = Caller(FakeEngine(faults=self.faults), no_shutdown=True)
        self._vm_config = vm_config
        self._folder = folder
        vm_config.disks = [DiskConfig(path=self._image("disk"), id="d0")]
        vm_config.cpus.max_vcpus = 4
        vm_config.memory = MemoryConfig(
            size=128 * MIB, hotplug_size=512 * MIB, hotplug_method=HotplugMethod.ACPI
        )

    def begin(self, state: str) -> None:
        caller = self.caller
        caller(api.vm_create, self._vm_config)
        if state == "created":
            return
        caller(api.vm_boot)
        if state in ("paused", "saved"):
            caller(api.vm_pause)
        if state == "saved":
            (self._folder / "saved").mkdir()
            caller(api.vm_snapshot, api.VmSnapshotConfig(destination_url=f"file://{self._folder}/saved"))
            caller(api.vm_delete)

    def call(self, command: str) -> object:
        """Carry `command` out; return the error that it ended with."""
        try:
            self.caller(getattr(api, command), *self._data(command))
        except api.ApiError as error:
            return error
        return None

    def state(self) -> str | None:
        try:
            return self.caller(api.vm_info).state.value
        except api.ApiError:
            return None

    def _data(self, command: str) -> tuple[object, ...]:
        folder = self._folder
        match command:
            case "vm_add_disk":
                return (DiskConfig(path=self._image("other"), id="d1"),)
            case "vm_remove_device":
                return (api.VmRemoveDeviceData(id="d0"),)
            case "vm_resize":
                return (api.VmResizeData(desired_vcpus=2, desired_ram=256 * MIB),)
            case "vm_resize_disk":
                return (api.VmResizeDiskData(id="d0", desired_size=2 * MIB),)
            case "vm_snapshot":
                (folder / "made").mkdir()
                return (api.VmSnapshotConfig(destination_url=f"file://{folder}/made"),)
            case "vm_restore":
                return (api.RestoreConfig(source_url=f"file://{folder}/saved"),)
            case "vm_coredump":
                return (api.VmCoredumpData(destination_url=f"file://{folder}/core"),)
        return ()

    def _image(self, name: str) -> str:
        path = self._folder / name
        path.write_bytes(bytes(MIB))
        return str(path)


@pytest.fixture
def life(vm_config: VmConfig, tmp_path: Path) -> Iterator[Life]:
    holdings = Holdings()
    life = Life(vm_config, tmp_path)
    yield life
    life.caller.close()
    holdings.assert_nothing_added()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_takes_the_operations_that_are_struck_here(life, command):
    state, operations = COMMANDS[command]
    life.begin(state)
    life.faults.begun.clear()
    assert life.call(command) is None
    assert life.faults.begun == operations


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(("command", "operation"), STEPS)
def test_fault_is_told_and_the_next_vm_is_as_good_as_any(life, command, operation, fault):
    life.begin(COMMANDS[command][0])
    life.faults.set(operation, fault, times=1)

    error = life.call(command)

    assert not life.faults.has(operation), "it did not strike"
    if isinstance(fault, Fail):
        assert error_chain(error)[-1] == "A fault of the test"
    if isinstance(fault, Delay):
        assert error is None
    assert life.caller(api.vmm_ping).pid
    if life.state() is not None:
        wait_until(
            lambda: life.state() in ("Created", "Running", "Paused"), "it stands", timeout_s=DEADLINE_S
        )
        life.caller(api.vm_delete)
    assert life.state() is None
    life.begin("booted")
    assert life.state() == "Running"


@pytest.mark.parametrize(("command", "operation"), STEPS)
def test_operation_that_never_ends_is_overtaken_by_the_end_of_the_vmm(life, command, operation):
    life.begin(COMMANDS[command][0])
    life.faults.set(operation, Hang())
    under_way = life.caller.beside(getattr(api, command), *life._data(command))
    wait_until(lambda: life.faults.begun[-1:] == [operation], f"{operation} hangs", timeout_s=DEADLINE_S)
    assert life.caller(api.vmm_ping).pid

    life.caller(api.vmm_shutdown)

    assert isinstance(under_way.result(), api.ApiError | None)
    assert life.caller.vmm.join(DEADLINE_S)
