"""The VM that the command line describes."""

import pytest

from cloudvmm.cli.error import ParsingConfig
from cloudvmm.cli.flag import parse_args
from cloudvmm.cli.vm_flag import build_vm_config
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import RtcConfig, TpmConfig, VsockConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import error_chain

MIB = 1 << 20


def build(*argv):
    return build_vm_config(parse_args(argv))


def test_kernel_alone_gives_a_vm_of_defaults():
    assert build("--kernel", "/k") == VmConfig(payload=PayloadConfig(kernel="/k"))


def test_every_part_of_the_command_line_arrives():
    argv = [
        "--kernel",
        "/k",
        "--cmdline",
        "quiet",
        "--initramfs",
        "/i",
        "--cpus",
        "boot=2,max=4",
        "--memory",
        "size=0",
        "--memory-zone",
        "id=z,size=64M",
        "--disk",
        "path=/a",
        "path=/b,iommu=on",
        "--net",
        "tap=t",
        "--console",
        "off",
        "--rtc",
        "--vsock",
        "cid=3,socket=/s",
        "--tpm",
        "socket=/t",
        "--watchdog",
        "--pvpanic",
    ]
    assert build(*argv) == VmConfig(
        payload=PayloadConfig(kernel="/k", cmdline="quiet", initramfs="/i"),
        cpus=CpusConfig(boot_vcpus=2, max_vcpus=4),
        memory=MemoryConfig(size=0, zones=[MemoryZoneConfig(id="z", size=64 * MIB)]),
        disks=[DiskConfig(path="/a"), DiskConfig(path="/b", iommu=True)],
        net=[NetConfig(tap="t")],
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
        rtc=RtcConfig(),
        vsock=VsockConfig(cid=3, socket="/s"),
        tpm=TpmConfig(socket="/t"),
        watchdog=True,
        pvpanic=True,
        iommu=True,
    )


@pytest.mark.parametrize(
    ("flag", "text", "member"),
    [
        ("--balloon", "size=1M", "balloon"),
        ("--device", "path=/p", "devices"),
        ("--landlock-rules", "path=/,access=r", "landlock_rules"),
        ("--numa", "guest_numa_id=0,cpus=[0]", "numa"),
        ("--pci-segment", "pci_segment=0", "pci_segments"),
        ("--platform", "iommufd=on", "platform"),
        ("--pmem", "file=/p", "pmem"),
        ("--rate-limit-group", "id=g,ops_size=1,ops_refill_time=1", "rate_limit_groups"),
        ("--vdpa", "path=/v", "vdpa"),
    ],
)
def test_flag_sets_its_member(flag, text, member):
    assert getattr(build("--kernel", "/k", flag, text), member) is not None


@pytest.mark.parametrize(
    ("flag", "text", "member"),
    [
        ("--fs", "tag=t,socket=/s", "fs"),
        ("--generic-vhost-user", "socket=/s,queue_sizes=[64],device_type=fs", "generic_vhost_user"),
        ("--user-device", "socket=/s", "user_devices"),
    ],
)
def test_flag_of_a_back_end_sets_its_member_with_shared_memory(flag, text, member):
    built = build("--kernel", "/k", "--memory", "size=64M,shared=on", flag, text)
    assert getattr(built, member) is not None


def test_switches_and_payloads_without_a_test_of_their_own_arrive():
    built = build("--igvm", "/i", "--host-data", "00", "--gdb", "path=/g", "--landlock", "--pvmemcontrol")
    assert built.payload == PayloadConfig(igvm="/i", host_data="00")
    assert (built.gdb, built.landlock_enable, built.pvmemcontrol is not None) == (True, True, True)


def test_firmware_loses_its_command_line():
    assert build("--firmware", "/f", "--cmdline", "x").payload == PayloadConfig(firmware="/f")


def test_fault_in_an_option_string_is_reported_with_its_flag():
    with pytest.raises(ParsingConfig) as caught:
        build("--kernel", "/k", "--memory", "size=512m")
    assert error_chain(caught.value) == [
        "Error parsing config",
        "Error parsing --memory",
        "Unable to convert 512m for size",
    ]


def test_broken_rule_is_reported_as_such():
    with pytest.raises(ParsingConfig) as caught:
        build("--kernel", "/k", "--cpus", "boot=2,max=1")
    assert error_chain(caught.value) == [
        "Error parsing config",
        "Error validating configuration",
        "Max CPUs (1) lower than boot CPUs (2)",
    ]


def test_of_two_faults_the_references_first_is_reported():
    with pytest.raises(ParsingConfig) as caught:
        build("--kernel", "/k", "--cpus", "nope=1", "--disk", "nope=1")
    assert error_chain(caught.value)[1] == "Error parsing --disk"
