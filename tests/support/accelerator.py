"""Which accelerator tests give to QEMU: emulation, or what CLOUDVMM_TEST_ACCEL names, as in the KVM lane."""

from __future__ import annotations

import os


def accelerator() -> str:
    return os.environ.get("CLOUDVMM_TEST_ACCEL", "tcg")
