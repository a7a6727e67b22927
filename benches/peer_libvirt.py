"""libvirt with QEMU, beside which we are measured: its daemon in session mode, and virsh, which stays open.

Everything that libvirt keeps lies in a folder of the benchmark's; the machine's own libvirt, if it has one,
is not touched. A session is what a user without rights has, so root becomes one for it: libvirt then does
without the cgroups, namespaces and labels that it gives the domains of a whole system, which is in its
favour. The guest and the accelerator are ours; all else is what libvirt chooses.

    python benches/peer_libvirt.py          say what is missing, and end with status 1, if anything is
"""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from cloudvmm.guest import locate

PACKAGES = "libvirt-daemon libvirt-clients"
NAME = "bench"
USER = "nobody"
DISK_TARGET = "vda"
_ADMIN_PATH = "/usr/sbin:/sbin"
_DAEMONS = ("virtqemud", "libvirtd")
_END = "===cloudvmm-bench-end==="
_TIMEOUT_S = 120.0
_POLL_EVERY_S = 0.002


class LibvirtFailed(Exception):
    """libvirt did not do what it was asked for; the text is its own."""


def missing() -> str | None:
    """Say what is missing for libvirt to be measured; None where nothing is."""
    if shutil.which("virsh") is None or _daemon() is None:
        return f"there is no libvirt (Debian's packages {PACKAGES})"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "there is no setpriv, and root must become another user for a session"
    return None


class Libvirt:
    """A running session. `folder` belongs to the user that it runs as; `kernel`, `initramfs` lie in it."""

    def __init__(self, folder: str, virsh: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.serial = Path(folder, "serial")
        self._virsh = virsh
        guest = locate()
        self.kernel = self._copy(guest.kernel)
        self.initramfs = self._copy(guest.initramfs)

    def ask(self, command: str) -> str:
        """Have virsh carry `command` out; return what it prints.

        :raises LibvirtFailed: it says that this failed, or says nothing for long.
        """
        assert self._virsh.stdin is not None and self._virsh.stdout is not None
        self._virsh.stdin.write(f"{command}\necho {_END}\n".encode())
        self._virsh.stdin.flush()
        heard, deadline = b"", time.monotonic() + _TIMEOUT_S
        while f"\n{_END}".encode() not in heard:
            ready, _, _ = select.select([self._virsh.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._virsh.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise LibvirtFailed(f"No answer to {command}: {heard!r}")
            heard += piece
        lines = [line.removeprefix("virsh # ") for line in heard.decode(errors="replace").splitlines()]
        said = "\n".join(line for line in lines if line not in (command, f"echo {_END}", _END, ""))
        if "error: " in said:
            raise LibvirtFailed(f"{command}: {said}")
        return said

    def domain(self, *, ram_bytes: int, cmdline: str, has_console: bool = False) -> str:
        """Write a domain that is our guest, all else libvirt's defaults; return its file.

        Its serial port writes to `serial`; with `has_console` there is a PTY, see `console`.
        """
        console = "<console type='pty'><target type='virtio' port='0'/></console>" * has_console
        return self.write(
            "domain.xml",
            f"""<domain type='qemu'>
  <name>{NAME}</name>
  <memory unit='b'>{ram_bytes}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64'>hvm</type>
    <kernel>{escape(self.kernel)}</kernel>
    <initrd>{escape(self.initramfs)}</initrd>
    <cmdline>{escape(cmdline)}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>{escape(shutil.which("qemu-system-x86_64") or "")}</emulator>
    <serial type='file'><source path='{escape(str(self.serial))}'/><target port='0'/></serial>
    {console}
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
""",
        )

    def disk(self, size_bytes: int) -> str:
        """Make a raw image, and a file that describes it as a disk; return the file."""
        image = self.write("image", "")
        os.truncate(image, size_bytes)
        return self.write(
            "disk.xml",
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
            f"<source file='{escape(image)}'/><target dev='{DISK_TARGET}' bus='virtio'/></disk>\n",
        )

    def create(self, domain: str) -> None:
        """Start the guest of the file `domain`."""
        self.serial.unlink(missing_ok=True)
        self.ask(f"create {domain}")

    def console(self) -> str:
        """Return the path of the PTY that is the running guest's console."""
        for line in self.ask(f"dumpxml {NAME}").splitlines():
            if "<console" in line and "tty='" in line:
                return line.partition("tty='")[2].partition("'")[0]
        raise LibvirtFailed("The guest has no console")

    def destroy(self) -> None:
        self.ask(f"destroy {NAME}")

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.folder, name)
        Path(path).write_text(text)
        _give_away(path)
        return path

    def _copy(self, path: str) -> str:
        copied = os.path.join(self.folder, os.path.basename(path))
        shutil.copyfile(path, copied)
        _give_away(copied)
        return copied


@contextlib.contextmanager
def libvirt() -> Iterator[Libvirt | None]:
    """Run a session until the end; give None where there is no libvirt."""
    daemon = _daemon()
    if missing() is not None or daemon is None:
        yield None
        return
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="cloudvmm-libvirt-"))
        for name in ("home", "run"):
            os.mkdir(os.path.join(folder, name), 0o700)
            _give_away(os.path.join(folder, name))
        _give_away(folder)
        with open(os.path.join(folder, "daemon.log"), "wb") as log:
            process = subprocess.Popen(
                [*_as_user(), daemon],
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        undo.callback(_end, process)
        _await_socket(folder, process)
        virsh = subprocess.Popen(
            [*_as_user(), "virsh", "-c", "qemu:///session"],
            env=_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        undo.callback(_end, virsh)
        session = Libvirt(folder, virsh)
        undo.callback(_destroy_all, session)
        session.ask("capabilities")  # it looks at QEMU once, for seconds, and remembers
        yield session


def _destroy_all(session: Libvirt) -> None:
    """A domain outlives the daemon."""
    with contextlib.suppress(LibvirtFailed, OSError):
        for name in session.ask("list --name").split():
            session.ask(f"destroy {name}")


def _await_socket(folder: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    sockets = [Path(folder, "run", "libvirt", f"{name}-sock") for name in ("virtqemud", "libvirt")]
    while not any(socket.exists() for socket in sockets):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"libvirt does not start: {Path(folder, 'daemon.log').read_text()}")
        time.sleep(_POLL_EVERY_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _daemon() -> str | None:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), _ADMIN_PATH))
    return next((found for name in _DAEMONS if (found := shutil.which(name, path=path))), None)


def _as_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(USER)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]


def _give_away(path: str) -> None:
    if os.geteuid() == 0:
        user = pwd.getpwnam(USER)
        os.chown(path, user.pw_uid, user.pw_gid)


def _environment(folder: str) -> dict[str, str]:
    home, run = os.path.join(folder, "home"), os.path.join(folder, "run")
    return {
        "PATH": os.pathsep.join((os.environ.get("PATH", os.defpath), _ADMIN_PATH)),
        "LC_ALL": "C",
        "HOME": home,
        "XDG_CONFIG_HOME": os.path.join(home, "config"),
        "XDG_CACHE_HOME": os.path.join(home, "cache"),
        "XDG_RUNTIME_DIR": run,
    }


if __name__ == "__main__":
    sys.exit(missing())
