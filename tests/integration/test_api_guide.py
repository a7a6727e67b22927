"""The curl calls of Cloud Hypervisor's own API guide (its docs/api.md), run by curl, against a real guest.

They stand as they are there, but for the paths and one addition: Debian's kernel has its virtio drivers as
modules, so that an initramfs is needed. The guest's disk is a root file system that brings its network up by
itself, as a cloud image does.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import READY_WORDS, Booted, copy_root_disk, default_guest, serving
from support.deadline import GUEST_S, HOST_S
from support.namespace import ip, network_namespace, ping
from support.traffic import Answer, check_curl
from support.wait import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
    pytest.mark.skipif(
        shutil.which("debugfs") is None, reason="needs debugfs, of Debian's package e2fsprogs"
    ),
]

CREATE = """
curl --unix-socket /tmp/cloud-hypervisor.sock -i \\
     -X PUT 'http://localhost/api/v1/vm.create'  \\
     -H 'Accept: application/json'               \\
     -H 'Content-Type: application/json'         \\
     -d '{
         "cpus":{"boot_vcpus": 4, "max_vcpus": 4},
         "payload":{"kernel":"/opt/clh/kernel/vmlinux-virtio-fs-virtio-iommu", INITRAMFS "cmdline":"console=ttyS0 console=hvc0 root=/dev/vda1 rw"},
         "disks":[{"path":"/opt/clh/images/focal-server-cloudimg-amd64.raw"}],
         "rng":{"src":"/dev/urandom"},
         "net":[{"ip":"192.168.10.10", "mask":"255.255.255.0", "mac":"12:34:56:78:90:01"}]
         }'
"""  # noqa: E501
BOOT = "curl --unix-socket /tmp/cloud-hypervisor.sock -i -X PUT 'http://localhost/api/v1/vm.boot'"
INFO = """
curl --unix-socket /tmp/cloud-hypervisor.sock -i \\
     -X GET 'http://localhost/api/v1/vm.info' \\
     -H 'Accept: application/json'
"""
REBOOT = "curl --unix-socket /tmp/cloud-hypervisor.sock -i -X PUT 'http://localhost/api/v1/vm.reboot'"
SHUTDOWN = "curl --unix-socket /tmp/cloud-hypervisor.sock -i -X PUT 'http://localhost/api/v1/vm.shutdown'"

DONE = b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
HOST_ADDRESS, GUEST_ADDRESS = "192.168.10.10", "192.168.10.2"

# What a cloud image's own start-up does: bring the network up, and say so on every console.
START_UP = f"""#!/bin/sh
(
    until ifconfig eth0 {GUEST_ADDRESS} netmask 255.255.255.0 up 2>/dev/null; do sleep 1; done
    ping -c 3 -W 10 {HOST_ADDRESS} >/dev/null || exit
    echo "guest on $(sed -n 's/ \\/ .*//p' /proc/mounts) reached the host" >/dev/hvc0
) &
exec /init.real "$@"
"""


class Guide:
    """Runs the guide's calls against one server, whose output is the guest's console."""

    def __init__(self, vm: Booted, disk: Path) -> None:
        guest = default_guest()
        self.vm = vm
        self.disk = disk
        self._paths = {
            "/tmp/cloud-hypervisor.sock": vm.server.socket_path,
            "/opt/clh/kernel/vmlinux-virtio-fs-virtio-iommu": guest.kernel,
            "/opt/clh/images/focal-server-cloudimg-amd64.raw": str(disk),
            "INITRAMFS": f'"initramfs":"{guest.initramfs}",',
        }

    def run(self, script: str) -> bytes:
        """Run a call by bash; return all that curl printed: the response's head and body."""
        for path, ours in self._paths.items():
            script = script.replace(path, ours)
        printed = subprocess.run(
            ["bash", "-ec", script],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=HOST_S,
        ).stdout
        head, _, body = printed.partition(b"\r\n\r\n")
        check_curl(shlex.split(script), Answer.of(head, body))
        return printed

    def info(self) -> dict[str, Any]:
        head, _, body = self.run(INFO).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 \r\n")
        return json.loads(body)

    def wait_said(self, words: str, *, count: int) -> None:
        """Return once the guest's console has shown `words` so many times."""
        wait_until(
            lambda: self.vm.server.stderr.count(words) >= count, f"{words!r}, {count} times", timeout_s=HOST_S
        )


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    folder = tmp_path_factory.mktemp("guide")
    disk = copy_root_disk(folder)
    add_start_up(disk, folder)
    with network_namespace(), serving(folder) as vm:
        yield Guide(vm, disk)


def add_start_up(disk: Path, folder: Path) -> None:
    """Put START_UP in front of the /init of the root file system in the first partition of `disk`."""
    script = folder / "init"
    script.write_text(START_UP)
    table = disk.read_bytes()[:512]
    offset = int.from_bytes(table[454:458], "little") * 512
    commands = f"ln init init.real\nunlink init\nwrite {script} init\nsif init mode 0100755\n"
    subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", f"{disk}?offset={offset}"],
        check=True,
        input=commands,
        text=True,
        capture_output=True,
        timeout=GUEST_S,
    )


def test_guide_takes_a_guest_from_create_to_shutdown(guide: Guide) -> None:
    assert guide.run(CREATE) == DONE
    assert guide.info()["state"] == "Created"

    assert guide.run(BOOT) == DONE
    guide.wait_said(READY_WORDS, count=1)
    guide.wait_said("guest on /dev/vda1 reached the host", count=1)
    ping(GUEST_ADDRESS)

    info = guide.info()
    assert info["state"] == "Running"
    assert info["config"]["cpus"]["boot_vcpus"] == 4
    assert info["config"]["memory"]["size"] == info["memory_actual_size"] == 512 << 20
    assert info["config"]["disks"][0]["id"] == "_disk0"
    net = info["config"]["net"][0]
    assert (net["id"], net["mac"], net["ip"]) == ("_net1", "12:34:56:78:90:01", HOST_ADDRESS)
    assert f"inet {HOST_ADDRESS}/24" in ip("addr show vmtap0")

    assert guide.run(REBOOT) == DONE
    guide.wait_said(READY_WORDS, count=2)
    guide.wait_said("guest on /dev/vda1 reached the host", count=2)
    ping(GUEST_ADDRESS)

    assert guide.run(SHUTDOWN) == DONE
    assert guide.info()["state"] == "Created"
    assert "vmtap0" not in ip("link show")
    assert guide.vm.events.names("vm") == [
        *("vm/booting", "vm/booted", "vm/rebooting", "vm/rebooted", "vm/shutdown")
    ]


def test_head_of_every_answer_is_the_references(guide: Guide) -> None:
    head, _, body = guide.run(INFO).partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 ",
        b"Server: Cloud Hypervisor API",
        b"Connection: keep-alive",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]
