"""The QEMU engine alone, with a real guest: what the contract suite, which knows no engine, cannot ask.

Each QMP command that any of these tests sends is held against the schema of the QEMU that runs it.
"""

from __future__ import annotations

import base64
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.device import BalloonConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import (
    ConsoleSink,
    DeviceError,
    EngineError,
    Exited,
    GuestPanicked,
    ImageLocked,
    MachineSpec,
    PayloadError,
    ResetRequested,
    SinkKind,
    VcpuStarted,
)
from cloudvmm.engine.qemu import QemuEngine, keepsake
from cloudvmm.engine.qemu.machine import QemuMachine
from cloudvmm.engine.qemu.probe import choose_accelerator, judge_kvm, run_probe_guest
from cloudvmm.errors import error_chain
from cloudvmm.host.lock import lock_file
from support.deadline import BOOT_S, HOST_S
from support.guest import find_guest
from support.leak import Holdings
from support.process import descendants_of
from support.qmp_schema import QmpSchema
from support.wait import is_readable, wait_event

pytestmark = pytest.mark.qemu

CMDLINE = "console=ttyS0 panic=-1"
OFF = ConsoleSink(kind=SinkKind.OFF)
SLOTS = {"__console": 2, "_disk0": 3, "__rng": 4, "__pvpanic": 5, "__watchdog": 6, "__balloon": 7}
MORE_SLOTS = {"_disk1": 8, "_disk2": 9}


class Guest:
    """The shell service of the guest at the other end of its virtio console."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._heard = b""

    def wait_for(self, word: bytes, timeout_s: float = BOOT_S) -> bytes:
        """Return what came up to `word`."""
        deadline = time.monotonic() + timeout_s
        while word not in self._heard:
            rest_s = max(0.0, deadline - time.monotonic())
            assert is_readable(self._end.fileno(), timeout_s=rest_s), f"No {word!r} in {self._heard!r}"
            data = self._end.recv(65536)
            assert data, f"The console ended after {self._heard!r}"
            self._heard += data
        before, _, self._heard = self._heard.partition(word)
        return before

    def run(self, script: str) -> None:
        self._end.sendall(b"run 1 %s\n" % base64.b64encode(script.encode()))

    def speaks(self, *, timeout_s: float) -> bool:
        return is_readable(self._end.fileno(), timeout_s=timeout_s)

    def drain(self) -> None:
        """Forget what was said so far."""
        while self.speaks(timeout_s=0):
            self._end.recv(65536)
        self._heard = b""


@pytest.fixture(scope="module")
def sent() -> list[tuple[str, dict]]:
    return []


@pytest.fixture(scope="module")
def engine(sent) -> QemuEngine:
    return QemuEngine(accel="tcg", observe=lambda command, arguments: sent.append((command, arguments)))


@pytest.fixture(scope="module", autouse=True)
def every_command_keeps_to_the_schema(engine, sent) -> Iterator[None]:
    yield
    machine = engine.build(empty_spec())
    try:
        schema = QmpSchema(machine._monitors.control.execute("query-qmp-schema"))
    finally:
        machine.close()
    commands = dict(sent)
    assert [text for call in commands.items() for text in schema.complaints(*call)] == []
    assert "cont" in commands


def empty_spec(**members) -> MachineSpec:
    vm_config = VmConfig(
        memory=MemoryConfig(size=128 * MIB), console=ConsoleConfig(mode=ConsoleOutputMode.OFF), **members
    )
    null = ConsoleSink(kind=SinkKind.NULL)
    return MachineSpec(vm_config=vm_config, slots=SLOTS, serial=null, console=OFF, debug_console=OFF)


def guest_payload() -> PayloadConfig:
    guest = find_guest()
    return PayloadConfig(kernel=guest.kernel, initramfs=guest.initramfs, cmdline=CMDLINE)


@pytest.fixture
def build(engine, tmp_path) -> Iterator[Callable[..., tuple[QemuMachine, Guest]]]:
    """Build a machine with the default guest and changes to its configuration; all are closed."""
    machines: list[QemuMachine] = []
    ends: list[socket.socket] = []

    def make(state_dir: str | None = None, **members) -> tuple[QemuMachine, Guest]:
        ours, theirs = socket.socketpair()
        ends.extend((ours, theirs))
        image = tmp_path / "disk.raw"
        image.write_bytes(bytes(MIB))
        members = {
            "memory": MemoryConfig(size=256 * MIB),
            "payload": guest_payload(),
            "disks": [DiskConfig(id="_disk0", path=str(image), image_type=ImageType.RAW)],
            **members,
        }
        spec = MachineSpec(
            vm_config=VmConfig(**members),
            slots=SLOTS | MORE_SLOTS,
            serial=ConsoleSink(kind=SinkKind.FILE, path=make_file(tmp_path / "serial")),
            console=ConsoleSink(kind=SinkKind.STREAM, stream_fd=theirs.fileno()),
            debug_console=OFF,
            state_dir=state_dir,
        )
        machines.append(engine.build(spec))
        return machines[-1], Guest(ours)

    yield make
    for machine in machines:
        machine.close()
    for end in ends:
        end.close()


def make_file(path) -> str:
    path.touch()
    return str(path)


def test_nmi_is_seen_in_the_guest(build):
    machine, guest = build()
    machine.boot()
    guest.wait_for(b"@cvm ready")
    machine.nmi()
    guest.run("until grep -q 'NMI: *[1-9]' /proc/interrupts; do :; done; grep NMI: /proc/interrupts")
    heard = base64.b64decode(guest.wait_for(b"@cvm end").split()[-1])

    assert int(heard.split()[1]) == 1


def test_panic_is_told_and_the_reset_after_it(build):
    machine, guest = build(pvpanic=True)
    machine.boot()
    guest.wait_for(b"@cvm ready")
    guest.run("echo c >/proc/sysrq-trigger")
    events = wait_event(machine, ResetRequested, timeout_s=HOST_S)

    assert events[-1] == ResetRequested(by_watchdog=False)
    assert GuestPanicked("panic") in events


def test_requests_of_every_disk_are_measured_from_the_boot_on_and_nobody_waits_for_that(
    build, sent, tmp_path
):
    disks = []
    for number in range(3):
        image = tmp_path / f"{number}.raw"
        image.write_bytes(bytes(MIB))
        disks.append(DiskConfig(id=f"_disk{number}", path=str(image), image_type=ImageType.RAW))
    machine, _ = build(disks=disks)
    before = len(sent)
    machine.boot()
    machine.pause()
    machine.resume()  # and this does not begin anew
    names = [name for name, _ in sent[before:] if not name.startswith(("query", "x-query"))]
    stats = [each["stats"] for each in machine._monitors.control.execute("query-blockstats")]

    assert names == ["cont", *["block-latency-histogram-set"] * 3, "stop", "cont"]
    assert len(stats) == 3
    assert all(each[f"{kind}_latency_histogram"]["boundaries"] for each in stats for kind in ("rd", "wr"))


def test_pause_stands_still_and_resume_goes_on(build):
    machine, guest = build()
    machine.boot()
    guest.wait_for(b"@cvm ready")
    guest.run("while :; do echo tick >/dev/hvc0; done")
    guest.wait_for(b"tick")
    machine.pause()
    guest.drain()

    assert not guest.speaks(timeout_s=0.3)
    machine.resume()
    guest.wait_for(b"tick")


def test_kernel_that_qemu_cannot_load_is_refused_by_boot_with_its_words(build, tmp_path):
    fake = tmp_path / "bzImage"
    # A boot protocol of before 2.00, and shorter than it says it is.
    fake.write_bytes(bytes(0x1F1) + b"\x04" + bytes(0x10) + b"HdrS\x06\x01" + bytes(100))
    machine, _ = build(payload=PayloadConfig(kernel=str(fake)))

    with pytest.raises(PayloadError):
        machine.boot()
    assert machine.counters()["_disk0"]["read_ops"] == 0


@pytest.fixture
def dirty_image(tmp_path):
    """A qcow2 that whoever opens it for writing repairs at once."""
    path = tmp_path / "dirty.qcow2"
    options = "lazy_refcounts=on,compat=1.1"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), "1M"]
    subprocess.run(command, check=True, timeout=HOST_S)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\x01")  # the dirty bit among the incompatible features
    return path


def test_image_that_somebody_else_holds_is_not_touched_and_refused_by_boot(build, dirty_image, tmp_path):
    before = dirty_image.read_bytes()
    free = DiskConfig(id="_disk0", path=str(tmp_path / "disk.raw"), image_type=ImageType.RAW)
    held = DiskConfig(id="__balloon", path=str(dirty_image), image_type=ImageType.QCOW2)
    with dirty_image.open("r+b") as holder:
        lock_file(holder.fileno(), path=str(dirty_image), write=True)
        machine, _ = build(disks=[free, held])
        with pytest.raises(ImageLocked) as caught:
            machine.boot()
        assert machine.image_types == {"_disk0": ImageType.RAW, "__balloon": ImageType.QCOW2}
        machine.close()

    assert str(dirty_image) in str(caught.value.__cause__)
    assert dirty_image.read_bytes() == before
    build(disks=[held])
    assert dirty_image.read_bytes() != before  # what must not happen above does happen to a free image


@contextlib.contextmanager
def only_more_descriptors(count: int) -> Iterator[None]:
    free = [os.dup(0) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", range(1, 14))
def test_want_of_descriptors_is_an_engine_error_and_leaves_nothing(engine, tmp_path, count):
    engine.build(empty_spec()).close()
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MIB))
    spec = empty_spec(disks=[DiskConfig(id="_disk0", path=str(image), image_type=ImageType.RAW)])
    before = Holdings()
    with only_more_descriptors(count), contextlib.suppress(EngineError):
        engine.build(spec).close()
    before.assert_nothing_added()


def test_missing_kernel_leaves_a_whole_machine(build):
    machine, _ = build(payload=PayloadConfig(kernel="/nowhere/vmlinux"))

    with pytest.raises(PayloadError, match="^Cannot open kernel file$") as caught:
        machine.boot()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "_disk0" in machine.counters()


def test_refusal_by_qemu_is_in_its_own_words(engine, tmp_path):
    image = tmp_path / "broken.qcow2"
    image.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(1000))
    before = Holdings()
    spec = empty_spec(disks=[DiskConfig(id="_disk0", path=str(image), image_type=ImageType.QCOW2)])

    with pytest.raises(EngineError) as caught:
        engine.build(spec)
    assert isinstance(caught.value, DeviceError)
    assert "qemu-system" not in str(caught.value)
    before.assert_nothing_added()


def test_state_folder_holds_pid_and_argv_until_close(build, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    machine, _ = build(state_dir=str(folder))

    assert (folder / "pid").read_text().split()[0] == str(machine.process_id)
    assert "-machine" in (folder / "argv").read_text().splitlines()
    machine.close()
    assert os.listdir(folder) == []


def test_next_manager_knows_whose_requests_are_not_measured_yet(build, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    machine, _ = build(state_dir=str(folder))
    before = keepsake.read(str(folder))
    machine.boot()
    after = keepsake.read(str(folder))

    assert (before.unmeasured, after.unmeasured) == (["_disk0"], [])


def test_balloon_and_watchdog_and_panic_device_together(build):
    machine, guest = build(
        balloon=BalloonConfig(id="__balloon", size=0),
        pvpanic=True,
        watchdog=True,
    )
    machine.boot()
    guest.wait_for(b"@cvm ready")

    assert {"__balloon", "__pvpanic", "__watchdog", "_disk0"} <= set(machine.pci_resources())


MANAGER = """
import sys, time
import msgspec
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, MachineSpec, SinkKind
from cloudvmm.engine.qemu import QemuEngine
null = ConsoleSink(kind=SinkKind.NULL)
vm_config = VmConfig(
    memory=MemoryConfig(size=128 << 20),
    payload=msgspec.json.decode(sys.argv[1], type=PayloadConfig),
    console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
)
off = ConsoleSink(kind=SinkKind.OFF)
spec = MachineSpec(vm_config=vm_config, slots={"__rng": 2}, serial=null, console=off, debug_console=off)
machine = QemuEngine(accel="tcg").build(spec)
machine.boot()
print(machine.process_id, flush=True)
time.sleep(300)
"""


def test_killed_manager_takes_its_guest_along():
    argument = msgspec.json.encode(guest_payload()).decode()
    with subprocess.Popen([sys.executable, "-c", MANAGER, argument], stdout=subprocess.PIPE) as manager:
        assert manager.stdout is not None
        qemu_pid = int(manager.stdout.readline())
        pidfd = os.pidfd_open(qemu_pid)
        manager.kill()
        gone = is_readable(pidfd, timeout_s=HOST_S)
        os.close(pidfd)

    assert gone


def test_death_of_qemu_is_told_with_its_signal(build):
    machine, _ = build()
    machine.boot()
    assert machine.process_id is not None
    os.kill(machine.process_id, signal.SIGKILL)

    events = wait_event(machine, Exited, timeout_s=HOST_S)
    told = [event for event in events if not isinstance(event, VcpuStarted)]
    assert told == [Exited("QEMU was killed by signal 9 (SIGKILL)")]


def test_probe_guest_runs_to_its_end_under_emulation(engine):
    verdict = run_probe_guest(engine.facts(), "tcg", "qemu64")

    assert (verdict.usable, verdict.reason) == (True, "A probe guest ran to its end")


def test_probe_guest_that_hangs_is_given_up(engine):
    verdict = run_probe_guest(engine.facts(), "tcg", "qemu64", run_timeout_s=0.000001)

    assert not verdict.usable
    assert "did not end within" in verdict.reason


@pytest.mark.parametrize(
    ("device", "words"), [("/nowhere/kvm", "There is no /nowhere/kvm"), ("/dev/null", "/dev/null")]
)
def test_device_that_is_no_kvm_means_emulation_and_says_why(engine, device, words, monkeypatch, tmp_path):
    monkeypatch.setenv("CLOUDVMM_CACHE", str(tmp_path))
    accelerator, reason = choose_accelerator("auto", engine.facts(), kvm_device=device)

    assert accelerator == "tcg"
    assert words in reason
    with pytest.raises(EngineError, match="KVM was asked for but cannot be used"):
        choose_accelerator("kvm", engine.facts(), kvm_device=device)


def test_verdict_on_kvm_agrees_with_a_stock_guest(engine, monkeypatch, tmp_path):
    """Whatever /dev/kvm is on this machine: the probe says usable exactly where Linux boots on it."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("There is no /dev/kvm that may be opened")
    guest = find_guest()
    monkeypatch.setenv("CLOUDVMM_CACHE", str(tmp_path))
    argv = [
        engine.facts().binary,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-machine", "pc", "-m", "256M", "-accel", "kvm", "-cpu", "host"),
        *("-kernel", guest.kernel, "-initrd", guest.initramfs, "-append", CMDLINE),
    ]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as qemu:
        assert qemu.stdout is not None
        booted = hears(qemu.stdout.fileno(), b"cloudvmm-guest ready", timeout_s=15.0)
        qemu.kill()

    assert judge_kvm(engine.facts()).usable == booted


def hears(fd: int, word: bytes, *, timeout_s: float) -> bool:
    heard = b""
    deadline = time.monotonic() + timeout_s
    while word not in heard:
        if not is_readable(fd, timeout_s=max(0.0, deadline - time.monotonic())):
            return False
        data = os.read(fd, 65536)
        if not data:
            return False
        heard += data
    return True


def test_whatever_a_build_asks_a_qemu_that_is_killed_the_error_says_so(build, engine, monkeypatch):
    asked: list[str] = []

    def strike(command: str, arguments: dict) -> None:
        asked.append(command)
        if len(asked) == struck:
            for process in descendants_of(os.getpid()):
                process.kill()

    monkeypatch.setattr(engine, "_observe", strike)
    struck = 0
    build()[0].close()
    count = len(asked)
    while struck < count:
        struck += 1
        asked.clear()
        with pytest.raises(EngineError) as caught:
            build()
        assert "killed by signal 9" in error_chain(caught.value)[-1], asked
