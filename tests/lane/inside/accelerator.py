"""Run inside the outer machine: is its /dev/kvm real, and do we find that out by ourselves?"""

from __future__ import annotations

import fcntl
import os

from cloudvmm.engine.qemu.engine import QemuEngine

_KVM_GET_API_VERSION = 0xAE00
_STABLE_API_VERSION = 12


def test_device_speaks_the_stable_kvm_interface():
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(device, _KVM_GET_API_VERSION) == _STABLE_API_VERSION
    finally:
        os.close(device)


def test_auto_chooses_kvm_because_a_probe_guest_ran():
    info = QemuEngine(accel="auto").info
    assert info.accelerator == "kvm"
    assert info.accelerator_reason == "A probe guest ran to its end (under KVM on /dev/kvm)"


def test_kvm_is_given_to_who_asks_for_it():
    assert QemuEngine(accel="kvm").info.accelerator == "kvm"


def test_tcg_is_given_to_who_asks_for_it():
    assert QemuEngine(accel="tcg").info.accelerator == "tcg"
