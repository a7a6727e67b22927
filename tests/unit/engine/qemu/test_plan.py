"""Every option of every struct as a golden pair: a configuration, and the arguments or the refusal it gives.

``golden/NAME.json`` holds a `Case`, of which only what it is about is given. Beside it lies ``NAME.args``,
one argument a line, or ``NAME.err``, the text of the refusal. Where the case is about devices that can be
added, ``NAME.qmp`` holds what adds the same devices to a guest that runs: one command a line with its
descriptor behind it, then, newest first, the commands that undo them; or the text of the refusal. To write
all anew: ``CLOUDVMM_WRITE_GOLDEN=1 pytest tests/unit/engine/qemu/test_plan.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from cloudvmm.config.device import (
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    PmemConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.user_net import parse_forward
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.numbering import PREFIXES
from cloudvmm.engine.base import EngineError, MachineSpec
from cloudvmm.engine.qemu import plan
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.disk import DiskBacking
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.image import Image
from cloudvmm.engine.qemu.kind import KINDS, check_device_means, check_means, describe, devices_of
from cloudvmm.engine.qemu.mapped import MappedBacking
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.net import NetBacking
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.parts import Command, steps
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.slot import check_slots
from cloudvmm.engine.qemu.support import check_supported
from cloudvmm.engine.qemu.tpm import TpmBacking
from cloudvmm.engine.qemu.user_device import UserDeviceBacking
from cloudvmm.engine.qemu.user_net import UserNetBacking
from cloudvmm.engine.qemu.vdpa import VdpaBacking
from cloudvmm.engine.qemu.vfio import VfioBacking, has_iommufd
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking
from cloudvmm.engine.qemu.vmdk import Extents, OpenExtent
from cloudvmm.engine.qemu.vsock import VsockBacking
from cloudvmm.engine.qemu.zone import zones_of
from support.sink import sink_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
# The members of a configuration whose devices can be added; a case is about one if its name says so.
HOT_KINDS = ("disk-", "net-", "pmem-", "fs-", "generic-", "vsock-", "user-device-", "vdpa-", "vfio-")
HOT_NAMES = [name for name in NAMES if name.startswith(HOT_KINDS)]
WRITE = os.environ.get("CLOUDVMM_WRITE_GOLDEN") == "1"


class Case(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`bases` lists the types of the backing images of a disk; `slots` is by default one after another from
    2. The QEMU has every device that some kind needs but what it `lacks`.
    """

    config: VmConfig
    has_qboot: bool = True
    version: tuple[int, int, int] = (10, 0, 2)
    accelerator: Literal["tcg", "kvm"] = "tcg"
    firmware_is_elf: bool = False
    bases: dict[str, list[ImageType]] = msgspec.field(default_factory=dict)
    block_devices: list[str] = msgspec.field(default_factory=list)
    slots: dict[str, int] | None = None
    lacks: list[str] = msgspec.field(default_factory=list)


def read_case(name: str) -> Case:
    return msgspec.json.decode((GOLDEN / f"{name}.json").read_bytes(), type=Case)


def default_slots(config: VmConfig) -> dict[str, int]:
    ids = [config.console.id or "__console"]
    ids += [device.id or "" for device in devices_of(config)]
    ids += [config.rng.id or "__rng"]
    ids += [config.balloon.id or "__balloon"] if config.balloon else []
    ids += ["__watchdog", "__pvpanic", *zones_of(config.memory), "__ivshmem", "__iommu"]
    return {device_id: slot for slot, device_id in enumerate(ids, start=2)}


def spec_of(case: Case) -> MachineSpec:
    config = case.config
    return MachineSpec(
        vm_config=config,
        slots=default_slots(config) if case.slots is None else case.slots,
        serial=sink_of(config.serial.mode, config.serial.file, 10),
        console=sink_of(config.console.mode, config.console.file, 11),
        debug_console=sink_of(config.debug_console.mode, config.debug_console.file, 12),
    )


def image_of(case: Case, disk: DiskConfig, fd: int) -> Image:
    """What `open_image` would have made of `disk`, with its bases below it."""
    types = [disk.image_type, *case.bases.get(disk.id or "", [])]
    image: Image | None = None
    for depth in reversed(range(len(types))):
        kind = ImageType.RAW if types[depth] is ImageType.UNKNOWN else types[depth]
        image = Image(
            path=disk.path or "",
            fd=fd + depth,
            image_type=kind,
            readonly=disk.readonly or depth > 0,
            size_bytes=1 << 20,
            kind="host_device" if disk.path in case.block_devices else "file",
            direct=disk.direct,
            data_bytes=1 << 19 if kind is ImageType.FIXED_VHD else None,
            base=image,
            extents=extents_of(fd) if kind is ImageType.FLAT_VMDK else None,
        )
    assert image is not None
    return image


def extents_of(fd: int) -> Extents:
    opened = [OpenExtent(fd + number, 1000 + number) for number in (1, 2)]
    return Extents(opened, text_fd=fd + 3)


def disk_backing(case: Case, disk: DiskConfig, fd: int) -> Backing:
    if disk.vhost_user:
        return VhostUserBacking(device_id=disk.id or "", path=disk.vhost_socket)
    image = image_of(case, disk, fd)
    return DiskBacking(device_id=disk.id or "", image=image, granularity=disk.lock_granularity)


def net_backing(case: Case, net: NetConfig, fd: int) -> Backing:
    if net.user is not None:
        forwards = [parse_forward(text) for text in net.user.forwards]
        # The one with an MTU stands for a host with passt, the others for those without.
        return UserNetBacking(device_id=net.id or "", forwards=forwards, fd=fd if net.mtu else -1)
    if net.vhost_user:
        return VhostUserBacking(device_id=net.id or "", path="/tmp/relay/s")
    queues = [fd + queue for queue in range(net.num_queues // 2)]
    return NetBacking(device_id=net.id or "", queues=queues, tap=net.tap)


def pmem_backing(case: Case, pmem: PmemConfig, fd: int) -> Backing:
    return MappedBacking(
        device_id=pmem.id or "",
        fd=fd,
        size=pmem.size or 4 << 20,
        is_shared=not pmem.discard_writes,
    )


def vhost_user_backing(case: Case, device: PciDevice, fd: int) -> Backing:
    return VhostUserBacking(device_id=device.id or "", fd=fd)


def vsock_backing(_case: Case, vsock: VsockConfig, fd: int) -> Backing:
    return VsockBacking(device_id=vsock.id or "", fd=fd)


def user_device_backing(case: Case, device: UserDeviceConfig, fd: int) -> Backing:
    return UserDeviceBacking(device_id=device.id or "", path=device.socket)


def vdpa_backing(_case: Case, vdpa: VdpaConfig, fd: int) -> Backing:
    return VdpaBacking(device_id=vdpa.id or "", fd=fd)


def vfio_backing(_case: Case, device: DeviceConfig, fd: int) -> Backing:
    if device.path is None:
        return VfioBacking(device_id=device.id or "", fd=fd)
    return VfioBacking(device_id=device.id or "", folder=device.path)


# What `open_backing` would have made of a device; `fd` and the nine numbers behind it are its own.
BACKINGS: dict[type[PciDevice], Callable[[Case, Any, int], Backing]] = {
    DiskConfig: disk_backing,
    NetConfig: net_backing,
    GenericVhostUserConfig: vhost_user_backing,
    FsConfig: vhost_user_backing,
    PmemConfig: pmem_backing,
    VsockConfig: vsock_backing,
    UserDeviceConfig: user_device_backing,
    VdpaConfig: vdpa_backing,
    DeviceConfig: vfio_backing,
}


def fixed_backings(config: VmConfig) -> list[Backing]:
    """What `acquire` would have opened of what is there from the start alone."""
    found: list[Backing] = []
    if config.ivshmem:
        name = config.ivshmem.id or "__ivshmem"
        found.append(MappedBacking(device_id=name, fd=14, size=config.ivshmem.size))
    if config.tpm:
        found.append(TpmBacking(device_id="__tpm", fd=15))
    return found


def resources_of(case: Case) -> Resources:
    """What `acquire` would have opened, under made-up numbers."""
    config = case.config
    memory = memory_of(config)
    zones = zones_of(config.memory)
    rams = {name: RamBacking(device_id=ram.zone_id, ram=ram) for name, ram in memory.rams.items()}
    for number, opened in enumerate([*rams.values(), *zones.values()], start=20):
        opened.fd = None if opened.ram.is_private else number
    return Resources(
        memory=memory,
        rams=rams,
        zones=zones,
        backings={
            device.id or "": BACKINGS[type(device)](case, device, 30 + 10 * index)
            for index, device in enumerate(devices_of(config))
        }
        | {backing.device_id: backing for backing in fixed_backings(config)},
        serial_fd=10,
        console_fd=11,
        debug_console_fd=12,
        rng_path=config.rng.src,
        firmware_is_elf=case.firmware_is_elf,
        iommufd_fd=None if config.platform is None or config.platform.iommufd_fd is None else 13,
    )


def facts_of(case: Case) -> QemuFacts:
    needed = {kind.needs.driver for kind in KINDS.values() if kind.needs is not None}
    return QemuFacts(
        binary="/usr/bin/qemu-system-x86_64",
        version=case.version,
        accelerator=case.accelerator,
        qboot_path="/usr/share/qemu/qboot.rom" if case.has_qboot else None,
        seabios_path="/usr/share/seabios/bios-256k.bin",
        devices=frozenset(needed.difference(case.lacks)),
    )


def outcome(case: Case) -> tuple[str, str]:
    """Return the suffix of the golden file and what should be in it."""
    facts = facts_of(case)
    try:
        check_supported(case.config)
        check_means(case.config, facts)
        spec = spec_of(case)
        check_slots(spec.slots)
        return ".args", "".join(f"{line}\n" for line in plan.arguments(spec, resources_of(case), facts))
    except EngineError as error:
        return ".err", f"{type(error).__name__}: {error}\n"


def hot_outcome(case: Case) -> str:
    """Return what should be in the golden file of the hot form."""
    spec, resources = spec_of(case), resources_of(case)
    lines: list[str] = []
    first_fdset = 1
    for device in devices_of(case.config):
        try:
            check_device_means(device, facts_of(case))
            seat = Seat(
                slots=spec.slots,
                facts=facts_of(case),
                first_fdset=first_fdset,
                has_iommufd=has_iommufd(case.config.platform),
            )
            parts = describe(device, resources.backings[device.id or ""], seat)
        except EngineError as error:
            return f"{type(error).__name__}: {error}\n"
        first_fdset += len(parts.fdsets)
        todo = steps(parts)
        lines += [line_of(step.does) + ("" if step.fd is None else f" fd={step.fd}") for step in todo]
        lines += [f"undo {line_of(step.undoes)}" for step in reversed(todo)]
    return "".join(f"{line}\n" for line in lines)


def line_of(command: Command) -> str:
    return f"{command.name} {msgspec.json.encode(command.arguments).decode()}"


def test_golden_folder_has_a_case_for_every_outcome():
    outcomes = {path.stem for path in GOLDEN.iterdir() if path.suffix != ".json"}
    assert outcomes == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_case_gives_its_golden_outcome(name):
    suffix, text = outcome(read_case(name))
    golden = GOLDEN / f"{name}{suffix}"
    if WRITE:
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", HOT_NAMES)
def test_hot_case_gives_its_golden_commands(name):
    golden = GOLDEN / f"{name}.qmp"
    text = hot_outcome(read_case(name))
    if WRITE:
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_kind_of_device_is_made():
    assert set(KINDS) == set(PREFIXES)
    assert set(BACKINGS) == set(KINDS)
