"""What is known about the QEMU at hand before any machine is made.

Plain values only. How they are found: `binary.py` (version, devices, firmware) and `probe.py` (accelerator).
"""

from __future__ import annotations

from typing import Literal

import msgspec

Accelerator = Literal["tcg", "kvm"]
KVM_DEVICE = "/dev/kvm"
KVM_CPU_MODEL = "host"  # what the probe guest is shown and every guest under KVM as well


class QemuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`binary` is an absolute path. `version` is (major, minor, micro).

    `devices` are the names that ``-device help`` lists, `machines` those of ``-machine help`` that are not
    deprecated. `kvm_device` is what probe and guests run on where the accelerator is KVM. A firmware path is
    None where the file is not installed; `firmware_folders` are where QEMU looks for its own.
    """

    binary: str
    version: tuple[int, int, int]
    accelerator: Accelerator = "tcg"
    accelerator_reason: str = ""
    kvm_device: str = KVM_DEVICE
    qboot_path: str | None = None
    seabios_path: str | None = None
    firmware_folders: tuple[str, ...] = ()
    devices: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)

    @property
    def masks_vectors(self) -> bool:
        """Say whether interrupts of a vhost-user network device can be MSI-X: before 8.0 only KVM can."""
        return self.accelerator == "kvm" or self.version >= (8, 0, 0)

    @property
    def reconnects_in_ms(self) -> bool:
        """Say whether a socket is connected again after ``reconnect-ms``; before 9.2 it was ``reconnect``."""
        return self.version >= (9, 2, 0)

    @property
    def spares_files(self) -> bool:
        """Say whether a file can be mapped privately and stay whole: before 8.2 it cannot.

        For what the guest gives back QEMU makes holes in the file, too, unless it has it for reading alone.
        """
        return self.version >= (8, 2, 0)

    @property
    def tells_every_write(self) -> bool:
        """Say whether memory may be sent while the guest runs: before 9.0 emulation does not tell each write.

        What the guest writes to a page again after it was sent may stay behind, and the guest dies of it.
        """
        return self.accelerator == "kvm" or self.version >= (9, 0, 0)

    @property
    def loses_writes(self) -> bool:
        """Say whether emulated vCPUs that run side by side may lose a write to a device: before 10.1 they do.

        One of them maps or unmaps a device, as in a hot addition, and another looks up where its write goes
        in a table that is already freed. A notification or an interrupt is lost, and the guest stands.
        """
        return self.accelerator == "tcg" and self.version < (10, 1, 0)

    @property
    def dies_of_virtio_status(self) -> bool:
        """Say whether this QEMU may abort when asked for the status of a virtio device, as 11.1.3 does."""
        return self.version >= (11, 0, 0)

    def has_device(self, name: str) -> bool:
        """Say whether this QEMU was built with the device `name`, e.g. ``i6300esb``."""
        return name in self.devices
