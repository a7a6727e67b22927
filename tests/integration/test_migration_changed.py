"""A guest that was changed while it ran moves as it is then: modules, vCPUs, a network with descriptors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.booted import MIB, Booted, booting, serving, vm_config
from support.deadline import GUEST_S
from support.namespace import ip, network_namespace, open_tap, ping
from support.traveller import receiving
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

HOST, GUEST = "192.168.48.1", "192.168.48.2"

KIB_BY_MODULE = 100 * 1024
UP = f"ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"
ONLINE = "for cpu in /sys/devices/system/cpu/cpu[1-9]*; do echo 1 >$cpu/online; done 2>/dev/null; nproc"


def memory_kib(vm: Booted) -> int:
    return int(vm.run("awk '/MemTotal/{print $2}' /proc/meminfo"))


def wait_for_memory(vm: Booted, least_kib: int) -> None:
    wait_until(lambda: memory_kib(vm) >= least_kib, "the guest has the memory", timeout_s=GUEST_S)


def test_guest_that_was_changed_goes_on_and_can_be_changed_further(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/way"
    config = vm_config(
        cpus={"boot_vcpus": 1, "max_vcpus": 3}, memory={"size": 256 * MIB, "hotplug_size": 512 * MIB}
    )
    with (
        network_namespace(),
        booting(tmp_path / "first", config) as source,
        serving(tmp_path / "second") as target,
    ):
        queues = [open_tap(f"moved{number}", queues=1)[0] for number in range(2)]
        ip(f"addr add {HOST}/24 dev moved0")
        ip("link set moved0 up")
        source.vmm.put("vm.add-net", {"id": "n", "num_queues": 2}, fds=queues[:1], expect=200)
        booted_kib = memory_kib(source)
        source.vmm.put("vm.resize", {"desired_vcpus": 2, "desired_ram": 384 * MIB}, expect=204)
        wait_until(lambda: source.run(ONLINE) == "2", "the guest has the vCPU", timeout_s=GUEST_S)
        wait_for_memory(source, booted_kib + KIB_BY_MODULE)
        source.run(f"until [ -e /sys/class/net/eth0 ]; do usleep 20000; done; {UP}")
        ping(GUEST)
        before_kib = memory_kib(source)

        words = refused(source, target, url)
        assert words[-1] == "Net id n is associated with FDs and is required"
        source.events.wait("vm/migration-failed", timeout_s=GUEST_S)

        nets = {"net_fds": [{"id": "n", "num_fds": 1}]}
        arrive = receiving(target, url, nets, fds=queues[1:])
        source.vmm.put("vm.send-migration", {"destination_url": url}, expect=204)
        arrive()
        source.server.wait_end(timeout_s=GUEST_S)
        ip("link delete moved0")
        ip(f"addr add {HOST}/24 dev moved1")
        ip("link set moved1 up")
        target.open_shell()
        assert target.run("nproc") == "2"
        assert memory_kib(target) == before_kib
        ping(GUEST)

        target.vmm.put("vm.resize", {"desired_vcpus": 3, "desired_ram": 512 * MIB}, expect=204)
        wait_until(lambda: target.run(ONLINE) == "3", "the guest has the vCPU", timeout_s=GUEST_S)
        wait_for_memory(target, before_kib + KIB_BY_MODULE)
        for queue in queues:
            os.close(queue)


def refused(source: Booted, target: Booted, url: str) -> list[str]:
    arrive = receiving(target, url, {}, expect=500)
    source.vmm.put("vm.send-migration", {"destination_url": url}, expect=204)
    words: list[str] = arrive()
    return words
