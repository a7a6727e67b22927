"""The default guest for tests: found, never built."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import msgspec
import pytest


class TestGuest(msgspec.Struct, frozen=True):
    """Absolute paths of the guest's files."""

    __test__ = False

    kernel: str
    initramfs: str


def find_guest() -> TestGuest:
    """Return the guest that CLOUDVMM_TEST_GUEST (a JSON file) names, else the built one; skip without it."""
    if named := os.environ.get("CLOUDVMM_TEST_GUEST"):
        return msgspec.json.decode(Path(named).read_bytes(), type=TestGuest)
    guest = import_or_skip("cloudvmm.guest")
    try:
        found = guest.locate()
    except guest.GuestNotBuilt as error:
        pytest.skip(f"The default guest is missing: {error}")
    return TestGuest(kernel=found.kernel, initramfs=found.initramfs)


def import_or_skip(module_name: str):
    """Return the module, or skip the test saying which room is missing."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{module_name} is missing: {error}")
