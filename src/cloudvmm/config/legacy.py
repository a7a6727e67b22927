"""Request forms of 2022 that `vm.create` still accepts.

Then a VM's kernel, initramfs, command line and TDX firmware were members of the configuration itself, and
two members of the platform had other names. A body is rewritten only when it has none of today's payload
or one of the old names; anything else passes through untouched. Members that are gone (`sgx_epc`, `dax`,
`cache_size`, `poll_queue`, `mergeable` of pmem) are unknown ones, and ignored like these.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from cloudvmm.config.error import DecodeError

_PAYLOAD_MEMBERS = (("kernel", "path"), ("initramfs", "path"), ("cmdline", "args"))
_NO_PAYLOAD = re.compile(rb'"payload"\s*:\s*null')
PLATFORM_ALIASES = (("serial_number", "system_serial_number"), ("uuid", "system_uuid"))
_QUOTED_ALIASES = tuple(f'"{alias}"'.encode() for alias, _ in PLATFORM_ALIASES)
# A number that no float can hold may be in a member that nobody knows: it stays as it is written.
_decoder = msgspec.json.Decoder(float_hook=lambda text: msgspec.Raw(text.encode()))


def modernise(raw: bytes) -> bytes:
    """Return the JSON text of a VM's configuration in today's form.

    Text that is not a JSON object is returned as it is: the decoder says what is wrong with it.

    :raises DecodeError: when an old name and its successor are both given.
    """
    if _has_payload(raw) and not _has_alias(raw):
        return raw
    try:
        document = _decoder.decode(raw)
        if not isinstance(document, dict):
            return raw
        is_changed = _rename_platform_members(document.get("platform"))
        is_changed |= _gather_payload(document)
        return msgspec.json.encode(document) if is_changed else raw
    except (msgspec.MsgspecError, OverflowError, RecursionError, UnicodeDecodeError):
        return raw


def _has_payload(raw: bytes) -> bool:
    return b'"payload"' in raw and not (b"null" in raw and _NO_PAYLOAD.search(raw))


def _has_alias(raw: bytes) -> bool:
    one, other = _QUOTED_ALIASES
    return one in raw or other in raw


def _gather_payload(document: dict[str, Any]) -> bool:
    if document.get("payload") is not None:
        return False
    payload = {}
    for member, inner in _PAYLOAD_MEMBERS:
        old = document.get(member)
        if isinstance(old, dict) and inner in old:
            payload[member] = old[inner]
    payload |= _take_tdx(document)
    if payload:
        document["payload"] = payload
    return bool(payload)


def _take_tdx(document: dict[str, Any]) -> dict[str, Any]:
    """Say on the platform that the guest is a TDX one; return its firmware as a member of the payload."""
    tdx = document.get("tdx")
    platform = document.get("platform") or {}
    if not isinstance(tdx, dict) or "firmware" not in tdx or not isinstance(platform, dict):
        return {}
    document["platform"] = {"tdx": True, **platform}
    return {"firmware": tdx["firmware"]}


def _rename_platform_members(platform: object) -> bool:
    if not isinstance(platform, dict):
        return False
    is_changed = False
    for alias, name in PLATFORM_ALIASES:
        if alias in platform:
            if name in platform:
                raise DecodeError(f"duplicate field `{name}`")
            platform[name] = platform.pop(alias)
            is_changed = True
    return is_changed
