"""Names in QEMU for the devices of a VM. Ids of the API hold any character; QEMU's do not.

A QEMU id starts with a letter and goes on with letters, digits, ``-``, ``.`` and ``_``. `qdev_id` puts a
letter in front and writes every other byte of the UTF-8 form as ``.xx``, so that `device_id` can read it
back. Block node names are cut at 31 characters by QEMU, which `node_name` keeps to.
"""

from __future__ import annotations

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_PREFIX = "d"
_MAX_NODE_NAME = 31


def qdev_id(device_id: str) -> str:
    """Return the QEMU id of the device `device_id`: ``_disk0`` becomes ``d_disk0``."""
    return _PREFIX + "".join(
        chr(byte) if byte in _PLAIN else f".{byte:02x}" for byte in device_id.encode("utf-8")
    )


def device_id(qdev_id: str) -> str | None:
    """Return the id that `qdev_id` was made from; None where it was not made by us."""
    if not qdev_id.startswith(_PREFIX):
        return None
    head, *escaped = qdev_id.removeprefix(_PREFIX).split(".")
    try:
        raw = head.encode("ascii") + b"".join(
            bytes.fromhex(piece[:2]) + piece[2:].encode("ascii") for piece in escaped
        )
        found = raw.decode("utf-8")
    except ValueError:
        return None
    return found if _round_trips(found, qdev_id) else None


def _round_trips(found: str, wanted: str) -> bool:
    return qdev_id(found) == wanted


def part_id(device_id: str, part: str) -> str:
    """Return the QEMU id of an object that serves `device_id`: a back end, a character device, a port."""
    return f"{part}.{qdev_id(device_id)}"


def node_name(device_id: str) -> str:
    """Return the name of the block node that the disk `device_id` reads and writes."""
    whole = qdev_id(device_id)
    if len(whole) <= _MAX_NODE_NAME:
        return whole
    return _hashed("h", whole)


def below_name(device_id: str) -> str:
    """Return the name of the node of the disk's image, where its own node is a filter above that."""
    return _hashed("i", qdev_id(device_id))


def overlay_name(device_id: str, number: int) -> str:
    """Return the name of the node of the overlay `number` of the disk `device_id`."""
    return _hashed(f"o{number}", qdev_id(device_id))


def _hashed(mark: str, whole: str) -> str:
    # A dot is always followed by two hexadecimal digits in `qdev_id`, and `mark` begins with none, so that
    # this form is never one of its own.
    import hashlib

    room = _MAX_NODE_NAME - len(f"{_PREFIX}.{mark}-")
    return f"{_PREFIX}.{mark}-{hashlib.blake2s(whole.encode(), digest_size=min(13, room // 2)).hexdigest()}"
