"""One description, two renderings: what a device is made of, as arguments and as commands with undo."""

from __future__ import annotations

from cloudvmm.engine.qemu.parts import Parts, remains, render, steps

BY_PATH = {
    "id": "chr.a",
    "backend": {
        "type": "socket",
        "data": {"addr": {"type": "unix", "data": {"path": "/run/a,b"}}, "server": False, "reconnect": 1},
    },
}
BY_FD = {
    "id": "chr.b",
    "backend": {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "7"}}, "server": False}},
}
MEMORY = {"qom-type": "memory-backend-file", "id": "mem.a", "size": 4096}
DEVICE = {"driver": "vhost-user-fs-pci", "id": "da", "chardev": "chr.a"}


def names(parts):
    return [(step.does.name, step.undoes.name) for step in steps(parts)]


def test_objects_and_character_devices_come_before_the_device_and_go_behind_it():
    parts = Parts(objects=[MEMORY], chardevs=[BY_PATH], devices=[DEVICE])
    assert names(parts) == [
        ("object-add", "object-del"),
        ("chardev-add", "chardev-remove"),
        ("device_add", "device_del"),
    ]
    assert [(command.name, command.arguments) for command in remains(parts)] == [
        ("chardev-remove", {"id": "chr.a"}),
        ("object-del", {"id": "mem.a"}),
    ]


def test_connected_character_device_takes_its_descriptor_by_name():
    named, made = steps(Parts(chardevs=[BY_FD]))
    assert (named.does.name, named.does.arguments, named.fd) == ("getfd", {"fdname": "chr.b.fd"}, 7)
    assert named.undoes.name == "closefd"
    assert made.does.arguments["backend"]["data"] == {
        "addr": {"type": "fd", "data": {"str": "chr.b.fd"}},
        "server": False,
    }
    assert made.fd is None
    assert BY_FD["backend"]["data"]["addr"]["data"]["str"] == "7"


def test_character_devices_are_rendered_in_the_grammar_of_their_option():
    assert render(Parts(chardevs=[BY_PATH, BY_FD])) == [
        *("-chardev", "socket,id=chr.a,path=/run/a,,b,reconnect=1"),
        *("-chardev", "socket,id=chr.b,fd=7"),
    ]
