"""QEMU itself accepts every golden argument list, silently, and puts each device where the plan says.

The configurations are those of ``tests/unit/engine/qemu/golden``, on real images and interfaces. No vCPU
runs. The same devices are plugged into a machine that stands ready, and each command is
held against the schema that QEMU reports. The QEMU on the path is asked, and the one that
CLOUDVMM_TEST_OLD_QEMU names: a folder into which the Debian packages of an older release were unpacked
(``dpkg -x``), and the one that CLOUDVMM_TEST_NEW_QEMU names, made by scripts/new_qemu.sh.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.device import FsConfig, GenericVhostUserConfig, TpmConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, MachineSpec, SinkKind, slot_of
from cloudvmm.engine.qemu import QemuEngine, plan
from cloudvmm.engine.qemu.binary import parse_devices
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.kind import KINDS, devices_of
from cloudvmm.engine.qemu.name import device_id, qdev_id
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.resource import acquire
from cloudvmm.engine.qemu.zone import zones_of
from support.guest import find_guest
from support.namespace import open_tap
from support.qemu import NEW_QEMU, find_qemu, look_apart
from support.qmp_schema import QmpSchema
from support.sink import sink_of
from support.storage_daemon import StorageDaemon
from support.vfio_user import VfioUserServer
from support.vhost_user import back_end
from support.vhost_user_net import VhostUserNet

GOLDEN = Path(__file__).parents[1] / "unit" / "engine" / "qemu" / "golden"
# What the host itself must have for QEMU to take it.
OF_THE_HOST = ("cpus-kvm", "platform-iommufd", "vdpa-", "vfio-")
CASES = [path.stem for path in sorted(GOLDEN.glob("*.args")) if not path.stem.startswith(OF_THE_HOST)]
PASSED_THROUGH = [
    path.stem for path in sorted(GOLDEN.glob("*.qmp")) if path.stem.startswith(("vdpa-", "vfio-"))
]
HOT_KINDS = ("disk-", "net-", "pmem-", "fs-", "generic-", "vsock-", "user-device-")
HOT_CASES = [name for name in CASES if name.startswith(HOT_KINDS)]
NOT_IN_7_2 = {
    "disk-queue-affinity-queues",  # needs QEMU 9.0
    "iommu-address-width",  # needs QEMU 9.0
    "generic-vhost-user-sound",
    "generic-vhost-user-input",  # it has it for KVM alone
}
IMAGE_BYTES = 1 << 20
PMEM_BYTES = 4 << 20
FORMATS = {
    ImageType.QCOW2: "qcow2",
    ImageType.FIXED_VHD: "vpc",
    ImageType.VHDX: "vhdx",
    ImageType.FLAT_VMDK: "vmdk",
}
OPTIONS = {"vpc": ["-o", "subformat=fixed,force_size=on"], "vmdk": ["-o", "subformat=monolithicFlat"]}
WITH_CONFIG = {2, 18, 19, 25, 41}  # types of devices whose configuration QEMU gets from the back end
TIMEOUT_S = 60
# QEMU 11 says it of the machine that all guests have, so that they can be restored on any.
MACHINE_IS_OLD = "warning: Machine type 'pc-i440fx-7.2' is deprecated"
FIXED_ARGUMENTS = ["-nodefaults", "-no-user-config", "-display", "none", "-no-shutdown", "-S"]

pytestmark = [pytest.mark.qemu, pytest.mark.root]


class Qemu(msgspec.Struct, frozen=True):
    """How to run one QEMU: its command, its environment, its firmware."""

    command: list[str]
    environment: dict[str, str]
    qboot: str
    is_old: bool = False

    def lacks(self, driver: str) -> bool:
        """Say whether it was built without the device `driver`."""
        listed = subprocess.run(
            [*self.command, "-device", "help"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
        return driver not in parse_devices(listed.stdout)


class Golden(msgspec.Struct, kw_only=True):
    config: VmConfig
    slots: dict[str, int] | None = None
    bases: dict[str, list[ImageType]] = msgspec.field(default_factory=dict)


@pytest.fixture(scope="module", params=["current", "old", "newest"])
def qemu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Qemu:
    if request.param == "newest":
        program = find_qemu("newest", tmp_path_factory.getbasetemp())
        return Qemu([program], {}, f"{os.environ[NEW_QEMU]}/usr/share/qemu/qboot.rom")
    if request.param == "current":
        binary = shutil.which("qemu-system-x86_64")
        if binary is None:
            pytest.skip("qemu-system-x86_64 is missing")
        return Qemu([binary], {}, "/usr/share/qemu/qboot.rom")
    root = os.environ.get("CLOUDVMM_TEST_OLD_QEMU")
    if root is None:
        pytest.skip("CLOUDVMM_TEST_OLD_QEMU does not name an unpacked QEMU")
    command = [
        f"{root}/usr/bin/qemu-system-x86_64",
        "-L",
        f"{root}/usr/share/qemu",
        "-L",
        "/usr/share/seabios",
    ]
    modules = f"{root}/usr/lib/x86_64-linux-gnu/qemu"
    return Qemu(command, {"QEMU_MODULE_DIR": modules}, f"{root}/usr/share/qemu/qboot.rom", is_old=True)


@pytest.fixture
def golden(
    request: pytest.FixtureRequest, tmp_path: Path, qemu: Qemu, backends: contextlib.ExitStack
) -> Golden:
    """The configuration of a case, with files that exist in the place of those it names."""
    if qemu.is_old and request.param in NOT_IN_7_2:
        pytest.skip("This QEMU is too old for it, and says so")
    case = msgspec.json.decode((GOLDEN / f"{request.param}.json").read_bytes(), type=Golden)
    skip_without_means(qemu, case.config)
    use_real_payload(case.config, tmp_path)
    served = [disk for disk in case.config.disks or [] if disk.vhost_user]
    for disk in case.config.disks or []:
        if not disk.vhost_user:
            make_image(disk, case.bases.get(disk.id or "", []), tmp_path)
    for net in case.config.net or []:
        backends.enter_context(use_real_network(net, tmp_path))
    for zone in case.config.memory.zones or []:
        if zone.file is not None:
            zone.file = str(make_file(tmp_path / "ram", zone.size))
    for pmem in case.config.pmem or []:
        pmem.file = str(make_file(tmp_path / Path(pmem.file).name, pmem.size or PMEM_BYTES))
    if case.config.vsock is not None:
        case.config.vsock.socket = str(tmp_path / "vsock")
    if case.config.ivshmem:
        case.config.ivshmem.path = str(make_file(tmp_path / "shared", case.config.ivshmem.size))
    if case.config.tpm:
        folder = tmp_path / "tpm"
        folder.mkdir()
        case.config.tpm = TpmConfig(state_dir=str(folder))
    for console in (case.config.serial, case.config.console, case.config.debug_console):
        if console.file is not None:
            console.file = str(tmp_path / Path(console.file).name)
    need_hugepages(case.config)
    for disk in served:
        image = make_file(tmp_path / "served.raw", IMAGE_BYTES)
        disk.vhost_socket = str(tmp_path / "served,0.sock")
        backends.enter_context(StorageDaemon(disk.vhost_socket, image, queues=disk.num_queues))
    for device in [*(case.config.fs or []), *(case.config.generic_vhost_user or [])]:
        device.socket = serve(device, tmp_path / f"{device.id}.sock", backends)
    for user_device in case.config.user_devices or []:
        path = tmp_path / f"{user_device.id},é.sock"
        user_device.socket = str(backends.enter_context(contextlib.closing(VfioUserServer(path))).path)
    return case


def skip_without_means(qemu: Qemu, config: VmConfig) -> None:
    for device in devices_of(config):
        needs = KINDS[type(device)].needs
        if needs is not None and qemu.lacks(needs.driver):
            pytest.skip(f"This QEMU lacks {needs.driver}")


def serve(device: FsConfig | GenericVhostUserConfig, path: Path, undo: contextlib.ExitStack) -> str:
    """Start a back end for `device` at `path`."""
    config = b"" if getattr(device, "device_type", None) in WITH_CONFIG else None
    undo.enter_context(back_end(path, config=config))
    return str(path)


def make_file(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@pytest.fixture
def backends() -> Iterator[contextlib.ExitStack]:
    """What serves the devices of a case; it ends after it."""
    with contextlib.ExitStack() as stack:
        yield stack


@contextlib.contextmanager
def use_real_network(net: NetConfig, folder: Path) -> Iterator[None]:
    """Let `net` have an interface of its own, a back end or ports that are free."""
    net.tap = None
    if net.fds is not None:
        net.fds = open_tap("planned0", queues=len(net.fds))
        try:
            yield
        finally:
            for fd in net.fds:
                os.close(fd)
        return
    if net.user is not None:
        net.user.forwards = [with_free_port(text) for text in net.user.forwards]
    if not net.vhost_user:
        yield
        return
    net.vhost_socket = str(folder / "net.sock")
    frames, _ = pair = os.pipe()  # there never are any
    backend = VhostUserNet(folder / "net.sock", frames, connects=net.vhost_mode is VhostMode.SERVER)
    try:
        yield
    finally:
        backend.close()
        for fd in pair:
            os.close(fd)


def with_free_port(forward: str) -> str:
    protocol, address, _, guest_port = forward.split(":")
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as trial:
        trial.bind((address, 0))
        return f"{protocol}:{address}:{trial.getsockname()[1]}:{guest_port}"


def use_real_payload(config: VmConfig, folder: Path) -> None:
    payload = config.payload
    if payload is None:
        return
    if payload.firmware is not None:
        firmware = folder / "firmware"
        source = (
            find_guest().kernel if "hypervisor-fw" in payload.firmware else "/usr/share/seabios/bios-256k.bin"
        )
        firmware.symlink_to(source)
        payload.firmware = str(firmware)
    if payload.kernel is not None:
        kernel = folder / Path(payload.kernel).name
        kernel.symlink_to(find_guest().kernel)
        payload.kernel = str(kernel)
    if payload.initramfs is not None:
        payload.initramfs = find_guest().initramfs


def make_image(disk: DiskConfig, bases: list[ImageType], folder: Path) -> None:
    """Create the image that `disk` asks for, on images of the types `bases`, and name it in `disk`."""
    below: list[str] = []
    for depth, image_type in reversed(list(enumerate([disk.image_type, *bases]))):
        image_format = FORMATS.get(image_type, "raw")
        path = str(folder / f"{(disk.id or '').encode().hex()}-{depth}.{image_format}")
        options = OPTIONS.get(image_format, [])
        size = [] if below else [str(IMAGE_BYTES)]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", image_format, *options, *below, path, *size],
            check=True,
            timeout=TIMEOUT_S,
        )
        below = ["-b", path, "-F", image_format]
        disk.path = path


def need_hugepages(config: VmConfig) -> None:
    huge = [memory for memory in (config.memory, *(config.memory.zones or ())) if memory.hugepages]
    if not huge:
        return
    pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    free = int(pages.read_text()) if pages.exists() else 0
    wanted = sum(memory.size for memory in huge) >> 21
    if free < wanted:
        pytest.skip(f"{wanted} free huge pages of 2 MiB are missing, there are {free}")


def spec_of(golden: Golden, stream_fd: int) -> MachineSpec:
    config = golden.config
    return MachineSpec(
        vm_config=config,
        slots=default_slots(config) if golden.slots is None else golden.slots,
        serial=sink_of(config.serial.mode, config.serial.file, stream_fd),
        console=sink_of(config.console.mode, config.console.file, stream_fd),
        debug_console=sink_of(config.debug_console.mode, config.debug_console.file, stream_fd),
    )


def default_slots(config: VmConfig) -> dict[str, int]:
    ids = [config.console.id or "__console", config.rng.id or "__rng", "__watchdog", "__pvpanic", "__ivshmem"]
    ids += [device.id or "" for device in devices_of(config)] + ["__iommu"]
    ids += [config.balloon.id or "__balloon"] if config.balloon else []
    ids += zones_of(config.memory)
    return {each: slot for slot, each in enumerate(ids, start=2)}


def ask(qemu: Qemu, spec: MachineSpec, commands: list[str]) -> tuple[list[dict], str]:
    """Start the machine of `spec`, give `commands`, end it; return the answers and what QEMU said besides."""
    version = (7, 2, 0) if qemu.is_old else (10, 0, 0)
    facts = QemuFacts(binary=qemu.command[0], version=version, qboot_path=qemu.qboot)
    with contextlib.ExitStack() as undo:
        resources = acquire(spec, undo)
        arguments = plan.arguments(spec, resources, facts)
        resources.lock_images()
        script = "".join(
            f'{{"execute":"{command}"}}\n' for command in ["qmp_capabilities", *commands, "quit"]
        )
        done = subprocess.run(
            [*qemu.command, *FIXED_ARGUMENTS, "-qmp", "stdio", *arguments],
            input=script,
            env={**os.environ, **qemu.environment},
            pass_fds=resources.inherited_fds,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    messages = [msgspec.json.decode(line) for line in done.stdout.splitlines()]
    assert not [message for message in messages if "error" in message]
    said = [line for line in done.stderr.splitlines() if MACHINE_IS_OLD not in line]
    return [message["return"] for message in messages if "return" in message], "\n".join(said)


def devices_on(bus: dict) -> dict[str, int]:
    """Return the slot of every device of ours on the flat bus."""
    found = {
        device_id(device["qdev_id"]): slot_of(device["slot"], device["function"])
        for device in bus["devices"]
        if device["qdev_id"]
    }
    return {each: slot for each, slot in found.items() if each is not None}


def expected_devices(config: VmConfig) -> set[str]:
    ids = {device.id or "" for device in devices_of(config)} | set(zones_of(config.memory))
    ids.add(config.rng.id or "__rng")
    if config.console.mode is not ConsoleOutputMode.OFF:
        ids.add(config.console.id or "__console")
    if config.balloon:
        ids.add(config.balloon.id or "__balloon")
    ids |= {"__watchdog"} if config.watchdog else set()
    ids |= {"__iommu"} if config.iommu else set()
    ids |= {config.ivshmem.id or "__ivshmem"} if config.ivshmem else set()
    return ids | ({"__pvpanic"} if config.pvpanic else set())


@pytest.mark.parametrize("golden", CASES, indirect=True)
def test_qemu_makes_every_device_on_its_slot_without_a_word(qemu, golden, stream):
    spec = spec_of(golden, stream)
    (_, (bus,), *_), said = ask(qemu, spec, ["query-pci"])
    assert said == ""
    assert devices_on(bus) == {each: spec.slots[each] for each in expected_devices(golden.config)}


@pytest.fixture(scope="module")
def sent() -> list[tuple[str, dict]]:
    return []


@pytest.fixture(scope="module")
def engine(qemu: Qemu, sent: list, tmp_path_factory: pytest.TempPathFactory) -> QemuEngine:
    program = tmp_path_factory.mktemp("qemu") / "qemu-system-x86_64"
    variables = "".join(f"export {name}={value}\n" for name, value in qemu.environment.items())
    program.write_text(f'#!/bin/sh\n{variables}exec {" ".join(qemu.command)} "$@"\n')
    program.chmod(0o755)
    # QEMU is not confined: one that was started without the network takes no device that is to use it.
    engine = QemuEngine(
        str(program),
        "tcg",
        has_sandbox=False,
        has_landlock=False,
        observe=lambda name, arguments: sent.append((name, arguments)),
    )
    look_apart(engine, program.parent / "cache")
    return engine


@pytest.fixture(scope="module")
def schema(engine: QemuEngine) -> QmpSchema:
    machine = engine.build(empty_spec(VmConfig()))
    try:
        return QmpSchema(machine._monitors.control.execute("query-qmp-schema"))
    finally:
        machine.close()


def empty_spec(config: VmConfig) -> MachineSpec:
    """A machine with nothing of its own but the entropy device; vCPUs and limiters of `config`; room."""
    bare = VmConfig(
        cpus=config.cpus,
        memory=MemoryConfig(size=512 << 20, hotplug_size=1 << 30),
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
        rate_limit_groups=config.rate_limit_groups,
    )
    off = ConsoleSink(kind=SinkKind.OFF)
    return MachineSpec(vm_config=bare, slots={"__rng": 31}, serial=off, console=off, debug_console=off)


def stated(name: str, arguments: dict) -> dict:
    """Return what of `arguments` the schema knows: it leaves a device's properties to the device."""
    common = ("driver", "bus", "id")
    return {key: arguments[key] for key in common} if name == "device_add" else arguments


@pytest.mark.parametrize("golden", HOT_CASES, indirect=True)
def test_qemu_takes_every_device_hot_on_its_slot(engine, schema, sent, golden):
    slots = default_slots(golden.config) if golden.slots is None else golden.slots
    devices = list(devices_of(golden.config))
    machine = engine.build(empty_spec(golden.config))
    try:
        sent.clear()
        for device in devices:
            machine._hotplug.plug(device, slots[device.id])
            for command in machine._hotplug.remains_of(device.id) or ():
                sent.append((command.name, command.arguments))
            sent.append(("device_del", {"id": qdev_id(device.id)}))
        assert [text for name, each in sent for text in schema.complaints(name, stated(name, each))] == []
        assert sent
        (bus,) = machine._monitors.reader.execute("query-pci")
        found = devices_on(bus)
        assert {device.id: found[device.id] for device in devices} == {
            device.id: slots[device.id] for device in devices
        }
    finally:
        machine.close()


@pytest.mark.parametrize("name", PASSED_THROUGH)
def test_qemu_knows_every_option_of_devices_that_the_host_must_have(engine, schema, name):
    lines = [line for line in (GOLDEN / f"{name}.qmp").read_text().splitlines() if line.startswith("device_")]
    devices = [msgspec.json.decode(line.removeprefix("device_add ")) for line in lines if "{" in line]
    if not devices:
        pytest.skip(f"{name} is refused")
    machine = engine.build(empty_spec(VmConfig()))
    try:
        for device in devices:
            assert schema.complaints("device_add", stated("device_add", device)) == []
            query = {"typename": device["driver"]}
            try:
                known = machine._monitors.control.execute("device-list-properties", query)
            except QmpError as error:
                # What QEMU answers to device_add as well.
                assert engine.info.version.startswith("7.2") and "vdpa" in name, error
                continue
            names = {each["name"] for each in known} | {"driver", "id", "bus", "addr"}
            newer = {"fd", "iommufd"} if engine.info.version.startswith("7.2") else set()
            assert set(device) <= names | newer
    finally:
        machine.close()


@pytest.fixture
def stream():
    """The engine's end of a console stream."""

    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs.fileno()
