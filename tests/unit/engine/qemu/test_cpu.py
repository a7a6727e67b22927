"""Which accelerator the command line asks for; models and counts are in the golden files."""

from __future__ import annotations

import pytest

from cloudvmm.config.cpu import CpusConfig
from cloudvmm.engine.qemu.cpu import cpu_arguments


@pytest.mark.parametrize(
    ("device", "accelerator"), [("/dev/kvm", "kvm"), ("/dev/my,kvm", "kvm,device=/dev/my,,kvm")]
)
def test_guests_run_on_the_device_that_was_probed(device, accelerator):
    arguments = cpu_arguments(CpusConfig(boot_vcpus=1, max_vcpus=1), "kvm", kvm_device=device)

    assert arguments[:2] == ["-accel", accelerator]
