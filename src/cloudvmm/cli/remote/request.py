"""Arguments into a request: the body as the reference's own client sends it, and what travels beside it.

Option strings are read by the parsers of the VMM's flags and turned into JSON with every default filled in.
What one member has to do with another is the VMM's business, except in migrations, whose addresses are
checked here too, as in the reference. Descriptors are taken out of the JSON, where their numbers would mean
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cloudvmm.cli.remote.command import BY_NAME
from cloudvmm.cli.remote.error import (
    ConfigSyntax,
    InvalidBalloonSize,
    InvalidCpuCount,
    InvalidDiskSize,
    InvalidMemorySize,
    ReadingFile,
    ReadingStdin,
    Reason,
    ReceiveMigrationConfig,
    SendMigrationConfig,
    SizeError,
)

if TYPE_CHECKING:
    import msgspec

    from cloudvmm.config.device import DeviceConfig
    from cloudvmm.config.net import NetConfig
    from cloudvmm.config.operation import (
        CloneConfig,
        RestoreConfig,
        RestoredVfioConfig,
        VmReceiveMigrationData,
        VmSendMigrationData,
    )

T = TypeVar("T")

_U32_MAX = 2**32 - 1
_MIGRATION_SCHEMES = ("tcp:", "unix:")


class Request(NamedTuple):
    """`command` is the API's, `fds` are this process's own and stay the user's."""

    subcommand: str
    command: str
    method: str
    body: bytes | None = None
    fds: tuple[int, ...] = ()


def make_request(args: argparse.Namespace) -> Request:
    """Turn parsed arguments into what is to be sent; reads the file or standard input for `create`.

    :raises RemoteError: an argument does not parse, or the file cannot be read.
    """
    subcommand = BY_NAME[args.command]
    build = _BUILDERS.get(subcommand.name)
    body, fds = (None, ()) if build is None else build(args)
    return Request(subcommand.name, subcommand.api_command, subcommand.method, body, fds)


Content = tuple[bytes | None, tuple[int, ...]]


def _encode(value: msgspec.Struct, fds: tuple[int, ...] = ()) -> Content:
    from cloudvmm.config.form import encode

    return encode(value), fds


def _parse(parse: Callable[[str], T], text: str, *, what: str) -> T:
    from cloudvmm.options.error import OptionError

    try:
        return parse(text)
    except OptionError as error:
        raise ConfigSyntax(what) from error


# Devices


def _add_device(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_device

    device: DeviceConfig = _parse(parse_device, args.device_config, what="device")
    fds = () if device.fd is None else (device.fd,)
    device.fd = None
    return _encode(device, fds)


def _add_disk(args: argparse.Namespace) -> Content:
    from cloudvmm.options.disk import parse_disk

    return _encode(_parse(parse_disk, args.disk_config, what="disk"))


def _add_fs(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_fs

    return _encode(_parse(parse_fs, args.fs_config, what="filesystem"))


def _add_generic_vhost_user(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_generic_vhost_user

    text = args.generic_vhost_user_config
    return _encode(_parse(parse_generic_vhost_user, text, what="generic vhost-user"))


def _add_net(args: argparse.Namespace) -> Content:
    from cloudvmm.options.net import parse_net

    net: NetConfig = _parse(parse_net, args.net_config, what="network")
    fds = tuple(net.fds or ())
    net.fds = None
    return _encode(net, fds)


def _add_pmem(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_pmem

    return _encode(_parse(parse_pmem, args.pmem_config, what="persistent memory"))


def _add_user_device(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_user_device

    return _encode(_parse(parse_user_device, args.device_config, what="user device"))


def _add_vdpa(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_vdpa

    return _encode(_parse(parse_vdpa, args.vdpa_config, what="vDPA device"))


def _add_vsock(args: argparse.Namespace) -> Content:
    from cloudvmm.options.device import parse_vsock

    return _encode(_parse(parse_vsock, args.vsock_config, what="vsock"))


def _remove_device(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmRemoveDeviceData

    return _encode(VmRemoveDeviceData(id=args.id))


def _cancel_job(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmmCancelJobData

    return _encode(VmmCancelJobData(id=args.id))


# Sizes


def _resize(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmResizeData

    return _encode(
        VmResizeData(
            desired_vcpus=None if args.cpus is None else _parse_cpus(args.cpus),
            desired_ram=_maybe_size("--memory", args.memory, InvalidMemorySize),
            desired_balloon=_maybe_size("--balloon", args.balloon, InvalidBalloonSize),
        )
    )


def _resize_disk(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmResizeDiskData

    size_bytes = _parse_size("--size", args.size, InvalidDiskSize)
    return _encode(VmResizeDiskData(id=args.disk, desired_size=size_bytes))


def _resize_zone(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmResizeZoneData

    size_bytes = _parse_size("--size", args.size, InvalidMemorySize)
    return _encode(VmResizeZoneData(id=args.id, desired_ram=size_bytes))


def _parse_cpus(text: str) -> int:
    digits = text.removeprefix("+")
    if not text:
        raise InvalidCpuCount(text) from Reason("cannot parse integer from empty string")
    if not (digits.isascii() and digits.isdigit()):
        raise InvalidCpuCount(text) from Reason("invalid digit found in string")
    if len(digits.lstrip("0")) > 10 or int(digits) > _U32_MAX:
        raise InvalidCpuCount(text) from Reason("number too large to fit in target type")
    return int(digits)


def _maybe_size(option: str, text: str | None, failure: type[SizeError]) -> int | None:
    return None if text is None else _parse_size(option, text, failure)


def _parse_size(option: str, text: str, failure: type[SizeError]) -> int:
    from cloudvmm.options.error import InvalidValue
    from cloudvmm.options.value import parse_byte_size

    if '"' not in text:  # quotes belong to option strings
        try:
            return parse_byte_size(text)
        except ValueError:
            pass
    raise failure(option, text) from InvalidValue(text.strip().rstrip("KMG"))


# Files and addresses


def _create(args: argparse.Namespace) -> Content:
    try:
        if args.path == "-":
            with open(0, "rb", closefd=False) as stdin:
                text = stdin.read()
        else:
            with open(args.path, "rb") as file:
                text = file.read()
        text.decode()
    except UnicodeDecodeError:
        failure = ReadingStdin() if args.path == "-" else ReadingFile()
        raise failure from Reason("stream did not contain valid UTF-8")
    except OSError as error:
        raise (ReadingStdin() if args.path == "-" else ReadingFile()) from error
    return text, ()


def _snapshot(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmSnapshotConfig

    snapshot = VmSnapshotConfig(destination_url=args.snapshot_config)
    if args.overlay_directory is not None:
        snapshot.overlay_directory = args.overlay_directory
    return _encode(snapshot)


def _fork(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmForkData

    clones = None if args.clones is None else _read_clones(args.clones)
    return _encode(
        VmForkData(directory=args.directory, count=args.count, clones=clones, resume=not args.paused)
    )


def _read_clones(path: str) -> list[CloneConfig]:
    import msgspec

    from cloudvmm.config.operation import CloneConfig

    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=list[CloneConfig])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReadingFile from error


def _coredump(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmCoredumpData

    return _encode(VmCoredumpData(destination_url=args.coredump_config))


def _restore(args: argparse.Namespace) -> Content:
    from cloudvmm.options.operation import parse_restore

    restore: RestoreConfig = _parse(parse_restore, args.restore_config, what="restore")
    return _encode(restore, tuple(_take_fds(restore)))


def _receive_migration(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmReceiveMigrationData
    from cloudvmm.migration.error import MigrationError
    from cloudvmm.migration.rule import check_receive
    from cloudvmm.options.error import OptionError
    from cloudvmm.options.operation import parse_receive_migration

    text = args.receive_migration_config
    data: VmReceiveMigrationData
    try:
        data = VmReceiveMigrationData(receiver_url=text) if _is_url(text) else parse_receive_migration(text)
        check_receive(data)
    except (OptionError, MigrationError) as error:
        raise ReceiveMigrationConfig from error
    return _encode(data, tuple(_take_fds(data)))


def _send_migration(args: argparse.Namespace) -> Content:
    from cloudvmm.config.operation import VmSendMigrationData
    from cloudvmm.migration.error import MigrationError
    from cloudvmm.migration.rule import check_send
    from cloudvmm.options.error import OptionError
    from cloudvmm.options.operation import parse_send_migration

    text = args.send_migration_config
    data: VmSendMigrationData
    try:
        data = VmSendMigrationData(destination_url=text) if _is_url(text) else parse_send_migration(text)
        data.local = data.local or args.local
        check_send(data)
    except (OptionError, MigrationError) as error:
        raise SendMigrationConfig from error
    return _encode(data)


def _is_url(text: str) -> bool:
    """Whether this is the bare URL of older releases; no option string begins like one."""
    return text.startswith(_MIGRATION_SCHEMES)


def _take_fds(data: RestoreConfig | VmReceiveMigrationData) -> list[int]:
    """Remove the descriptors from `data` in the order in which the server hands them out."""
    fds: list[int] = []
    for net in data.net_fds or ():
        fds += net.fds or ()
        net.fds = None
    devices: list[RestoredVfioConfig] = data.vfio_fds or []
    fds += [device.fd for device in devices if device.fd is not None]
    for device in devices:
        device.fd = None
    if data.iommufd_fd is not None:
        fds.append(data.iommufd_fd)
    data.iommufd_fd = None
    return fds


_BUILDERS: dict[str, Callable[[argparse.Namespace], Content]] = {
    "add-device": _add_device,
    "add-disk": _add_disk,
    "add-fs": _add_fs,
    "add-generic-vhost-user": _add_generic_vhost_user,
    "add-net": _add_net,
    "add-pmem": _add_pmem,
    "add-user-device": _add_user_device,
    "add-vdpa": _add_vdpa,
    "add-vsock": _add_vsock,
    "cancel-job": _cancel_job,
    "coredump": _coredump,
    "fork": _fork,
    "create": _create,
    "receive-migration": _receive_migration,
    "remove-device": _remove_device,
    "resize": _resize,
    "resize-disk": _resize_disk,
    "resize-zone": _resize_zone,
    "restore": _restore,
    "send-migration": _send_migration,
    "snapshot": _snapshot,
}
