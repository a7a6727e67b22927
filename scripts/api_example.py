"""The examples of the reference pages: each command by curl, by the Python client and by the remote.

They are run by the tests: a page's in the order in which they stand, one language at a time, each against a
server of its own that the page's first block starts.
"""

from __future__ import annotations

import enum
import json
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from cloudvmm.api import COMMANDS, ApiRequest, Effect
from cloudvmm.config import form
from cloudvmm.http.openapi import python_name
from cloudvmm.http.route import ROOT
from cloudvmm.http.sample import SAMPLES
from cloudvmm.http.schema import struct_fields

SOCKET = "/tmp/cloudvmm.sock"

# What a page's examples find, and the order in which they can be run one after the other.
_START = f"cloudvmm --engine fake --api-socket {SOCKET} &\nuntil [ -S {SOCKET} ]; do sleep 0.1; done"
_KERNEL = "echo 'not really a kernel' >/tmp/vmlinux\ntruncate -s 64M /tmp/root.raw"
_CREATED = ("vm.create",)
_BOOTED = ("vm.create", "vm.boot")
_PAUSED = ("vm.create", "vm.boot", "vm.pause")
_FOLDER = "mkdir /tmp/snapshot /tmp/clones"
OTHER_SOCKET = "/tmp/other.sock"
_MIGRATION_SOCKET = "/tmp/migration.sock"
PREPARED: dict[str, tuple[str, ...]] = {
    "information": _BOOTED,
    "sizes": _BOOTED,
    "devices": _CREATED,
    "state": _PAUSED,
}
# The order in which the commands of a page stand; the table's where there is none here.
ORDER: dict[str, tuple[str, ...]] = {
    "vmm": ("vmm.ping", "vmm.jobs", "vmm.cancel-job", "vmm.shutdown"),
    "life": (
        *("vm.create", "vm.boot", "vm.pause", "vm.resume", "vm.nmi", "vm.power-button", "vm.reboot"),
        *("vm.shutdown", "vm.delete"),
    ),
    "state": (
        "vm.coredump",
        "vm.snapshot",
        "vm.snapshot-progress",
        "vm.cancel-snapshot",
        "vm.fork",
        "vm.restore",
        "vm.send-migration",
        "vm.receive-migration",
        "vm.migration-progress",
        "vm.cancel-migration",
    ),
}
# Commands that an example needs right before its own.
BEFORE: dict[str, tuple[str, ...]] = {"vm.restore": ("vm.delete",)}
NOT_RUN: dict[str, str] = {
    "vm.resize-zone": "needs a VM with memory zones",
    "vm.receive-migration": "it waits for a VM; the first block has run it",
    "vm.migration-progress": "the VMM that has sent its VM has ended",
    "vm.cancel-migration": "there is no migration any more",
    "vm.cancel-snapshot": "the snapshot is there",
    "vmm.cancel-job": "there is no such job",
}
REMOTE: dict[str, str] = {
    "vmm.ping": "ping",
    "vmm.shutdown": "shutdown-vmm",
    "vmm.cancel-job": "cancel-job 7",
    "vm.create": "create /tmp/vm.json",
    "vm.resize": "resize --cpus 2 --memory 384M",
    "vm.resize-disk": "resize-disk --disk root --size 128M",
    "vm.resize-zone": "resize-zone --id mem0 --size 384M",
    "vm.add-device": "add-device id=gpu,path=/sys/bus/pci/devices/0000:41:00.0",
    "vm.add-user-device": "add-user-device id=user0,socket=/tmp/user.sock",
    "vm.add-disk": "add-disk id=data,path=/tmp/data.raw,image_type=raw",
    "vm.add-fs": "add-fs id=share,tag=share,socket=/tmp/virtiofsd.sock",
    "vm.add-generic-vhost-user": "add-generic-vhost-user "
    "id=sound,socket=/tmp/sound.sock,queue_sizes=[64,64,64,64],device_type=sound",
    "vm.add-net": "add-net id=net0,tap=tap0,mac=2e:89:a8:e4:3b:01",
    "vm.add-pmem": "add-pmem id=pmem0,file=/tmp/pmem.img",
    "vm.add-vdpa": "add-vdpa id=vdpa0,path=/dev/vhost-vdpa-0",
    "vm.add-vsock": "add-vsock id=vsock0,cid=3,socket=/tmp/vsock.sock",
    "vm.remove-device": "remove-device data",
    "vm.snapshot": "snapshot file:///tmp/snapshot",
    "vm.fork": "fork --count 2 /tmp/clones",
    "vm.restore": "restore source_url=file:///tmp/snapshot,resume=on",
    "vm.coredump": "coredump file:///tmp/core",
    "vm.receive-migration": "receive-migration receiver_url=unix:/tmp/migration.sock",
    "vm.send-migration": "send-migration destination_url=unix:/tmp/migration.sock,local=on",
}


def preparation(tag: str) -> str:
    """Return what starts a page: how its examples are run, and the block that makes ready for them."""
    words = (
        "N, C and A below: there is no VM; there is a stored configuration alone; there is a VM object,\n"
        "from `vm.boot` on. The examples run one after the other, those of one language at a time, against\n"
        "the fake engine:\n"
    )
    lines = [_START]
    prepared = PREPARED.get(tag, ())
    if prepared or tag == "life":
        lines += [_KERNEL, f"cat >/tmp/vm.json <<'end'\n{_pretty(SAMPLES['vm.create'])}\nend"]
    lines += [curl(name, data="@/tmp/vm.json" if name == "vm.create" else None) for name in prepared]
    if tag == "state":
        lines += _state_preparation()
    return f"{words}\n{fence('sh', *lines)}"


def _state_preparation() -> list[str]:
    """Make the folders of a snapshot and of clones, and a second VMM that waits for a VM."""
    return [
        _FOLDER,
        "# Another VMM, which waits for a VM",
        _START.replace(SOCKET, OTHER_SOCKET),
        curl("vm.receive-migration", data=_data("vm.receive-migration"), socket=OTHER_SOCKET) + " &",
        f"until [ -S {_MIGRATION_SOCKET} ]; do sleep 0.1; done",
    ]


def examples(name: str) -> Iterator[str]:
    """Yield the parts of a page that show the command `name` in every language."""
    if name in NOT_RUN:
        yield not_run(NOT_RUN[name])
    before = BEFORE.get(name, ())
    yield fence("sh", *(curl(one) for one in before), curl(name, data=_data(name)))
    if name in NOT_RUN:
        yield not_run(NOT_RUN[name])
    yield fence("python", _python(name, before))
    if name in NOT_RUN:
        yield not_run(NOT_RUN[name])
    yield fence("sh", *(_remote(one) for one in before), _remote(name))


def not_run(reason: str) -> str:
    return f"Not run by the tests: {reason}.\n"


def fence(language: str, *lines: str) -> str:
    text = "\n".join(lines)
    return f"```{language}\n{text}\n```\n"


def curl(name: str, *flags: str, data: str | None = None, socket: str = SOCKET) -> str:
    command = _COMMANDS.get(name)
    words = ["curl", "-sS", "--fail-with-body", *flags, "--unix-socket", socket]
    if command is not None and command.effect is Effect.CHANGES:
        words += ["-X", "PUT"]
    words.append(f"http://localhost{ROOT}{name}")
    call = " ".join(words)
    if data is None:
        return call
    return f"{call} \\\n    -H 'Content-Type: application/json' --data {shlex.quote(data)}"


def _data(name: str) -> str | None:
    return (
        json.dumps(SAMPLES[name])
        if name in SAMPLES and name != "vm.create"
        else ("@/tmp/vm.json" if name == "vm.create" else None)
    )


def _remote(name: str) -> str:
    return f"cloudvmm-remote --api-socket {SOCKET} {REMOTE.get(name) or name.partition('.')[2]}"


def _python(name: str, before: Iterable[str] = ()) -> str:
    imports: set[tuple[str, str]] = {("cloudvmm.client", "Client")}
    calls = [f"    client.{python_name(one)}()" for one in before]
    command = _COMMANDS[name]
    argument = ""
    if command.body is not None:
        value = form.decode(json.dumps(SAMPLES[name]).encode(), command.body)
        argument = _code(value, imports, indent=8)
        argument = f"\n        {argument}\n    " if "\n" in argument or len(argument) > 60 else argument
    call = f"client.{python_name(name)}({argument})"
    has_answer = command.effect is Effect.READS or name.startswith("vm.add-")
    calls.append(f"    print({call})" if has_answer and "\n" not in call else f"    {call}")
    by_module: dict[str, list[str]] = {}
    for module, what in sorted(imports):
        by_module.setdefault(module, []).append(what)
    lines = [f"from {module} import {', '.join(names)}" for module, names in by_module.items()]
    return "\n".join([*lines, "", f'with Client("{SOCKET}") as client:', *calls])


def _code(value: Any, imports: set[tuple[str, str]], *, indent: int) -> str:
    """Return the Python that makes `value`, a struct or what one holds."""
    if isinstance(value, enum.Enum):
        imports.add((type(value).__module__, type(value).__name__))
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, list):
        return f"[{', '.join(_code(one, imports, indent=indent) for one in value)}]"
    if not isinstance(value, msgspec.Struct):
        return json.dumps(value) if isinstance(value, str) else repr(value)
    imports.add((type(value).__module__, type(value).__name__))
    given = [
        f"{field.name}={_code(getattr(value, field.name), imports, indent=indent + 4)}"
        for field in struct_fields(type(value))
        if field.required or not _is_default(value, field)
    ]
    flat = f"{type(value).__name__}({', '.join(given)})"
    if len(flat) + indent <= 88 and "\n" not in flat:
        return flat
    pad = " " * (indent + 4)
    inner = "".join(f"{pad}{one},\n" for one in given)
    return f"{type(value).__name__}(\n{inner}{' ' * indent})"


def _is_default(value: msgspec.Struct, field: msgspec.structs.FieldInfo) -> bool:
    default = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        default = field.default_factory()
    return bool(getattr(value, field.name) == default)


def _pretty(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


_COMMANDS: dict[str, type[ApiRequest]] = {command.name: command for command in COMMANDS}
