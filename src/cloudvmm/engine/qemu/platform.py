"""What the machine says it is: SMBIOS tables, and the generation of its guest.

Every string is given, empty ones too, because QEMU fills those left out with its own name and the machine's.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.config.platform import PlatformConfig
from cloudvmm.engine.base import EngineError
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts, escape

VMGENID_ID: Final = "__vmgenid"

_MANUFACTURER: Final = "Cloud Hypervisor"
_PRODUCT: Final = "cloud-hypervisor"
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


class InvalidSystemUuid(EngineError):
    def __init__(self, text: str) -> None:
        super().__init__(f"System UUID {text} is not a UUID")


def smbios_arguments(platform: PlatformConfig | None) -> list[str]:
    """Return the options for the tables of firmware, system, chassis, processors, memory and OEM strings.

    :raises InvalidSystemUuid: `system_uuid` is not one.
    """
    platform = platform or PlatformConfig()
    arguments = [
        "-smbios",
        _table(0, vendor=_PRODUCT, version="0", date=""),
        "-smbios",
        _table(
            1,
            manufacturer=platform.system_manufacturer or _MANUFACTURER,
            product=platform.system_product_name or _PRODUCT,
            version=platform.system_version,
            serial=platform.system_serial_number,
            uuid=_uuid(platform.system_uuid),
            sku=platform.system_sku_number,
            family=platform.system_family,
        ),
        "-smbios",
        _table(
            3,
            manufacturer="",
            version="",
            serial="",
            asset=platform.chassis_asset_tag,
            sku="",
        ),
        "-smbios",
        _table(4, manufacturer="", version=""),
        "-smbios",
        _table(17, manufacturer=""),
    ]
    if platform.oem_strings:
        values = ",".join(f"value={escape(text)}" for text in platform.oem_strings)
        arguments += ["-smbios", f"type=11,{values}"]
    return arguments


def has_vmgenid(platform: PlatformConfig | None) -> bool:
    return platform is not None and platform.vmgenid is not None


def vmgenid_parts(platform: PlatformConfig | None) -> Parts:
    """Describe the device that has the VM generation id.

    A QEMU that goes on from a state has the guest notice that it may have another id than it had.
    """
    if platform is None or platform.vmgenid is None:
        return Parts()
    return Parts(devices=[{"driver": "vmgenid", "id": qdev_id(VMGENID_ID), "guid": platform.vmgenid}])


def _table(kind: int, **fields: str | None) -> str:
    return ",".join([f"type={kind}", *(f"{key}={escape(value or '')}" for key, value in fields.items())])


def _uuid(text: str | None) -> str:
    """Return `text` with hyphens; plain, hyphenated, braced and URN forms are understood."""
    if text is None:
        return _NO_UUID
    digits = text.removeprefix("urn:uuid:").removeprefix("{").removesuffix("}").replace("-", "")
    if len(digits) != 32 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        raise InvalidSystemUuid(text)
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
