import os

import msgspec
import pytest

from cloudvmm.api import AddressRange, PciBarResource, VmmPingResponse, VmState
from cloudvmm.client import AnswerNotUnderstood
from cloudvmm.client.codec import decode, encode
from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.form import INVALID_FD
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import (
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
    VmReceiveMigrationData,
    VmResizeData,
)
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig


def encoded(data):
    body, fds = encode(data)
    return msgspec.json.decode(body), fds


def test_no_data_is_no_body():
    assert encode(None) == (None, ())


def test_sizes_not_given_are_null():
    assert encoded(VmResizeData(desired_vcpus=2))[0]["desired_ram"] is None


def test_net_descriptors_travel_beside_the_body():
    net = NetConfig(fds=[5, 6], num_queues=4)
    body, fds = encoded(net)

    assert "fds" not in body
    assert fds == (5, 6)
    assert net.fds == [5, 6]


def test_vfio_descriptor_travels_beside_the_body():
    body, fds = encoded(DeviceConfig(fd=7))

    assert "fd" not in body
    assert fds == (7,)


def test_restore_passes_net_then_vfio_then_iommufd():
    data = RestoreConfig(
        source_url="file:///s",
        net_fds=[RestoredNetConfig(id="a", fds=[10, 11]), RestoredNetConfig(id="b")],
        vfio_fds=[RestoredVfioConfig(id="v", fd=12)],
        iommufd_fd=13,
    )
    body, fds = encoded(data)

    assert fds == (10, 11, 12, 13)
    assert [(net["id"], net["num_fds"], net["fds"]) for net in body["net_fds"]] == [
        ("a", 2, None),
        ("b", 0, None),
    ]
    assert body["vfio_fds"] == [{"id": "v", "fd": None}]
    assert body["iommufd_fd"] is None


def test_receive_passes_vfio_then_iommufd():
    data = VmReceiveMigrationData(
        receiver_url="unix:/m", vfio_fds=[RestoredVfioConfig(id="v", fd=12)], iommufd_fd=13
    )

    assert encoded(data)[1] == (12, 13)


@pytest.mark.parametrize(
    "data",
    [
        NetConfig(fds=[INVALID_FD]),
        DeviceConfig(fd=INVALID_FD),
        VmConfig(net=[NetConfig(fds=[5])]),
        VmConfig(devices=[DeviceConfig(fd=5)]),
        VmConfig(platform=PlatformConfig(iommufd_fd=5)),
        RestoreConfig(source_url="file:///s", net_fds=[RestoredNetConfig(id="a", num_fds=2, fds=[10])]),
        RestoreConfig(source_url="file:///s", net_fds=[RestoredNetConfig(id="a", num_fds=1)]),
        RestoreConfig(source_url="file:///s", vfio_fds=[RestoredVfioConfig(id="v")], iommufd_fd=1),
        RestoreConfig(source_url="file:///s", vfio_fds=[]),
        RestoreConfig(source_url="file:///s", iommufd_fd=3),
        VmReceiveMigrationData(receiver_url="unix:/m", vfio_fds=[RestoredVfioConfig(id="v", fd=3)]),
    ],
)
def test_descriptors_that_do_not_fit_are_refused(data):
    with pytest.raises(ValueError, match="descriptor|iommufd"):
        encode(data)


@pytest.mark.parametrize("data", [{"path": "/d"}, '{"path":"/d"}', 1])
def test_data_that_is_no_object_of_ours_is_refused_in_words(data):
    with pytest.raises(ValueError, match=f"takes an object of cloudvmm.config, not a {type(data).__name__}"):
        encode(data)


def test_config_read_from_a_server_can_be_sent_again():
    vm_config = VmConfig(
        net=[NetConfig(id="n", fds=[INVALID_FD])],
        devices=[DeviceConfig(fd=INVALID_FD)],
        platform=PlatformConfig(iommufd_fd=INVALID_FD),
    )
    body, fds = encoded(vm_config)

    assert fds == ()
    assert "fds" not in body["net"][0]
    assert vm_config.net[0].fds == [INVALID_FD]


def test_ping_of_2022_has_only_a_version():
    ping = decode("vmm.ping", "ping", b'{"version":"v23.0.0"}')

    assert ping == VmmPingResponse(build_version="", version="v23.0.0", pid=0, features=[])


# As v23 prints it: nulls, a kernel of its own member, a device tree without parents.
INFO_2022 = b"""{"config":{"cpus":{"boot_vcpus":1,"max_vcpus":1,"topology":null,"kvm_hyperv":false,
"max_phys_bits":46,"affinity":null,"features":{"amx":false}},"memory":{"size":1073741824,"mergeable":false,
"hotplug_method":"Acpi","hotplug_size":null,"hotplugged_size":null,"shared":false,"hugepages":false,
"hugepage_size":null,"prefault":false,"zones":null},"kernel":{"path":"/vmlinux"},"initramfs":null,
"cmdline":{"args":"console=hvc0"},"disks":[{"path":"/d","readonly":false,"direct":false,"iommu":false,
"num_queues":1,"queue_size":128,"vhost_user":false,"vhost_socket":null,"poll_queue":true,
"rate_limiter_config":null,"id":"_disk0","disable_io_uring":false,"pci_segment":0}],"net":null,
"rng":{"src":"/dev/urandom","iommu":false},"balloon":null,"fs":null,"pmem":null,
"serial":{"file":null,"mode":"Null","iommu":false},"console":{"file":null,"mode":"Tty","iommu":false},
"devices":null,"user_devices":null,"vdpa":null,"vsock":null,"iommu":false,"sgx_epc":null,"numa":null,
"watchdog":false,"platform":null,"tdx":null},"state":"Running","memory_actual_size":1073741824,
"device_tree":{"__serial":{"id":"__serial","resources":[],"parent":null,"children":[],"pci_bdf":null}}}"""


def test_info_of_2022_is_understood():
    info = decode("vm.info", "info", INFO_2022)

    assert info.state is VmState.RUNNING
    assert info.config.payload.kernel == "/vmlinux"
    assert info.config.payload.cmdline == "console=hvc0"
    assert info.config.disks[0].id == "_disk0"
    assert info.device_tree["__serial"].resources == []


def test_members_of_a_newer_server_are_passed_over():
    body = b"""{"config":{"cpus":{"boot_vcpus":2,"max_vcpus":2,"new":1},"newest":{"a":[]}},"state":"Paused",
    "memory_actual_size":1,"more":true,"device_tree":{"d":{"id":"d","resources":[{"PciBar":{"index":0,"base":1,
    "size":2,"type_":"Mmio64","prefetchable":false}},{"MmioAddressRange":{"base":3,"size":4}},{"LegacyIrq":5},
    "Unheard",{"PciBar":{"index":0,"base":1,"size":2,"type_":"Cxl"}}],"children":[],"tint":"red"}}}"""

    info = decode("vm.info", "info", body)

    assert info.config.cpus.boot_vcpus == 2
    assert info.device_tree["d"].resources == [
        {"PciBar": PciBarResource(index=0, base=1, size=2, type_="Mmio64", prefetchable=False)},
        {"MmioAddressRange": AddressRange(base=3, size=4)},
        {"LegacyIrq": 5},
        "Unheard",
        {"PciBar": {"index": 0, "base": 1, "size": 2, "type_": "Cxl"}},
    ]


def test_numbers_of_the_servers_descriptors_are_not_taken():
    body = b'{"config":{"net":[{"fds":[3,4]}]},"state":"Created","memory_actual_size":1}'

    assert decode("vm.info", "info", body).config.net[0].fds == [INVALID_FD, INVALID_FD]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        ("ping", b"{}"),
        ("ping", b"pong"),
        ("ping", b""),
        ("info", b'{"config":{},"state":"Dreaming","memory_actual_size":1}'),
        ("info", b'{"config":{"disks":3},"state":"Running","memory_actual_size":1}'),
        ("info", b"[" * 100_000),
        ("counters", b'{"d":{"c":"many"}}'),
        ("device", b'{"id":"d"}'),
        ("device", b"\xff"),
    ],
)
def test_answer_of_another_form_keeps_its_body(answer, body):
    with pytest.raises(AnswerNotUnderstood) as caught:
        decode("vm.something", answer, body)

    assert caught.value.body == body
    assert caught.value.__cause__ is not None


def test_cold_add_answers_nothing():
    assert decode("vm.add-disk", "device", b"") is None


def test_encoding_opens_and_closes_no_descriptor(tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    encode(RestoreConfig(source_url="file:///s", net_fds=[RestoredNetConfig(id="a", fds=[0])]))

    assert sorted(os.listdir("/proc/self/fd")) == before
