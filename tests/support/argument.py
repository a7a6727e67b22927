"""One value for each command that takes data: small, valid, and unlike the defaults where it can be."""

from __future__ import annotations

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.device import (
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    PmemConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import (
    RestoreConfig,
    VmCoredumpData,
    VmForkData,
    VmmCancelJobData,
    VmReceiveMigrationData,
    VmRemoveDeviceData,
    VmResizeData,
    VmResizeDiskData,
    VmResizeZoneData,
    VmSendMigrationData,
    VmSnapshotConfig,
)
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig

ARGUMENTS = {
    "vm.create": VmConfig(
        memory=MemoryConfig(size=64 << 20),
        payload=PayloadConfig(kernel="/bin/sh"),
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    ),
    "vm.resize": VmResizeData(desired_vcpus=2),
    "vm.resize-disk": VmResizeDiskData(id="d", desired_size=1 << 20),
    "vm.resize-zone": VmResizeZoneData(id="z", desired_ram=1 << 30),
    "vm.add-device": DeviceConfig(path="/sys/bus/pci/devices/0000:00:1f.0", id="v"),
    "vm.add-user-device": UserDeviceConfig(socket="/u"),
    "vm.add-disk": DiskConfig(path="/d", readonly=True, id="d"),
    "vm.add-fs": FsConfig(tag="t", socket="/f"),
    "vm.add-generic-vhost-user": GenericVhostUserConfig(socket="/g", queue_sizes=[64, 64], device_type=26),
    "vm.add-net": NetConfig(mac="12:34:56:78:9a:bc", mtu=1400),
    "vm.add-pmem": PmemConfig(file="/p", size=1 << 21),
    "vm.add-vdpa": VdpaConfig(path="/dev/vhost-vdpa-0"),
    "vm.add-vsock": VsockConfig(cid=3, socket="/v"),
    "vm.remove-device": VmRemoveDeviceData(id="d"),
    "vmm.cancel-job": VmmCancelJobData(id=999),
    "vm.snapshot": VmSnapshotConfig(destination_url="file:///s"),
    "vm.fork": VmForkData(directory="/c", count=2),
    "vm.restore": RestoreConfig(source_url="file:///s", resume=True),
    "vm.coredump": VmCoredumpData(destination_url="file:///c"),
    "vm.receive-migration": VmReceiveMigrationData(receiver_url="unix:/m"),
    "vm.send-migration": VmSendMigrationData(destination_url="unix:/m", local=True),
}


def arguments_of(name: str) -> list[object]:
    """Return what the method for the command called `name` is given."""
    return [ARGUMENTS[name]] if name in ARGUMENTS else []


def method_name(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")
