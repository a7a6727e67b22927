"""Every struct of the reference with every field, its type and its default, written out, against the types.

Reference: config.md sections 2 to 11, rest.md section 7. `path` is `string` here, `uint` is `u64`; `req` is a
member that JSON must have, `unset` an optional one, and `whole` one whose default is a struct of its own.
"""

import enum
import types
from typing import Annotated, Union, get_args, get_origin

import msgspec
import pytest

from cloudvmm.config import (
    console,
    cpu,
    device,
    disk,
    landlock,
    memory,
    net,
    numa,
    operation,
    payload,
    pci,
    platform,
    rate_limit,
    user_net,
    vm,
)
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, SerialConfig
from cloudvmm.config.cpu import CpuFeatures, CpusConfig
from cloudvmm.config.device import RngConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.rate_limit import RateLimiterConfig

PCI = """
    id string? unset
    iommu bool false
    pci_segment u16 0
    pci_device_id u8? unset
"""
TABLE = {
    vm.VmConfig: """
        cpus CpusConfig whole
        memory MemoryConfig whole
        payload PayloadConfig? unset
        rate_limit_groups [RateLimiterGroupConfig]? unset
        disks [DiskConfig]? unset
        net [NetConfig]? unset
        rng RngConfig whole
        balloon BalloonConfig? unset
        generic_vhost_user [GenericVhostUserConfig]? unset
        fs [FsConfig]? unset
        pmem [PmemConfig]? unset
        serial SerialConfig whole
        console ConsoleConfig whole
        debug_console DebugConsoleConfig whole
        devices [DeviceConfig]? unset
        user_devices [UserDeviceConfig]? unset
        vdpa [VdpaConfig]? unset
        vsock VsockConfig? unset
        pvmemcontrol PvmemcontrolConfig? unset
        pvpanic bool false
        iommu bool false
        numa [NumaConfig]? unset
        watchdog bool false
        rtc RtcConfig? unset
        gdb bool false
        pci_segments [PciSegmentConfig]? unset
        platform PlatformConfig? unset
        tpm TpmConfig? unset
        landlock_enable bool false
        landlock_rules [LandlockConfig]? unset
        ivshmem IvshmemConfig? unset
    """,
    cpu.CpusConfig: """
        boot_vcpus u32 req
        max_vcpus u32 req
        topology CpuTopology? unset
        kvm_hyperv bool false
        max_phys_bits u8 46
        affinity [CpuAffinity]? unset
        features CpuFeatures whole
        nested bool true
        core_scheduling CoreScheduling Vm
        profile CpuProfile Host
    """,
    cpu.CpuTopology: """
        threads_per_core u16 req
        cores_per_die u16 req
        dies_per_package u16 req
        packages u16 req
    """,
    cpu.CpuAffinity: """
        vcpu u32 req
        host_cpus [u64] req
    """,
    cpu.CpuFeatures: "amx bool false",
    memory.MemoryConfig: """
        size u64 req
        mergeable bool false
        hotplug_method HotplugMethod Acpi
        hotplug_size u64? unset
        hotplugged_size u64? unset
        shared bool false
        hugepages bool false
        hugepage_size u64? unset
        prefault bool false
        reserve bool false
        zones [MemoryZoneConfig]? unset
        thp bool true
    """,
    memory.MemoryZoneConfig: """
        id string req
        size u64 req
        file string? unset
        shared bool false
        hugepages bool false
        hugepage_size u64? unset
        host_numa_node u32? unset
        hotplug_size u64? unset
        hotplugged_size u64? unset
        prefault bool false
        reserve bool false
        mergeable bool false
    """,
    payload.PayloadConfig: """
        firmware string? unset
        kernel string? unset
        cmdline string? unset
        initramfs string? unset
        igvm string? unset
        host_data string? unset
        fw_cfg_config FwCfgConfig? unset
    """,
    payload.FwCfgConfig: """
        e820 bool true
        kernel bool true
        cmdline bool true
        initramfs bool true
        acpi_tables bool true
        items FwCfgItemList? unset
    """,
    payload.FwCfgItemList: "item_list [FwCfgItem] []",
    payload.FwCfgItem: """
        name string empty
        file string? unset
        string string? unset
    """,
    pci.PciDevice: PCI,
    disk.DiskConfig: f"""{PCI}
        path string? unset
        readonly bool false
        direct bool false
        num_queues u64 1
        queue_size u16 128
        vhost_user bool false
        vhost_socket string? unset
        rate_limit_group string? unset
        rate_limiter_config RateLimiterConfig? unset
        disable_io_uring bool false
        disable_aio bool false
        serial string? unset
        queue_affinity [VirtQueueAffinity]? unset
        backing_files bool false
        sparse bool true
        image_type ImageType Unknown
        lock_granularity LockGranularity ByteRange
    """,
    disk.VirtQueueAffinity: """
        queue_index u16 req
        host_cpus [u64] req
    """,
    net.NetConfig: f"""{PCI}
        tap string? unset
        ip string? unset
        mask string? unset
        mac string? unset
        host_mac string? unset
        mtu u16? unset
        num_queues u64 2
        queue_size u16 256
        vhost_user bool false
        vhost_socket string? unset
        vhost_mode VhostMode Client
        fds [i32]? unset
        rate_limiter_config RateLimiterConfig? unset
        offload_tso bool true
        offload_ufo bool true
        offload_csum bool true
    """,
    rate_limit.RateLimiterConfig: """
        bandwidth TokenBucketConfig? unset
        ops TokenBucketConfig? unset
    """,
    rate_limit.TokenBucketConfig: """
        size u64 req
        one_time_burst u64? unset
        refill_time u64 req
    """,
    rate_limit.RateLimiterGroupConfig: """
        id string empty
        rate_limiter_config RateLimiterConfig whole
    """,
    device.RngConfig: f"{PCI} src string req",
    device.RtcConfig: PCI,
    device.BalloonConfig: f"""{PCI}
        size u64 req
        deflate_on_oom bool false
        free_page_reporting bool false
    """,
    device.FsConfig: f"""{PCI}
        tag string req
        socket string req
        num_queues u64 1
        queue_size u16 1024
    """,
    device.GenericVhostUserConfig: f"""{PCI}
        socket string req
        queue_sizes [u16] req
        device_type u32 req
    """,
    device.PmemConfig: f"""{PCI}
        file string req
        size u64? unset
        discard_writes bool false
    """,
    device.DeviceConfig: f"""{PCI}
        path string? unset
        fd i32? unset
        x_nv_gpudirect_clique u8? unset
        x_exclude_mmap_bars [u64] []
    """,
    device.UserDeviceConfig: f"{PCI} socket string req",
    device.VdpaConfig: f"""{PCI}
        path string req
        num_queues u64 1
    """,
    device.VsockConfig: f"""{PCI}
        cid u32 req
        socket string req
    """,
    device.IvshmemConfig: f"""{PCI}
        path string req
        size u64 req
    """,
    device.TpmConfig: "socket string req",
    device.PvmemcontrolConfig: "",
    console.SerialConfig: """
        file string? unset
        mode ConsoleOutputMode req
        socket string? unset
    """,
    console.ConsoleConfig: f"""{PCI}
        file string? unset
        mode ConsoleOutputMode req
        socket string? unset
    """,
    console.DebugConsoleConfig: """
        file string? unset
        mode ConsoleOutputMode req
        iobase u16? unset
    """,
    platform.PlatformConfig: """
        num_pci_segments u16 1
        iommu_segments [u16]? unset
        iommu_address_width_bits u8 64
        system_serial_number string? unset
        system_uuid string? unset
        oem_strings [string]? unset
        system_manufacturer string? unset
        system_product_name string? unset
        system_version string? unset
        system_family string? unset
        system_sku_number string? unset
        chassis_asset_tag string? unset
        tdx bool false
        sev_snp bool false
        iommufd bool false
        iommufd_fd i32? unset
        vfio_p2p_dma bool true
    """,
    numa.NumaConfig: """
        guest_numa_id u32 req
        cpus [u32]? unset
        distances [NumaDistance]? unset
        memory_zones [string]? unset
        pci_segments [u16]? unset
        device_id string? unset
    """,
    numa.NumaDistance: """
        destination u32 0
        distance u8 0
    """,
    pci.PciSegmentConfig: """
        pci_segment u16 0
        mmio32_aperture_weight u32 1
        mmio64_aperture_weight u32 1
    """,
    landlock.LandlockConfig: """
        path string req
        access string req
    """,
    operation.VmResizeData: """
        desired_vcpus u32? unset
        desired_ram u64? unset
        desired_balloon u64? unset
    """,
    operation.VmResizeDiskData: """
        id string req
        desired_size u64 req
    """,
    operation.VmResizeZoneData: """
        id string req
        desired_ram u64 req
    """,
    operation.VmRemoveDeviceData: "id string req",
    operation.VmSnapshotConfig: "destination_url string req",
    operation.VmCoredumpData: "destination_url string req",
    operation.RestoreConfig: """
        source_url string req
        prefault bool false
        memory_restore_mode MemoryRestoreMode Copy
        net_fds [RestoredNetConfig]? unset
        vfio_fds [RestoredVfioConfig]? unset
        iommufd_fd i32? unset
        resume bool false
        zone_updates [MemoryZoneUpdate] []
    """,
    operation.RestoredNetConfig: """
        id string req
        num_fds u64 0
        fds [i32]? unset
    """,
    operation.RestoredVfioConfig: """
        id string req
        fd i32? unset
    """,
    operation.MemoryZoneUpdate: """
        id string req
        host_numa_node u32 req
    """,
    operation.VmReceiveMigrationData: """
        receiver_url string req
        tls_dir string? unset
        memory_mode MigrationMemoryMode Precopy
        vfio_fds [RestoredVfioConfig]? unset
        iommufd_fd i32? unset
        zone_updates [MemoryZoneUpdate] []
    """,
    operation.VmSendMigrationData: """
        destination_url string req
        local bool false
        preserve_source bool false
        downtime_ms u64>=1 300
        timeout_s u64>=1 3600
        timeout_strategy TimeoutStrategy Cancel
        connections u32>=1 1
        tls_dir string? unset
        memory_mode MigrationMemoryMode Precopy
    """,
}
WHOLE_DEFAULTS = {
    (vm.VmConfig, "cpus"): CpusConfig(boot_vcpus=1, max_vcpus=1),
    (vm.VmConfig, "memory"): MemoryConfig(size=512 << 20),
    (vm.VmConfig, "rng"): RngConfig(src="/dev/urandom"),
    (vm.VmConfig, "serial"): SerialConfig(mode=ConsoleOutputMode.NULL),
    (vm.VmConfig, "console"): ConsoleConfig(mode=ConsoleOutputMode.TTY),
    (vm.VmConfig, "debug_console"): DebugConsoleConfig(mode=ConsoleOutputMode.OFF, iobase=0xE9),
    (cpu.CpusConfig, "features"): CpuFeatures(amx=False),
    (rate_limit.RateLimiterGroupConfig, "rate_limiter_config"): RateLimiterConfig(),
}
ENUMS = {
    console.ConsoleOutputMode: ["Off", "Pty", "Tty", "File", "Socket", "Null"],
    cpu.CoreScheduling: ["Vm", "Vcpu", "Off"],
    cpu.CpuProfile: ["Host"],
    disk.ImageType: ["FlatVmdk", "FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"],
    disk.LockGranularity: ["ByteRange", "Full"],
    memory.HotplugMethod: ["Acpi", "VirtioMem"],
    net.VhostMode: ["Client", "Server"],
    operation.MemoryRestoreMode: ["Copy", "OnDemand"],
    operation.MigrationMemoryMode: ["Precopy", "Postcopy"],
    operation.TimeoutStrategy: ["Cancel", "Ignore"],
}
# What the reference has not, and what may be left out where that stands in for it.
ADDITIONS = {
    device.BalloonConfig: "statistics bool? unset",
    device.FsConfig: "socket string? unset shared_dir string? unset",
    device.TpmConfig: "socket string? unset state_dir string? unset",
    net.NetConfig: "user UserNetConfig? unset",
    platform.PlatformConfig: "vmgenid string? unset",
    operation.RestoreConfig: "overrides object? unset overlay_directory string? unset",
    operation.VmSnapshotConfig: "overlay_directory string? unset",
    operation.VmReceiveMigrationData: "overrides object? unset net_fds [RestoredNetConfig]? unset",
    operation.VmSendMigrationData: "copy_disks [string]? unset",
}
RANGES = {
    (0, 0xFF): "u8",
    (0, 0xFFFF): "u16",
    (0, 0xFFFF_FFFF): "u32",
    (0, None): "u64",
    (-(2**31), 2**31 - 1): "i32",
    (1, None): "u64>=1",
    (1, 0xFFFF_FFFF): "u32>=1",
}


def type_name(annotation):
    origin = get_origin(annotation)
    if origin is Annotated:
        limits = get_args(annotation)[1]
        return RANGES[limits.ge, limits.le]
    if origin in (Union, types.UnionType):
        member, nothing = get_args(annotation)
        assert nothing in (type(None), msgspec.UnsetType)
        return f"{type_name(member)}?"
    if origin is list:
        return f"[{type_name(get_args(annotation)[0])}]"
    if origin is dict:
        return "object"
    return {str: "string", bool: "bool"}.get(annotation) or annotation.__name__


def default_name(kind, field):
    if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
        return "req"
    if field.default is msgspec.NODEFAULT:
        made = field.default_factory()
        if made == []:
            return "[]"
        assert made == WHOLE_DEFAULTS[kind, field.name]
        return "whole"
    default = field.default
    if default is None or default is msgspec.UNSET:
        return "unset"
    if isinstance(default, enum.Enum):
        return default.value
    return "empty" if default == "" else str(default).lower()


def members_of(text):
    words = text.split()
    return {words[i]: tuple(words[i + 1 : i + 3]) for i in range(0, len(words), 3)}


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_struct_has_the_references_fields_types_and_defaults(kind):
    wanted = members_of(TABLE[kind]) | members_of(ADDITIONS.get(kind, ""))
    found = {
        field.name: (type_name(field.type), default_name(kind, field))
        for field in msgspec.structs.fields(kind)
    }
    assert found == wanted


@pytest.mark.parametrize("kind", ADDITIONS, ids=lambda kind: kind.__name__)
def test_additions_are_unset_and_so_left_out_of_what_is_printed(kind):
    assert all(default == "unset" for _, default in members_of(ADDITIONS[kind]).values())


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_enum_has_the_references_words(kind):
    assert [member.value for member in kind] == ENUMS[kind]


def test_no_struct_of_the_configuration_is_missing_above():
    rooms = [console, cpu, device, disk, landlock, memory, net, numa]
    rooms += [operation, payload, pci, platform, rate_limit, vm]
    own = {
        thing
        for room in rooms
        for thing in vars(room).values()
        if isinstance(thing, type) and issubclass(thing, msgspec.Struct | enum.Enum)
        if thing.__module__.startswith("cloudvmm.config")
    }
    additions = {user_net.UserNetConfig, user_net.Forward, operation.CloneConfig, operation.VmForkData}
    additions |= {operation.VmmCancelJobData}
    assert own - additions == {*TABLE, *ENUMS}
