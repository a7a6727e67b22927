"""Serial port, virtio console and debug console in every mode, from both of their ends."""

from __future__ import annotations

import base64
import os
import socket
import stat
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.guest.shell import GuestShell
from support.booted import READY_WORDS, Booted, booting, direct_boot, serving, vm_config
from support.deadline import BOOT_S, GUEST_S, HOST_S
from support.machine_code import boot_disk, port_writer
from support.wait import is_readable, wait_until

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
NEEDS_SEABIOS = pytest.mark.skipif(not SEABIOS.exists(), reason=f"needs {SEABIOS}, of the package seabios")

pytestmark = [pytest.mark.qemu]


def write_port(vm: Booted, port: int, text: str) -> None:
    """Have the guest write `text` to an I/O port, byte by byte."""
    program = base64.b64encode(port_writer(port)).decode()
    vm.run(f"echo {program} | base64 -d >/tmp/out && chmod +x /tmp/out && printf '{text}' | /tmp/out")


def wait_file(path: Path, words: str) -> str:
    wait_until(lambda: words in path.read_text(errors="replace"), f"{words!r} in {path}", timeout_s=GUEST_S)
    return path.read_text(errors="replace")


@pytest.fixture(scope="class")
def serial_pty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """Serial port on a PTY with the guest's shell, console to nowhere, debug console on its usual port."""
    folder = tmp_path_factory.mktemp("serial")
    config = vm_config(
        payload=direct_boot("cloudvmm.shell=ttyS0"),
        serial={"mode": "Pty"},
        console={"mode": "Null"},
        debug_console={"mode": "File", "file": str(folder / "debug.log")},
    )
    with booting(folder, config, shell="serial") as booted:
        yield booted


class TestSerialPty:
    def test_pty_is_a_terminal_in_raw_mode_that_info_names(self, serial_pty: Booted) -> None:
        path = serial_pty.config()["serial"]["file"]
        assert path.startswith("/dev/pts/")
        assert stat.S_ISCHR(os.stat(path).st_mode)
        assert not local_modes(path) & (termios.ICANON | termios.ECHO)

    def test_console_with_mode_null_is_a_device_of_the_guest(self, serial_pty: Booted) -> None:
        assert (
            serial_pty.run("cat /sys/class/virtio-ports/*/name 2>/dev/null; echo dropped >/dev/hvc0; echo $?")
            == "0"
        )
        assert "__console" in serial_pty.info()["device_tree"]

    def test_debug_console_keeps_what_the_guest_writes_to_its_port(self, serial_pty: Booted) -> None:
        write_port(serial_pty, 0xE9, "to port 0xe9")
        assert wait_file(serial_pty.folder / "debug.log", "0xe9") == "to port 0xe9"
        assert serial_pty.config()["debug_console"]["file"] == str(serial_pty.folder / "debug.log")

    def test_pty_can_be_left_and_entered_again(self, serial_pty: Booted) -> None:
        serial_pty.close_shell()
        serial_pty.open_shell("serial")
        assert serial_pty.run("echo $((6 * 7))") == "42"

    def test_pty_and_who_has_it_open_survive_a_reboot(self, serial_pty: Booted) -> None:
        path = serial_pty.config()["serial"]["file"]
        serial_pty.run("echo here >/tmp/before")
        serial_pty.vmm.put("vm.reboot")
        serial_pty.wait_ready()
        assert serial_pty.config()["serial"]["file"] == path
        assert serial_pty.run("ls /tmp/before 2>/dev/null || echo gone") == "gone"


@pytest.fixture(scope="class")
def console_pty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """No serial port, console on a PTY, debug console on another port."""
    folder = tmp_path_factory.mktemp("console")
    config = vm_config(
        serial={"mode": "Off"},
        console={"mode": "Pty"},
        debug_console={"mode": "File", "file": str(folder / "debug.log"), "iobase": 0x402},
    )
    with booting(folder, config) as booted:
        yield booted


class TestConsolePty:
    def test_serial_port_that_is_off_is_absent_in_the_guest(self, console_pty: Booted) -> None:
        assert console_pty.run("grep -c 16550 /proc/tty/driver/serial || true") == "0"
        assert "__serial" not in console_pty.info()["device_tree"]

    def test_debug_console_answers_on_its_port_alone(self, console_pty: Booted) -> None:
        write_port(console_pty, 0xE9, "to port 0xe9")
        write_port(console_pty, 0x402, "to port 0x402")
        assert wait_file(console_pty.folder / "debug.log", "0x402").endswith("to port 0x402")
        assert "0xe9" not in (console_pty.folder / "debug.log").read_text()

    def test_new_ptys_after_shutdown_and_boot_are_named_by_info(self, console_pty: Booted) -> None:
        console_pty.vmm.put("vm.shutdown")
        console_pty.vmm.put("vm.boot")
        console_pty.open_shell()
        console_pty.wait_ready()
        assert console_pty.run("tty </dev/hvc0") == "/dev/hvc0"


@pytest.fixture(scope="class")
def serial_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """Serial port on a socket with the guest's shell, console in a file."""
    folder = tmp_path_factory.mktemp("socket")
    (folder / "console.log").write_text("from an earlier life")
    payload = direct_boot("console=hvc0", "cloudvmm.shell=ttyS0")
    config = vm_config(
        payload=payload,
        serial={"mode": "Socket", "socket": str(folder / "serial.sock")},
        console={"mode": "File", "file": str(folder / "console.log")},
        debug_console={"mode": "Null"},
    )
    with booting(folder, config, shell=None) as booted:
        wait_file(folder / "console.log", READY_WORDS)
        yield booted


class TestSerialSocket:
    def connect(self, serial_socket: Booted) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(HOST_S)
        client.connect(str(serial_socket.folder / "serial.sock"))
        return client

    def test_console_file_is_truncated_and_holds_the_kernels_console(self, serial_socket: Booted) -> None:
        text = (serial_socket.folder / "console.log").read_text()
        assert "earlier life" not in text
        assert text.count(READY_WORDS) == 1

    def test_first_client_is_told_what_was_said_before_it_came(self, serial_socket: Booted) -> None:
        with self.connect(serial_socket) as client:
            heard = b""
            while READY_WORDS.encode() not in heard:
                heard += (piece := client.recv(65536))
                assert piece, heard
            shell = GuestShell(client)
            shell.wait_ready(BOOT_S)
            assert shell.run("echo over a socket", timeout_s=GUEST_S) == (0, b"over a socket\n")

    def test_new_client_replaces_the_old_one(self, serial_socket: Booted) -> None:
        with self.connect(serial_socket) as first, self.connect(serial_socket) as second:
            while first.recv(65536):
                pass
            shell = GuestShell(second)
            shell.wait_ready(BOOT_S)
            assert shell.run("echo $((6 * 7))", timeout_s=GUEST_S) == (0, b"42\n")

    def test_output_without_a_client_is_kept_for_the_next(self, serial_socket: Booted) -> None:
        with self.connect(serial_socket) as client:
            shell = GuestShell(client)
            shell.wait_ready(BOOT_S)
            shell.run("(sleep 1; echo said to nobody >/dev/ttyS0; echo done >/dev/hvc0) &", timeout_s=GUEST_S)
        wait_file(serial_socket.folder / "console.log", "done")
        with self.connect(serial_socket) as client:
            heard = b""
            while b"said to nobody" not in heard:
                heard += (piece := client.recv(65536))
                assert piece, heard

    def test_socket_goes_with_the_vm(self, serial_socket: Booted) -> None:
        assert (serial_socket.folder / "serial.sock").exists()
        serial_socket.vmm.put("vm.delete")
        assert not (serial_socket.folder / "serial.sock").exists()


def test_output_that_nobody_takes_does_not_hold_the_guest_up(tmp_path: Path) -> None:
    payload = direct_boot("cloudvmm.shell=ttyS0")
    config = vm_config(payload=payload, serial={"mode": "Pty"}, console={"mode": "Pty"})
    with booting(tmp_path, config, shell="serial") as vm:
        vm.run("dd if=/dev/zero bs=1M count=3 2>/dev/null | tr '\\0' x >/dev/hvc0")
        # By itself: QEMU drops what comes while a host that was busy has not taken what came before.
        vm.run("echo the last line >/dev/hvc0")
        fd = os.open(vm.config()["console"]["file"], os.O_RDONLY | os.O_NOCTTY)
        try:
            heard = b""
            while b"the last line" not in heard:
                assert is_readable(fd, timeout_s=HOST_S), f"After {len(heard)} bytes the PTY fell silent"
                heard += os.read(fd, 65536)
        finally:
            os.close(fd)
        assert (1 << 20) - 100 < len(heard) < (1 << 20) + (1 << 17)


def test_serial_socket_path_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with serving(tmp_path) as vm:
        config = vm_config(serial={"mode": "Socket", "socket": str(tmp_path / "taken")})
        chain = vm.vmm.put("vm.create", config, expect=500)
        assert chain[:2] == ["Error from API", "The VM could not be created"]
    assert (tmp_path / "taken").read_text() == "a file"


def test_console_on_a_socket_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as vm:
        config = vm_config(console={"mode": "Socket", "socket": str(tmp_path / "new")})
        chain = vm.vmm.put("vm.create", config, expect=500)
        assert chain[-1] == "No socket option support for console device"


@NEEDS_SEABIOS
def test_debug_console_on_a_pty_keeps_its_words_until_somebody_listens(tmp_path: Path) -> None:
    config = vm_config(
        payload={"firmware": str(SEABIOS)},
        disks=[{"path": str(boot_disk(tmp_path / "boot.raw")), "image_type": "Raw"}],
        console={"mode": "Off"},
        serial={"mode": "File", "file": str(tmp_path / "serial.log")},
        debug_console={"mode": "Pty"},
    )
    with booting(tmp_path / "vm", config, shell=None) as vm:
        wait_file(tmp_path / "serial.log", "hello")
        fd = os.open(vm.config()["debug_console"]["file"], os.O_RDONLY | os.O_NOCTTY)
        try:
            wait_until(lambda: b"hello" in os.read(fd, 4096), "the words on the PTY", timeout_s=GUEST_S)
        finally:
            os.close(fd)


def local_modes(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    try:
        return termios.tcgetattr(fd)[3]
    finally:
        os.close(fd)
