"""The configuration as JSON, both ways."""

import msgspec
import pytest
from hypothesis import given, settings

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, SerialConfig
from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import BalloonConfig, DeviceConfig, FsConfig, PmemConfig, TpmConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.error import DecodeError
from cloudvmm.config.form import decode, decode_saved, encode
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.numa import NumaConfig
from cloudvmm.config.operation import (
    RestoreConfig,
    RestoredNetConfig,
    VmReceiveMigrationData,
    VmRemoveDeviceData,
    VmResizeData,
    VmSendMigrationData,
)
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.config.vm import VmConfig
from support.config_value import structs

# lifecycle.md section 4, the `config` member of the example, without its line breaks
GOLDEN = (
    b'{"cpus":{"boot_vcpus":2,"max_vcpus":4,"kvm_hyperv":false,"max_phys_bits":46,'
    b'"features":{"amx":false},"nested":true,"core_scheduling":"Vm","profile":"Host"},'
    b'"memory":{"size":1073741824,"mergeable":false,"hotplug_method":"Acpi","shared":false,'
    b'"hugepages":false,"prefault":false,"reserve":false,"thp":true},'
    b'"payload":{"kernel":"/srv/vmlinux","cmdline":"root=/dev/vda1"},'
    b'"disks":[{"pci_segment":0,"path":"/srv/a.raw","readonly":false,"direct":false,"num_queues":1,'
    b'"queue_size":128,"vhost_user":false,"disable_io_uring":false,"disable_aio":false,'
    b'"backing_files":false,"sparse":true,"image_type":"Raw","lock_granularity":"ByteRange"}],'
    b'"rng":{"pci_segment":0,"src":"/dev/urandom"},'
    b'"serial":{"mode":"Null"},"console":{"mode":"Off","pci_segment":0},'
    b'"debug_console":{"mode":"Off","iobase":233},'
    b'"pvpanic":false,"iommu":false,"watchdog":false,"landlock_enable":false}'
)


def golden_vm():
    return VmConfig(
        cpus=CpusConfig(boot_vcpus=2, max_vcpus=4),
        memory=MemoryConfig(size=1 << 30),
        payload=PayloadConfig(kernel="/srv/vmlinux", cmdline="root=/dev/vda1"),
        disks=[DiskConfig(path="/srv/a.raw", image_type=ImageType.RAW)],
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )


def test_encoding_matches_the_reference_byte_for_byte():
    assert encode(golden_vm()) == GOLDEN


def test_reference_text_decodes_to_the_same_vm():
    assert decode(GOLDEN, VmConfig) == golden_vm()


def test_empty_object_is_a_vm_of_defaults():
    assert decode(b"{}", VmConfig) == VmConfig()


def test_device_behind_the_iommu_says_so():
    assert b'"iommu":true,"pci_segment":0' in encode(DiskConfig(iommu=True))


def test_rate_limiter_prints_unset_members_as_null():
    limiter = RateLimiterConfig(ops=TokenBucketConfig(size=1, refill_time=2))
    text = encode(DiskConfig(rate_limiter_config=limiter))
    expected = b'{"bandwidth":null,"ops":{"size":1,"one_time_burst":null,"refill_time":2}}'
    assert b'"rate_limiter_config":' + expected in text


def test_excluded_bars_are_printed_even_when_empty():
    assert encode(DeviceConfig(path="/p")) == b'{"pci_segment":0,"path":"/p","x_exclude_mmap_bars":[]}'


def test_pty_console_shows_its_file():
    serial = SerialConfig(mode=ConsoleOutputMode.PTY, file="/dev/pts/7")
    assert encode(serial) == b'{"file":"/dev/pts/7","mode":"Pty"}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            VmResizeData(desired_vcpus=2),
            b'{"desired_vcpus":2,"desired_ram":null,"desired_balloon":null}',
        ),
        (
            RestoreConfig(source_url="file:///s"),
            b'{"source_url":"file:///s","prefault":false,"memory_restore_mode":"Copy","net_fds":null,'
            b'"vfio_fds":null,"iommufd_fd":null,"resume":false,"zone_updates":[]}',
        ),
        (VmRemoveDeviceData(id="d"), b'{"id":"d"}'),
        (
            BalloonConfig(size=5),
            b'{"pci_segment":0,"size":5,"deflate_on_oom":false,"free_page_reporting":false}',
        ),
    ],
)
def test_payloads_are_printed_as_the_reference_does(value, text):
    assert encode(value) == text
    assert decode(text, type(value)) == value


class Info(msgspec.Struct, kw_only=True):
    """As vm.info nests a configuration."""

    config: VmConfig
    tree: dict[str, DiskConfig] | None = None


def test_configuration_nested_in_an_answer_is_printed_the_same():
    assert encode(Info(config=golden_vm())) == b'{"config":' + GOLDEN + b"}"
    assert encode(Info(config=golden_vm(), tree={"a": DiskConfig()})).endswith(
        b',"tree":{"a":' + encode(DiskConfig()) + b"}}"
    )


def test_unknown_members_are_ignored():
    assert decode(b'{"future":1,"memory":{"size":1,"x":[]}}', VmConfig).memory.size == 1


@pytest.mark.parametrize(
    ("raw", "kind", "text"),
    [
        (b"{}", VmRemoveDeviceData, "missing field `id` at line 1 column 2"),
        (b'{\n "ip": 1\n}', VmRemoveDeviceData, "missing field `id` at line 3 column 1"),
        (b'{"memory":{}}', VmConfig, "missing field `size` at `$.memory`"),
        (b'{"id":5}', VmRemoveDeviceData, "invalid type: integer, expected a string at `$.id`"),
        (b'{"id":null}', VmRemoveDeviceData, "invalid type: null, expected a string at `$.id`"),
        (b'{"cpus":null}', VmConfig, "invalid type: null, expected a map at `$.cpus`"),
        (b"[]", VmConfig, "invalid type: sequence, expected struct VmConfig at line 1 column 2"),
        (
            b'{"disks":[{"num_queues":1.5}]}',
            VmConfig,
            "invalid type: floating point, expected an integer at `$.disks[0].num_queues`",
        ),
        (
            b'{"disks":[{"num_queues":1.0}]}',
            VmConfig,
            "invalid type: floating point, expected an integer at `$.disks[0].num_queues`",
        ),
        (
            b'{"disks":[{"readonly":null}]}',
            VmConfig,
            "invalid type: null, expected a boolean at `$.disks[0].readonly`",
        ),
        (
            b'{"disks":[{"pci_segment":65536}]}',
            VmConfig,
            "invalid value: integer, expected u16 at `$.disks[0].pci_segment`",
        ),
        (
            b'{"memory":{"size":-1}}',
            VmConfig,
            "invalid value: integer, expected an unsigned integer at `$.memory.size`",
        ),
        (
            b'{"memory":{"size":18446744073709551616}}',
            VmConfig,
            "invalid value: integer `18446744073709551616`, expected u64",
        ),
        (b'{"console":{"mode":"off"}}', VmConfig, "unknown variant `off` at `$.console.mode`"),
        (
            b'{"disks":[{"rate_limiter_config":{"iops":1}}]}',
            VmConfig,
            "unknown field `iops` at `$.disks[0].rate_limiter_config`",
        ),
        (b"", VmConfig, "EOF while parsing a value at line 1 column 0"),
        (b'{"a":', VmConfig, "EOF while parsing a value at line 1 column 5"),
        (b"{}}", VmConfig, "trailing characters at line 1 column 3"),
        (
            b'{"net":[{"mac":"1:2"}]}',
            VmConfig,
            "The provided MAC address is invalid: parsing of 1:2 into a MAC address failed",
        ),
        (
            b'{"net":[{"fds":[2147483648]}]}',
            VmConfig,
            "invalid value: integer, expected i32 at `$.net[0].fds[0]`",
        ),
        (
            b'{"platform":{"iommufd_fd":-2147483649}}',
            VmConfig,
            "invalid value: integer, expected i32 at `$.platform.iommufd_fd`",
        ),
        (b'{"net":[{"ip":"10.0.0.256"}]}', VmConfig, "invalid IP address syntax"),
        (
            b'{"destination_url":"unix:/s","downtime_ms":0}',
            VmSendMigrationData,
            "invalid value: integer, expected at least 1 at `$.downtime_ms`",
        ),
        (b'{"platform":{"uuid":"a","system_uuid":"b"}}', VmConfig, "duplicate field `system_uuid`"),
    ],
)
def test_text_that_is_not_the_configuration_is_refused(raw, kind, text):
    with pytest.raises(DecodeError) as caught:
        decode(raw, kind)
    assert str(caught.value) == text


_PAYLOAD = b'{"payload":{"kernel":"/a"}'


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (_PAYLOAD + b',"payload":{"kernel":"/b"}}', "`payload` at line 1 column 36"),
        (_PAYLOAD + b', "payload" :{}}', "`payload` at line 1 column 38"),
        (_PAYLOAD + b',\n\n"payload"\n:{}}', "`payload` at line 4 column 0"),
        (_PAYLOAD + b',"p\\u0061yload":{}}', "`payload` at line 1 column 41"),
        (_PAYLOAD + b',"net":null,"net":null}', "`net` at line 1 column 43"),
        (_PAYLOAD + b',"disks":[{"path":"/a"},{"path":"/b","path":"/c"}]}', "`path` at line 1 column 69"),
        (b'{"payload":{"kernel":"a\\"}b","kernel":"/b"}}', "`kernel` at line 1 column 37"),
        (b'{"kernel":{"path":"/a"},"net":[],"net":[]}', "`net` at line 1 column 38"),
        (b'{"platform":{"uuid":"x","uuid":"y"}}', "`system_uuid` at line 1 column 30"),
        (
            b'{"cpus":{"boot_vcpus":1,"max_vcpus":1,"affinity":[{"vcpu":0,"host_cpus":[1],"vcpu":2}]}}',
            "`vcpu` at line 1 column 82",
        ),
        (
            b'{"disks":[{"path":"/a","rate_limiter_config":{"ops":{"size":1,"refill_time":3,"size":2}}}]}',
            "`size` at line 1 column 84",
        ),
    ],
)
def test_member_that_is_given_twice_is_refused(raw, text):
    with pytest.raises(DecodeError) as caught:
        decode(raw, VmConfig)
    assert str(caught.value) == f"duplicate field {text}"


@pytest.mark.parametrize(
    "member",
    [
        b'"zz":1,"zz":2',
        b'"zz":{"path":1,"path":2}',
        b'"zz":[{"a":1,"a":2}],"yy":1e999',
        b'"net":[{"id":"a\\u0061"},{"id":"b"}],"disks":[{"id":"c"}]',
        b'"platform":{"oem_strings":["path","path"]}',
    ],
)
def test_member_that_nobody_knows_may_be_given_twice(member):
    assert decode(_PAYLOAD + b"," + member + b"}", VmConfig).payload == PayloadConfig(kernel="/a")


def test_member_that_is_given_twice_is_refused_in_any_body():
    with pytest.raises(DecodeError, match="^duplicate field `desired_vcpus` at line 1 column 34$"):
        decode(b'{"desired_vcpus":1,"desired_vcpus":2}', VmResizeData)


def test_largest_u64_is_accepted():
    assert decode(b'{"memory":{"size":18446744073709551615}}', VmConfig).memory.size == 2**64 - 1


def test_deep_nesting_is_refused_not_a_crash():
    with pytest.raises(DecodeError, match="recursion limit exceeded"):
        decode(b'{"future":' + b"[" * 100_000, VmConfig)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(DecodeError):
        decode(b'{"payload":{"kernel":"\xff"}}', VmConfig)


@pytest.mark.parametrize("member", [b'"\xff":1', b'"unknown":"\xff"'])
def test_text_that_is_not_utf8_is_refused_in_a_member_that_nobody_knows(member):
    with pytest.raises(DecodeError, match="utf-8"):
        decode(b'{"payload":{"kernel":"/k"},"platform":{"serial_number":"a"},%s}' % member, VmConfig)


@pytest.mark.parametrize("number", [b"1e999", b"1e30", b"0.1", b"9" * 400])
def test_number_in_a_member_that_nobody_knows_does_not_hide_an_old_name(number):
    config = decode(
        b'{"payload":{"kernel":"/k"},"platform":{"serial_number":"a"},"unknown":%s}' % number, VmConfig
    )
    assert config.platform.system_serial_number == "a"


def test_descriptors_in_a_request_are_dropped():
    raw = b'{"net":[{"fds":[3,4]}],"devices":[{"fd":5}],"platform":{"iommufd_fd":6}}'
    vm = decode(raw, VmConfig)
    assert vm.net[0].fds is None
    assert vm.devices[0].fd is None
    assert vm.platform.iommufd_fd == -1
    assert decode(b'{"fds":[3]}', NetConfig).fds is None
    assert decode(b'{"fd":3}', DeviceConfig).fd is None


def test_descriptors_in_a_saved_configuration_keep_their_count():
    saved = VmConfig(
        net=[NetConfig(fds=[7, 8])],
        devices=[DeviceConfig(fd=9)],
        platform=PlatformConfig(iommufd=True, iommufd_fd=10),
    )
    vm = decode_saved(encode(saved), VmConfig)
    assert (vm.net[0].fds, vm.devices[0].fd, vm.platform.iommufd_fd) == ([-1, -1], -1, -1)


def test_descriptors_of_a_restore_come_only_beside_the_text():
    raw = (
        b'{"source_url":"u","net_fds":[{"id":"n","num_fds":2,"fds":[3,4]}],'
        b'"vfio_fds":[{"id":"v","fd":5}],"iommufd_fd":6}'
    )
    restore = decode(raw, RestoreConfig)
    assert restore.net_fds == [RestoredNetConfig(id="n", num_fds=2)]
    assert restore.vfio_fds[0].fd is None
    assert restore.iommufd_fd is None
    raw = b'{"receiver_url":"u","vfio_fds":[{"id":"v","fd":5}],"iommufd_fd":6}'
    assert decode(raw, VmReceiveMigrationData).vfio_fds[0].fd is None


def test_addresses_are_shown_in_their_canonical_form():
    net = decode(b'{"mac":"AA:BB:CC:00:11:22","ip":"2001:DB8:0::1","mask":"ffff::"}', NetConfig)
    assert (net.mac, net.ip, net.mask) == ("aa:bb:cc:00:11:22", "2001:db8::1", "ffff::")


@pytest.mark.parametrize(
    ("raw", "payload"),
    [
        (
            b'{"kernel":{"path":"/k"},"initramfs":{"path":"/i"},"cmdline":{"args":"quiet"}}',
            PayloadConfig(kernel="/k", initramfs="/i", cmdline="quiet"),
        ),
        (b'{"kernel":{"path":"/k"},"cmdline":null}', PayloadConfig(kernel="/k")),
        (b'{"kernel":{"path":"/old"},"payload":{"kernel":"/new"}}', PayloadConfig(kernel="/new")),
        (b'{"disks":[]}', None),
        (b'{"payload": null,"kernel":{"path":"/k"}}', PayloadConfig(kernel="/k")),
        (b'{"kernel":null,"initramfs":null,"cmdline":null,"tdx":null}', None),
        (b'{"tdx":{"firmware":"/td"}}', PayloadConfig(firmware="/td")),
    ],
)
def test_payload_of_2022_is_understood(raw, payload):
    assert decode(raw, VmConfig).payload == payload


@pytest.mark.parametrize(
    ("raw", "platform"),
    [
        (b'{"tdx":{"firmware":"/td"}}', PlatformConfig(tdx=True)),
        (
            b'{"tdx":{"firmware":"/td"},"platform":{"num_pci_segments":2,"uuid":"u"}}',
            PlatformConfig(tdx=True, num_pci_segments=2, system_uuid="u"),
        ),
        (b'{"tdx":{"firmware":"/td"},"platform":null}', PlatformConfig(tdx=True)),
        (b'{"tdx":{"firmware":"/td"},"payload":{"kernel":"/k"}}', None),
    ],
)
def test_tdx_of_2022_is_a_property_of_the_platform(raw, platform):
    assert decode(raw, VmConfig).platform == platform


# A body as clients of v23 sent it, with every member that is gone.
OF_2022 = b"""{
    "cpus": {"boot_vcpus": 1, "max_vcpus": 2, "topology": null, "kvm_hyperv": false, "max_phys_bits": 46,
             "affinity": null, "features": {"amx": false}},
    "memory": {"size": 536870912, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null,
               "hotplugged_size": null, "shared": true, "hugepages": false, "hugepage_size": null,
               "prefault": false, "zones": null},
    "kernel": {"path": "/k"}, "initramfs": null, "cmdline": {"args": "quiet"},
    "disks": [{"path": "/d", "readonly": false, "direct": false, "iommu": false, "num_queues": 1,
               "queue_size": 128, "vhost_user": false, "vhost_socket": null, "poll_queue": true,
               "rate_limiter_config": null, "id": null, "disable_io_uring": false, "pci_segment": 0}],
    "net": null,
    "rng": {"src": "/dev/urandom", "iommu": false}, "balloon": null,
    "fs": [{"tag": "t", "socket": "/s", "num_queues": 1, "queue_size": 1024, "dax": true,
            "cache_size": 8589934592, "id": null, "pci_segment": 0}],
    "pmem": [{"file": "/p", "size": null, "iommu": false, "mergeable": true, "discard_writes": false,
              "id": null, "pci_segment": 0}],
    "serial": {"file": null, "mode": "Null", "iommu": false},
    "console": {"file": null, "mode": "Off", "iommu": false},
    "devices": null, "user_devices": null, "vdpa": null, "vsock": null, "iommu": false,
    "sgx_epc": [{"id": "epc0", "size": 1048576, "prefault": false}],
    "numa": [{"guest_numa_id": 0, "cpus": [0], "distances": null, "memory_zones": null,
              "sgx_epc_sections": ["epc0"]}],
    "watchdog": false, "platform": null
}"""


def test_whole_body_of_2022_means_the_same():
    assert decode(OF_2022, VmConfig) == VmConfig(
        cpus=CpusConfig(boot_vcpus=1, max_vcpus=2),
        memory=MemoryConfig(size=536870912, shared=True),
        payload=PayloadConfig(kernel="/k", cmdline="quiet"),
        disks=[DiskConfig(path="/d")],
        fs=[FsConfig(tag="t", socket="/s")],
        pmem=[PmemConfig(file="/p")],
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
        numa=[NumaConfig(guest_numa_id=0, cpus=[0])],
    )


@pytest.mark.parametrize(
    ("raw", "kind", "value"),
    [
        (b'{"desired_vcpus":2}', VmResizeData, VmResizeData(desired_vcpus=2)),
        (b'{"source_url":"u","prefault":true}', RestoreConfig, RestoreConfig(source_url="u", prefault=True)),
        (b'{"receiver_url":"u"}', VmReceiveMigrationData, VmReceiveMigrationData(receiver_url="u")),
        (
            b'{"destination_url":"u","local":true}',
            VmSendMigrationData,
            VmSendMigrationData(destination_url="u", local=True),
        ),
    ],
)
def test_commands_of_2022_are_understood(raw, kind, value):
    assert decode(raw, kind) == value


def test_dropped_descriptors_are_told_of():
    heard = []
    raw = b'{"net":[{"id":"n","fds":[3]},{}],"devices":[{"fd":5},{"path":"/p"}]}'
    decode(raw, VmConfig, heard.append)
    decode(b'{"id":"n","fds":[]}', NetConfig, heard.append)
    decode(b'{"path":"/p"}', DeviceConfig, heard.append)
    text = "FD numbers were present in HTTP request body for device {} but will be ignored"
    assert heard == [text.format('Some("n")'), text.format("None"), text.format('Some("n")')]


def test_confidential_platform_is_printed_where_it_is_asked_for():
    assert b"tdx" not in encode(PlatformConfig())
    assert b'"tdx":true' in encode(PlatformConfig(tdx=True))
    assert b'"sev_snp":true' in encode(PlatformConfig(sev_snp=True))


def test_old_platform_names_are_understood():
    raw = b'{"payload":{"kernel":"/k"},"platform":{"serial_number":"s","uuid":"u"}}'
    assert decode(raw, VmConfig).platform == PlatformConfig(system_serial_number="s", system_uuid="u")


@settings(max_examples=150, deadline=None)
@given(structs(VmConfig))
def test_every_vm_survives_the_round_trip(vm):
    assert decode(encode(vm), VmConfig) == vm


@pytest.mark.parametrize("kind", [RestoreConfig, VmSendMigrationData, VmReceiveMigrationData, VmResizeData])
def test_every_payload_survives_the_round_trip(kind):
    @settings(max_examples=30, deadline=None)
    @given(structs(kind).filter(lambda value: getattr(value, "iommufd_fd", None) is None))
    def check(value):
        assert decode(encode(value), kind) == value

    check()


def test_file_system_has_a_socket_or_a_folder():
    own = FsConfig(tag="t", shared_dir="/d")
    assert decode(b'{"tag":"t","shared_dir":"/d"}', FsConfig) == own
    assert b"socket" not in encode(own)
    assert b"shared_dir" not in encode(FsConfig(tag="t", socket="/s"))
    with pytest.raises(DecodeError, match=r"missing field `socket` at line 1 column 11"):
        decode(b'{"tag":"t"}', FsConfig)
    with pytest.raises(DecodeError, match=r"missing field `socket` at `\$.fs\[1\]`"):
        decode(
            b'{"cpus":{"boot_vcpus":1,"max_vcpus":1},"fs":[{"tag":"t","socket":"/s"},{"tag":"u"}]}', VmConfig
        )


def test_tpm_has_a_socket_or_a_folder_for_its_state():
    own = TpmConfig(state_dir="/d")
    assert decode(b'{"state_dir":"/d"}', TpmConfig) == own
    assert encode(own) == b'{"state_dir":"/d"}'
    assert encode(TpmConfig(socket="/s")) == b'{"socket":"/s"}'
    with pytest.raises(DecodeError, match=r"missing field `socket`"):
        decode(b"{}", TpmConfig)
