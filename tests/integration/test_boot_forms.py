"""Direct boot of both forms of a kernel, and a VM that the command line describes and starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cloudvmm.guest import FAST_CMDLINE
from support.booted import (
    READY_WORDS,
    Booted,
    EventFile,
    booting,
    copy_root_disk,
    default_guest,
    direct_boot,
    serving,
    vm_config,
)
from support.deadline import GUEST_S, HOST_S
from support.namespace import ip, network_namespace, ping
from support.vm import choose_engine
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]


def test_bzimage_boots_with_its_command_line_and_initramfs(tmp_path: Path) -> None:
    payload = direct_boot('word="of the bzImage"') | {"kernel": default_guest().bzimage}
    with booting(tmp_path, vm_config(payload=payload)) as vm:
        assert 'word="of the bzImage"' in vm.run("cat /proc/cmdline")
        assert vm.run("uname -r") in default_guest().version


def test_pvh_elf_boots_from_its_root_disk_without_losing_writes(tmp_path: Path) -> None:
    disk = copy_root_disk(tmp_path)
    config = vm_config(
        payload=direct_boot("root=/dev/vda1"), disks=[{"path": str(disk), "image_type": "Raw"}]
    )
    with booting(tmp_path, config) as vm:
        assert vm.run("grep ' / ' /proc/mounts | cut -d' ' -f1") == "/dev/vda1"
        vm.run("echo kept >/kept; sync")
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        assert vm.run("cat /kept") == "kept"


def command_line(*flags: str) -> list[str]:
    guest = default_guest()
    return ["--kernel", guest.kernel, "--initramfs", guest.initramfs, "--cmdline", FAST_CMDLINE, *flags]


@pytest.mark.root
def test_command_line_boots_a_whole_vm_and_power_off_ends_it_with_status_0(tmp_path: Path) -> None:
    disk = copy_root_disk(tmp_path)
    with (
        network_namespace(),
        serving(
            tmp_path,
            *command_line("--cpus", "boot=2,max=2", "--memory", "size=256M"),
            *("--disk", f"path={disk},image_type=raw,serial=one"),
            *("--net", "tap=line0,ip=192.168.5.1,mask=255.255.255.0,mac=12:34:56:78:90:05"),
            *("--rng", "src=/dev/urandom", "--serial", f"file={tmp_path}/serial.log", "--console", "pty"),
        ) as vm,
    ):
        vm.events.wait("vm/booted")
        vm.open_shell()
        vm.wait_ready()
        assert READY_WORDS in (tmp_path / "serial.log").read_text()
        assert vm.run("nproc; cat /sys/block/vda/serial /sys/class/net/eth0/address") == (
            "2\none12:34:56:78:90:05"
        )
        vm.run("ifconfig eth0 192.168.5.2 netmask 255.255.255.0 up && ping -c 2 -W 10 192.168.5.1")
        ping("192.168.5.2")
        assert "line0" in ip("link show")
        vm.tell("poweroff -f")
        assert vm.server.wait_end() == 0
        assert "line0" not in ip("link show")
        assert_events_of_a_whole_life(vm)


def assert_events_of_a_whole_life(vm: Booted) -> None:
    assert vm.events.names("vm", "vmm") == [
        *("vmm/starting", "vm/booting", "vm/booted"),
        *("vm/shutdown", "vm/deleted", "vmm/shutdown"),
    ]
    times = [
        (document["timestamp"]["secs"], document["timestamp"]["nanos"]) for document in vm.events.documents()
    ]
    assert times == sorted(times)
    assert times[-1][0] < 120
    first = vm.events.path.read_text().split("\n\n")[0]
    head, _, rest = first.partition('"nanos": ')
    assert head == '{\n  "timestamp": {\n    "secs": 0,\n    '
    assert (
        rest.partition("\n")[2] == '  },\n  "source": "vmm",\n  "event": "starting",\n  "properties": null\n}'
    )


def test_command_line_without_api_socket_ends_by_sigterm_with_status_0(tmp_path: Path) -> None:
    flags = command_line(
        "--memory", "size=256M", "--serial", f"file={tmp_path}/serial.log", "--console", "off"
    )
    with serving(tmp_path, *flags, has_socket=False) as vm:
        wait_until(
            lambda: (
                Path(tmp_path, "serial.log").exists()
                and READY_WORDS in Path(tmp_path, "serial.log").read_text()
            ),
            "the guest is ready",
            timeout_s=GUEST_S,
        )
        vm.server.terminate()
        assert vm.server.wait_end() == 0
        assert vm.events.names("vm", "vmm")[-3:] == ["vm/shutdown", "vm/deleted", "vmm/shutdown"]


def run_to_the_end(flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "cloudvmm.cli.main", *choose_engine("qemu").flags, *flags]
    return subprocess.run(program, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=HOST_S)


@pytest.mark.parametrize("content", [None, b"", b"no kernel at all\n" * 100])
def test_kernel_that_cannot_be_loaded_ends_with_status_1_and_the_chain(
    tmp_path: Path, content: bytes | None
) -> None:
    kernel = tmp_path / "kernel"
    if content is not None:
        kernel.write_bytes(content)
    events = EventFile(tmp_path / "events")
    ended = run_to_the_end(
        ["--kernel", str(kernel), "--console", "off", "--event-monitor", f"path={events.path}"]
    )
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    start = lines.index("Error: Cloud Hypervisor exited with the following chain of errors:")
    assert lines[start + 1].split(":", 1) == ["  0", " Error booting VM"]
    assert lines[start + 2].split(":", 1) == ["  1", " The VM could not boot"]
    assert len(lines) > start + 3
    assert "Traceback" not in ended.stderr
    assert events.names("vm")[0] == "vm/booting"
    assert "vm/booted" not in events.names()


def test_disk_that_is_missing_ends_with_status_1_and_names_it(tmp_path: Path) -> None:
    ended = run_to_the_end(command_line("--console", "off", "--disk", f"path={tmp_path}/absent.raw"))
    assert ended.returncode == 1
    assert "Error booting VM" in ended.stderr
    assert f"{tmp_path}/absent.raw" in ended.stderr
