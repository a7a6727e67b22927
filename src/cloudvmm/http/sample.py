"""One request body per command that takes one: for the API's document and the reference pages.

Plain values. The paths are of nobody's machine; the reference pages show them as they are.
"""

from __future__ import annotations

from typing import Any, Final

SAMPLES: Final[dict[str, dict[str, Any]]] = {
    "vm.create": {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
        "memory": {"size": 268435456, "hotplug_size": 268435456, "shared": True},
        "payload": {"kernel": "/tmp/vmlinux", "cmdline": "console=hvc0"},
        "console": {"mode": "Off"},
        "disks": [{"id": "root", "path": "/tmp/root.raw", "image_type": "Raw"}],
    },
    "vm.resize": {"desired_vcpus": 2, "desired_ram": 402653184},
    "vm.resize-disk": {"id": "root", "desired_size": 134217728},
    "vm.resize-zone": {"id": "mem0", "desired_ram": 402653184},
    "vm.add-device": {"id": "gpu", "path": "/sys/bus/pci/devices/0000:41:00.0"},
    "vm.add-user-device": {"id": "user0", "socket": "/tmp/user.sock"},
    "vm.add-disk": {"id": "data", "path": "/tmp/data.raw", "image_type": "Raw"},
    "vm.add-fs": {"id": "share", "tag": "share", "socket": "/tmp/virtiofsd.sock"},
    "vm.add-generic-vhost-user": {
        "id": "sound",
        "socket": "/tmp/sound.sock",
        "queue_sizes": [64, 64, 64, 64],
        "device_type": 25,
    },
    "vm.add-net": {"id": "net0", "tap": "tap0", "mac": "2e:89:a8:e4:3b:01"},
    "vm.add-pmem": {"id": "pmem0", "file": "/tmp/pmem.img"},
    "vm.add-vdpa": {"id": "vdpa0", "path": "/dev/vhost-vdpa-0"},
    "vm.add-vsock": {"id": "vsock0", "cid": 3, "socket": "/tmp/vsock.sock"},
    "vm.remove-device": {"id": "data"},
    "vm.snapshot": {"destination_url": "file:///tmp/snapshot"},
    "vm.fork": {"directory": "/tmp/clones", "count": 2},
    "vm.restore": {"source_url": "file:///tmp/snapshot", "resume": True},
    "vmm.cancel-job": {"id": 7},
    "vm.coredump": {"destination_url": "file:///tmp/core"},
    "vm.receive-migration": {"receiver_url": "unix:/tmp/migration.sock"},
    "vm.send-migration": {"destination_url": "unix:/tmp/migration.sock", "local": True},
}
