"""The default guest under a bare QEMU: it boots, obeys, and ends when its power button is pressed."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time

import pytest

from cloudvmm.guest import FAST_CMDLINE, build
from cloudvmm.guest.shell import GuestShell, ready_uptime_s
from support.deadline import BOOT_S, GUEST_S, HOST_S

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs qemu-system-x86_64"),
]


# QEMU drops what a virtio console says while its socket is full, and a busy host may read late.
SO_SNDBUFFORCE = 32
ROOM_BYTES = 16 << 20


class BareVm:
    """A QEMU of its own, without any of cloudvmm but the guest: its lines are sockets to us."""

    def __init__(self, guest, *, cmdline=FAST_CMDLINE, extra=()):
        lines = {name: socket.socketpair() for name in ("serial", "hvc", "qmp")}
        with contextlib.suppress(PermissionError):  # for root alone
            lines["hvc"][1].setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, ROOM_BYTES)
        fds = {name: theirs.fileno() for name, (_, theirs) in lines.items()}
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-M", "pc-i440fx-7.2,smm=off,vmport=off", "-accel", "tcg,thread=multi", "-cpu", "qemu64"),
            *("-m", "256M,maxmem=1G,slots=2", "-smp", "1,maxcpus=2,sockets=2", "-no-reboot"),
            *("-bios", "qboot.rom", "-kernel", guest.kernel, "-initrd", guest.initramfs, "-append", cmdline),
            *("-chardev", f"socket,id=serial,fd={fds['serial']}", "-serial", "chardev:serial"),
            *("-chardev", f"socket,id=hvc,fd={fds['hvc']}", "-device", "virtio-serial-pci"),
            *("-device", "virtconsole,chardev=hvc"),
            *("-chardev", f"socket,id=qmp,fd={fds['qmp']}", "-mon", "chardev=qmp,mode=control"),
            *extra,
        ]
        self.process = subprocess.Popen(argv, pass_fds=list(fds.values()))
        for _, theirs in lines.values():
            theirs.close()
        self.serial, self.hvc, self.qmp = (ours for ours, _ in lines.values())
        self._replies = self.qmp.makefile("rb")
        self.qmp.settimeout(BOOT_S)
        self._replies.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        self.qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (reply := json.loads(self._replies.readline())):
            pass
        assert "return" in reply, reply
        return reply["return"]

    def read_serial(self, marker):
        """Return what the serial line carried up to and with the line that holds `marker`."""
        self.serial.setblocking(True)
        self.serial.settimeout(BOOT_S)
        text = b""
        while marker not in text or not text.endswith(b"\n"):
            data = self.serial.recv(65536)
            assert data, text
            text += data
        return text

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(HOST_S)
        for line in (self.serial, self.hvc, self._replies, self.qmp):
            line.close()


@pytest.fixture(scope="module")
def guest():
    return build()


@pytest.fixture
def boot(guest):
    machines = []

    def start(**options):
        machines.append(BareVm(guest, **options))
        return machines[-1]

    yield start
    for machine in machines:
        machine.close()


def disk_of(guest):
    """The guest's disk as /dev/vda, writes going to a throw-away overlay."""
    drive = f"file={guest.disk},format=raw,if=none,id=root,snapshot=on"
    return ["-drive", drive, "-device", "virtio-blk-pci,drive=root"]


def wait_until(shell, script, *, deadline_s=GUEST_S):
    """Run `script` in the guest until it succeeds; return what it printed."""
    end = time.monotonic() + deadline_s
    while (answer := shell.run(script, timeout_s=deadline_s))[0] != 0:
        assert time.monotonic() < end, answer
    return answer[1]


def test_initramfs_guest_runs_commands_and_obeys_its_power_button(boot):
    vm = boot()
    console = vm.read_serial(b"cloudvmm-guest ready")
    assert console.count(b"cloudvmm-guest ready") == 1
    assert ready_uptime_s(console) > 0
    shell = GuestShell(vm.hvc)
    shell.wait_ready(BOOT_S)

    assert shell.run("echo out; echo err >&2; exit 7", timeout_s=GUEST_S) == (7, b"out\nerr\n")
    assert shell.run("sleep 1000 & echo on", timeout_s=GUEST_S) == (0, b"on\n")
    assert shell.run("cat /sys/class/net/lo/flags", timeout_s=GUEST_S) == (0, b"0x9\n")

    vm.execute("system_powerdown")
    assert vm.process.wait(HOST_S) == 0
    assert b"reboot: Power down" in vm.serial.recv(65536)


def test_large_output_and_script_come_through_unharmed(boot):
    vm = boot()
    shell = GuestShell(vm.hvc)
    shell.wait_ready(BOOT_S)
    text = os.urandom(20_000).hex()

    status, output = shell.run(f"echo {text}", timeout_s=GUEST_S)
    assert (status, output.decode().strip() == text) == (0, True)

    status, output = shell.run("dd if=/dev/zero bs=1k count=1024 2>/dev/null | tr '\\0' x", timeout_s=GUEST_S)
    assert (status, output == b"x" * (1 << 20)) == (0, True)


def test_disk_guest_has_its_root_on_the_first_partition(boot, guest):
    vm = boot(cmdline=f"{FAST_CMDLINE} root=/dev/vda1", extra=disk_of(guest))
    shell = GuestShell(vm.hvc)
    shell.wait_ready(BOOT_S)

    script = (
        "grep ' / ' /proc/mounts | cut -d' ' -f1-3; stat -c '%u:%g %a' /bin/busybox; touch /kept && echo w"
    )
    assert shell.run(script, timeout_s=GUEST_S) == (0, b"/dev/vda1 / ext4\n0:0 755\nw\n")

    vm.execute("system_powerdown")
    assert vm.process.wait(HOST_S) == 0


def test_missing_root_device_is_said_and_leaves_a_usable_guest(boot):
    vm = boot(cmdline=f"{FAST_CMDLINE} root=/dev/vdx1")

    console = vm.read_serial(b"cloudvmm-guest ready")

    assert b"root device /dev/vdx1 cannot be used" in console
    shell = GuestShell(vm.hvc)
    shell.wait_ready(BOOT_S)
    assert shell.run("true", timeout_s=GUEST_S) == (0, b"")


def test_service_on_the_serial_console_withstands_the_consoles_lines(boot):
    vm = boot(cmdline=f"{FAST_CMDLINE} cloudvmm.shell=ttyS0")
    lines = []
    shell = GuestShell(vm.serial, on_line=lines.append)
    shell.wait_ready(BOOT_S)

    script = "echo a note >/dev/console; echo '<0>from the kernel' >/dev/kmsg; echo answer"
    assert shell.run(script, timeout_s=GUEST_S) == (0, b"answer\n")
    assert b"a note" in lines
    assert any(b"from the kernel" in line for line in lines)


def test_interactive_shell_answers_on_the_serial_console(boot):
    vm = boot(cmdline=f"{FAST_CMDLINE} cloudvmm.shell=interactive")
    vm.read_serial(b"busybox shell")

    vm.serial.sendall(b"echo $((6 * 7)) $(tty); poweroff\n")

    assert b"42 /dev/ttyS0\r\n" in vm.read_serial(b"42 /dev/ttyS0")
    assert vm.process.wait(HOST_S) == 0


def test_plugged_in_cpu_memory_and_network_card_come_to_life(boot):
    vm = boot()
    shell = GuestShell(vm.hvc)
    shell.wait_ready(BOOT_S)
    before_kib = int(shell.run("awk '/MemTotal/ {print $2}' /proc/meminfo", timeout_s=GUEST_S)[1])

    cpu = {"socket-id": 1, "core-id": 0, "thread-id": 0, "die-id": 0}
    vm.execute("device_add", driver="qemu64-x86_64-cpu", id="cpu1", **cpu)
    vm.execute("object-add", **{"qom-type": "memory-backend-ram", "id": "ram1", "size": 128 << 20})
    vm.execute("device_add", driver="pc-dimm", id="dimm1", memdev="ram1")
    vm.execute("device_add", driver="virtio-net-pci", id="net1")

    assert wait_until(shell, "[ $(nproc) = 2 ] && nproc") == b"2\n"
    assert wait_until(shell, "[ -d /sys/class/net/eth0 ] && echo eth0") == b"eth0\n"
    larger = (
        f"[ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -ge {before_kib + 100 * 1024} ] && echo larger"
    )
    assert wait_until(shell, larger) == b"larger\n"


def test_modules_for_tests_are_there_but_not_loaded(boot):
    vm = boot()
    shell = GuestShell(vm.hvc)
    shell.wait_ready(BOOT_S)

    assert shell.run("grep -c ^kvm /proc/modules", timeout_s=GUEST_S) == (1, b"0\n")
    names = "irqbypass kvm vfat overlay tun"
    script = f"modprobe -a {names} && for name in {names}; do ls -d /sys/module/$name; done | wc -l"
    assert shell.run(script, timeout_s=GUEST_S) == (0, b"5\n")
