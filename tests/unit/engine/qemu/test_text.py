"""Texts that are no UTF-8: which are refused, by which name, and which go through."""

from __future__ import annotations

import contextlib
import os

import msgspec
import pytest

from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, EngineError, MachineSpec, SinkKind
from cloudvmm.engine.qemu import QemuEngine
from cloudvmm.engine.qemu.resource import acquire
from cloudvmm.engine.qemu.text import TextNotUtf8, check_texts

MIB = 1 << 20
OFF = ConsoleSink(kind=SinkKind.OFF)


def spec_of(**config) -> MachineSpec:
    vm_config = msgspec.convert({"memory": {"size": 64 * MIB}, **config}, VmConfig)
    return MachineSpec(vm_config=vm_config, slots={}, serial=OFF, console=OFF, debug_console=OFF)


@pytest.mark.parametrize("bad", ["\udcff", "a\ud800b"])
@pytest.mark.parametrize(
    ("make", "member"),
    [
        (lambda bad: {"disks": [{"path": "/d"}, {"path": "/d", "id": bad}]}, "disks[1].id"),
        (lambda bad: {"disks": [{"path": "/d", "serial": bad}]}, "disks[0].serial"),
        (lambda bad: {"net": [{"id": bad}]}, "net[0].id"),
        (lambda bad: {"rng": {"src": "/dev/urandom", "id": bad}}, "rng.id"),
        (lambda bad: {"platform": {"oem_strings": ["good", bad]}}, "platform.oem_strings[1]"),
    ],
)
def test_text_that_is_no_utf8_is_refused_by_the_name_of_its_member(make, member, bad):
    with pytest.raises(EngineError) as caught:
        QemuEngine(binary="/nowhere/qemu").build(spec_of(**make(bad)))

    assert str(caught.value) == f"The text of {member} in the configuration is not UTF-8"


@pytest.mark.parametrize(
    ("config", "member"),
    [
        ({"payload": {"kernel": "/k", "cmdline": "\ud800"}}, "payload.cmdline"),
        ({"payload": {"kernel": "\ud800"}}, "payload.kernel"),
        ({"disks": [{"path": "\ud800"}]}, "disks[0].path"),
        ({"rng": {"src": "\ud800"}}, "rng.src"),
    ],
)
def test_text_that_not_even_bytes_give_is_refused_anywhere(config, member):
    with pytest.raises(TextNotUtf8) as caught:
        check_texts(spec_of(**config).vm_config)

    assert caught.value.member == member


def test_paths_and_the_command_line_may_be_any_bytes():
    check_texts(
        spec_of(
            payload={"kernel": "/\udcff", "initramfs": "/\udcff", "cmdline": "\udcff"},
            disks=[{"path": "/\udcff"}],
            rng={"src": "/\udcff"},
            serial={"mode": "File", "file": "/\udcff"},
        ).vm_config
    )


def test_entropy_source_whose_name_is_no_utf8_is_inherited(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with open(path, "wb") as file:
        file.write(b"random")
    with contextlib.ExitStack() as undo:
        resources = acquire(spec_of(rng={"src": path}), undo)
        assert resources.rng_fd in resources.inherited_fds
        assert resources.rng_path == f"/proc/self/fd/{resources.rng_fd}"
        with open(resources.rng_path, "rb") as file:
            assert file.read() == b"random"


def test_entropy_source_with_a_plain_name_is_opened_by_it():
    with contextlib.ExitStack() as undo:
        resources = acquire(spec_of(), undo)
        assert (resources.rng_path, resources.rng_fd) == ("/dev/urandom", None)
