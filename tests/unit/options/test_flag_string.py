"""What each flag's option string gives, and how each fault is worded."""

import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, SerialConfig
from cloudvmm.config.cpu import CoreScheduling, CpuAffinity, CpuFeatures, CpusConfig, CpuTopology
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
from cloudvmm.config.disk import DiskConfig, ImageType, LockGranularity, VirtQueueAffinity
from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.config.numa import NumaConfig, NumaDistance
from cloudvmm.config.operation import (
    MemoryRestoreMode,
    MemoryZoneUpdate,
    MigrationMemoryMode,
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
from cloudvmm.errors import error_chain
from cloudvmm.options import console, cpu, device, disk, memory, net, operation, payload, platform, rate_limit
from cloudvmm.options.error import OptionError, hint_of

MIB = 1 << 20
GOOD = [
    (cpu.parse_cpus, "", CpusConfig(boot_vcpus=1, max_vcpus=1)),
    (cpu.parse_cpus, "boot=2", CpusConfig(boot_vcpus=2, max_vcpus=2)),
    (
        cpu.parse_cpus,
        "boot=1,max=4,topology=2:2:1:1,kvm_hyperv=on,max_phys_bits=40,affinity=[0@[1,2],1@[3-5]],"
        "features=amx,nested=off,core_scheduling=VCPU,profile=Host",
        CpusConfig(
            boot_vcpus=1,
            max_vcpus=4,
            topology=CpuTopology(threads_per_core=2, cores_per_die=2, dies_per_package=1, packages=1),
            kvm_hyperv=True,
            max_phys_bits=40,
            affinity=[CpuAffinity(vcpu=0, host_cpus=[1, 2]), CpuAffinity(vcpu=1, host_cpus=[3, 4, 5])],
            features=CpuFeatures(amx=True),
            nested=False,
            core_scheduling=CoreScheduling.VCPU,
        ),
    ),
    (memory.parse_memory, "", MemoryConfig(size=512 * MIB)),
    (
        memory.parse_memory,
        "size=1G,file=/x,mergeable=on,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=1M,"
        "shared=on,hugepages=on,hugepage_size=2M,prefault=on,reserve=on,thp=off",
        MemoryConfig(
            size=1 << 30,
            mergeable=True,
            hotplug_method=HotplugMethod.VIRTIO_MEM,
            hotplug_size=2 << 30,
            hotplugged_size=MIB,
            shared=True,
            hugepages=True,
            hugepage_size=2 * MIB,
            prefault=True,
            reserve=True,
            thp=False,
        ),
    ),
    (
        memory.parse_memory_zone,
        "id=z,size=1M,file=/f,shared=on,host_numa_node=1,hotplug_size=2M,hotplugged_size=1K",
        MemoryZoneConfig(
            id="z",
            size=MIB,
            file="/f",
            shared=True,
            host_numa_node=1,
            hotplug_size=2 * MIB,
            hotplugged_size=1024,
        ),
    ),
    (disk.parse_disk, "path=/d", DiskConfig(path="/d")),
    (
        disk.parse_disk,
        "path=/d,readonly=on,direct=on,iommu=on,num_queues=4,queue_size=256,id=i,pci_segment=1,pci_device_id=3,"
        "rate_limit_group=g,queue_affinity=[0@[1,2]],serial=s,backing_files=on,sparse=off,image_type=QCOW2,"
        "lock_granularity=full,_disable_io_uring=on,_disable_aio=on,bw_size=10,bw_refill_time=20",
        DiskConfig(
            path="/d",
            readonly=True,
            direct=True,
            iommu=True,
            num_queues=4,
            queue_size=256,
            id="i",
            pci_segment=1,
            pci_device_id=3,
            rate_limit_group="g",
            queue_affinity=[VirtQueueAffinity(queue_index=0, host_cpus=[1, 2])],
            serial="s",
            backing_files=True,
            sparse=False,
            image_type=ImageType.QCOW2,
            lock_granularity=LockGranularity.FULL,
            disable_io_uring=True,
            disable_aio=True,
            rate_limiter_config=RateLimiterConfig(
                bandwidth=TokenBucketConfig(size=10, one_time_burst=0, refill_time=20)
            ),
        ),
    ),
    (
        disk.parse_disk,
        "vhost_user=true,socket=/s,image_type=raw",
        DiskConfig(vhost_user=True, vhost_socket="/s"),
    ),
    (disk.parse_disk, "path=/d,bw_size=10", DiskConfig(path="/d")),
    (disk.parse_disk, 'path="/a,b"', DiskConfig(path="/a,b")),
    (net.parse_net, "tap=,mac=", NetConfig()),
    (net.parse_net, "user=off", NetConfig()),
    (
        net.parse_net,
        "user=on,forward=[tcp:127.0.0.1:8080:80,udp:0.0.0.0:5:6],id=n",
        NetConfig(id="n", user=UserNetConfig(forwards=["tcp:127.0.0.1:8080:80", "udp:0.0.0.0:5:6"])),
    ),
    (
        net.parse_net,
        "tap=t,ip=10.0.0.1,mask=255.0.0.0,mac=2E:00:00:00:00:01"
        ",host_mac=2e:00:00:00:00:02,mtu=1500,fd=[3,4],iommu=on,num_queues=4,queue_size=512,id=n,"
        "vhost_user=on,socket=/s,vhost_mode=server,ops_size=1,ops_one_time_burst=2,ops_refill_time=3,"
        "offload_tso=off,offload_ufo=off,offload_csum=off",
        NetConfig(
            tap="t",
            ip="10.0.0.1",
            mask="255.0.0.0",
            mac="2e:00:00:00:00:01",
            host_mac="2e:00:00:00:00:02",
            mtu=1500,
            fds=[3, 4],
            iommu=True,
            num_queues=4,
            queue_size=512,
            id="n",
            vhost_user=True,
            vhost_socket="/s",
            vhost_mode=VhostMode.SERVER,
            rate_limiter_config=RateLimiterConfig(
                ops=TokenBucketConfig(size=1, one_time_burst=2, refill_time=3)
            ),
            offload_tso=False,
            offload_ufo=False,
            offload_csum=False,
        ),
    ),
    (
        rate_limit.parse_rate_limit_group,
        "id=g,bw_size=1,bw_refill_time=2",
        RateLimiterGroupConfig(
            id="g",
            rate_limiter_config=RateLimiterConfig(
                bandwidth=TokenBucketConfig(size=1, one_time_burst=0, refill_time=2)
            ),
        ),
    ),
    (rate_limit.parse_rate_limit_group, "", RateLimiterGroupConfig()),
    (device.parse_rng, "", RngConfig(src="/dev/urandom")),
    (device.parse_rng, "src=/r,iommu=on,id=i", RngConfig(src="/r", iommu=True, id="i")),
    (device.parse_rtc, "", RtcConfig()),
    (device.parse_rtc, "pci_segment=1", RtcConfig(pci_segment=1)),
    (device.parse_balloon, "", BalloonConfig(size=0)),
    (
        device.parse_balloon,
        "size=1M,deflate_on_oom=on,free_page_reporting=on",
        BalloonConfig(size=MIB, deflate_on_oom=True, free_page_reporting=True),
    ),
    (device.parse_balloon, "statistics=on", BalloonConfig(size=0, statistics=True)),
    (
        device.parse_fs,
        "tag=t,socket=/s,num_queues=2,queue_size=64",
        FsConfig(tag="t", socket="/s", num_queues=2, queue_size=64),
    ),
    (device.parse_fs, "shared_dir=/d,tag=t", FsConfig(tag="t", shared_dir="/d")),
    (
        device.parse_generic_vhost_user,
        "device_type=fs,socket=/s,queue_sizes=[64,128]",
        GenericVhostUserConfig(socket="/s", queue_sizes=[64, 128], device_type=26),
    ),
    (
        device.parse_generic_vhost_user,
        "virtio_id=4294967295,socket=/s,queue_sizes=64",
        GenericVhostUserConfig(socket="/s", queue_sizes=[64], device_type=4294967295),
    ),
    (
        device.parse_pmem,
        "file=/p,size=2M,discard_writes=on",
        PmemConfig(file="/p", size=2 * MIB, discard_writes=True),
    ),
    (
        device.parse_device,
        "path=/p,x_nv_gpudirect_clique=2,x_exclude_mmap_bars=[0,2]",
        DeviceConfig(path="/p", x_nv_gpudirect_clique=2, x_exclude_mmap_bars=[0, 2]),
    ),
    (device.parse_device, "fd=9", DeviceConfig(fd=9)),
    (device.parse_user_device, "socket=/s,id=u", UserDeviceConfig(socket="/s", id="u")),
    (device.parse_vdpa, "path=/v,num_queues=2", VdpaConfig(path="/v", num_queues=2)),
    (device.parse_vsock, "cid=3,socket=/s", VsockConfig(cid=3, socket="/s")),
    (device.parse_ivshmem, "path=/i", IvshmemConfig(path="/i", size=128 * MIB)),
    (device.parse_tpm, "socket=/s", TpmConfig(socket="/s")),
    (console.parse_serial, "tty", SerialConfig(mode=ConsoleOutputMode.TTY)),
    (console.parse_serial, "file=/f", SerialConfig(mode=ConsoleOutputMode.FILE, file="/f")),
    (console.parse_serial, "socket=/s", SerialConfig(mode=ConsoleOutputMode.SOCKET, socket="/s")),
    (console.parse_serial, "file=/f,null,pty", SerialConfig(mode=ConsoleOutputMode.PTY)),
    (
        console.parse_console,
        "off,iommu=on,id=c",
        ConsoleConfig(mode=ConsoleOutputMode.OFF, iommu=True, id="c"),
    ),
    (console.parse_console, "file=/f", ConsoleConfig(mode=ConsoleOutputMode.FILE, file="/f")),
    (
        console.parse_debug_console,
        "off,iobase=0xe9",
        DebugConsoleConfig(mode=ConsoleOutputMode.OFF, iobase=0xE9),
    ),
    (console.parse_debug_console, "tty", DebugConsoleConfig(mode=ConsoleOutputMode.TTY)),
    (
        platform.parse_platform,
        "num_pci_segments=4,iommu_segments=[1,2-3],iommu_address_width=48,oem_strings=[a,b],"
        "system_manufacturer=m,chassis_asset_tag=c,vfio_p2p_dma=off",
        PlatformConfig(
            num_pci_segments=4,
            iommu_segments=[1, 2, 3],
            iommu_address_width_bits=48,
            oem_strings=["a", "b"],
            system_manufacturer="m",
            chassis_asset_tag="c",
            vfio_p2p_dma=False,
        ),
    ),
    (platform.parse_platform, "vmgenid=auto", PlatformConfig(vmgenid="auto")),
    (platform.parse_platform, "tdx=on,sev_snp=off", PlatformConfig(tdx=True)),
    (platform.parse_platform, "iommufd_fd=9", PlatformConfig(iommufd=True, iommufd_fd=9)),
    (platform.parse_platform, "iommufd_fd=9,iommufd=off", PlatformConfig(iommufd=False, iommufd_fd=9)),
    (
        platform.parse_platform,
        "serial_number=old,uuid=u,system_serial_number=new",
        PlatformConfig(system_serial_number="new", system_uuid="u"),
    ),
    (
        platform.parse_numa,
        "guest_numa_id=1,cpus=[0-2],distances=[0@20,2@300],memory_zones=[a,b],pci_segments=[1]",
        NumaConfig(
            guest_numa_id=1,
            cpus=[0, 1, 2],
            distances=[
                NumaDistance(destination=0, distance=20),
                NumaDistance(destination=2, distance=44),
            ],
            memory_zones=["a", "b"],
            pci_segments=[1],
        ),
    ),
    (platform.parse_numa, "guest_numa_id=1,device_id=d", NumaConfig(guest_numa_id=1, device_id="d")),
    (
        platform.parse_pci_segment,
        "pci_segment=1,mmio32_aperture_weight=2",
        PciSegmentConfig(pci_segment=1, mmio32_aperture_weight=2),
    ),
    (platform.parse_landlock_rule, "path=/p,access=rw", LandlockConfig(path="/p", access="rw")),
    (
        payload.parse_fw_cfg_config,
        "e820=off,acpi_table=off,items=[name=a,file=p:name=b,string=s]",
        FwCfgConfig(
            e820=False,
            acpi_tables=False,
            items=FwCfgItemList(item_list=[FwCfgItem(name="a", file="p"), FwCfgItem(name="b", string="s")]),
        ),
    ),
    (
        operation.parse_restore,
        "source_url=file:///s,prefault=on,memory_restore_mode=ondemand,net_fds=[n@[23,24]],vfio_fds=[v@5],"
        "iommufd_fd=6,resume=true,zone_updates=[z@1]",
        RestoreConfig(
            source_url="file:///s",
            prefault=True,
            memory_restore_mode=MemoryRestoreMode.ON_DEMAND,
            net_fds=[RestoredNetConfig(id="n", num_fds=2, fds=[23, 24])],
            vfio_fds=[RestoredVfioConfig(id="v", fd=5)],
            iommufd_fd=6,
            resume=True,
            zone_updates=[MemoryZoneUpdate(id="z", host_numa_node=1)],
        ),
    ),
    (
        operation.parse_send_migration,
        "destination_url=unix:/s,local=on,timeout_strategy=Ignore,downtime_ms=5",
        VmSendMigrationData(
            destination_url="unix:/s",
            local=True,
            timeout_strategy=TimeoutStrategy.IGNORE,
            downtime_ms=5,
        ),
    ),
    (
        operation.parse_receive_migration,
        "receiver_url=tcp:h:1,memory_mode=postcopy",
        VmReceiveMigrationData(receiver_url="tcp:h:1", memory_mode=MigrationMemoryMode.POSTCOPY),
    ),
]

UNKNOWN = "Unknown option: nope"
BAD = [
    (cpu.parse_cpus, "nope=1", ["Error parsing --cpus", UNKNOWN]),
    (cpu.parse_cpus, "boot=x", ["Error parsing --cpus", "Unable to convert x for boot"]),
    (cpu.parse_cpus, "profile=host", ["Error parsing --cpus", "Unable to convert host for profile"]),
    (cpu.parse_cpus, "features=[amx,sse]", ["Invalid feature in --cpus features list: sse"]),
    (memory.parse_memory, "size=512m", ["Error parsing --memory", "Unable to convert 512m for size"]),
    (memory.parse_memory, "size", ["Error parsing --memory", "Invalid syntax: size"]),
    (memory.parse_memory_zone, "size=1M", ["Error parsing --memory-zone: id missing"]),
    (
        memory.parse_memory_zone,
        "id=z,size=1T",
        ["Error parsing --memory-zone", "Unable to convert 1T for size"],
    ),
    (rate_limit.parse_rate_limit_group, "nope=1", ["Error parsing --rate-limit-group", UNKNOWN]),
    (disk.parse_disk, "nope=1", ["Error parsing --disk", UNKNOWN]),
    (
        disk.parse_disk,
        "lock_granularity=Full",
        ["Error parsing --disk", "Unable to convert Full for lock_granularity"],
    ),
    (
        disk.parse_disk,
        "path=/d,pci_segment=x",
        ["Error parsing common PCI device config", "Unable to convert x for pci_segment"],
    ),
    (net.parse_net, "forward=[tcp:0.0.0.0:1:1]", ["Error parsing --net: forward needs user=on"]),
    (net.parse_net, "mac=x", ["Error parsing --net", "Unable to convert x for mac"]),
    (device.parse_rng, "nope=1", ["Error parsing --rng", UNKNOWN]),
    (device.parse_rtc, "nope=1", ["Error parsing --rtc", UNKNOWN]),
    (device.parse_balloon, "nope=1", ["Error parsing --balloon", UNKNOWN]),
    (device.parse_fs, "nope=1", ["Error parsing --fs", UNKNOWN]),
    (device.parse_fs, "tag=t,socket=/s,iommu=on", ["Error parsing --fs", "Unknown option: iommu"]),
    (device.parse_fs, "socket=/s", ["Error parsing --fs: tag missing"]),
    (device.parse_fs, "tag=t", ["Error parsing --fs: socket missing"]),
    (device.parse_fs, "tag=t,queue_size=x", ["Error parsing --fs: socket missing"]),
    (device.parse_fs, "tag=" + "x" * 37, ["Error parsing --fs: max tag length is 36"]),
    (device.parse_pmem, "nope=1", ["Error parsing --pmem", UNKNOWN]),
    (device.parse_pmem, "size=1M", ["Error parsing --pmem: file missing"]),
    (device.parse_generic_vhost_user, "nope=1", ["Error parsing --generic-vhost-user", UNKNOWN]),
    (
        device.parse_generic_vhost_user,
        "device_type=fs",
        ["Error parsing --generic-vhost-user: socket missing"],
    ),
    (
        device.parse_generic_vhost_user,
        "socket=/s",
        ["Error parsing --generic-vhost-user: queue size missing"],
    ),
    (
        device.parse_generic_vhost_user,
        "socket=/s,queue_sizes=[1]",
        ["Error parsing --generic-vhost-user: device_type missing"],
    ),
    (
        device.parse_generic_vhost_user,
        "socket=/s,queue_sizes=[1],device_type=007",
        ['Error parsing --generic-vhost-user: device_type "007" invalid (leading zeros or unknown string)'],
    ),
    (
        device.parse_generic_vhost_user,
        "socket=/s,queue_sizes=[1],device_type=35",
        [
            'Error parsing --generic-vhost-user: device with device_type "35" '
            "cannot be implemented via vhost-user"
        ],
    ),
    (
        device.parse_generic_vhost_user,
        "socket=/s,queue_sizes=[65536],device_type=fs",
        ["Error parsing --generic-vhost-user", "Unable to convert [65536] for queue_sizes"],
    ),
    (device.parse_device, "nope=1", ["Error parsing --device", UNKNOWN]),
    (device.parse_user_device, "nope=1", ["Error parsing --user-device", UNKNOWN]),
    (device.parse_user_device, "", ["Error parsing --user-device: socket missing"]),
    (device.parse_vdpa, "nope=1", ["Error parsing --vdpa", UNKNOWN]),
    (device.parse_vdpa, "", ["Error parsing --vdpa: path missing"]),
    (device.parse_vsock, "nope=1", ["Error parsing --vsock", UNKNOWN]),
    (device.parse_vsock, "cid=3", ["Error parsing --vsock: socket missing"]),
    (device.parse_vsock, "socket=/s", ["Error parsing --vsock: cid missing"]),
    (device.parse_ivshmem, "nope=1", ["Error parsing --ivshmem", UNKNOWN]),
    (device.parse_ivshmem, "size=1M", ["Error parsing --ivshmem: path missing"]),
    (device.parse_tpm, "nope=1", ["Error parsing --tpm", UNKNOWN]),
    (device.parse_tpm, "", ["Error parsing --tpm: path missing"]),
    (console.parse_serial, "nope", ["Error parsing --serial", UNKNOWN]),
    (console.parse_serial, "", ["Error parsing --console: invalid console mode given"]),
    (
        console.parse_serial,
        "file=",
        ["Error validating configuration", "Path missing when using file console mode"],
    ),
    (console.parse_console, "nope", ["Error parsing --console", UNKNOWN]),
    (console.parse_console, "id=c", ["Error parsing --console: invalid console mode given"]),
    (
        console.parse_debug_console,
        "iobase=0x10",
        ["Error parsing --debug-console: invalid console mode given"],
    ),
    (
        console.parse_console,
        "socket=",
        ["Error validating configuration", "Path missing when using socket console mode"],
    ),
    (console.parse_debug_console, "nope", ["Error parsing --debug-console", UNKNOWN]),
    (
        console.parse_debug_console,
        "off,iobase=233",
        [
            "Error validating configuration",
            "The IO port was not properly provided in hex or a `0x` prefix is missing: 233",
        ],
    ),
    (
        console.parse_debug_console,
        "off,iobase=0x10000",
        [
            "Error validating configuration",
            "The IO port was not properly provided in hex or a `0x` prefix is missing: 0x10000",
        ],
    ),
    (platform.parse_platform, "nope=1", ["Error parsing --platform", UNKNOWN]),
    (platform.parse_pci_segment, "nope=1", ["Error parsing --pci-segment", UNKNOWN]),
    (
        platform.parse_numa,
        "cpus=[0]",
        ["Error parsing --numa", "Invalid value: guest_numa_id is required for all NUMA nodes"],
    ),
    (
        platform.parse_numa,
        "guest_numa_id=0,device_id=d,cpus=[0]",
        [
            "Error parsing --numa",
            "Invalid value: device_id in numa config cannot be used with cpus or memory zones",
        ],
    ),
    (platform.parse_landlock_rule, "nope=1", ["Error parsing --landlock-rules", UNKNOWN]),
    (
        platform.parse_landlock_rule,
        "path=/p",
        ["Error parsing --landlock-rules: path/access field missing"],
    ),
    (
        platform.parse_landlock_rule,
        "access=r",
        ["Error parsing --landlock-rules: path/access field missing"],
    ),
    (
        platform.parse_landlock_rule,
        "path=/p,access=rwx",
        ["Error parsing --landlock-rules", "Invalid value: rwx"],
    ),
    (
        payload.parse_fw_cfg_config,
        "items=[file=p]",
        ["Error parsing --fw-cfg-config items", "Unable to convert [file=p] for items"],
    ),
    (
        payload.parse_fw_cfg_config,
        "items=",
        ["Error parsing --fw-cfg-config items", "Unable to convert  for items"],
    ),
    (operation.parse_restore, "nope=1", ["Error parsing --restore", UNKNOWN]),
    (operation.parse_restore, "prefault=on", ["Error parsing --restore: source_url missing"]),
    (
        operation.parse_receive_migration,
        "tcp:h:1",
        ["Error parsing receive migration parameters", "Unknown option: tcp:h:1"],
    ),
    (
        operation.parse_receive_migration,
        "",
        [
            "Error parsing receive migration parameters",
            "Invalid syntax: receiver_url is required",
        ],
    ),
    (
        operation.parse_send_migration,
        "local=on",
        [
            "Error parsing send migration parameters",
            "Invalid syntax: destination_url is required",
        ],
    ),
    (
        operation.parse_send_migration,
        "destination_url=unix:/s,connections=0",
        [
            "Error parsing send migration parameters",
            "Invalid value: connections must be non-zero",
        ],
    ),
]


# Two faults each: the one that the reference meets first is reported.
FIRST = [
    (cpu.parse_cpus, "features=sse,nested=x", "Invalid feature in --cpus features list: sse"),
    (
        device.parse_generic_vhost_user,
        "socket=/s,queue_sizes=[1],device_type=0,pci_segment=x",
        'Error parsing --generic-vhost-user: device_type "0" invalid (leading zeros or unknown string)',
    ),
    (device.parse_pmem, "pci_segment=x", "Error parsing common PCI device config"),
    (device.parse_fs, "pci_segment=x", "Error parsing --fs: tag missing"),
    (disk.parse_disk, "pci_segment=x,sparse=x", "Error parsing --disk"),
]
HINTS = [
    (memory.parse_memory, "size=512m", "size=<size>[K|M|G]"),
    (memory.parse_memory, "hotplug_method=none", "hotplug_method=acpi|virtio-mem"),
    (disk.parse_disk, "image_type=iso", "image_type=vmdk|vhd|qcow2|raw|vhdx"),
    (device.parse_tpm, "nope=1", "socket=<path>,state_dir=<path>"),
    (device.parse_vsock, "cid=3,pci_segment=x", "pci_segment=<number>"),
    (console.parse_serial, "", "--serial off|pty|tty|null,file=<path>,socket=<path>"),
    (cpu.parse_cpus, "features=sse", "features=[amx]"),
    (platform.parse_landlock_rule, "path=/p,access=rwx", "access=r|w|rw"),
    (console.parse_debug_console, "iobase=0x10", "off|pty|tty|null,file=<path>,iobase=0x<port>"),
    (console.parse_serial, "file=", "--serial file=<path>"),
    (console.parse_console, "socket=", "--console socket=<path>"),
    (console.parse_debug_console, "file=", "--debug-console file=<path>"),
]


@pytest.mark.parametrize(("parse", "text", "expected"), FIRST)
def test_of_two_faults_the_references_first_is_reported(parse, text, expected):
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert error_chain(caught.value)[0] == expected


@pytest.mark.parametrize(("parse", "text", "hint"), HINTS)
def test_refusal_tells_what_is_allowed(parse, text, hint):
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert hint_of(caught.value) == hint


@pytest.mark.parametrize("parse", [device.parse_generic_vhost_user])
def test_refused_device_type_tells_all_names(parse):
    with pytest.raises(OptionError) as caught:
        parse("socket=/s,queue_sizes=[1],device_type=disk")
    assert hint_of(caught.value).startswith("device_type=net|block|console|")
    assert "iommu" not in hint_of(caught.value)


def test_image_type_beside_a_socket_is_not_looked_at():
    assert disk.parse_disk("socket=/s,image_type=iso") == DiskConfig(vhost_socket="/s")


def test_old_names_are_read_with_a_warning():
    heard = []
    platform.parse_platform("serial_number=a,uuid=b", heard.append)
    device.parse_generic_vhost_user("socket=/s,queue_sizes=[1],virtio_id=fs", heard.append)
    assert heard == [
        "'serial_number' in --platform is deprecated; use 'system_serial_number'.",
        "'uuid' in --platform is deprecated; use 'system_uuid'.",
        "'virtio_id' in --generic-vhost-user is deprecated; use 'device_type'.",
    ]


@pytest.mark.parametrize(("parse", "text", "expected"), GOOD)
def test_option_string_gives(parse, text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(("parse", "text", "chain"), BAD)
def test_option_string_is_refused_with(parse, text, chain):
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert error_chain(caught.value) == chain


def test_zones_inherit_mergeable_from_the_memory():
    parsed = memory.parse_memory("size=0,mergeable=on", ["id=a,size=1M", "id=b,size=1M,mergeable=off"])
    assert parsed.zones == [
        MemoryZoneConfig(id="a", size=MIB, mergeable=True),
        MemoryZoneConfig(id="b", size=MIB),
    ]
