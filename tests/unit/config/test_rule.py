"""Each validation rule, broken alone: its class, its text, and which of two comes first."""

import pytest

from cloudvmm.config import console, cpu, device, disk, landlock, memory, net, numa, payload, pci
from cloudvmm.config import platform as platform_rules
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, SerialConfig
from cloudvmm.config.cpu import CpusConfig, CpuTopology
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    IvshmemConfig,
    PmemConfig,
    RngConfig,
    RtcConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.error import (
    DuplicateDevicePath,
    IdentifierNotUnique,
    InvalidIdentifier,
    ValidationError,
)
from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.numa import NumaConfig
from cloudvmm.config.payload import FwCfgConfig, FwCfgItem, FwCfgItemList, PayloadConfig
from cloudvmm.config.pci import PciSegmentConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.queue import InvalidQueueSize, TooManyQueues
from cloudvmm.config.rate_limit import (
    InvalidRateLimiterGroup,
    RateLimiterConfig,
    RateLimiterGroupConfig,
    TokenBucketConfig,
)
from cloudvmm.config.rule import validate
from cloudvmm.config.vhost_user import (
    VhostUserMissingSocket,
    VhostUserRateLimiterNotSupported,
    VhostUserRequiresSharedMemory,
)
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import error_chain

MIB = 1 << 20
SHARED = MemoryConfig(size=64 * MIB, shared=True)
LIMIT = RateLimiterConfig(ops=TokenBucketConfig(size=1, refill_time=1))
GROUP = RateLimiterGroupConfig(id="group", rate_limiter_config=LIMIT)
TWO_SEGMENTS = PlatformConfig(num_pci_segments=2)


def vm(**members):
    return VmConfig(**{"payload": PayloadConfig(kernel="/vmlinux"), **members})


def net_vm(**members):
    return vm(net=[NetConfig(**members)])


def disk_vm(**members):
    return vm(disks=[DiskConfig(path="/d", **members)])


def vhost_disk(**members):
    return DiskConfig(vhost_user=True, **{"vhost_socket": "/s", **members})


def vhost_net(**members):
    return NetConfig(vhost_user=True, **{"vhost_socket": "/s", **members})


def topology(*parts, max_vcpus):
    names = ("threads_per_core", "cores_per_die", "dies_per_package", "packages")
    return vm(
        cpus=CpusConfig(
            boot_vcpus=1, max_vcpus=max_vcpus, topology=CpuTopology(**dict(zip(names, parts, strict=True)))
        )
    )


def numa_vm(*nodes, **members):
    return vm(numa=list(nodes), **members)


PAYLOAD_RULES = [
    (None, payload.MissingBootitem, "No bootitem provided: neither firmware nor kernel"),
    (
        PayloadConfig(cmdline="quiet"),
        payload.MissingBootitem,
        "No bootitem provided: neither firmware nor kernel",
    ),
    (
        PayloadConfig(firmware="/f", kernel="/k"),
        payload.FirmwarePlusOtherPayloads,
        "Specifying a kernel is not supported when a firmware is provided",
    ),
    (
        PayloadConfig(igvm="/i", firmware="/f"),
        payload.IgvmPlusOtherPayloads,
        "Specifying a kernel or firmware is not supported when an igvm is provided",
    ),
    (
        PayloadConfig(firmware="/f", fw_cfg_config=FwCfgConfig()),
        payload.FwCfgMissingKernel,
        "Error --fw-cfg-config: missing --kernel",
    ),
    (
        PayloadConfig(kernel="/k", fw_cfg_config=FwCfgConfig()),
        payload.FwCfgMissingCmdline,
        "Error --fw-cfg-config: missing --cmdline",
    ),
    (
        PayloadConfig(kernel="/k", cmdline="c", fw_cfg_config=FwCfgConfig()),
        payload.FwCfgMissingInitramfs,
        "Error --fw-cfg-config: missing --initramfs",
    ),
    (
        PayloadConfig(
            kernel="/k",
            cmdline="c",
            initramfs="/i",
            fw_cfg_config=FwCfgConfig(items=FwCfgItemList(item_list=[FwCfgItem(name="n")])),
        ),
        payload.FwCfgInvalidItem,
        "Error --fw-cfg-config: invalid item 'n' (exactly one of 'file' or 'string' is required)",
    ),
]

RULES = [
    (
        vm(console=ConsoleConfig(mode=ConsoleOutputMode.FILE)),
        console.ConsoleFileMissing,
        "Path missing when using file console mode",
    ),
    (
        vm(serial=SerialConfig(mode=ConsoleOutputMode.FILE)),
        console.ConsoleFileMissing,
        "Path missing when using file console mode",
    ),
    (
        vm(cpus=CpusConfig(boot_vcpus=2, max_vcpus=1)),
        cpu.CpusMaxLowerThanBoot,
        "Max CPUs (1) lower than boot CPUs (2)",
    ),
    (vm(cpus=CpusConfig(boot_vcpus=1, max_vcpus=8193)), cpu.TooManyCpus, None),
    (
        vm(rate_limit_groups=[RateLimiterGroupConfig(id="group")]),
        InvalidRateLimiterGroup,
        "Invalid rate-limiter group",
    ),
    (
        vm(rate_limit_groups=[RateLimiterGroupConfig(rate_limiter_config=LIMIT)]),
        InvalidRateLimiterGroup,
        "Invalid rate-limiter group",
    ),
    (
        vm(rate_limit_groups=[GROUP, GROUP]),
        IdentifierNotUnique,
        "Identifier group is not unique",
    ),
    (
        disk_vm(vhost_socket="/s"),
        disk.DiskSocketAndPath,
        "Disk path and vhost socket both provided",
    ),
    (
        vm(disks=[vhost_disk()]),
        VhostUserRequiresSharedMemory,
        "Using vhost-user requires using shared memory or huge pages",
    ),
    (
        vm(disks=[vhost_disk(vhost_socket=None)], memory=SHARED),
        VhostUserMissingSocket,
        "No socket provided when using vhost-user",
    ),
    (
        vm(disks=[vhost_disk(rate_limiter_config=LIMIT)], memory=SHARED),
        VhostUserRateLimiterNotSupported,
        "Rate limiting is not supported with vhost-user",
    ),
    (
        vm(disks=[vhost_disk(rate_limit_group="group")], memory=SHARED),
        VhostUserRateLimiterNotSupported,
        "Rate limiting is not supported with vhost-user",
    ),
    (disk_vm(rate_limit_group="other"), InvalidRateLimiterGroup, "Invalid rate-limiter group"),
    (disk_vm(pci_segment=1), pci.InvalidPciSegment, "Invalid PCI segment id: 1"),
    (
        vm(
            disks=[DiskConfig(path="/d", pci_segment=1)],
            platform=PlatformConfig(num_pci_segments=2, iommu_segments=[1]),
        ),
        pci.OnIommuSegment,
        "Device is on an IOMMU PCI segment (1) but not placed behind IOMMU",
    ),
    (
        disk_vm(pci_device_id=32),
        pci.InvalidPciDeviceId,
        "Given PCI device ID (32) is out of the supported range of 0..32",
    ),
    (disk_vm(pci_device_id=0), pci.ReservedPciDeviceId, "Given PCI device ID (0) is reserved"),
    (disk_vm(num_queues=2), TooManyQueues, "Queue count (2) must not exceed boot vCPUs (1)"),
    (
        disk_vm(queue_size=100),
        InvalidQueueSize,
        "Queue size must be a power of 2 no greater than 32768: 100",
    ),
    (
        disk_vm(queue_size=0),
        InvalidQueueSize,
        "Queue size must be a power of 2 no greater than 32768: 0",
    ),
    (
        disk_vm(queue_size=2),
        disk.BlockQueueSizeTooSmall,
        "Block queue size must be greater than 2: 2",
    ),
    (
        vm(disks=[vhost_disk(iommu=True)], memory=SHARED),
        pci.IommuNotSupported,
        "Device does not support being placed behind IOMMU",
    ),
    (
        vm(
            disks=[DiskConfig(path="/d", rate_limiter_config=LIMIT, rate_limit_group="group")],
            rate_limit_groups=[GROUP],
        ),
        InvalidRateLimiterGroup,
        "Invalid rate-limiter group",
    ),
    (
        disk_vm(serial="x" * 21),
        disk.InvalidSerialLength,
        "Block device serial length (21) exceeds maximum allowed length (20)",
    ),
    (disk_vm(id="__d"), InvalidIdentifier, "Identifier __d is not valid"),
    (
        vm(net=[vhost_net()]),
        VhostUserRequiresSharedMemory,
        "Using vhost-user requires using shared memory or huge pages",
    ),
    (
        vm(net=[vhost_net(vhost_socket=None)], memory=SHARED),
        VhostUserMissingSocket,
        "No socket provided when using vhost-user",
    ),
    (
        vm(net=[vhost_net(rate_limiter_config=LIMIT)], memory=SHARED),
        VhostUserRateLimiterNotSupported,
        "Rate limiting is not supported with vhost-user",
    ),
    (net_vm(pci_segment=1), pci.InvalidPciSegment, "Invalid PCI segment id: 1"),
    (
        net_vm(num_queues=1),
        net.VnetQueueLowerThan2,
        "Number of queues (1) to virtio_net should be higher than 2",
    ),
    (
        net_vm(fds=[3, 4]),
        net.VnetQueueFdMismatch,
        "Number of queues (2) to virtio_net does not match the number of FDs (4)",
    ),
    (net_vm(fds=[2]), net.VnetReservedFd, "Reserved fd number (<= 2): 2"),
    (net_vm(num_queues=4), TooManyQueues, "Queue count (4) must not exceed boot vCPUs (1)"),
    (
        net_vm(queue_size=3),
        InvalidQueueSize,
        "Queue size must be a power of 2 no greater than 32768: 3",
    ),
    (
        vm(net=[vhost_net(iommu=True)], memory=SHARED),
        pci.IommuNotSupported,
        "Device does not support being placed behind IOMMU",
    ),
    (
        net_vm(mtu=1279),
        net.InvalidMtu,
        "Provided MTU 1279 is lower than 1280 (expected by VIRTIO specification)",
    ),
    (
        net_vm(offload_csum=False, offload_ufo=False),
        net.NoHardwareChecksumOffload,
        '"offload_tso" and "offload_ufo" depend on "offload_csum"',
    ),
    (net_vm(mask="255.0.0.0"), net.MaskProvidedWithoutIp, "Mask provided without an IP"),
    (net_vm(ip="10.0.0.1"), net.IpProvidedWithoutMask, "IP provided without a mask"),
    (
        vm(fs=[FsConfig(tag="t", socket="/s")]),
        VhostUserRequiresSharedMemory,
        "Using vhost-user requires using shared memory or huge pages",
    ),
    (
        vm(fs=[FsConfig(tag="t", socket="/s", num_queues=2)], memory=SHARED),
        TooManyQueues,
        "Queue count (2) must not exceed boot vCPUs (1)",
    ),
    (
        vm(fs=[FsConfig(tag="t", socket="/s", queue_size=5)], memory=SHARED),
        InvalidQueueSize,
        "Queue size must be a power of 2 no greater than 32768: 5",
    ),
    (
        vm(fs=[FsConfig(tag="t", socket="/s", iommu=True)], memory=SHARED),
        pci.IommuNotSupported,
        "Device does not support being placed behind IOMMU",
    ),
    (
        vm(fs=[FsConfig(tag="t", socket="/s", pci_segment=9)], memory=SHARED),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 9",
    ),
    (
        vm(generic_vhost_user=[GenericVhostUserConfig(socket="/s", queue_sizes=[64], device_type=1)]),
        VhostUserRequiresSharedMemory,
        "Using vhost-user requires using shared memory or huge pages",
    ),
    (
        vm(
            generic_vhost_user=[
                GenericVhostUserConfig(socket="/s", queue_sizes=[64], device_type=1, iommu=True)
            ],
            memory=SHARED,
        ),
        pci.IommuNotSupported,
        "Device does not support being placed behind IOMMU",
    ),
    (
        vm(
            generic_vhost_user=[GenericVhostUserConfig(socket="/s", queue_sizes=[64, 7], device_type=1)],
            memory=SHARED,
        ),
        InvalidQueueSize,
        "Queue size must be a power of 2 no greater than 32768: 7",
    ),
    (
        vm(pmem=[PmemConfig(file="/p", pci_segment=1)]),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    (
        vm(rng=RngConfig(src="/r", pci_segment=2)),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 2",
    ),
    (vm(rtc=RtcConfig(pci_segment=3)), pci.InvalidPciSegment, "Invalid PCI segment id: 3"),
    (
        vm(console=ConsoleConfig(mode=ConsoleOutputMode.OFF, pci_segment=4)),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 4",
    ),
    (
        topology(1, 0, 1, 1, max_vcpus=1),
        cpu.CpuTopologyZeroPart,
        "No part of the CPU topology can be zero",
    ),
    (
        topology(1, 2, 1, 1, max_vcpus=3),
        cpu.CpuTopologyCount,
        "Product of CPU topology parts does not match maximum vCPU",
    ),
    (
        vm(memory=MemoryConfig(size=MIB, hugepage_size=2 * MIB)),
        memory.HugePageSizeWithoutHugePages,
        "Huge page size specified but huge pages not enabled",
    ),
    (
        vm(memory=MemoryConfig(size=MIB, hugepages=True, hugepage_size=3)),
        memory.InvalidHugePageSize,
        "Huge page size is not power of 2: 3",
    ),
    (
        vm(memory=MemoryConfig(size=MIB, shared=True, mergeable=True)),
        memory.InvalidSharedMemoryWithMergeable,
        "Invalid to set both 'mergeable' and 'shared' for memory",
    ),
    (
        vm(
            memory=MemoryConfig(
                size=0, zones=[MemoryZoneConfig(id="z", size=MIB, shared=True, mergeable=True)]
            )
        ),
        memory.InvalidSharedMemoryWithMergeable,
        "Invalid to set both 'mergeable' and 'shared' for memory",
    ),
    (
        vm(memory=MemoryConfig(size=0, zones=[MemoryZoneConfig(id="z", size=MIB, hugepage_size=1)])),
        memory.HugePageSizeWithoutHugePages,
        "Huge page size specified but huge pages not enabled",
    ),
    (
        vm(user_devices=[UserDeviceConfig(socket="/s")]),
        device.UserDevicesRequireSharedMemory,
        "Using user devices requires using shared memory or huge pages",
    ),
    (
        vm(user_devices=[UserDeviceConfig(socket="/s", iommu=True)], memory=SHARED),
        pci.IommuNotSupported,
        "Device does not support being placed behind IOMMU",
    ),
    (
        vm(vdpa=[VdpaConfig(path="/v", pci_segment=1)]),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    *[
        (vm(vsock=VsockConfig(cid=cid, socket="/s")), device.VsockSpecialCid, f"{cid} is a special VSOCK CID")
        for cid in (0, 1, 2, 4294967295)
    ],
    (
        vm(balloon=BalloonConfig(size=512 * MIB)),
        device.BalloonLargerThanRam,
        "Balloon size (536870912) greater than RAM (536870912)",
    ),
    (
        vm(balloon=BalloonConfig(size=0, pci_segment=1)),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    (
        vm(devices=[DeviceConfig(path="/p"), DeviceConfig(path="/p")]),
        DuplicateDevicePath,
        "Duplicated device path: /p",
    ),
    (
        vm(devices=[DeviceConfig()]),
        device.VfioDeviceNeitherPathNorFd,
        "VFIO device config must specify `path=` or `fd=`",
    ),
    (
        vm(devices=[DeviceConfig(path="/p", fd=9)]),
        device.VfioDeviceBothPathAndFd,
        "VFIO device config must specify at most one of `path=` or `fd=`",
    ),
    (
        vm(devices=[DeviceConfig(fd=9)]),
        device.VfioFdRequiresIommufdFd,
        "VFIO device `fd=` requires platform `iommufd_fd=<fd>`",
    ),
    (
        vm(
            devices=[DeviceConfig(path="/p", x_nv_gpudirect_clique=1)],
            platform=PlatformConfig(vfio_p2p_dma=False),
        ),
        device.GpuDirectCliqueRequiresP2pDma,
        "Device with x_nv_gpudirect_clique requires vfio_p2p_dma=on",
    ),
    (
        vm(devices=[DeviceConfig(path="/p", x_exclude_mmap_bars=[5, 6])]),
        device.InvalidDeviceExcludeMmapBar,
        "Invalid VFIO excluded-mmap BAR index: 6",
    ),
    (
        vm(vsock=VsockConfig(cid=3, socket="/s", pci_segment=1)),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=0, device_id="")),
        numa.InvalidNumaConfig,
        "Invalid NUMA configuration: device_id in numa config cannot be empty",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=0, cpus=[])),
        numa.InvalidNumaConfig,
        "Invalid NUMA configuration: cpus list in numa config cannot be empty",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=0, memory_zones=[])),
        numa.InvalidNumaConfig,
        "Invalid NUMA configuration: memory_zones in numa config cannot be empty",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=0, device_id="d", cpus=[0])),
        numa.InvalidNumaConfig,
        "Invalid NUMA configuration: "
        "device_id in numa config is mutually exclusive with cpus and memory_zones",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=0)),
        numa.InvalidNumaConfig,
        "Invalid NUMA configuration: numa config must specify either device_id or cpus/memory_zones",
    ),
    (
        numa_vm(
            NumaConfig(guest_numa_id=0, memory_zones=["z"]), NumaConfig(guest_numa_id=4, memory_zones=["z"])
        ),
        numa.MemoryZoneReused,
        "Memory zone: z belongs to multiple NUMA nodes: 0 and 4",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=0, cpus=[0], pci_segments=[1])),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    (
        numa_vm(NumaConfig(guest_numa_id=5, cpus=[0], pci_segments=[0])),
        numa.DefaultPciSegmentInvalidNode,
        "Default PCI segment assigned to non-zero NUMA node 5",
    ),
    (
        numa_vm(
            NumaConfig(guest_numa_id=0, cpus=[0], pci_segments=[1]),
            NumaConfig(guest_numa_id=1, cpus=[1], pci_segments=[1]),
            platform=TWO_SEGMENTS,
        ),
        numa.PciSegmentReused,
        "PCI segment: 1 belongs to multiple NUMA nodes 0 and 1",
    ),
    (
        vm(
            memory=MemoryConfig(
                size=0, zones=[MemoryZoneConfig(id="z", size=MIB), MemoryZoneConfig(id="z", size=MIB)]
            )
        ),
        IdentifierNotUnique,
        "Identifier z is not unique",
    ),
    (
        vm(pci_segments=[PciSegmentConfig(pci_segment=1)]),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    (
        vm(pci_segments=[PciSegmentConfig(mmio64_aperture_weight=0)]),
        pci.InvalidPciSegmentApertureWeight,
        "Invalid PCI segment aperture weight: 0",
    ),
    (
        vm(platform=PlatformConfig(num_pci_segments=97)),
        platform_rules.InvalidNumPciSegments,
        "Number of PCI segments (97) not in range of 1 to 96",
    ),
    (
        vm(platform=PlatformConfig(iommu_segments=[1])),
        pci.InvalidPciSegment,
        "Invalid PCI segment id: 1",
    ),
    (
        vm(platform=PlatformConfig(iommu_address_width_bits=65)),
        platform_rules.InvalidIommuAddressWidthBits,
        "IOMMU address width in bits (65) should be less than or equal to 64",
    ),
    (
        vm(platform=PlatformConfig(iommufd_fd=9)),
        platform_rules.IommufdFdRequiresIommufd,
        "Platform `iommufd_fd=<fd>` requires `iommufd=on`",
    ),
    (
        vm(landlock_rules=[LandlockConfig(path="/does/not/exist", access="r")]),
        landlock.LandlockPathDoesNotExist,
        'Path "/does/not/exist" provided in landlock-rules does not exist',
    ),
    (
        vm(landlock_rules=[LandlockConfig(path="/", access="x")]),
        landlock.InvalidLandlockAccess,
        "Invalid landlock access: Invalid Landlock access: Invalid access: x",
    ),
    (
        vm(ivshmem=IvshmemConfig(path="/dev/null", size=MIB, iommu=True)),
        pci.IommuNotSupported,
        "Device does not support being placed behind IOMMU",
    ),
    (
        vm(ivshmem=IvshmemConfig(path="/dev/null", size=3)),
        device.InvalidIvshmemInputSize,
        "Invalid ivshmem input size: 3",
    ),
    (
        vm(ivshmem=IvshmemConfig(path="/does/not/exist", size=MIB)),
        device.InvalidIvshmemPath,
        "Invalid ivshmem backend file path",
    ),
    (
        vm(ivshmem=IvshmemConfig(path="/dev/null", size=MIB)),
        device.InvalidIvshmemSize,
        "Invalid ivshmem backend file size: 0",
    ),
]


@pytest.mark.parametrize(("broken", "cause", "text"), PAYLOAD_RULES)
def test_payload_that_cannot_boot_is_refused_with_its_cause(broken, cause, text):
    with pytest.raises(payload.PayloadNotBootable) as caught:
        validate(VmConfig(payload=broken))

    assert type(caught.value.__cause__) is cause
    assert error_chain(caught.value) == ["Payload configuration is not bootable", text]


@pytest.mark.parametrize(("config", "kind", "text"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_rule_is_refused(config, kind, text):
    with pytest.raises(ValidationError) as caught:
        validate(config)

    assert type(caught.value) is kind
    assert text is None or str(caught.value) == text


def test_threads_per_core_above_two_are_refused_on_x86(monkeypatch):
    monkeypatch.setattr(cpu, "_machine", lambda: "x86_64")
    with pytest.raises(cpu.CpuTopologyThreadsPerCore, match="at most 2 threads per core"):
        validate(topology(4, 1, 1, 1, max_vcpus=4))


def test_dies_per_package_other_than_one_are_refused_on_arm(monkeypatch):
    monkeypatch.setattr(cpu, "_machine", lambda: "aarch64")
    with pytest.raises(cpu.CpuTopologyDiesPerPackage, match="Dies per package must be 1"):
        validate(topology(1, 1, 2, 1, max_vcpus=2))


@pytest.mark.parametrize(("machine", "limit"), [("x86_64", 8192), ("riscv64", 255)])
def test_vcpu_limit_depends_on_the_machine(monkeypatch, machine, limit):
    monkeypatch.setattr(cpu, "_machine", lambda: machine)
    validate(vm(cpus=CpusConfig(boot_vcpus=1, max_vcpus=limit)))
    with pytest.raises(cpu.TooManyCpus) as caught:
        validate(vm(cpus=CpusConfig(boot_vcpus=1, max_vcpus=limit + 1)))
    assert str(caught.value) == f"Too many CPUs: specified {limit + 1} but {limit} is the limit"


def with_id(where):
    devices = {
        "rate_limit_groups": RateLimiterGroupConfig(id="same", rate_limiter_config=LIMIT),
        "disks": DiskConfig(path="/d", id="same"),
        "net": NetConfig(id="same"),
        "fs": FsConfig(tag="t", socket="/s", id="same"),
        "generic_vhost_user": GenericVhostUserConfig(socket="/s", queue_sizes=[64], device_type=1, id="same"),
        "pmem": PmemConfig(file="/p", id="same"),
        "user_devices": UserDeviceConfig(socket="/s", id="same"),
        "vdpa": VdpaConfig(path="/v", id="same"),
        "devices": DeviceConfig(path="/p", id="same"),
    }
    singletons = {
        "rng": RngConfig(src="/r", id="same"),
        "rtc": RtcConfig(id="same"),
        "console": ConsoleConfig(mode=ConsoleOutputMode.OFF, id="same"),
        "balloon": BalloonConfig(size=0, id="same"),
        "vsock": VsockConfig(cid=3, socket="/s", id="same"),
    }
    return {where: [devices[where]]} if where in devices else {where: singletons[where]}


EVERYWHERE = ("rate_limit_groups", "disks", "net", "fs", "generic_vhost_user", "pmem", "rng", "rtc",
              "console", "user_devices", "vdpa", "balloon", "devices", "vsock")  # fmt: skip


@pytest.mark.parametrize("where", EVERYWHERE)
def test_identifier_of_a_device_and_of_a_zone_must_differ(where):
    memory_config = MemoryConfig(size=0, zones=[MemoryZoneConfig(id="same", size=MIB, shared=True)])
    with pytest.raises(IdentifierNotUnique, match="Identifier same is not unique"):
        validate(vm(memory=memory_config, **with_id(where)))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_identifier_given_by_the_user_is_returned(where):
    assert validate(vm(memory=SHARED, **with_id(where))) == {"same"}


def test_first_broken_rule_wins_over_later_ones():
    config = vm(
        cpus=CpusConfig(boot_vcpus=2, max_vcpus=1),
        disks=[DiskConfig(path="/d", vhost_socket="/s")],
        platform=PlatformConfig(num_pci_segments=0),
    )
    with pytest.raises(cpu.CpusMaxLowerThanBoot):
        validate(config)


def test_firmware_loses_command_line_and_initramfs():
    config = VmConfig(payload=PayloadConfig(firmware="/f", cmdline="quiet", initramfs="/i"))
    validate(config)
    assert config.payload == PayloadConfig(firmware="/f")


def test_igvm_with_kernel_is_let_through():
    config = VmConfig(payload=PayloadConfig(igvm="/i", kernel="/k", cmdline="quiet"))
    validate(config)
    assert config.payload == PayloadConfig(igvm="/i", kernel="/k", cmdline="quiet")


@pytest.mark.parametrize(
    "members",
    [
        {"disks": [DiskConfig(path="/d", iommu=True)]},
        {"net": [NetConfig(iommu=True)]},
        {"pmem": [PmemConfig(file="/p", iommu=True)]},
        {"rng": RngConfig(src="/r", iommu=True)},
        {"rtc": RtcConfig(iommu=True)},
        {"console": ConsoleConfig(mode=ConsoleOutputMode.OFF, iommu=True)},
        {"vdpa": [VdpaConfig(path="/v", iommu=True)]},
        {"balloon": BalloonConfig(size=0, iommu=True)},
        {"devices": [DeviceConfig(path="/p", iommu=True)]},
        {"vsock": VsockConfig(cid=3, socket="/s", iommu=True)},
        {"platform": PlatformConfig(num_pci_segments=2, iommu_segments=[1])},
    ],
    ids=lambda members: next(iter(members)),
)
def test_vm_gets_an_iommu_when_something_asks_for_it(members):
    config = vm(**members)
    validate(config)
    assert config.iommu is True


def test_plain_vm_is_valid_and_gets_no_iommu():
    config = vm()
    assert validate(config) == set()
    assert config.iommu is False


@pytest.mark.parametrize(
    ("memory_config", "is_shared"),
    [
        (MemoryConfig(size=MIB), False),
        (MemoryConfig(size=MIB, hugepages=True), True),
        (MemoryConfig(size=0), False),
        (MemoryConfig(size=0, zones=[MemoryZoneConfig(id="a", size=MIB, hugepages=True)]), True),
        (
            MemoryConfig(
                size=0,
                zones=[MemoryZoneConfig(id="a", size=1, shared=True), MemoryZoneConfig(id="b", size=1)],
            ),
            False,
        ),
    ],
)
def test_shared_memory_is_recognised(memory_config, is_shared):
    assert memory.is_backed_by_shared_memory(memory_config) is is_shared


def test_total_size_counts_zones_and_what_was_plugged():
    zones = [MemoryZoneConfig(id="a", size=3, hugepages=True, hotplugged_size=5)]
    assert memory.total_size_bytes(MemoryConfig(size=1, hotplugged_size=7, zones=zones)) == 16
