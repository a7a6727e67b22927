"""Every validation rule of config.md section 12, by its number: what breaks it alone, its class, its text.

A row's config is JSON, so that rows can be laid over each other: of two neighbours the first is reported.
What a row needs to be absent, it says to be null.
"""

import itertools

import msgspec
import pytest

from cloudvmm.config import (
    confidential,
    console,
    cpu,
    device,
    disk,
    fork,
    landlock,
    memory,
    net,
    numa,
    override,
    payload,
    pci,
    user_net,
)
from cloudvmm.config import platform as platform_rules
from cloudvmm.config import restore as restore_rules
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.cpu import CpusConfig, CpuTopology
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
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
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.payload import PayloadConfig
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


def vm(**members):
    return VmConfig(**{"payload": PayloadConfig(kernel="/vmlinux"), **members})


def topology(*parts, max_vcpus):
    names = ("threads_per_core", "cores_per_die", "dies_per_package", "packages")
    return vm(
        cpus=CpusConfig(
            boot_vcpus=1, max_vcpus=max_vcpus, topology=CpuTopology(**dict(zip(names, parts, strict=True)))
        )
    )


class Row:
    """Rule `number`, broken by the JSON `config` alone, gives an error of `kind` that says `text`."""

    def __init__(self, number, config, kind, text):
        self.number = number
        self.config = config
        self.kind = kind
        self.text = text

    def __repr__(self):
        return f"{self.number}-{self.kind.__name__}"


NOT_SHARED = "Using vhost-user requires using shared memory or huge pages"
NO_SOCKET = "No socket provided when using vhost-user"
NO_LIMIT = "Rate limiting is not supported with vhost-user"
NO_IOMMU = "Device does not support being placed behind IOMMU"
BAD_GROUP = "Invalid rate-limiter group"
BAD_SIZE = "Queue size must be a power of 2 no greater than 32768: {}"
BAD_SEGMENT = "Invalid PCI segment id: {}"
NOT_UNIQUE = "Identifier {} is not unique"
UNSHARED = {"memory": {"size": 64 * MIB, "shared": False}}
MEMORY = {"memory": {"size": 64 * MIB, "shared": True}}
OPS = {"ops": {"size": 1, "refill_time": 1}}
GROUP = {"rate_limit_groups": [{"id": "group", "rate_limiter_config": OPS}]}
VHOST = {"vhost_user": True, "vhost_socket": "/s"}
FS = {"tag": "t", "socket": "/s"}
GENERIC = {"socket": "/s", "queue_sizes": [64], "device_type": 1}
IVSHMEM = {"path": "/dev/null", "size": MIB}
ONE_VCPU = {"boot_vcpus": 1, "max_vcpus": 1}
BEHIND_IOMMU = {"platform": {"num_pci_segments": 2, "iommu_segments": [1]}}
ON_SEGMENT = "Device is on an IOMMU PCI segment (1) but not placed behind IOMMU"


def parts(threads, cores, dies, packages):
    return {
        "threads_per_core": threads,
        "cores_per_die": cores,
        "dies_per_package": dies,
        "packages": packages,
    }


def fw_cfg(**members):
    off = {"kernel": False, "cmdline": False, "initramfs": False}
    return {"payload": {"kernel": "/k", "fw_cfg_config": {**off, **members}}}


def disk_with(**members):
    return {"disks": [{"path": "/d", "vhost_user": False, "vhost_socket": None, **members}]}


def vhost_disk(**members):
    return {"disks": [{**VHOST, "path": None, **members}]}


def net_with(**members):
    return {"net": [members]}


def vfio(*devices, **members):
    return {"devices": list(devices), **members}


def zone(**members):
    return {"memory": {"size": 0, "zones": [{"id": "z", "size": MIB, **members}]}}


def node(number, **members):
    unset = {"device_id": None, "cpus": None, "memory_zones": None, "pci_segments": None}
    return {"guest_numa_id": number, **unset, **members}


def common_rows(number, place):
    """Rows of the rules common to PCI devices, for the device that `place` makes from its members."""
    return [
        Row(f"{number}a", place(pci_segment=7), pci.InvalidPciSegment, BAD_SEGMENT.format(7)),
        Row(f"{number}b", {**place(pci_segment=1), **BEHIND_IOMMU}, pci.OnIommuSegment, ON_SEGMENT),
        Row(
            f"{number}c",
            place(pci_device_id=32),
            pci.InvalidPciDeviceId,
            "Given PCI device ID (32) is out of the supported range of 0..32",
        ),
        Row(
            f"{number}d",
            place(pci_device_id=0),
            pci.ReservedPciDeviceId,
            "Given PCI device ID (0) is reserved",
        ),
    ]


def id_row(number, place):
    return Row(f"{number} id", place(id="__x"), InvalidIdentifier, "Identifier __x is not valid")


def fs_with(**members):
    return {"fs": [{**FS, **members}], **MEMORY}


def generic_with(**members):
    return {"generic_vhost_user": [{**GENERIC, **members}], **MEMORY}


def pmem_with(**members):
    return {"pmem": [{"file": "/p", **members}]}


def rng_with(**members):
    return {"rng": {"src": "/r", **members}}


def rtc_with(**members):
    return {"rtc": members}


def console_with(**members):
    return {"console": {"mode": "Off", **members}}


def user_device_with(**members):
    return {"user_devices": [{"socket": "/s", **members}], **MEMORY}


def vdpa_with(**members):
    return {"vdpa": [{"path": "/v", **members}]}


def balloon_with(**members):
    return {"balloon": {"size": 0, **members}}


def device_with(**members):
    return {"devices": [{"path": "/p", **members}]}


def vsock_with(**members):
    return {"vsock": {"cid": 3, "socket": "/s", **members}}


def ivshmem_with(**members):
    return {"ivshmem": {**IVSHMEM, **members}}


NO_BOOT = "No bootitem provided: neither firmware nor kernel"
FILE_MISSING = "Path missing when using file console mode"
SHARED_AND_MERGEABLE = "Invalid to set both 'mergeable' and 'shared' for memory"
NO_HUGEPAGES = "Huge page size specified but huge pages not enabled"
BAD_NUMA = "Invalid NUMA configuration: {}"

ROWS = [
    Row("1", {"payload": None}, payload.MissingBootitem, NO_BOOT),
    Row(
        "1",
        {"payload": {"cmdline": "quiet", "firmware": None, "kernel": None, "igvm": None}},
        payload.MissingBootitem,
        NO_BOOT,
    ),
    # The reference looks at rule 3 before rule 2.
    Row(
        "3",
        {"payload": {"igvm": "/i", "firmware": "/f"}},
        payload.IgvmPlusOtherPayloads,
        "Specifying a kernel or firmware is not supported when an igvm is provided",
    ),
    Row(
        "2",
        {"payload": {"firmware": "/f", "kernel": "/k", "igvm": None}},
        payload.FirmwarePlusOtherPayloads,
        "Specifying a kernel is not supported when a firmware is provided",
    ),
    Row(
        "5",
        {"payload": {"firmware": "/f", "kernel": None, "fw_cfg_config": {"kernel": True}}},
        payload.FwCfgMissingKernel,
        "Error --fw-cfg-config: missing --kernel",
    ),
    Row("5", fw_cfg(cmdline=True), payload.FwCfgMissingCmdline, "Error --fw-cfg-config: missing --cmdline"),
    Row(
        "5",
        fw_cfg(initramfs=True),
        payload.FwCfgMissingInitramfs,
        "Error --fw-cfg-config: missing --initramfs",
    ),
    Row(
        "5",
        fw_cfg(items={"item_list": [{"name": "n"}]}),
        payload.FwCfgInvalidItem,
        "Error --fw-cfg-config: invalid item 'n' (exactly one of 'file' or 'string' is required)",
    ),
    Row(
        "5",
        fw_cfg(items={"item_list": [{"name": "n", "file": "/f", "string": "s"}]}),
        payload.FwCfgInvalidItem,
        "Error --fw-cfg-config: invalid item 'n' (exactly one of 'file' or 'string' is required)",
    ),
    Row(
        "6",
        {"payload": {"kernel": "/k", "firmware": None}, "platform": {"tdx": True}},
        confidential.TdxFirmwareMissing,
        "No TDX firmware specified",
    ),
    Row(
        "6",
        {
            "payload": {"firmware": "/f", "igvm": None},
            "platform": {"tdx": True},
            "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
        },
        confidential.TdxNoCpuHotplug,
        "CPU hotplug is not permitted with TDX",
    ),
    Row(
        "7",
        {"payload": {"igvm": "/i", "host_data": "00"}, "platform": {"sev_snp": True}},
        confidential.InvalidHostData,
        "Invalid host data format",
    ),
    Row(
        "7",
        {"platform": {"sev_snp": True}},
        confidential.SevSnpRequiresIgvm,
        "SEV-SNP requires an IGVM payload (--payload igvm=<path>)",
    ),
    Row("8", {"console": {"mode": "File"}}, console.ConsoleFileMissing, FILE_MISSING),
    Row("8", {"serial": {"mode": "File"}}, console.ConsoleFileMissing, FILE_MISSING),
    Row(
        "9",
        {"cpus": {"boot_vcpus": 9000, "max_vcpus": 8999}},
        cpu.CpusMaxLowerThanBoot,
        "Max CPUs (8999) lower than boot CPUs (9000)",
    ),
    Row("10", {"cpus": {"boot_vcpus": 1, "max_vcpus": 8193}}, cpu.TooManyCpus, None),
    Row(
        "11",
        {"rate_limit_groups": [{"id": "group", "rate_limiter_config": {"bandwidth": None, "ops": None}}]},
        InvalidRateLimiterGroup,
        BAD_GROUP,
    ),
    Row(
        "11",
        {"rate_limit_groups": [{"id": "", "rate_limiter_config": OPS}]},
        InvalidRateLimiterGroup,
        BAD_GROUP,
    ),
    Row(
        "12",
        {"rate_limit_groups": GROUP["rate_limit_groups"] * 2},
        IdentifierNotUnique,
        NOT_UNIQUE.format("group"),
    ),
    Row(
        "12",
        {"rate_limit_groups": [{"id": "__g", "rate_limiter_config": OPS}]},
        InvalidIdentifier,
        "Identifier __g is not valid",
    ),
    Row(
        "13", disk_with(vhost_socket="/s"), disk.DiskSocketAndPath, "Disk path and vhost socket both provided"
    ),
    Row("14", {**vhost_disk(), **UNSHARED}, VhostUserRequiresSharedMemory, NOT_SHARED),
    Row("15", {**vhost_disk(vhost_socket=None), **MEMORY}, VhostUserMissingSocket, NO_SOCKET),
    Row(
        "16",
        {**vhost_disk(rate_limiter_config=OPS), **MEMORY},
        VhostUserRateLimiterNotSupported,
        NO_LIMIT,
    ),
    Row(
        "16",
        {**vhost_disk(rate_limit_group="other"), **MEMORY},
        VhostUserRateLimiterNotSupported,
        NO_LIMIT,
    ),
    Row("17", disk_with(rate_limit_group="other"), InvalidRateLimiterGroup, BAD_GROUP),
    Row("17", {**disk_with(rate_limit_group="other"), **GROUP}, InvalidRateLimiterGroup, BAD_GROUP),
    *common_rows("18", disk_with),
    Row("18e", disk_with(num_queues=2), TooManyQueues, "Queue count (2) must not exceed boot vCPUs (1)"),
    Row("18f", disk_with(queue_size=100), InvalidQueueSize, BAD_SIZE.format(100)),
    Row("18f", disk_with(queue_size=0), InvalidQueueSize, BAD_SIZE.format(0)),
    Row(
        "18g",
        disk_with(queue_size=2),
        disk.BlockQueueSizeTooSmall,
        "Block queue size must be greater than 2: 2",
    ),
    Row(
        "18h",
        {**vhost_disk(iommu=True, rate_limiter_config=None, rate_limit_group=None), **MEMORY},
        pci.IommuNotSupported,
        NO_IOMMU,
    ),
    Row(
        "18j",
        {**disk_with(rate_limiter_config=OPS, rate_limit_group="group"), **GROUP},
        InvalidRateLimiterGroup,
        BAD_GROUP,
    ),
    Row(
        "18k",
        disk_with(serial="\u00e4" * 11),
        disk.InvalidSerialLength,
        "Block device serial length (22) exceeds maximum allowed length (20)",
    ),
    id_row("18", disk_with),
    Row("19", {**net_with(**VHOST), **UNSHARED}, VhostUserRequiresSharedMemory, NOT_SHARED),
    Row("19", {**net_with(vhost_user=True, vhost_socket=None), **MEMORY}, VhostUserMissingSocket, NO_SOCKET),
    Row(
        "19",
        {**net_with(**VHOST, rate_limiter_config=OPS), **MEMORY},
        VhostUserRateLimiterNotSupported,
        NO_LIMIT,
    ),
    *common_rows("20", net_with),
    Row(
        "20e",
        net_with(num_queues=1),
        net.VnetQueueLowerThan2,
        "Number of queues (1) to virtio_net should be higher than 2",
    ),
    Row(
        "20f",
        net_with(fds=[1, 4]),
        net.VnetQueueFdMismatch,
        "Number of queues (2) to virtio_net does not match the number of FDs (4)",
    ),
    Row("20g", net_with(fds=[2], num_queues=2), net.VnetReservedFd, "Reserved fd number (<= 2): 2"),
    Row("20h", net_with(num_queues=4), TooManyQueues, "Queue count (4) must not exceed boot vCPUs (1)"),
    Row("20i", net_with(queue_size=3), InvalidQueueSize, BAD_SIZE.format(3)),
    Row("20j", {**net_with(**VHOST, iommu=True), **MEMORY}, pci.IommuNotSupported, NO_IOMMU),
    Row(
        "20k",
        net_with(mtu=1279),
        net.InvalidMtu,
        "Provided MTU 1279 is lower than 1280 (expected by VIRTIO specification)",
    ),
    Row(
        "20l",
        net_with(offload_csum=False, offload_ufo=False, offload_tso=True),
        net.NoHardwareChecksumOffload,
        '"offload_tso" and "offload_ufo" depend on "offload_csum"',
    ),
    Row(
        "20l",
        net_with(offload_csum=False, offload_tso=False),
        net.NoHardwareChecksumOffload,
        '"offload_tso" and "offload_ufo" depend on "offload_csum"',
    ),
    Row("20m", net_with(mask="255.0.0.0", ip=None), net.MaskProvidedWithoutIp, "Mask provided without an IP"),
    Row("20n", net_with(ip="10.0.0.1"), net.IpProvidedWithoutMask, "IP provided without a mask"),
    Row(
        "20z",
        net_with(user={}, tap="x"),
        net.UserNetConflict,
        "User-mode networking excludes tap",
    ),
    Row(
        "20z",
        net_with(user={}, vhost_socket="/s"),
        net.UserNetConflict,
        "User-mode networking excludes vhost_socket",
    ),
    Row(
        "20z",
        {**net_with(user={}, num_queues=4), "cpus": {"boot_vcpus": 2, "max_vcpus": 2}},
        net.UserNetQueues,
        "User-mode networking has 2 queues, not 4",
    ),
    *(
        Row(
            "20z",
            net_with(user={"forwards": [text]}),
            user_net.InvalidForward,
            f'Forward "{text}" is not valid: it is PROTOCOL:ADDRESS:PORT:GUEST_PORT, '
            "such as tcp:127.0.0.1:8080:80",
        )
        for text in (
            "",
            "tcp:8080:80",
            "sctp:127.0.0.1:1:1",
            "tcp:127.0.0.1:0:80",
            "tcp:127.0.0.1:80:0",
            "tcp:127.0.0.1:65536:80",
            "tcp:127.0.0.256:80:80",
            "tcp:127.0.1:80:80",
            "tcp:127.0.0.1:80:80\n",
            "tcp:127.0.0.1:80:80,hostfwd=x",
            "tcp:localhost:80:80",
        )
    ),
    Row(
        "20z",
        net_with(user={"forwards": ["tcp:127.0.0.1:80:80", "udp:127.0.0.1:80:80", "tcp:127.0.0.1:80:81"]}),
        user_net.DuplicateForward,
        'Forward "tcp:127.0.0.1:80:81" has the protocol, the address and the port of another one',
    ),
    id_row("20", net_with),
    Row("21", {"fs": [FS], **UNSHARED}, VhostUserRequiresSharedMemory, NOT_SHARED),
    Row(
        "21 both",
        fs_with(shared_dir="/d"),
        device.FsSocketAndSharedDir,
        "File system socket and shared_dir both provided",
    ),
    Row("21a", fs_with(num_queues=2), TooManyQueues, "Queue count (2) must not exceed boot vCPUs (1)"),
    Row("21b", fs_with(queue_size=5), InvalidQueueSize, BAD_SIZE.format(5)),
    Row("21c", fs_with(iommu=True), pci.IommuNotSupported, NO_IOMMU),
    *common_rows("21", fs_with),
    id_row("21", fs_with),
    Row("22", {"generic_vhost_user": [GENERIC], **UNSHARED}, VhostUserRequiresSharedMemory, NOT_SHARED),
    Row("22a", generic_with(iommu=True), pci.IommuNotSupported, NO_IOMMU),
    Row("22b", generic_with(queue_sizes=[64, 7]), InvalidQueueSize, BAD_SIZE.format(7)),
    *common_rows("22", generic_with),
    id_row("22", generic_with),
    *common_rows("23", pmem_with),
    id_row("23", pmem_with),
    *common_rows("24", rng_with),
    id_row("24", rng_with),
    *common_rows("24", rtc_with),
    id_row("24", rtc_with),
    *common_rows("24", console_with),
    id_row("24", console_with),
    Row(
        "25",
        {"cpus": {**ONE_VCPU, "topology": parts(3, 0, 1, 1)}},
        cpu.CpuTopologyZeroPart,
        "No part of the CPU topology can be zero",
    ),
    Row(
        "28",
        {"cpus": {**ONE_VCPU, "topology": parts(1, 2, 1, 1)}},
        cpu.CpuTopologyCount,
        "Product of CPU topology parts does not match maximum vCPU",
    ),
    Row(
        "29",
        {"memory": {"size": 64 * MIB, "hugepages": False, "hugepage_size": 3}},
        memory.HugePageSizeWithoutHugePages,
        NO_HUGEPAGES,
    ),
    Row(
        "30",
        {"memory": {"size": 64 * MIB, "hugepages": True, "hugepage_size": 3}},
        memory.InvalidHugePageSize,
        "Huge page size is not power of 2: 3",
    ),
    Row(
        "31",
        {"memory": {"size": 64 * MIB, "shared": True, "mergeable": True}},
        memory.InvalidSharedMemoryWithMergeable,
        SHARED_AND_MERGEABLE,
    ),
    Row(
        "32", zone(shared=True, mergeable=True), memory.InvalidSharedMemoryWithMergeable, SHARED_AND_MERGEABLE
    ),
    Row("32", zone(hugepages=False, hugepage_size=1), memory.HugePageSizeWithoutHugePages, NO_HUGEPAGES),
    Row(
        "32",
        zone(hugepages=True, hugepage_size=6),
        memory.InvalidHugePageSize,
        "Huge page size is not power of 2: 6",
    ),
    Row(
        "33",
        {"user_devices": [{"socket": "/s"}], **UNSHARED},
        device.UserDevicesRequireSharedMemory,
        "Using user devices requires using shared memory or huge pages",
    ),
    Row("33a", user_device_with(iommu=True), pci.IommuNotSupported, NO_IOMMU),
    *common_rows("33", user_device_with),
    id_row("33", user_device_with),
    *common_rows("34", vdpa_with),
    id_row("34", vdpa_with),
    *[
        Row("35", vsock_with(cid=cid), device.VsockSpecialCid, f"{cid} is a special VSOCK CID")
        for cid in (0, 1, 2, 4294967295)
    ],
    *common_rows("36", balloon_with),
    id_row("36", balloon_with),
    Row(
        "36",
        balloon_with(size=512 * MIB),
        device.BalloonLargerThanRam,
        "Balloon size (536870912) greater than RAM (536870912)",
    ),
    Row(
        "37",
        vfio({"path": "/p", "pci_segment": 0}, {"path": "/p"}),
        DuplicateDevicePath,
        "Duplicated device path: /p",
    ),
    *common_rows("38", device_with),
    Row(
        "38e",
        vfio({"path": None, "fd": None}),
        device.VfioDeviceNeitherPathNorFd,
        "VFIO device config must specify `path=` or `fd=`",
    ),
    Row(
        "38f",
        vfio({"path": "/p", "fd": 9}),
        device.VfioDeviceBothPathAndFd,
        "VFIO device config must specify at most one of `path=` or `fd=`",
    ),
    Row(
        "38g",
        vfio({"path": None, "fd": 9}),
        device.VfioFdRequiresIommufdFd,
        "VFIO device `fd=` requires platform `iommufd_fd=<fd>`",
    ),
    Row(
        "38h",
        {**device_with(x_nv_gpudirect_clique=1), "platform": {"vfio_p2p_dma": False}},
        device.GpuDirectCliqueRequiresP2pDma,
        "Device with x_nv_gpudirect_clique requires vfio_p2p_dma=on",
    ),
    Row(
        "38i",
        device_with(x_exclude_mmap_bars=[5, 6]),
        device.InvalidDeviceExcludeMmapBar,
        "Invalid VFIO excluded-mmap BAR index: 6",
    ),
    id_row("38", device_with),
    *common_rows("39", vsock_with),
    id_row("39", vsock_with),
    Row(
        "40",
        {"numa": [node(0, device_id="")]},
        numa.InvalidNumaConfig,
        BAD_NUMA.format("device_id in numa config cannot be empty"),
    ),
    Row(
        "40",
        {"numa": [node(0, cpus=[])]},
        numa.InvalidNumaConfig,
        BAD_NUMA.format("cpus list in numa config cannot be empty"),
    ),
    Row(
        "40",
        {"numa": [node(0, memory_zones=[])]},
        numa.InvalidNumaConfig,
        BAD_NUMA.format("memory_zones in numa config cannot be empty"),
    ),
    Row(
        "40",
        {"numa": [node(0, device_id="d", cpus=[0])]},
        numa.InvalidNumaConfig,
        BAD_NUMA.format("device_id in numa config is mutually exclusive with cpus and memory_zones"),
    ),
    Row(
        "40",
        {"numa": [node(0)]},
        numa.InvalidNumaConfig,
        BAD_NUMA.format("numa config must specify either device_id or cpus/memory_zones"),
    ),
    Row(
        "41",
        {"numa": [node(0, memory_zones=["z"]), node(4, memory_zones=["z"])]},
        numa.MemoryZoneReused,
        "Memory zone: z belongs to multiple NUMA nodes: 0 and 4",
    ),
    Row(
        "42",
        {"numa": [node(0, cpus=[0], pci_segments=[1])]},
        pci.InvalidPciSegment,
        BAD_SEGMENT.format(1),
    ),
    Row(
        "43",
        {"numa": [node(5, cpus=[0], pci_segments=[0])]},
        numa.DefaultPciSegmentInvalidNode,
        "Default PCI segment assigned to non-zero NUMA node 5",
    ),
    Row(
        "44",
        {
            "numa": [node(0, cpus=[0], pci_segments=[1]), node(1, cpus=[1], pci_segments=[1])],
            "platform": {"num_pci_segments": 2},
        },
        numa.PciSegmentReused,
        "PCI segment: 1 belongs to multiple NUMA nodes 0 and 1",
    ),
    Row(
        "45",
        {"memory": {"size": 0, "zones": [{"id": "z", "size": MIB}, {"id": "z", "size": MIB}]}},
        IdentifierNotUnique,
        NOT_UNIQUE.format("z"),
    ),
    Row("45", zone(id="__z"), InvalidIdentifier, "Identifier __z is not valid"),
    Row("46", {"pci_segments": [{"pci_segment": 3}]}, pci.InvalidPciSegment, BAD_SEGMENT.format(3)),
    Row(
        "46",
        {"pci_segments": [{"mmio32_aperture_weight": 0}]},
        pci.InvalidPciSegmentApertureWeight,
        "Invalid PCI segment aperture weight: 0",
    ),
    Row(
        "46",
        {"pci_segments": [{"mmio64_aperture_weight": 0}]},
        pci.InvalidPciSegmentApertureWeight,
        "Invalid PCI segment aperture weight: 0",
    ),
    Row(
        "47",
        {"platform": {"num_pci_segments": 97}},
        platform_rules.InvalidNumPciSegments,
        "Number of PCI segments (97) not in range of 1 to 96",
    ),
    Row("48", {"platform": {"iommu_segments": [9]}}, pci.InvalidPciSegment, BAD_SEGMENT.format(9)),
    Row(
        "49",
        {"platform": {"iommu_address_width_bits": 65}},
        platform_rules.InvalidIommuAddressWidthBits,
        "IOMMU address width in bits (65) should be less than or equal to 64",
    ),
    Row(
        "50",
        {"platform": {"iommufd_fd": 9}},
        platform_rules.IommufdFdRequiresIommufd,
        "Platform `iommufd_fd=<fd>` requires `iommufd=on`",
    ),
    Row(
        "50a",  # ours
        {"platform": {"vmgenid": "1c1ff3dc6e5d4b1c9a5f2f6fb0b3d3a1"}},
        platform_rules.InvalidVmgenid,
        "VM generation id '1c1ff3dc6e5d4b1c9a5f2f6fb0b3d3a1' is neither a GUID nor 'auto'",
    ),
    Row(
        "50b",  # ours
        {"tpm": {"socket": "/s", "state_dir": "/d"}},
        device.TpmSocketAndStateDir,
        "TPM socket and state_dir both provided",
    ),
    Row(
        "51",
        {"landlock_rules": [{"path": "/does/not/exist", "access": "x"}]},
        landlock.LandlockPathDoesNotExist,
        'Path "/does/not/exist" provided in landlock-rules does not exist',
    ),
    Row(
        "51",
        {"landlock_rules": [{"path": "/", "access": "rx"}]},
        landlock.InvalidLandlockAccess,
        "Invalid landlock access: Invalid Landlock access: Invalid access: x",
    ),
    Row(
        "51",
        {"landlock_rules": [{"path": "/", "access": ""}]},
        landlock.InvalidLandlockAccess,
        "Invalid landlock access: Invalid Landlock access: Access cannot be empty",
    ),
    Row("52a", ivshmem_with(iommu=True), pci.IommuNotSupported, NO_IOMMU),
    *common_rows("52", ivshmem_with),
    Row("52e", ivshmem_with(size=3), device.InvalidIvshmemInputSize, "Invalid ivshmem input size: 3"),
    Row(
        "52f",
        ivshmem_with(path="/does/not/exist"),
        device.InvalidIvshmemPath,
        "Invalid ivshmem backend file path",
    ),
    Row("52g", ivshmem_with(), device.InvalidIvshmemSize, "Invalid ivshmem backend file size: 0"),
]


def read(config):
    return msgspec.convert({"payload": {"kernel": "/vmlinux"}, **config}, VmConfig)


def refusal(config):
    """Return the innermost error of the chain: the rule."""
    with pytest.raises(ValidationError) as caught:
        validate(read(config))
    error = caught.value
    return error.__cause__ or error


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_broken_rule_is_refused_by_name_and_text(row):
    error = refusal(row.config)
    assert type(error) is row.kind
    assert row.text is None or str(error) == row.text


def test_every_number_of_the_reference_has_a_row():
    elsewhere = {4, 26, 27}  # a warning, and two rules of one architecture each; tests of their own below
    numbers = {int("".join(letter for letter in row.number[:2] if letter.isdigit())) for row in ROWS}
    assert numbers == set(range(1, 53)) - elsewhere


def test_payload_is_refused_with_its_rule_as_the_cause():
    with pytest.raises(payload.PayloadNotBootable) as caught:
        validate(VmConfig())
    assert error_chain(caught.value) == ["Payload configuration is not bootable", NO_BOOT]


def classes_below(kind):
    return {kind for below in kind.__subclasses__() for kind in {below, *classes_below(below)}}


def test_every_error_of_the_configuration_has_a_row():
    elsewhere = {
        payload.PayloadNotBootable,  # the first link of the chain of rules 1 to 5
        console.ConsoleSocketPathMissing,  # the reference finds it in option strings only
        console.InvalidIoPortHex,  # the same
        cpu.CpuTopologyThreadsPerCore,  # depends on the architecture: test below
        cpu.CpuTopologyDiesPerPackage,  # the same
    }
    reachable = {
        kind
        for kind in classes_below(ValidationError) | classes_below(payload.PayloadConfigError)
        if kind.__module__.startswith("cloudvmm.")
        and kind.__module__ not in (fork.__name__, restore_rules.__name__, override.__name__)
    }
    assert reachable - elsewhere == {row.kind for row in ROWS}
    # Unused in the reference, hence not here: DebugconFileMissing, IommuUnsupported, VfioUnsupported.
    assert {kind.__name__ for kind in reachable}.isdisjoint(
        {"DebugconFileMissing", "IommuUnsupported", "VfioUnsupported"}
    )


def laid_over(lower, upper):
    """Put `upper` over `lower`: objects and lists member by member, of anything else `upper` wins."""
    if isinstance(lower, dict) and isinstance(upper, dict):
        return {
            name: laid_over(lower.get(name), upper[name]) if name in upper else lower[name]
            for name in {**lower, **upper}
        }
    if isinstance(lower, list) and isinstance(upper, list) and any(isinstance(item, dict) for item in upper):
        longer = max(len(lower), len(upper))
        return [
            laid_over(lower[i] if i < len(lower) else None, upper[i]) if i < len(upper) else lower[i]
            for i in range(longer)
        ]
    return upper


@pytest.mark.parametrize(("earlier", "later"), list(itertools.pairwise(ROWS)), ids=repr)
def test_of_two_neighbours_the_first_is_reported(earlier, later):
    error = refusal(laid_over(later.config, earlier.config))
    assert (type(error), earlier.text or str(error)) == (earlier.kind, str(error))


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


@pytest.mark.parametrize(
    ("given", "warned_of"),
    [
        ({}, []),
        ({"cmdline": "quiet"}, ["cmdline"]),
        ({"cmdline": "quiet", "initramfs": "/i"}, ["cmdline", "initramfs"]),
    ],
)
def test_rule_4_firmware_loses_command_line_and_initramfs_with_a_warning(given, warned_of):
    config = VmConfig(payload=PayloadConfig(firmware="/f", **given))
    heard = []
    validate(config, heard.append)
    assert config.payload == PayloadConfig(firmware="/f")
    assert heard == [
        f"Ignoring {name} parameter as firmware is provided as the payload" for name in warned_of
    ]


TTY = {"mode": "Tty"}
OFF = {"mode": "Off"}


@pytest.mark.parametrize(
    ("consoles", "names"),
    [
        ({"console": TTY, "serial": TTY}, '"virtio-console", "serial-console"'),
        ({"console": OFF, "serial": TTY, "debug_console": TTY}, '"serial-console", "debug-console"'),
        (
            {"console": TTY, "serial": TTY, "debug_console": TTY},
            '"virtio-console", "serial-console", "debug-console"',
        ),
        ({"console": TTY}, None),
        ({"console": OFF}, None),
    ],
)
def test_terminal_that_several_consoles_use_is_warned_of(consoles, names):
    heard = []
    validate(read(consoles), heard.append)
    assert heard == ([] if names is None else [f"Using TTY output for multiple consoles: [{names}]"])


def test_broken_rule_leaves_the_iommu_as_it_was():
    config = read({"disks": [{"path": "/d", "iommu": True}], "ivshmem": {**IVSHMEM, "size": 3}})
    with pytest.raises(device.InvalidIvshmemInputSize):
        validate(config)
    assert config.iommu is False


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
        (MemoryConfig(size=0, zones=[]), True),
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
