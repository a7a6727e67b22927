"""The configuration as JSON: what a client sends, what `vm.info` shows, what a snapshot keeps.

Decoding happens once, here, at the edge; inside, nobody checks a type again. Rules that relate
members to each other are not decoding: they are in `config/rule.py`.

Encoding follows the reference: unset optionals are left out, everything else is printed. msgspec can
leave out defaults only as a whole, so each struct gets a twin, built on first use, in which only
what may be left out has a default.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec

from cloudvmm.config.address import canonical_ip, canonical_mac
from cloudvmm.config.console import ConsoleConfig
from cloudvmm.config.decode_error import explain, explain_duplicate
from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.duplicate import find_duplicate
from cloudvmm.config.error import DecodeError
from cloudvmm.config.legacy import modernise
from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import U64_MAX
from cloudvmm.config.operation import (
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
    VmReceiveMigrationData,
    VmResizeData,
    VmSendMigrationData,
)
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard

T = TypeVar("T")

INVALID_FD = -1
"""Stands for a descriptor that a saved configuration once had and that must be replaced."""

PRINTED_WITH_NULLS = (
    RateLimiterConfig,
    TokenBucketConfig,
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
    VmResizeData,
    VmReceiveMigrationData,
    VmSendMigrationData,
)
# In the reference these exist only where it is built for guest debugging, TDX or SEV-SNP.
_OF_SPECIAL_BUILDS: dict[type, tuple[str, ...]] = {VmConfig: ("gdb",), PlatformConfig: ("tdx", "sev_snp")}
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that a decoder raises of bytes that are not what it reads."""
# As many digits as the least number above has, all of them read as noughts.
_MAYBE_ABOVE_U64 = b"0" * len(str(U64_MAX))
_DIGITS = bytes.maketrans(b"123456789", b"000000000")

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_twins: dict[type, type[msgspec.Struct]] = {}
_printers: dict[type, type[msgspec.Struct]] = {}
_encoder = msgspec.json.Encoder()
# msgspec describes a struct type to itself on first use, and crashes where two threads are first at once: the
# second one works with a description that is half written. So the first use of each is made under this lock.
first_use = threading.Lock()


def decode(raw: bytes, kind: type[T], warn: Warn = unheard) -> T:
    """Read a request's body.

    Numbers of file descriptors are never taken from JSON, since they mean nothing here. They are
    dropped, with a warning, except the platform's `iommufd_fd`, which becomes `INVALID_FD`.

    :raises DecodeError: when `raw` is not JSON, or not a `kind`.
    """
    value = _decode(raw, kind)
    match value:
        case VmConfig():
            for device in (*(value.net or ()), *(value.devices or ())):
                _drop_descriptors(device, warn)
        case NetConfig() | DeviceConfig():
            _drop_descriptors(value, warn)
        case _:
            pass
    return value


def decode_saved(raw: bytes, kind: type[T]) -> T:
    """Read what `encode` wrote earlier, perhaps in another process.

    As `decode`, but a device that had descriptors keeps their count, each as `INVALID_FD`, so that
    a restore knows what must be replaced.

    :raises DecodeError: when `raw` is not JSON, or not a `kind`.
    """
    return _decode(raw, kind)


def encode(value: msgspec.Struct) -> bytes:
    """Write `value` as JSON the way the reference prints it.

    Descriptors are printed with their numbers in this process.
    """
    if isinstance(value, PRINTED_WITH_NULLS):
        return _encoder.encode(value)
    return _encoder.encode(msgspec.convert(value, _printer(type(value)), from_attributes=True))


# Decoding


def _decode(raw: bytes, kind: type[T]) -> T:
    given = raw
    if kind is VmConfig:
        raw = modernise(raw)
    try:
        value: T = decoder(kind).decode(raw)
        raw.decode()  # what it skipped may be no UTF-8
    except MALFORMED as error:
        raise DecodeError(explain(error, raw, kind)) from None
    duplicate = find_duplicate(given, kind)
    if duplicate is not None:
        raise DecodeError(explain_duplicate(*duplicate, given))
    if _MAYBE_ABOVE_U64 in raw.translate(_DIGITS):
        _check_u64(msgspec.to_builtins(value))
    _normalise(value)
    return value


def decoder(kind: Any, dec_hook: Callable[[type, Any], Any] | None = None) -> msgspec.json.Decoder[Any]:
    """Return what reads JSON into a `kind`, made under the lock the first time. Any thread.

    `dec_hook` is msgspec's, and always the same for one `kind`.
    """
    known = _decoders.get(kind)
    if known is None:
        with first_use:
            known = _decoders.setdefault(kind, msgspec.json.Decoder(kind, dec_hook=dec_hook))
    return known


def prepare(read: Iterable[type], printed: Iterable[type[msgspec.Struct]]) -> None:
    """Have what decodes the kinds that are `read`, and encodes those `printed`, ready before it is needed.

    Any thread; blocking, for some milliseconds a kind.
    """
    for kind in read:
        decoder(kind)
    for kind in printed:
        _printer(kind)


def _check_u64(value: object) -> None:
    match value:
        case dict():
            for member in value.values():
                _check_u64(member)
        case list():
            for member in value:
                _check_u64(member)
        case int() if value > U64_MAX:
            raise DecodeError(f"invalid value: integer `{value}`, expected u64")
        case _:
            pass


def _drop_descriptors(device: NetConfig | DeviceConfig, warn: Warn) -> None:
    member = "fds" if isinstance(device, NetConfig) else "fd"
    if getattr(device, member) is not None:
        given_id = "None" if device.id is None else f'Some("{device.id}")'
        warn(f"FD numbers were present in HTTP request body for device {given_id} but will be ignored")
        setattr(device, member, None)


def _normalise(value: object) -> None:
    match value:
        case VmConfig():
            for net in value.net or ():
                _normalise_net(net)
            for device in value.devices or ():
                _invalidate_fd(device, "fd")
            if value.platform is not None:
                _invalidate_fd(value.platform, "iommufd_fd")
        case NetConfig():
            _normalise_net(value)
        case DeviceConfig():
            _invalidate_fd(value, "fd")
        case PlatformConfig():
            _invalidate_fd(value, "iommufd_fd")
        case RestoreConfig() | VmReceiveMigrationData():
            _forget_descriptors(value)
        case _:
            pass


def _normalise_net(net: NetConfig) -> None:
    net.mac = _canonical_mac(net.mac)
    net.host_mac = _canonical_mac(net.host_mac)
    net.ip = _canonical_ip(net.ip)
    net.mask = _canonical_ip(net.mask)
    if net.fds is not None:
        net.fds = [INVALID_FD] * len(net.fds)


def _forget_descriptors(data: RestoreConfig | VmReceiveMigrationData) -> None:
    data.iommufd_fd = None
    for device in data.vfio_fds or ():
        device.fd = None
    for net in data.net_fds or ():
        net.fds = None


def _invalidate_fd(value: msgspec.Struct, member: str) -> None:
    if getattr(value, member) is not None:
        setattr(value, member, INVALID_FD)


def _canonical_mac(text: str | None) -> str | None:
    try:
        return None if text is None else canonical_mac(text)
    except ValueError as error:
        raise DecodeError(f"The provided MAC address is invalid: {error}") from None


def _canonical_ip(text: str | None) -> str | None:
    try:
        return None if text is None else canonical_ip(text)
    except ValueError as error:
        raise DecodeError(str(error)) from None


# Encoding


def _printer(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return the twin of `kind`, ready for any thread."""
    printer = _printers.get(kind)
    if printer is None:
        with first_use:
            printer = _twin(kind)
            msgspec.json.Decoder(printer)  # describes it and all that it holds
            _printers[kind] = printer
    return printer


def _twin(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    twin = _twins.get(kind)
    if twin is None:
        fields = [_twin_field(kind, field) for field in _printing_order(kind)]
        twin = msgspec.defstruct(kind.__name__, fields, kw_only=True, omit_defaults=True)
        _twins[kind] = twin
    return twin


def _printing_order(kind: type[msgspec.Struct]) -> list[msgspec.structs.FieldInfo]:
    fields = list(msgspec.structs.fields(kind))
    if kind is ConsoleConfig:
        common = set(PciDevice.__struct_fields__)
        fields.sort(key=lambda field: field.name in common)
    return fields


def _twin_field(
    kind: type[msgspec.Struct], field: msgspec.structs.FieldInfo
) -> tuple[str, Any] | tuple[str, Any, Any]:
    annotation = _twin_annotation(field.type)
    if field.default is None:
        return field.name, annotation, None
    if is_left_out_when_false(kind, field.name):
        return field.name, annotation, False
    return field.name, annotation


def is_left_out_when_false(kind: type[msgspec.Struct], name: str) -> bool:
    return (name == "iommu" and issubclass(kind, PciDevice)) or name in _OF_SPECIAL_BUILDS.get(kind, ())


def _twin_annotation(annotation: Any) -> Any:
    """Replace the structs in `annotation` by their twins; whatever holds none passes unchecked."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _twin_annotation(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [_twin_annotation(member) for member in get_args(annotation)]
        is_ambiguous = Any in members or len(set(members) - {type(None)}) > 1
        return Any if is_ambiguous else Union[tuple(members)]  # noqa: UP007
    if origin in (list, dict):
        *keys, member = get_args(annotation)
        twin = _twin_annotation(member)
        return Any if twin is Any else origin[(*keys, twin)]
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return Any if issubclass(annotation, PRINTED_WITH_NULLS) else _twin(annotation)
    return annotation if annotation is type(None) else Any
