"""The smaller devices: entropy, balloon, panic notifier, watchdog."""

from __future__ import annotations

from typing import Final

from cloudvmm.engine.base import MachineSpec
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.slot import place

RNG_ID: Final = "__rng"
BALLOON_ID: Final = "__balloon"
PVPANIC_ID: Final = "__pvpanic"
WATCHDOG_ID: Final = "__watchdog"
STATISTICS_EVERY_S: Final = 1


def rng_parts(spec: MachineSpec, *, path: str) -> Parts:
    """Describe the entropy device, fed from the file `path`."""
    device_id = spec.vm_config.rng.id or RNG_ID
    backend = part_id(device_id, "rng")
    source = {"qom-type": "rng-random", "id": backend, "filename": path}
    return Parts(objects=[source], devices=[_virtio(spec, "virtio-rng-pci", device_id) | {"rng": backend}])


def balloon_parts(spec: MachineSpec) -> Parts:
    """Describe the balloon. How much it takes is said over QMP: see `balloon_target_bytes`."""
    balloon = spec.vm_config.balloon
    if balloon is None:
        return Parts()
    device = _virtio(spec, "virtio-balloon-pci", balloon.id or BALLOON_ID)
    device |= {
        "deflate-on-oom": balloon.deflate_on_oom,
        "free-page-reporting": balloon.free_page_reporting,
    }
    if balloon.statistics:
        device["guest-stats-polling-interval"] = STATISTICS_EVERY_S
    return Parts(devices=[device])


def statistics_source(spec: MachineSpec) -> str | None:
    """Return the id of the balloon that is to tell what the guest says of its memory, None where none is."""
    balloon = spec.vm_config.balloon
    return (balloon.id or BALLOON_ID) if balloon is not None and balloon.statistics else None


def balloon_target_bytes(spec: MachineSpec, ram_bytes: int) -> int | None:
    """Return the ``value`` for QMP's ``balloon`` before the vCPUs start; None where it is not needed.

    The configuration says what the balloon takes, QEMU wants to know what it leaves.
    """
    balloon = spec.vm_config.balloon
    if balloon is None or balloon.size == 0:
        return None
    return ram_bytes - balloon.size


def pvpanic_parts(spec: MachineSpec) -> Parts:
    if not spec.vm_config.pvpanic:
        return Parts()
    device = {"driver": "pvpanic-pci", "id": qdev_id(PVPANIC_ID), **place(spec.slots, PVPANIC_ID)}
    return Parts(devices=[device])


def watchdog_parts(spec: MachineSpec) -> Parts:
    if not spec.vm_config.watchdog:
        return Parts()
    device = {"driver": "i6300esb", "id": qdev_id(WATCHDOG_ID), **place(spec.slots, WATCHDOG_ID)}
    return Parts(devices=[device])


def _virtio(spec: MachineSpec, driver: str, device_id: str) -> Properties:
    return {
        "driver": driver,
        "id": qdev_id(device_id),
        **place(spec.slots, device_id),
        "disable-legacy": "on",
    }
