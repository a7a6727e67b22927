"""What keeps a VM from being built, row by row of config.md section 13."""

from __future__ import annotations

import pytest

from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import PmemConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.numa import NumaConfig, NumaDistance
from cloudvmm.config.number import MIB
from cloudvmm.config.vm import VmConfig
from cloudvmm.control import error
from cloudvmm.control.condition import check_devices, check_memory, check_numa, check_vcpus
from cloudvmm.errors import error_chain

VIRTIO_MEM = HotplugMethod.VIRTIO_MEM


def zone(name="z", size=MIB, **members):
    return MemoryZoneConfig(id=name, size=size, **members)


MEMORY = [
    (MemoryConfig(size=0), error.MissingMemoryZones),
    (MemoryConfig(size=0, zones=[]), error.MissingMemoryZones),
    (MemoryConfig(size=MIB, zones=[zone()]), error.InvalidMemoryParameters),
    (MemoryConfig(size=MIB, zones=[]), error.InvalidMemoryParameters),
    (MemoryConfig(size=MIB, hotplugged_size=0), error.InvalidMemoryParameters),
    (
        MemoryConfig(size=MIB, hotplug_method=VIRTIO_MEM, hotplug_size=MIB, hotplugged_size=2 * MIB),
        error.InvalidMemoryParameters,
    ),
    (MemoryConfig(size=MIB, hotplug_size=MIB, hotplugged_size=0), error.InvalidMemoryParameters),
    (MemoryConfig(size=MIB, hotplug_size=0), error.InvalidHotplugSize),
    (MemoryConfig(size=MIB + 1), error.MisalignedMemorySize),
    (MemoryConfig(size=MIB, hugepages=True, hugepage_size=2 * MIB), error.MisalignedMemorySize),
    (
        MemoryConfig(size=0, zones=[zone(shared=True, file="/f", host_numa_node=0)]),
        error.InvalidSharedMemoryZoneWithHostNuma,
    ),
    (MemoryConfig(size=0, zones=[zone(hotplug_size=MIB)]), error.InvalidHotplugMethodWithMemoryZones),
    (MemoryConfig(size=0, zones=[zone(hotplugged_size=MIB)]), error.InvalidMemoryParameters),
    (
        MemoryConfig(size=0, hotplug_method=VIRTIO_MEM, zones=[zone(hotplug_size=0)]),
        error.InvalidHotplugSize,
    ),
    (MemoryConfig(size=0, zones=[zone(), zone()]), error.DuplicateZoneId),
    (MemoryConfig(size=0, zones=[zone(), zone("y", 5)]), error.MisalignedMemorySize),
    (MemoryConfig(size=0, zones=[zone(file="/")]), error.DirectoryAsBackingFileForMemory),
    (MemoryConfig(size=0, zones=[zone(file="/no/such/file")]), error.GetFileSystemBlockSize),
]


@pytest.mark.parametrize(("memory", "kind"), MEMORY)
def test_memory_that_cannot_be(memory, kind):
    with pytest.raises(kind) as caught:
        check_memory(memory)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(size=MIB),
        MemoryConfig(size=MIB, hotplug_size=MIB),
        MemoryConfig(size=MIB, hotplug_method=VIRTIO_MEM, hotplug_size=MIB, hotplugged_size=MIB),
        MemoryConfig(size=0, zones=[zone("a"), zone("b", shared=True, host_numa_node=0)]),
        MemoryConfig(size=2 * MIB, hugepages=True, hugepage_size=2 * MIB),
    ],
)
def test_memory_that_can_be(memory):
    check_memory(memory)


@pytest.mark.parametrize(
    "numa",
    [
        [NumaConfig(guest_numa_id=0, cpus=[0]), NumaConfig(guest_numa_id=0, cpus=[1])],
        [NumaConfig(guest_numa_id=0, memory_zones=["other"])],
        [NumaConfig(guest_numa_id=0, distances=[NumaDistance(destination=1, distance=20)])],
        [NumaConfig(guest_numa_id=0, distances=[NumaDistance(destination=0), NumaDistance(destination=0)])],
    ],
)
def test_numa_nodes_that_cannot_be(numa):
    with pytest.raises(error.InvalidNumaNodes, match="^Invalid NUMA configuration$"):
        check_numa(VmConfig(numa=numa))


def test_numa_nodes_that_can_be():
    memory = MemoryConfig(size=0, zones=[zone("a"), zone("b")])
    near, far = NumaDistance(destination=0, distance=10), NumaDistance(destination=1, distance=20)
    nodes = [
        NumaConfig(guest_numa_id=0, memory_zones=["a"], distances=[near, far]),
        NumaConfig(guest_numa_id=1, memory_zones=["b"]),
    ]
    check_numa(VmConfig(memory=memory, numa=nodes))
    check_numa(VmConfig(numa=[NumaConfig(guest_numa_id=0, memory_zones=["mem0"])]))


def test_more_vcpus_than_the_engine_has_are_refused():
    vm_config = VmConfig(cpus=CpusConfig(boot_vcpus=1, max_vcpus=300))
    check_vcpus(vm_config, 300)
    with pytest.raises(error.MaximumVcpusExceeded, match="vCPUs 300 exceeds host limit 254"):
        check_vcpus(vm_config, 254)


def test_disk_without_a_path_is_refused():
    with pytest.raises(error.NoDiskPath, match="^No disk path was specified when one was expected$"):
        check_devices(VmConfig(disks=[DiskConfig()]))
    check_devices(VmConfig(disks=[DiskConfig(vhost_user=True, vhost_socket="/s")]))


def test_pmem_that_cannot_be(tmp_path):
    file = tmp_path / "pmem"
    file.write_bytes(bytes(4096))
    for pmem, kind in [
        (PmemConfig(file=str(file)), error.PmemSizeNotAligned),
        (PmemConfig(file=str(file), size=3 * MIB), error.PmemSizeNotAligned),
        (PmemConfig(file=str(tmp_path)), error.PmemWithDirectorySizeMissing),
        (PmemConfig(file=str(tmp_path / "none")), error.PmemFileOpen),
    ]:
        with pytest.raises(kind):
            check_devices(VmConfig(pmem=[pmem]))
    check_devices(VmConfig(pmem=[PmemConfig(file=str(tmp_path), size=2 * MIB)]))


def test_virtio_mem_that_does_not_fit_its_alignment_is_refused():
    memory = MemoryConfig(size=MIB, hotplug_method=VIRTIO_MEM, hotplug_size=2 * MIB)
    with pytest.raises(error.CreateVirtioMem) as caught:
        check_devices(VmConfig(memory=memory))
    assert error_chain(caught.value) == [
        "Cannot create virtio-mem device",
        "Virtio-mem size is not aligned with 134217728",
    ]
