"""The outer machine: a PC that QEMU emulates, AMD's virtualisation included, for a KVM that works anywhere.

It boots the default guest's kernel from the image of `image.py`, which nobody writes to, with the project
in /project. Commands go over the default guest's own shell service. The process dies with its parent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from cloudvmm.guest import FAST_CMDLINE, Guest, GuestError
from cloudvmm.guest.shell import GuestShell
from lane.image import GUEST, PROJECT, VENV

_COMMAND_LINE = f"{FAST_CMDLINE} root=/dev/vda ro cloudvmm.shell=hvc0"
# With erms and fsrm the kernel clears and copies memory by `rep stosb` and `rep movsb`, which TCG carries out
# byte by byte, and slowly where the memory has held code: all that a guest leaves behind when it ends.
_CPU = "max,erms=off,fsrm=off"
# hvc1 takes what scripts print while they print it: the shell service tells only at the end.
_LIVE = "/dev/hvc1"
_SET_UP = f"""
mount -t tmpfs -o size=256m project {PROJECT} && tar -x -f /dev/vdb -C {PROJECT} || exit
! test -d {PROJECT}/lib/modules || mount -o bind {PROJECT}/lib/modules /lib/modules || exit
modprobe -a kvm_amd tun || exit
test -c /dev/kvm || {{ dmesg | grep -i -e kvm -e svm; exit 1; }}
mkdir -p /tmp/home /dev/shm && mount -t tmpfs shm /dev/shm
stty raw -echo < {_LIVE}
"""
_ENVIRONMENT = f"""
export PATH={VENV}/bin:/usr/bin:/usr/sbin:/bin:/sbin HOME=/tmp/home CLOUDVMM_CACHE=/tmp/cache
export CLOUDVMM_TEST_GUEST={GUEST}/guest.json CLOUDVMM_TEST_ACCEL=kvm
cd {PROJECT}
"""
# Who started us may be gone before the death signal was asked for.
_PARENT_CHECK = '[ "$PPID" = "$0" ] && exec "$@"'
_TAIL_BYTES = 6000


class LaneError(Exception):
    """The outer machine did not do what it must; the text ends with its last words."""


class Hardware(msgspec.Struct, frozen=True):
    """What one lane's machine has beyond every lane's: options of QEMU, and words for the kernel."""

    options: tuple[str, ...] = ("-machine", "pc,vmport=off")
    words: str = "pci=lastbus=0"


class LaneMachine:
    """Owns the process. `folder` takes its logs and must outlive it. Leaving the context ends the machine.

    `guest` is what the machine boots. Where `project` brings modules for its kernel, those are used.
    """

    def __init__(
        self,
        image: Path,
        guest: Guest,
        project: bytes,
        folder: Path,
        *,
        hardware: Hardware = Hardware(),  # noqa: B008 - frozen
    ) -> None:
        self._hardware = hardware
        self._serial_log = folder / "serial.log"
        self._live_log = folder / "live.log"
        self._qemu_log = folder / "qemu.log"
        archive = folder / "project.tar"
        archive.write_bytes(project + bytes(-len(project) % 512))
        self._socket, theirs = socket.socketpair()
        mortal = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", _PARENT_CHECK, str(os.getpid())]
        argv = [*mortal, *self._arguments(image, guest, archive, theirs.fileno())]
        with theirs, self._qemu_log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()]
            )
        self._shell = GuestShell(self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def wait_ready(self, *, timeout_s: float) -> None:
        """Blocking until the machine has booted and has a /dev/kvm.

        :raises LaneError: it has not.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._shell.wait_ready(timeout_s)
            status, output = self._shell.run(_SET_UP, timeout_s=max(1.0, deadline - time.monotonic()))
        except GuestError as error:
            raise LaneError(f"The outer machine did not boot: {error!r}\n{self.last_words()}") from error
        if status != 0:
            raise LaneError(f"The outer machine has no KVM:\n{output.decode()}\n{self.last_words()}")

    def run(self, script: str, *, timeout_s: float) -> tuple[int, str]:
        """Run the sh `script` in /project; return its status and what it printed. Blocking.

        :raises LaneError: it did not end in time, or the machine did.
        """
        piped = f"{_ENVIRONMENT}set -o pipefail\n{{\n{script}\n}} 2>&1 | tee {_LIVE}\n"
        try:
            status, output = self._shell.run(piped, timeout_s=timeout_s)
        except GuestError as error:
            raise LaneError(f"No answer within {timeout_s:g} s: {error!r}\n{self.last_words()}") from error
        return status, output.decode(errors="replace")

    def last_words(self) -> str:
        """Return the ends of everything that was logged."""
        logs = {"console": self._serial_log, "scripts": self._live_log, "QEMU": self._qemu_log}
        return "\n".join(f"--- last words of its {name}:\n{_tail(path)}" for name, path in logs.items())

    def power_off(self, *, timeout_s: float) -> None:
        """Blocking until the machine has ended by itself.

        :raises LaneError: it has not; it still runs.
        """
        with contextlib.suppress(GuestError):
            self._shell.run("poweroff", timeout_s=timeout_s)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LaneError(f"It did not power off within {timeout_s:g} s\n{self.last_words()}") from error
        if status != 0:
            raise LaneError(f"QEMU ended with status {status}\n{self.last_words()}")

    def close(self) -> None:
        """End it at once if it still runs. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _arguments(self, image: Path, guest: Guest, archive: Path, channel_fd: int) -> list[str]:
        binary = shutil.which("qemu-system-x86_64")
        if binary is None:
            raise LaneError("The program qemu-system-x86_64 is not installed")
        disks = [f"if=virtio,format=raw,readonly=on,file={path}" for path in (image, archive)]
        return [
            binary,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *self._hardware.options,
            *("-m", "3G", "-smp", "2"),
            *("-accel", "tcg,thread=multi", "-cpu", _CPU),
            *("-bios", "qboot.rom", "-kernel", guest.kernel, "-initrd", guest.initramfs),
            *("-append", f"{_COMMAND_LINE} {self._hardware.words}"),
            *("-serial", f"file:{self._serial_log}"),
            *("-drive", disks[0], "-drive", disks[1]),
            *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
            *("-chardev", f"socket,id=shell,fd={channel_fd}", "-device", "virtconsole,chardev=shell"),
            *("-chardev", f"file,id=live,path={self._live_log}", "-device", "virtconsole,chardev=live"),
        ]


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return "(nothing)"
