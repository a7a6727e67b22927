"""What keeps a guest from going on before its memory is there, told before anything is touched."""

from __future__ import annotations

import pytest

from cloudvmm.config.memory import MemoryConfig, MemoryZoneConfig
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import NotSupportedYet
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import RamBacking, rams_of
from cloudvmm.engine.qemu.postcopy import check_memories, check_postcopy
from cloudvmm.host import userfault

NEW = QemuFacts(binary="/qemu", version=(9, 0, 0))
OLD = QemuFacts(binary="/qemu", version=(8, 2, 9), accelerator="kvm")


@pytest.mark.parametrize("is_receiver", [False, True])
def test_old_qemu_is_refused(is_receiver):
    with pytest.raises(NotSupportedYet, match=r"needs QEMU 9\.0 or later, and this is QEMU 8\.2\.9"):
        check_postcopy(OLD, is_receiver=is_receiver)


def test_receiver_alone_needs_userfaultfd(monkeypatch):
    monkeypatch.setattr(userfault, "refusal", lambda: PermissionError(1, "Operation not permitted"))

    check_postcopy(NEW, is_receiver=False)
    with pytest.raises(NotSupportedYet, match=r"vm\.unprivileged_userfaultfd") as refused:
        check_postcopy(NEW, is_receiver=True)
    assert isinstance(refused.value.__cause__, PermissionError)


@pytest.mark.parametrize("shared", [False, True])
def test_memory_in_a_file_is_refused(shared):
    zones = [
        MemoryZoneConfig(id="plain", size=128 * MIB),
        MemoryZoneConfig(id="kept", size=128 * MIB, file="/file", shared=shared),
    ]
    memories = [
        RamBacking(device_id=ram.zone_id, ram=ram) for ram in rams_of(MemoryConfig(size=0, zones=zones))
    ]

    check_memories(memories[:1])
    with pytest.raises(NotSupportedYet, match="The memory zone kept has a file"):
        check_memories(memories)
