"""Phases of a machine in memory, and which operation is allowed in which: one table."""

from __future__ import annotations

import enum
from typing import Final


class Phase(enum.Enum):
    BUILT = "built"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"  # switched off, or waiting to be built anew
    GONE = "gone"


# Where an operation is allowed; GONE allows none.
ALLOWED: Final = {
    "boot": {Phase.BUILT},
    "pause": {Phase.RUNNING},
    "resume": {Phase.PAUSED},
    "save": {Phase.PAUSED},
    "send": {Phase.RUNNING, Phase.PAUSED},
    "transfer_rest": {Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "freeze_disks": {Phase.PAUSED},
    "fork": {Phase.RUNNING, Phase.PAUSED},
    "coredump": {Phase.PAUSED},
    "power_button": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "nmi": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "add_device": {Phase.RUNNING, Phase.PAUSED},
    "remove_device": {Phase.RUNNING, Phase.PAUSED},
    "resize_vcpus": {Phase.RUNNING, Phase.PAUSED},
    "add_memory": {Phase.RUNNING, Phase.PAUSED},
    "request_zone_size": {Phase.RUNNING, Phase.PAUSED},
    "resize_balloon": {Phase.RUNNING, Phase.PAUSED},
    "resize_disk": {Phase.RUNNING, Phase.PAUSED},
    "counters": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "pci_resources": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
}
