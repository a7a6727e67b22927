"""What a device is made of, as data, and how that becomes arguments.

A device is described once, by the file of its resource, as the JSON objects that QMP takes: `objects` for
``object-add``, `chardevs` for ``chardev-add``, `blockdevs` for ``blockdev-add``, `netdevs` for
``netdev_add`` and `devices` for ``device_add``, in the order in which they must be made. `render` gives the
same things as a command line, `steps` as the commands of a hot add. `tpmdevs` are for the command line only.

The `fds` of a TAP, the ``fd`` of a device and the ``str`` of an address of type ``fd``, be it a character
device's or a stream's, are numbers of descriptors: those that QEMU has at its start, ours when it is hot. So
is what `opened` makes the path of a piece of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

Properties = dict[str, Any]

_OPENED: Final = "/proc/self/fd/"


class FdSet(msgspec.Struct, frozen=True):
    """Descriptor `fd` of the QEMU process opens as ``/dev/fdset/<set_id>``."""

    fd: int
    set_id: int

    @property
    def path(self) -> str:
        return f"/dev/fdset/{self.set_id}"


class Command(msgspec.Struct, frozen=True):
    name: str
    arguments: Properties


class Step(msgspec.Struct, frozen=True):
    """`does`, with the descriptor `fd` (lent) beside it, makes one thing; `undoes` takes it away again.

    An ``object-add`` opens `fd` once more: QEMU is lent it for the moment, and the path in `does` is to be
    that of QEMU's own number.
    """

    does: Command
    undoes: Command
    fd: int | None = None


class Parts(msgspec.Struct, kw_only=True):
    fdsets: list[FdSet] = msgspec.field(default_factory=list)
    objects: list[Properties] = msgspec.field(default_factory=list)
    chardevs: list[Properties] = msgspec.field(default_factory=list)
    blockdevs: list[Properties] = msgspec.field(default_factory=list)
    netdevs: list[Properties] = msgspec.field(default_factory=list)
    tpmdevs: list[Properties] = msgspec.field(default_factory=list)
    devices: list[Properties] = msgspec.field(default_factory=list)


def has_nul(value: object) -> bool:
    """Say whether a text somewhere in `value` holds a NUL character, which QEMU does not read as one."""
    match value:
        case str():
            return "\0" in value
        case dict():
            return any(map(has_nul, value.values()))
        case list():
            return any(map(has_nul, value))
        case Parts():
            return any(has_nul(getattr(value, name)) for name in value.__struct_fields__)
        case _:
            return False


def render(parts: Parts) -> list[str]:
    """Return the options that make `parts` on a command line."""
    arguments: list[str] = []
    for fdset in parts.fdsets:
        arguments += ["-add-fd", f"fd={fdset.fd},set={fdset.set_id}"]
    for option, properties in (
        *(("-object", each) for each in parts.objects),
        *(("-chardev", each) for each in parts.chardevs),
        *(("-blockdev", each) for each in parts.blockdevs),
        *(("-netdev", _with_fds(each, [str(fd) for fd in _fds_of_netdev(each)])) for each in parts.netdevs),
        *(("-tpmdev", each) for each in parts.tpmdevs),
        *(("-device", each) for each in parts.devices),
    ):
        arguments += [option, _VALUES.get(option, _json)(properties)]
    return arguments


def steps(parts: Parts) -> list[Step]:
    """Return the commands that make `parts` in a QEMU that runs, in order."""
    return [
        *(
            Step(Command("add-fd", {"fdset-id": fdset.set_id}), _remove_fd(fdset), fd=fdset.fd)
            for fdset in parts.fdsets
        ),
        *(_object_step(each) for each in parts.objects),
        *(step for chardev in parts.chardevs for step in _chardev_steps(chardev)),
        *(Step(Command("blockdev-add", node), _blockdev_del(node)) for node in parts.blockdevs),
        *(step for netdev in parts.netdevs for step in _netdev_steps(netdev)),
        *(step for device in parts.devices for step in _device_steps(device)),
    ]


def remains(parts: Parts) -> list[Command]:
    """Return the commands that take away what is left in QEMU when the guest has let go of the device."""
    return [
        *(_netdev_del(netdev) for netdev in parts.netdevs),
        *(_blockdev_del(node) for node in parts.blockdevs),
        *(_chardev_remove(chardev) for chardev in parts.chardevs),
        *(_object_del(each) for each in parts.objects),
        *(_remove_fd(fdset) for fdset in parts.fdsets),
    ]


def opened(fd: int) -> str:
    """Return the path at which a process opens once more what it has open as `fd`."""
    return f"{_OPENED}{fd}"


def _object_step(each: Properties) -> Step:
    path = each.get("mem-path", "")
    fd = int(path.removeprefix(_OPENED)) if path.startswith(_OPENED) else None
    return Step(Command("object-add", each), _object_del(each), fd=fd)


def _chardev_steps(chardev: Properties) -> list[Step]:
    """Name the descriptor if there is one, then make the character device, which takes it by its name."""
    fd = _fd_of(chardev)
    if fd is None:
        return [Step(Command("chardev-add", chardev), _chardev_remove(chardev))]
    name = f"{chardev['id']}.fd"
    backend = chardev["backend"]
    data = backend["data"] | {"addr": {"type": "fd", "data": {"str": name}}}
    named = chardev | {"backend": backend | {"data": data}}
    return [
        Step(Command("getfd", {"fdname": name}), Command("closefd", {"fdname": name}), fd=fd),
        Step(Command("chardev-add", named), _chardev_remove(chardev)),
    ]


def _fd_of(chardev: Properties) -> int | None:
    address = chardev["backend"]["data"].get("addr", {})
    return int(address["data"]["str"]) if address.get("type") == "fd" else None


def _netdev_steps(netdev: Properties) -> list[Step]:
    """Name each descriptor, then make the back end, which takes them by their names."""
    fds = _fds_of_netdev(netdev)
    names = [f"{netdev['id']}.{number}" for number, _ in enumerate(fds)]
    return [
        *(
            Step(Command("getfd", {"fdname": name}), Command("closefd", {"fdname": name}), fd=fd)
            for name, fd in zip(names, fds, strict=True)
        ),
        Step(Command("netdev_add", _with_fds(netdev, names)), _netdev_del(netdev)),
    ]


def _device_steps(device: Properties) -> list[Step]:
    """Name the descriptor if the device takes one, then make the device."""
    undo = Command("device_del", {"id": device["id"]})
    if "fd" not in device:
        return [Step(Command("device_add", device), undo)]
    name = f"{device['id']}.fd"
    return [
        Step(Command("getfd", {"fdname": name}), Command("closefd", {"fdname": name}), fd=int(device["fd"])),
        Step(Command("device_add", device | {"fd": name}), undo),
    ]


def _fds_of_netdev(netdev: Properties) -> list[int]:
    if netdev["type"] == "stream":
        return [int(netdev["addr"]["str"])]
    return netdev["fds"] if netdev["type"] == "tap" else []


def _with_fds(netdev: Properties, names: list[str]) -> Properties:
    """Return `netdev` as QEMU takes it, its descriptors called `names`."""
    match netdev["type"]:
        case "tap":
            rest = {key: value for key, value in netdev.items() if key != "fds"}
            return rest | ({"fd": names[0]} if len(names) == 1 else {"fds": ":".join(names)})
        case "stream":
            return netdev | {"addr": netdev["addr"] | {"str": names[0]}}
        case _:
            return netdev


def _netdev_del(netdev: Properties) -> Command:
    return Command("netdev_del", {"id": netdev["id"]})


def _chardev_remove(chardev: Properties) -> Command:
    return Command("chardev-remove", {"id": chardev["id"]})


def _object_del(each: Properties) -> Command:
    return Command("object-del", {"id": each["id"]})


def _blockdev_del(node: Properties) -> Command:
    return Command("blockdev-del", {"node-name": node["node-name"]})


def _remove_fd(fdset: FdSet) -> Command:
    return Command("remove-fd", {"fdset-id": fdset.set_id})


def _json(properties: Properties) -> str:
    return msgspec.json.encode(properties).decode()


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
        case "pipe":
            settings = f",path={escape(data['device'])}"
        case "socket":
            settings = _socket(data)
        case _:
            raise AssertionError(backend)
    return f"{backend},id={chardev['id']}{settings}"


def _tpmdev(tpmdev: Properties) -> str:
    return f"{tpmdev['type']},id={tpmdev['id']},chardev={tpmdev['chardev']}"


_RECONNECT: Final = ("reconnect", "reconnect-ms")  # the first is gone from QEMU 11, the second new in 9.2


def _socket(data: Properties) -> str:
    address = data["addr"]
    if address["type"] == "fd":
        return f",fd={address['data']['str']}"
    settings = f",path={escape(address['data']['path'])}"
    if data["server"]:
        settings += f",server=on,wait={'on' if data['wait'] else 'off'}"
    return settings + "".join(f",{name}={data[name]}" for name in _RECONNECT if name in data)


# What takes no JSON.
_VALUES: Final[dict[str, Callable[[Properties], str]]] = {"-chardev": _chardev, "-tpmdev": _tpmdev}
