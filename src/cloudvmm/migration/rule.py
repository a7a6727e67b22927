"""Which options of a migration go together (reference: rest.md section 7, send and receive validation).

Run when the command is carried out. The rules about TLS look at the disk, so these functions may block.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from cloudvmm.config.operation import MigrationMemoryMode, VmReceiveMigrationData, VmSendMigrationData
from cloudvmm.config.platform import IommufdFdRequiresIommufd
from cloudvmm.config.vm import VmConfig
from cloudvmm.migration.address import AddressError, UnixAddress, parse_address
from cloudvmm.migration.error import MigrationError
from cloudvmm.migration.message import MAX_CONNECTIONS

CLIENT_FILES: Final = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
SERVER_FILES: Final = ("ca-cert.pem", "server-cert.pem", "server-key.pem")


class SendRule(MigrationError):
    """An option of `vm.send-migration` does not go; the text is the rule's."""

    def __init__(self, rule: str) -> None:
        super().__init__(f"Error validating send migration parameters: {rule}")


class InvalidDestinationUrl(SendRule):
    """The cause tells what is wrong with the address."""

    def __init__(self) -> None:
        super().__init__("destination_url must use tcp:<host>:<port> or unix:<path>.")


class ReceiveRule(MigrationError):
    """Root of the rules of `vm.receive-migration`."""


class MalformedReceiverUrl(ReceiveRule):
    """Expected receiver_url in the form of either `tcp:<host>:<port>` or `unix:<path>:`"""


class TlsEncryptionUsedForUnixSocket(ReceiveRule):
    """UNIX sockets and TLS encryption cannot be used at the same time"""


class InvalidSocketPrefix(ReceiveRule):
    """Expected receiver_url to either use `tcp` or `unix` prefix"""


class InvalidTlsConfiguration(ReceiveRule):
    """Invalid TLS configuration for receive-migration"""


class MultipleZoneUpdates(ReceiveRule):
    """More than one update was defined for at least one memory zone"""


class ZoneUpdateEmptyId(ReceiveRule):
    """One or more memory zone updates contained an empty ID"""


class VfioDeviceNoReplacementFd(ReceiveRule):
    def __init__(self, device_id: str) -> None:
        super().__init__(
            f"VFIO device '{device_id}' has no replacement in vfio_fds, its source path or fd is not usable "
            "on the destination"
        )


class VfioFdsNeedIommufdFd(ReceiveRule):
    """Usage of `vfio_fds` requires `iommufd_fd` to be specified"""


class VfioFdMultipleReplacements(ReceiveRule):
    def __init__(self, device_id: str) -> None:
        super().__init__(f"Multiple replacements defined for fd with ID {device_id}")


class VfioFdReplacementWithoutTarget(ReceiveRule):
    def __init__(self, device_id: str) -> None:
        super().__init__(
            f"Replacement ID {device_id} in vfio_fds id does not match any device in the received VmConfig"
        )


class PostcopyWithPrefault(ReceiveRule):
    """postcopy migration is incompatible with memory prefault; the source VM must not be configured with \
prefault=on"""


class PostcopyNotAsked(ReceiveRule):
    """The sender migrates with memory_mode Postcopy, and the receiver was not told so"""


class TlsDirError(MigrationError):
    """What is wrong with the folder of keys and certificates."""


def check_send(data: VmSendMigrationData) -> None:
    """:raises SendRule: the first rule that `data` breaks."""
    try:
        address = parse_address(data.destination_url)
    except AddressError as error:
        raise InvalidDestinationUrl from error
    if address is None:
        raise SendRule("destination_url must use tcp:<host>:<port> or unix:<path>.")
    is_unix = isinstance(address, UnixAddress)
    if is_unix and data.connections > 1:
        raise SendRule("UNIX sockets and connections option cannot be used at the same time.")
    if is_unix and data.tls_dir is not None:
        raise SendRule("UNIX sockets and TLS encryption cannot be used at the same time.")
    if data.connections > MAX_CONNECTIONS:
        raise SendRule(f"connections must not exceed {MAX_CONNECTIONS}.")
    if data.local and not is_unix:
        raise SendRule("local option is only supported with UNIX sockets.")
    if data.preserve_source and not data.local:
        raise SendRule("preserve_source option is only supported with the local option.")
    if data.tls_dir is not None:
        try:
            check_tls_dir(data.tls_dir, "migration client", CLIENT_FILES)
        except TlsDirError as error:
            raise SendRule(f"invalid TLS configuration for send-migration: {error}") from None
    copied = data.copy_disks or []
    if len(set(copied)) != len(copied):
        raise SendRule("copy_disks must not name a disk twice.")
    if copied and data.local and not data.preserve_source:
        raise SendRule("copy_disks and local options are mutually exclusive without preserve_source.")
    if data.memory_mode is MigrationMemoryMode.POSTCOPY:
        if copied:
            raise SendRule("memory_mode=postcopy and copy_disks are mutually exclusive.")
        if data.local:
            raise SendRule("memory_mode=postcopy and local options are mutually exclusive.")
        if data.connections > 1:
            raise SendRule("memory_mode=postcopy currently requires a single connection (connections=1).")


def check_receive(data: VmReceiveMigrationData) -> None:
    """:raises ReceiveRule: the first rule that `data` breaks, as far as can be told without a config."""
    try:
        address = parse_address(data.receiver_url)
    except AddressError as error:
        raise MalformedReceiverUrl from error
    if address is None:
        raise InvalidSocketPrefix
    if isinstance(address, UnixAddress) and data.tls_dir is not None:
        raise TlsEncryptionUsedForUnixSocket
    if data.tls_dir is not None:
        try:
            check_tls_dir(data.tls_dir, "migration server", SERVER_FILES)
        except TlsDirError as error:
            raise InvalidTlsConfiguration from error
    zone_ids = {update.id for update in data.zone_updates}
    if len(zone_ids) != len(data.zone_updates):
        raise MultipleZoneUpdates
    if "" in zone_ids:
        raise ZoneUpdateEmptyId


def check_received(data: VmReceiveMigrationData, vm_config: VmConfig) -> None:
    """:raises ReceiveRule: the received `vm_config` cannot be had with the options `data`.

    :raises IommufdFdRequiresIommufd: descriptors were given for a VM without iommufd.
    """
    given = [vfio.id for vfio in data.vfio_fds or ()]
    for device in vm_config.devices or ():
        if device.id is None or device.id not in given:
            raise VfioDeviceNoReplacementFd(device.id or "")
    if given:
        _check_vfio_fds(given, data, vm_config)
    if data.memory_mode is MigrationMemoryMode.POSTCOPY and _is_prefaulted(vm_config):
        raise PostcopyWithPrefault


def check_tls_dir(path: str, endpoint: str, names: tuple[str, ...]) -> None:
    """:raises TlsDirError: `path` is no folder, or one of `names` is no readable file in it."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        words = f"TLS directory does not exist or is inaccessible: {path}: {_words(error)}"
        raise TlsDirError(words) from error
    if not is_folder:
        raise TlsDirError(f"TLS directory must point to a directory: {path}")
    for name in names:
        _check_tls_file(f"{path.rstrip('/')}/{name}", endpoint)


def _check_tls_file(path: str, endpoint: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise TlsDirError(f"Missing required TLS file for {endpoint}: {path}") from None
    except OSError as error:
        words = f"Failed to inspect required TLS file for {endpoint}: {path}: {_words(error)}"
        raise TlsDirError(words) from error
    if not stat.S_ISREG(mode):
        raise TlsDirError(f"Required TLS path for {endpoint} must be a regular file: {path}")
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        words = f"Required TLS file for {endpoint} is not readable: {path}: {_words(error)}"
        raise TlsDirError(words) from error


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror} (os error {error.errno})"
    return str(error)


def _check_vfio_fds(given: list[str], data: VmReceiveMigrationData, vm_config: VmConfig) -> None:
    if data.iommufd_fd is None:
        raise VfioFdsNeedIommufdFd
    if vm_config.platform is None or not vm_config.platform.iommufd:
        raise IommufdFdRequiresIommufd
    for number, device_id in enumerate(given):
        if device_id in given[:number]:
            raise VfioFdMultipleReplacements(device_id)
    known = {device.id for device in vm_config.devices or ()}
    for device_id in given:
        if device_id not in known:
            raise VfioFdReplacementWithoutTarget(device_id)


def _is_prefaulted(vm_config: VmConfig) -> bool:
    memory = vm_config.memory
    return memory.prefault or any(zone.prefault for zone in memory.zones or ())
