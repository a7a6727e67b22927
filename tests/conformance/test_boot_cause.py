"""Why a boot fails, which reason wins, how its chain reads, on every engine: config.md section 13.

The reasons are in the order of lifecycle.md section 3: memory, rules, NUMA, vCPUs, devices.
"""

from __future__ import annotations

import pytest

from support.bench import texts
from support.vm import MIB

API = "Error from API"
BOOT = "The VM could not boot"
RULES = "Failed to validate config"
MEMORY = "Memory manager error"
DEVICES = "Error from device manager"
VFIO = {"path": "/sys/bus/pci/devices/0000:01:00.0"}

# (status, why, what is changed in the config, chain of vm.boot after "The VM could not boot")
BOOTS = [
    (
        500,
        "memory before the rules",
        {"memory": {"size": 0}, "cpus": {"boot_vcpus": 2, "max_vcpus": 1}},
        [MEMORY, "No memory zones found"],
    ),
    (
        500,
        "memory that contradicts itself",
        {"memory": {"size": MIB, "zones": [{"id": "z", "size": MIB}]}},
        [MEMORY, "Memory configuration is not valid"],
    ),
    (
        500,
        "a zone with ACPI hotplug",
        {"memory": {"size": 0, "zones": [{"id": "z", "size": MIB, "hotplug_size": MIB}]}},
        [MEMORY, "Invalid hotplug method associated with memory zones resizing capability"],
    ),
    (
        500,
        "two zones of one name",
        {"memory": {"size": 0, "zones": [{"id": "z", "size": MIB}, {"id": "z", "size": MIB}]}},
        [MEMORY, "Memory zone identifier is not unique"],
    ),
    (
        500,
        "nothing to plug",
        {"memory": {"size": 256 * MIB, "hotplug_size": 0}},
        [MEMORY, "Invalid size for resizing. Can be anything except 0"],
    ),
    (
        500,
        "more plugged than there is",
        {
            "memory": {
                "size": 256 * MIB,
                "hotplug_method": "VirtioMem",
                "hotplug_size": MIB,
                "hotplugged_size": 2 * MIB,
            }
        },
        [MEMORY, "Memory configuration is not valid"],
    ),
    (
        500,
        "a shared zone on a host node",
        {
            "memory": {
                "size": 0,
                "zones": [{"id": "z", "size": MIB, "shared": True, "file": "/f", "host_numa_node": 0}],
            }
        },
        [
            MEMORY,
            "Invalid to try applying a NUMA policy to a memory zone that is memory mapped with MAP_SHARED",
        ],
    ),
    (
        500,
        "a zone in a folder",
        {"memory": {"size": 0, "zones": [{"id": "z", "size": 256 * MIB, "file": "/"}]}},
        [MEMORY, "Using a directory as a backing file for memory is not supported"],
    ),
    (
        500,
        "half a page",
        {"memory": {"size": 256 * MIB + 2048}},
        [MEMORY, "Memory size is misaligned with default page size or its hugepage size"],
    ),
    (
        400,
        "a rule before NUMA",
        {"cpus": {"boot_vcpus": 2, "max_vcpus": 1}, "numa": [{"guest_numa_id": 0, "memory_zones": ["x"]}]},
        [RULES, "Max CPUs (1) lower than boot CPUs (2)"],
    ),
    (
        400,
        "no payload",
        {"payload": None},
        [
            RULES,
            "Payload configuration is not bootable",
            "No bootitem provided: neither firmware nor kernel",
        ],
    ),
    (
        409,
        "two disks of one name",
        {"disks": [{"id": "d", "path": "/d"}, {"id": "d", "path": "/e"}]},
        [RULES, "Identifier d is not unique"],
    ),
    (
        409,
        "one VFIO device twice",
        {"devices": [VFIO, VFIO]},
        [RULES, f"Duplicated device path: {VFIO['path']}"],
    ),
    (
        500,
        "NUMA before vCPUs",
        {
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1000},
            "numa": [{"guest_numa_id": 0, "memory_zones": ["x"]}],
        },
        ["Invalid NUMA configuration"],
    ),
    (
        500,
        "a slot taken twice",
        {"disks": [{"path": "/d", "pci_device_id": 9}, {"path": "/e", "pci_device_id": 9}]},
        [DEVICES, "Could not reserve the PCI device ID", "Valid PCI device identifier but already used: 9"],
    ),
    (
        500,
        "too many devices",
        {"disks": [{"path": "/d"}] * 300},
        [
            DEVICES,
            "Failed to find an available PCI device ID",
            "Could not find an available device slot on the PCI bus",
        ],
    ),
    (
        500,
        "a disk without a path",
        {"disks": [{}]},
        [DEVICES, "No disk path was specified when one was expected"],
    ),
    (
        500,
        "a pmem folder without a size",
        {"pmem": [{"file": "/"}]},
        [DEVICES, "Trying to use a directory for pmem but no size specified"],
    ),
    (
        500,
        "a pmem of an odd size",
        {"pmem": [{"file": "/", "size": 3 * MIB}]},
        [DEVICES, "Trying to use a size that is not multiple of 2MiB"],
    ),
    (
        500,
        "a pmem file that is not there",
        {"pmem": [{"file": "/no/such/pmem"}]},
        [
            DEVICES,
            "Cannot open persistent memory file",
            "No such file or directory: /no/such/pmem (os error 2)",
        ],
    ),
    (
        500,
        "a virtio-mem device of an odd size",
        {"memory": {"size": 256 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 2 * MIB}},
        [
            DEVICES,
            "Cannot create virtio-mem device",
            "Virtio-mem size is not aligned with 134217728",
        ],
    ),
    (
        500,
        "a disk that is not there",
        {"disks": [{"path": "/no/such/image"}]},
        [
            DEVICES,
            "Cannot open disk path",
            "I/O error (path=/no/such/image op=open)",
            "No such file or directory (os error 2)",
        ],
    ),
]


@pytest.mark.parametrize(
    ("status", "changes", "chain"),
    [pytest.param(row[0], *row[2:], id=f"{row[0]}-{row[1]}".replace(" ", "-")) for row in BOOTS],
)
def test_cause_of_a_boot_that_fails_and_leaves_the_config(bench, status, changes, chain):
    bench.create(**changes)

    reply = bench.exchange("PUT", "vm.boot", None)

    assert (reply.status, texts(reply)) == (status, [API, BOOT, *chain])
    assert bench.has_state("C")


def test_more_vcpus_than_the_host_has_are_500(bench):
    limit = {"fake": 254, "qemu": 255}[bench.engine.name]
    bench.create(cpus={"boot_vcpus": 1, "max_vcpus": 1000})

    assert bench.vmm.put("vm.boot", expect=500)[2:] == [
        "Error from CPU manager",
        f"Maximum number of vCPUs 1000 exceeds host limit {limit}",
    ]


def test_image_of_another_type_is_500(bench):
    bench.create(disks=[{"path": f"{bench.folder}/image", "image_type": "Qcow2"}])

    assert bench.vmm.put("vm.boot", expect=500)[2:] == [
        DEVICES,
        "Disk image type does not match expected type: specified = qcow2, detected = raw",
    ]


def test_failed_final_step_is_500_and_leaves_a_vm(bench):
    bench.reach("F")

    assert bench.has_state("F")
    assert bench.vmm.put("vm.boot", expect=500) == [API, BOOT, "VM is already created"]
    assert bench.exchange("PUT", "vm.shutdown", None).status == 204
    assert bench.has_state("C")
