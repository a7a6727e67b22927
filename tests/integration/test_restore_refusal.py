"""A snapshot that cannot fit is refused with the reason, and no QEMU is started for it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudvmm.snapshot.folder import describe_file
from cloudvmm.snapshot.state import FORMAT, decode_state, encode_state
from support.booted import MIB, Booted, make_image, serving, vm_config

pytestmark = pytest.mark.qemu

Change = Callable[[Path], object]


class Bench:
    """A server whose QEMU tells of each of its starts, and a snapshot of a guest with a disk."""

    def __init__(self, vm: Booted, folder: Path, starts: Path) -> None:
        self.vm = vm
        self.folder = folder
        self._starts = starts

    def incoming(self) -> int:
        """Return how many QEMUs were started so far to go on from a state."""
        return self._starts.read_text().count("-incoming")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home = tmp_path_factory.mktemp("refusal")
    starts, program, folder = home / "starts", home / "qemu", home / "snapshot"
    program.write_text(f'#!/bin/sh\necho "$*" >>{starts}\nexec {shutil.which("qemu-system-x86_64")} "$@"\n')
    program.chmod(0o755)
    folder.mkdir()
    disk = make_image(home / "disk", MIB)
    config = vm_config(disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}], console={"mode": "Off"})
    with serving(home / "run", "--qemu", str(program)) as vm:
        vm.vmm.put("vm.create", config)
        vm.vmm.put("vm.boot", expect=204)
        vm.vmm.put("vm.pause", expect=204)
        vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=204)
        vm.vmm.put("vm.delete", expect=204)
        yield Bench(vm, folder, starts)


def changed_config(**members: dict[str, Any]) -> Change:
    """Return what edits `config.json` as one would by hand."""

    def change(folder: Path) -> None:
        config = msgspec.json.decode((folder / "config.json").read_bytes())
        for member, value in members.items():
            part = config[member]
            (part[0] if isinstance(part, list) else part).update(value)
        (folder / "config.json").write_bytes(msgspec.json.encode(config))

    return change


def changed_machine(**members: Any) -> Change:
    """Return what has another machine write `engine-machine`; its checksum is right."""

    def change(folder: Path) -> None:
        path = folder / "engine-machine"
        path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | members))
        state = decode_state((folder / "state.json").read_bytes())
        files = {**state.files, path.name: describe_file(str(path))}
        (folder / "state.json").write_bytes(encode_state(msgspec.structs.replace(state, files=files)))

    return change


def flipped(name: str) -> Change:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek((folder / name).stat().st_size // 2)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    return change


def cut(name: str) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def newer_format(folder: Path) -> None:
    raw = (folder / "state.json").read_bytes()
    (folder / "state.json").write_bytes(re.sub(rb'"format":\d', b'"format":%d' % (FORMAT + 1), raw, count=1))


CASES: dict[str, tuple[Change, str]] = {
    "newer format": (newer_format, f"has format {FORMAT + 1}, this release reads {FORMAT}"),
    "newer format of the engine": (changed_machine(format=2), "The state has the format 2"),
    "other architecture": (changed_machine(architecture="aarch64"), "that of a guest on aarch64"),
    "other accelerator": (changed_machine(accelerator="kvm"), "guest under KVM"),
    "newer QEMU": (changed_machine(qemu=[99, 0, 0]), "QEMU 99.0.0 saved the state"),
    "more RAM": (changed_config(memory={"size": 512 * MIB}), "that of a machine with less RAM"),
    "more RAM to give": (
        changed_config(memory={"hotplug_method": "VirtioMem", "hotplug_size": 128 * MIB}),
        "devices that the saved state lacks: mem0",
    ),
    "RAM in the stream": (changed_config(memory={"mergeable": True}), "that of a machine with other RAM"),
    "more vCPUs": (changed_config(cpus={"boot_vcpus": 2, "max_vcpus": 2}), "a guest with 1 vCPUs"),
    "room for vCPUs": (changed_config(cpus={"max_vcpus": 4}), "without cores=1, without maxcpus=1"),
    "other CPU": (changed_config(cpus={"nested": False}), "with svm=off, with npt=off"),
    "missing disk": (changed_config(disks=[{"path": "/nowhere/disk"}][0]), "No such file or directory"),
    "other device": (changed_config(disks=[{"id": "e"}][0]), "devices that the saved state lacks: e"),
    "missing config": (lambda folder: (folder / "config.json").unlink(), "No such file or directory"),
    "missing state": (lambda folder: (folder / "state.json").unlink(), "No such file or directory"),
    "missing RAM": (lambda folder: (folder / "engine-ram-0").unlink(), "engine-ram-0 cannot be read"),
    "cut RAM": (cut("engine-ram-0"), "engine-ram-0 has"),
    "cut engine state": (cut("engine-state"), "engine-state has"),
    "flipped bit of the engine state": (flipped("engine-state"), "the checksum of engine-state"),
    "flipped bit of the RAM": (flipped("engine-ram-0"), "the checksum of engine-ram-0"),
    "flipped bit of the machine": (flipped("engine-machine"), "the checksum of engine-machine"),
    "flipped bit of the state": (flipped("state.json"), ""),
}


@pytest.mark.parametrize(
    ("case", "mode"), [*((case, "Copy") for case in CASES), ("more RAM", "OnDemand"), ("cut RAM", "OnDemand")]
)
def test_snapshot_that_cannot_fit_is_refused_before_anything_is_started(
    bench: Bench, tmp_path: Path, case: str, mode: str
) -> None:
    change, words = CASES[case]
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in bench.folder.iterdir():
        if path.name == "engine-ram-0" and case not in ("cut RAM", "flipped bit of the RAM"):
            (folder / path.name).hardlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)
    change(folder)
    before = bench.incoming()

    request = {"source_url": f"file://{folder}", "memory_restore_mode": mode}
    chain = bench.vm.vmm.put("vm.restore", request, expect=500)

    assert words in chain[-1] or words in chain[-2]
    assert bench.incoming() == before
    bench.vm.vmm.get("vm.info", expect=404)


def test_snapshot_itself_is_restored(bench: Bench) -> None:
    """What the others are refused for is what was changed of it."""
    before = bench.incoming()
    bench.vm.vmm.put("vm.restore", {"source_url": f"file://{bench.folder}"}, expect=204)
    bench.vm.vmm.put("vm.delete", expect=204)
    assert bench.incoming() == before + 1
