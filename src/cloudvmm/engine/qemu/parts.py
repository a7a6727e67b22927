"""What a device is made of, as data, and how that becomes arguments.

A device is described once, by the file of its resource, as the JSON objects that QMP takes: `objects` for
``object-add``, `chardevs` for ``chardev-add``, `blockdevs` for ``blockdev-add``, `netdevs` for
``netdev_add`` and `devices` for ``device_add``, in the order in which they must be made. `render` gives the
same things as a command line; a hot add sends them one by one.
"""

from __future__ import annotations

from typing import Any

import msgspec

Properties = dict[str, Any]


class FdSet(msgspec.Struct, frozen=True):
    """Descriptor `fd` of the QEMU process opens as ``/dev/fdset/<set_id>``."""

    fd: int
    set_id: int

    @property
    def path(self) -> str:
        return f"/dev/fdset/{self.set_id}"


class Parts(msgspec.Struct, kw_only=True):
    fdsets: list[FdSet] = msgspec.field(default_factory=list)
    objects: list[Properties] = msgspec.field(default_factory=list)
    chardevs: list[Properties] = msgspec.field(default_factory=list)
    blockdevs: list[Properties] = msgspec.field(default_factory=list)
    netdevs: list[Properties] = msgspec.field(default_factory=list)
    devices: list[Properties] = msgspec.field(default_factory=list)


def render(parts: Parts) -> list[str]:
    """Return the options that make `parts` on a command line."""
    arguments: list[str] = []
    for fdset in parts.fdsets:
        arguments += ["-add-fd", f"fd={fdset.fd},set={fdset.set_id}"]
    for option, properties in (
        *(("-object", each) for each in parts.objects),
        *(("-chardev", each) for each in parts.chardevs),
        *(("-blockdev", each) for each in parts.blockdevs),
        *(("-netdev", each) for each in parts.netdevs),
        *(("-device", each) for each in parts.devices),
    ):
        value = _chardev(properties) if option == "-chardev" else msgspec.json.encode(properties).decode()
        arguments += [option, value]
    return arguments


def escape(value: str) -> str:
    """Return `value` as QEMU's ``key=value`` grammar wants it: commas doubled."""
    return value.replace(",", ",,")


def _chardev(chardev: Properties) -> str:
    """Render the argument of ``chardev-add``; ``-chardev`` does not read JSON."""
    backend, data = chardev["backend"]["type"], chardev["backend"]["data"]
    match backend:
        case "null":
            settings = ""
        case "file":
            settings = f",path={escape(data['out'])},append={'on' if data['append'] else 'off'}"
        case "socket":
            settings = f",fd={data['addr']['data']['str']}"
        case _:
            raise AssertionError(backend)
    return f"{backend},id={chardev['id']}{settings}"
