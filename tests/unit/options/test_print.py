"""Every struct is written as an option string that reads back as it, or said to have none."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, SerialConfig
from cloudvmm.config.cpu import CpuAffinity, CpuFeatures, CpusConfig, CpuTopology
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    IvshmemConfig,
    PmemConfig,
    RngConfig,
    RtcConfig,
    TpmConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig, ImageType, VirtQueueAffinity
from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.numa import NumaConfig, NumaDistance
from cloudvmm.config.operation import (
    MemoryRestoreMode,
    MemoryZoneUpdate,
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
    TimeoutStrategy,
    VmReceiveMigrationData,
    VmSendMigrationData,
)
from cloudvmm.config.payload import FwCfgConfig, FwCfgItem, FwCfgItemList
from cloudvmm.config.pci import PciSegmentConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.rate_limit import RateLimiterConfig, RateLimiterGroupConfig, TokenBucketConfig
from cloudvmm.config.user_net import UserNetConfig
from cloudvmm.options import console, cpu, device, disk, memory, net, operation, payload, platform, rate_limit
from cloudvmm.options.error import Unprintable
from support.config_value import structs

MIB = 1 << 20
BUCKET = TokenBucketConfig(size=9, one_time_burst=0, refill_time=100)
PRINTED = [
    (cpu.format_cpus, CpusConfig(boot_vcpus=1, max_vcpus=1), ""),
    (cpu.format_cpus, CpusConfig(boot_vcpus=4, max_vcpus=4), "boot=4"),
    (
        cpu.format_cpus,
        CpusConfig(
            boot_vcpus=1,
            max_vcpus=4,
            topology=CpuTopology(threads_per_core=2, cores_per_die=2, dies_per_package=1, packages=1),
            affinity=[CpuAffinity(vcpu=0, host_cpus=[1, 2, 3, 7]), CpuAffinity(vcpu=1, host_cpus=[4])],
            features=CpuFeatures(amx=True),
            nested=False,
        ),
        "max=4,topology=2:2:1:1,affinity=[0@[1-3,7],1@[4]],features=amx,nested=off",
    ),
    (disk.format_disk, DiskConfig(path="/d"), "path=/d"),
    (disk.format_disk, DiskConfig(path='/a,b "c"]'), 'path="/a,b ""c""]"'),
    (disk.format_disk, DiskConfig(path=" /d", serial=""), 'path=" /d",serial=""'),
    (
        disk.format_disk,
        DiskConfig(
            path="/d",
            image_type=ImageType.FLAT_VMDK,
            rate_limiter_config=RateLimiterConfig(ops=BUCKET),
            queue_affinity=[VirtQueueAffinity(queue_index=0, host_cpus=[3])],
            iommu=True,
            pci_device_id=0,
        ),
        "path=/d,ops_size=9,ops_refill_time=100,queue_affinity=[0@[3]],image_type=vmdk,iommu=on,pci_device_id=0",
    ),
    (net.format_net, NetConfig(), ""),
    (net.format_net, NetConfig(user=UserNetConfig()), "user=on"),
    (
        net.format_net,
        NetConfig(user=UserNetConfig(forwards=["tcp:127.0.0.1:8080:80", "udp:0.0.0.0:5:6"])),
        "user=on,forward=[tcp:127.0.0.1:8080:80,udp:0.0.0.0:5:6]",
    ),
    (
        net.format_net,
        NetConfig(tap="t", fds=[3, 4, -1], offload_tso=False, mac="2e:00:00:00:00:01"),
        "tap=t,mac=2e:00:00:00:00:01,offload_tso=off,fd=[3,4,4294967295]",
    ),
    (
        rate_limit.format_rate_limit_group,
        RateLimiterGroupConfig(id="g", rate_limiter_config=RateLimiterConfig(bandwidth=BUCKET)),
        "id=g,bw_size=9,bw_refill_time=100",
    ),
    (device.format_rng, RngConfig(src="/dev/urandom"), ""),
    (device.format_rng, RngConfig(src="/dev/random", id="r"), "src=/dev/random,id=r"),
    (device.format_rtc, RtcConfig(), ""),
    (
        device.format_balloon,
        BalloonConfig(size=512 * MIB, deflate_on_oom=True),
        "size=512M,deflate_on_oom=on",
    ),
    (device.format_balloon, BalloonConfig(size=0, statistics=True), "statistics=on"),
    (device.format_fs, FsConfig(tag="t", socket="/s"), "tag=t,socket=/s"),
    (device.format_fs, FsConfig(tag="t", shared_dir="/d"), "tag=t,shared_dir=/d"),
    (
        device.format_generic_vhost_user,
        GenericVhostUserConfig(socket="/s", queue_sizes=[64, 64], device_type=26),
        "socket=/s,queue_sizes=[64,64],device_type=fs",
    ),
    (
        device.format_generic_vhost_user,
        GenericVhostUserConfig(socket="/s", queue_sizes=[1], device_type=999),
        "socket=/s,queue_sizes=[1],device_type=999",
    ),
    (device.format_pmem, PmemConfig(file="/p", size=(1 << 30) + 1024), "file=/p,size=1048577K"),
    (device.format_device, DeviceConfig(fd=7, x_exclude_mmap_bars=[0, 2]), "fd=7,x_exclude_mmap_bars=[0,2]"),
    (device.format_user_device, UserDeviceConfig(socket="/s", pci_segment=1), "pci_segment=1,socket=/s"),
    (device.format_vdpa, VdpaConfig(path="/v", num_queues=2), "path=/v,num_queues=2"),
    (device.format_vsock, VsockConfig(cid=3, socket="/s"), "socket=/s,cid=3"),
    (device.format_ivshmem, IvshmemConfig(path="/i", size=128 * MIB), "path=/i"),
    (device.format_tpm, TpmConfig(socket="/t"), "socket=/t"),
    (device.format_tpm, TpmConfig(state_dir="/t"), "state_dir=/t"),
    (console.format_serial, SerialConfig(mode=ConsoleOutputMode.SOCKET, socket="/s"), "socket=/s"),
    (console.format_console, ConsoleConfig(mode=ConsoleOutputMode.PTY, id="c"), "pty,id=c"),
    (console.format_console, ConsoleConfig(mode=ConsoleOutputMode.FILE, file="/f"), "file=/f"),
    (
        console.format_debug_console,
        DebugConsoleConfig(mode=ConsoleOutputMode.OFF, iobase=0xE9),
        "off,iobase=0xe9",
    ),
    (platform.format_platform, PlatformConfig(iommufd=True, iommufd_fd=9), "iommufd_fd=9"),
    (platform.format_platform, PlatformConfig(iommufd_fd=9), "iommufd_fd=9,iommufd=off"),
    (platform.format_platform, PlatformConfig(oem_strings=["a", "b c"]), "oem_strings=[a,b c]"),
    (platform.format_pci_segment, PciSegmentConfig(), ""),
    (
        platform.format_numa,
        NumaConfig(guest_numa_id=0, cpus=[0, 1, 2], distances=[NumaDistance(destination=1, distance=20)]),
        "guest_numa_id=0,cpus=[0-2],distances=[1@20]",
    ),
    (platform.format_landlock_rule, LandlockConfig(path="/p", access="rw"), "path=/p,access=rw"),
    (
        payload.format_fw_cfg_config,
        FwCfgConfig(
            kernel=False,
            items=FwCfgItemList(
                item_list=[FwCfgItem(name="a", file="/f"), FwCfgItem(name="b", string="s,t")]
            ),
        ),
        'kernel=off,items="[name=a,file=/f:name=b,string=""s,t""]"',
    ),
    (
        operation.format_restore,
        RestoreConfig(
            source_url="file:///s",
            memory_restore_mode=MemoryRestoreMode.ON_DEMAND,
            net_fds=[RestoredNetConfig(id="a@b", num_fds=2, fds=[23, 24])],
            vfio_fds=[RestoredVfioConfig(id="v", fd=5)],
            iommufd_fd=6,
            zone_updates=[MemoryZoneUpdate(id="z", host_numa_node=1)],
        ),
        'source_url=file:///s,memory_restore_mode=ondemand,net_fds=["a@b"@[23,24]],vfio_fds=[v@5],'
        "iommufd_fd=6,zone_updates=[z@1]",
    ),
    (
        operation.format_send_migration,
        VmSendMigrationData(destination_url="unix:/s", timeout_strategy=TimeoutStrategy.IGNORE),
        "destination_url=unix:/s,timeout_strategy=ignore",
    ),
    (
        operation.format_receive_migration,
        VmReceiveMigrationData(receiver_url="tcp:h:1", tls_dir="/t"),
        "receiver_url=tcp:h:1,tls_dir=/t",
    ),
]


@pytest.mark.parametrize(("write", "config", "text"), PRINTED)
def test_struct_is_written_as_short_as_can_be(write, config, text):
    assert write(config) == text


def test_memory_is_written_with_its_zones():
    zones = [
        MemoryZoneConfig(id="a", size=512 * MIB, mergeable=True),
        MemoryZoneConfig(id="b", size=1 << 30, file="/f"),
    ]
    config = MemoryConfig(size=0, mergeable=True, zones=zones, hotplug_method=HotplugMethod.VIRTIO_MEM)
    written = memory.format_memory(config)
    assert written == (
        "size=0,mergeable=on,hotplug_method=virtio-mem",
        ["id=a", "id=b,size=1G,file=/f,mergeable=off"],
    )
    assert memory.parse_memory(*written) == config


UNPRINTABLE = [
    (
        platform.format_platform,
        PlatformConfig(oem_strings=["a,b"]),
        "--platform has no form for this oem_strings",
    ),
    (
        platform.format_platform,
        PlatformConfig(iommu_segments=[]),
        "--platform has no form for this configuration",
    ),
    (platform.format_numa, NumaConfig(guest_numa_id=0, cpus=[]), "--numa has no form for this configuration"),
    (device.format_fs, FsConfig(tag="t" * 37, socket="/s"), "--fs has no form for this configuration"),
    (device.format_fs, FsConfig(tag="t", socket="/s", iommu=True), "--fs has no form for this iommu"),
    (
        disk.format_disk,
        DiskConfig(vhost_socket="/s", image_type=ImageType.RAW),
        "--disk has no form for this image_type",
    ),
    (
        disk.format_disk,
        DiskConfig(rate_limiter_config=RateLimiterConfig()),
        "--disk has no form for this rate_limiter_config",
    ),
    (
        net.format_net,
        NetConfig(rate_limiter_config=RateLimiterConfig(ops=TokenBucketConfig(size=1, refill_time=1))),
        "--net has no form for this rate_limiter_config",
    ),
    (
        console.format_console,
        ConsoleConfig(mode=ConsoleOutputMode.PTY, file="/dev/pts/1"),
        "--console has no form for this file",
    ),
    (
        console.format_serial,
        SerialConfig(mode=ConsoleOutputMode.FILE),
        "--serial has no form for this configuration",
    ),
]


@pytest.mark.parametrize(("write", "config", "text"), UNPRINTABLE)
def test_struct_that_no_string_gives_is_refused(write, config, text):
    with pytest.raises(Unprintable) as caught:
        write(config)
    assert str(caught.value) == text


DESCRIPTOR = st.integers(-(2**31), 2**31 - 1)
WORD = st.text(alphabet='ab,"[]@:= ', max_size=6)
BUCKETS = st.none() | st.builds(
    TokenBucketConfig,
    size=st.integers(1, 2**64 - 1),
    one_time_burst=st.integers(0, 2**64 - 1),
    refill_time=st.integers(1, 9),
)
LIMITERS = st.builds(RateLimiterConfig, bandwidth=BUCKETS, ops=BUCKETS)
# A list has no form for an item with a comma, a bracket or a quotation mark.
PLAIN_WORDS = st.lists(st.text("ad09_-.", min_size=1, max_size=8), min_size=1, max_size=3)
ANY_STRUCT = {
    "balloon": (BalloonConfig, device.parse_balloon, device.format_balloon, {}),
    "console": (ConsoleConfig, console.parse_console, console.format_console, {}),
    "cpus": (CpusConfig, cpu.parse_cpus, cpu.format_cpus, {}),
    "debug-console": (DebugConsoleConfig, console.parse_debug_console, console.format_debug_console, {}),
    "device": (
        DeviceConfig,
        device.parse_device,
        device.format_device,
        {"path": st.none() | WORD, "fd": st.none() | DESCRIPTOR},
    ),
    "disk": (
        DiskConfig,
        disk.parse_disk,
        disk.format_disk,
        {"path": st.none() | WORD, "rate_limiter_config": st.none() | LIMITERS},
    ),
    "fs": (FsConfig, device.parse_fs, device.format_fs, {"tag": WORD, "iommu": st.just(False)}),
    "fw-cfg-config": (FwCfgConfig, payload.parse_fw_cfg_config, payload.format_fw_cfg_config, {}),
    "generic-vhost-user": (
        GenericVhostUserConfig,
        device.parse_generic_vhost_user,
        device.format_generic_vhost_user,
        {"iommu": st.just(False)},
    ),
    "ivshmem": (IvshmemConfig, device.parse_ivshmem, device.format_ivshmem, {"iommu": st.just(False)}),
    "landlock-rules": (
        LandlockConfig,
        platform.parse_landlock_rule,
        platform.format_landlock_rule,
        {"path": WORD, "access": st.sampled_from(["r", "w", "rw", ""])},
    ),
    "memory-zone": (MemoryZoneConfig, memory.parse_memory_zone, memory.format_memory_zone, {"id": WORD}),
    "net": (
        NetConfig,
        net.parse_net,
        net.format_net,
        {
            "tap": st.none() | WORD,
            "fds": st.none() | st.lists(DESCRIPTOR, min_size=1, max_size=4),
            "rate_limiter_config": st.none() | LIMITERS,
        },
    ),
    "numa": (NumaConfig, platform.parse_numa, platform.format_numa, {}),
    "pci-segment": (PciSegmentConfig, platform.parse_pci_segment, platform.format_pci_segment, {}),
    "platform": (
        PlatformConfig,
        platform.parse_platform,
        platform.format_platform,
        {"iommufd_fd": st.none() | DESCRIPTOR},
    ),
    "pmem": (PmemConfig, device.parse_pmem, device.format_pmem, {"file": WORD}),
    "rate-limit-group": (
        RateLimiterGroupConfig,
        rate_limit.parse_rate_limit_group,
        rate_limit.format_rate_limit_group,
        {"rate_limiter_config": LIMITERS},
    ),
    "receive-migration": (
        VmReceiveMigrationData,
        operation.parse_receive_migration,
        operation.format_receive_migration,
        {"receiver_url": WORD},
    ),
    "restore": (RestoreConfig, operation.parse_restore, operation.format_restore, {"source_url": WORD}),
    "rng": (RngConfig, device.parse_rng, device.format_rng, {"src": WORD}),
    "rtc": (RtcConfig, device.parse_rtc, device.format_rtc, {}),
    "send-migration": (
        VmSendMigrationData,
        operation.parse_send_migration,
        operation.format_send_migration,
        {"destination_url": WORD, "copy_disks": st.just(msgspec.UNSET) | PLAIN_WORDS},
    ),
    "serial": (SerialConfig, console.parse_serial, console.format_serial, {}),
    "tpm": (TpmConfig, device.parse_tpm, device.format_tpm, {"socket": WORD}),
    "user-device": (
        UserDeviceConfig,
        device.parse_user_device,
        device.format_user_device,
        {"iommu": st.just(False)},
    ),
    "vdpa": (VdpaConfig, device.parse_vdpa, device.format_vdpa, {"path": WORD}),
    "vsock": (VsockConfig, device.parse_vsock, device.format_vsock, {"socket": WORD}),
}
# Of these every value has a form; of the others some have none, such as an empty list.
ALWAYS_PRINTABLE = {
    "balloon", "memory-zone", "pci-segment", "pmem", "rng", "rtc", "send-migration", "tpm", "vdpa", "vsock",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ANY_STRUCT))
def test_what_is_written_reads_back(name):
    struct, parse, write, special = ANY_STRUCT[name]
    written = 0

    @settings(max_examples=80, deadline=None, database=None)
    @given(structs(struct, **special))
    def check(config):
        nonlocal written
        try:
            text = write(config)
        except Unprintable:
            assert name not in ALWAYS_PRINTABLE
            return
        written += 1
        assert parse(text) == config

    check()
    assert written > 0


@pytest.mark.parametrize("name", sorted(ANY_STRUCT))
def test_what_was_read_is_written_the_same_again(name):
    struct, parse, write, special = ANY_STRUCT[name]

    @settings(max_examples=40, deadline=None, database=None)
    @given(structs(struct, **special))
    def check(config):
        try:
            text = write(config)
        except Unprintable:
            return
        assert write(parse(text)) == text

    check()
