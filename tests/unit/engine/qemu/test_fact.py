"""What is known of a QEMU by its version and its accelerator."""

from __future__ import annotations

import pytest

from cloudvmm.engine.qemu.fact import QemuFacts


@pytest.mark.parametrize(
    ("accelerator", "version", "tells"),
    [
        ("tcg", (7, 2, 22), False),
        ("tcg", (8, 2, 2), False),
        ("tcg", (9, 0, 0), True),
        ("tcg", (10, 0, 2), True),
        ("kvm", (7, 2, 0), True),
    ],
)
def test_emulation_tells_of_each_write_from_9_0_on(accelerator, version, tells):
    facts = QemuFacts(binary="/qemu", version=version, accelerator=accelerator)
    assert facts.tells_every_write is tells


@pytest.mark.parametrize(
    ("accelerator", "version", "loses"),
    [
        ("tcg", (7, 2, 0), True),
        ("tcg", (10, 0, 2), True),
        ("tcg", (10, 1, 0), False),
        ("kvm", (7, 2, 0), False),
    ],
)
def test_emulation_loses_writes_before_10_1(accelerator, version, loses):
    assert QemuFacts(binary="/qemu", version=version, accelerator=accelerator).loses_writes is loses
