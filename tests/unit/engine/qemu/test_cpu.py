"""Which accelerator the command line asks for; models and counts are in the golden files."""

from __future__ import annotations

import pytest

from cloudvmm.config.cpu import CoreScheduling, CpuAffinity, CpusConfig
from cloudvmm.engine.qemu.cpu import cpu_arguments


@pytest.mark.parametrize(
    ("device", "accelerator"), [("/dev/kvm", "kvm"), ("/dev/my,kvm", "kvm,device=/dev/my,,kvm")]
)
def test_guests_run_on_the_device_that_was_probed(device, accelerator):
    arguments = cpu_arguments(CpusConfig(boot_vcpus=1, max_vcpus=1), "kvm", kvm_device=device)

    assert arguments[:2] == ["-accel", accelerator]


@pytest.mark.parametrize(
    ("cpus", "threads"),
    [
        (CpusConfig(boot_vcpus=2, max_vcpus=2), "single"),
        (CpusConfig(boot_vcpus=1, max_vcpus=1), "multi"),
        (CpusConfig(boot_vcpus=2, max_vcpus=4), "multi"),
        (CpusConfig(boot_vcpus=2, max_vcpus=2, core_scheduling=CoreScheduling.VCPU), "multi"),
        (CpusConfig(boot_vcpus=2, max_vcpus=2, affinity=[CpuAffinity(vcpu=0, host_cpus=[0])]), "multi"),
    ],
)
def test_emulated_vcpus_take_turns_where_they_lose_writes_and_need_no_threads(cpus, threads):
    assert cpu_arguments(cpus, "tcg", loses_writes=True)[:2] == ["-accel", f"tcg,thread={threads}"]
    assert cpu_arguments(cpus, "tcg")[:2] == ["-accel", "tcg,thread=multi"]
