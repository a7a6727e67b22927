"""Each rule of sending and receiving, triggered alone, with the reference's text."""

from __future__ import annotations

import pytest

from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.operation import (
    MemoryZoneUpdate,
    MigrationMemoryMode,
    RestoredVfioConfig,
    VmReceiveMigrationData,
    VmSendMigrationData,
)
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.migration.rule import CLIENT_FILES, SERVER_FILES, check_receive, check_received, check_send

POSTCOPY = MigrationMemoryMode.POSTCOPY
WRONG = "Error validating send migration parameters: "


def send(url: str = "unix:/x", **options) -> VmSendMigrationData:
    return VmSendMigrationData(destination_url=url, **options)


def receive(url: str = "unix:/x", **options) -> VmReceiveMigrationData:
    return VmReceiveMigrationData(receiver_url=url, **options)


def chain_of(check, *data) -> list[str]:
    with pytest.raises(VmmError) as caught:
        check(*data)
    return error_chain(caught.value)


@pytest.fixture
def tls_dir(tmp_path):
    for name in {*CLIENT_FILES, *SERVER_FILES}:
        (tmp_path / name).write_text("pem")
    return tmp_path


@pytest.mark.parametrize(
    "data",
    [
        send(),
        send("tcp:h:1"),
        send("tcp:h:1", connections=128),
        send(local=True),
        send(local=True, preserve_source=True),
        send("tcp:h:1", memory_mode=POSTCOPY),
    ],
)
def test_options_that_go_together(data):
    check_send(data)


def test_tls_folder_that_is_complete(tls_dir):
    check_send(send("tcp:h:1", tls_dir=str(tls_dir)))
    check_receive(receive("tcp:h:1", tls_dir=str(tls_dir)))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (send("ftp:x"), "destination_url must use tcp:<host>:<port> or unix:<path>."),
        (send("unix:"), "destination_url must use tcp:<host>:<port> or unix:<path>."),
        (send(connections=2), "UNIX sockets and connections option cannot be used at the same time."),
        (send(tls_dir="/"), "UNIX sockets and TLS encryption cannot be used at the same time."),
        (send("tcp:h:1", connections=129), "connections must not exceed 128."),
        (send("tcp:h:1", local=True), "local option is only supported with UNIX sockets."),
        (send(preserve_source=True), "preserve_source option is only supported with the local option."),
        (
            send("tcp:h:1", tls_dir="/nope"),
            "invalid TLS configuration for send-migration: TLS directory does not exist or is "
            "inaccessible: /nope: No such file or directory (os error 2)",
        ),
        (
            send("tcp:h:1", tls_dir="/dev/null"),
            "invalid TLS configuration for send-migration: TLS directory must point to a directory: "
            "/dev/null",
        ),
        (
            send(local=True, copy_disks=["d"]),
            "copy_disks and local options are mutually exclusive without preserve_source.",
        ),
        (
            send(local=True, memory_mode=POSTCOPY),
            "memory_mode=postcopy and local options are mutually exclusive.",
        ),
        (
            send("tcp:h:1", connections=2, memory_mode=POSTCOPY),
            "memory_mode=postcopy currently requires a single connection (connections=1).",
        ),
    ],
)
def test_rule_of_sending(data, text):
    assert chain_of(check_send, data) == [WRONG + text]


def test_destination_that_is_no_address():
    assert chain_of(check_send, send("tcp:h")) == [
        WRONG + "destination_url must use tcp:<host>:<port> or unix:<path>.",
        "Missing TCP port",
    ]


def test_tls_file_that_is_missing(tls_dir):
    (tls_dir / "client-key.pem").unlink()
    assert chain_of(check_send, send("tcp:h:1", tls_dir=str(tls_dir))) == [
        f"{WRONG}invalid TLS configuration for send-migration: "
        f"Missing required TLS file for migration client: {tls_dir}/client-key.pem"
    ]


def test_tls_file_that_is_none(tls_dir):
    (tls_dir / "server-key.pem").unlink()
    (tls_dir / "server-key.pem").mkdir()
    assert chain_of(check_receive, receive("tcp:h:1", tls_dir=str(tls_dir))) == [
        "Invalid TLS configuration for receive-migration",
        f"Required TLS path for migration server must be a regular file: {tls_dir}/server-key.pem",
    ]


@pytest.mark.parametrize(
    ("data", "chain"),
    [
        (receive("ftp:x"), ["Expected receiver_url to either use `tcp` or `unix` prefix"]),
        (receive("unix:"), ["Expected receiver_url to either use `tcp` or `unix` prefix"]),
        (
            receive("tcp:h"),
            [
                "Expected receiver_url in the form of either `tcp:<host>:<port>` or `unix:<path>:`",
                "Missing TCP port",
            ],
        ),
        (receive(tls_dir="/"), ["UNIX sockets and TLS encryption cannot be used at the same time"]),
        (
            receive(zone_updates=[MemoryZoneUpdate(id="z", host_numa_node=n) for n in (0, 1)]),
            ["More than one update was defined for at least one memory zone"],
        ),
        (
            receive(zone_updates=[MemoryZoneUpdate(id="", host_numa_node=0)]),
            ["One or more memory zone updates contained an empty ID"],
        ),
    ],
)
def test_rule_of_receiving(data, chain):
    assert chain_of(check_receive, data) == chain


def vfio(*ids: str) -> list[RestoredVfioConfig]:
    return [RestoredVfioConfig(id=device_id, fd=9) for device_id in ids]


def config(*ids: str, iommufd: bool = True) -> VmConfig:
    return VmConfig(
        devices=[DeviceConfig(id=device_id, path="/d") for device_id in ids] or None,
        platform=PlatformConfig(iommufd=iommufd),
    )


def test_received_config_with_all_that_it_needs():
    check_received(receive(), config())
    check_received(receive(vfio_fds=vfio("a"), iommufd_fd=3), config("a"))


@pytest.mark.parametrize(
    ("data", "vm_config", "text"),
    [
        (
            receive(),
            config("a"),
            "VFIO device 'a' has no replacement in vfio_fds, its source path or fd is not usable on the "
            "destination",
        ),
        (
            receive(vfio_fds=vfio("a")),
            config("a"),
            "Usage of `vfio_fds` requires `iommufd_fd` to be specified",
        ),
        (
            receive(vfio_fds=vfio("a"), iommufd_fd=3),
            config("a", iommufd=False),
            "Platform `iommufd_fd=<fd>` requires `iommufd=on`",
        ),
        (
            receive(vfio_fds=vfio("a", "a"), iommufd_fd=3),
            config("a"),
            "Multiple replacements defined for fd with ID a",
        ),
        (
            receive(vfio_fds=vfio("a", "b"), iommufd_fd=3),
            config("a"),
            "Replacement ID b in vfio_fds id does not match any device in the received VmConfig",
        ),
        (
            receive(memory_mode=POSTCOPY),
            VmConfig(memory=MemoryConfig(size=1, prefault=True)),
            "postcopy migration is incompatible with memory prefault; the source VM must not be configured "
            "with prefault=on",
        ),
        (
            receive(memory_mode=POSTCOPY),
            VmConfig(memory=MemoryConfig(size=0, zones=[MemoryZoneConfig(id="z", size=1, prefault=True)])),
            "postcopy migration is incompatible with memory prefault; the source VM must not be configured "
            "with prefault=on",
        ),
    ],
)
def test_received_config_that_cannot_be_had(data, vm_config, text):
    assert chain_of(check_received, data, vm_config) == [text]
