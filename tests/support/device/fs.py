"""File systems, for the matrix of devices: a virtiofsd at a socket, and one that is started for a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.booted import Booted
from support.device.case import GUEST_S, DeviceCase, pci_folder
from support.old_qemu import OLD_QEMU

FOLDERS = ("/usr/libexec", "/usr/lib/qemu")
SHARED_MEMORY = {"memory": {"size": 256 << 20, "shared": True}}


def virtiofsd_program() -> str:
    """Return the path of a virtiofsd: on the PATH, where Debian has it, or beside the oldest QEMU."""
    old = os.environ.get(OLD_QEMU)
    path = os.pathsep.join(
        (os.environ.get("PATH", os.defpath), *FOLDERS, *([f"{old}/usr/lib/qemu"] if old else []))
    )
    found = shutil.which("virtiofsd", path=path)
    if found is None:
        pytest.skip(f"There is no virtiofsd, and {OLD_QEMU} does not name an unpacked QEMU")
    return found


class Virtiofsd:
    """A socket that stays, and behind it a daemon that serves one connection; `start` makes the next."""

    def __init__(self, path: Path, shared: Path) -> None:
        self.path = path
        self._shared = shared
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        program, fd = virtiofsd_program(), self._listener.fileno()
        argv = [program, f"--fd={fd}", "-f", "-o", f"source={self._shared},sandbox=chroot"]
        daemon = subprocess.Popen(argv, pass_fds=[fd], stderr=subprocess.DEVNULL)
        self._daemons.append(daemon)
        return daemon

    def close(self) -> None:
        self._listener.close()
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        self._daemons.clear()


class FsCase(DeviceCase):
    name = "fs"
    command = "vm.add-fs"
    member = "fs"
    changes = SHARED_MEMORY
    unsaved = "vhost-user-fs"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shared = folder / "shared"
        self.shared.mkdir()
        self._daemons: dict[str, Virtiofsd] = {}

    def device(self, device_id: str) -> dict[str, Any]:
        if device_id not in self._daemons:
            self._daemons[device_id] = Virtiofsd(self.folder / f"{device_id}.sock", self.shared)
        self._daemons[device_id].start()
        return {"id": device_id, "tag": f"tag-{device_id}", "socket": str(self._daemons[device_id].path)}

    def before_reboot(self) -> None:
        for daemon in self._daemons.values():
            daemon.start()

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        check_share(vm, f"tag-{device_id}", bdf, self.shared)

    def close(self) -> None:
        for daemon in self._daemons.values():
            daemon.close()


class OwnFsCase(FsCase):
    """The server finds a virtiofsd on the PATH that it inherits."""

    name = "fs-own"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = f"{self._path}{os.pathsep}{os.path.dirname(virtiofsd_program())}"

    def close(self) -> None:
        super().close()
        os.environ["PATH"] = self._path

    def device(self, device_id: str) -> dict[str, Any]:
        return {"id": device_id, "tag": f"tag-{device_id}", "shared_dir": str(self.shared)}


class GenericVhostUserCase(FsCase):
    """A file system too, told by its type alone; its tag is its id."""

    name = "generic-vhost-user"
    command = "vm.add-generic-vhost-user"
    member = "generic_vhost_user"

    def device(self, device_id: str) -> dict[str, Any]:
        socket_path = super().device(device_id)["socket"]
        return {"id": device_id, "device_type": 26, "socket": socket_path, "queue_sizes": [512, 512]}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        check_share(vm, device_id, bdf, self.shared)


def wait_driver(vm: Booted, bdf: str) -> None:
    """Return once the guest's driver has the file system at `bdf`."""
    folder = pci_folder(bdf)
    vm.run(f"until test -e {folder}/virtio*/driver; do usleep 20000; done", timeout_s=GUEST_S)
    assert vm.run(f"basename $(readlink {folder}/virtio*/driver)") == "virtiofs"


def check_share(vm: Booted, tag: str, bdf: str, shared: Path) -> None:
    """Fail unless the guest mounts the folder `shared` by `tag`, and each side reads what the other wrote."""
    wait_driver(vm, bdf)
    (shared / "from-host").write_text(f"host to {tag}\n")
    script = f"mkdir -p /tmp/m && mount -t virtiofs {tag} /tmp/m && cat /tmp/m/from-host"
    assert vm.run(script) == f"host to {tag}"
    vm.run(f"echo guest of {tag} >/tmp/m/from-guest && umount /tmp/m")
    assert (shared / "from-guest").read_text() == f"guest of {tag}\n"
    (shared / "from-guest").unlink()
