"""Queues of disks that have processors of the host for themselves: each its own thread in QEMU, pinned.

A disk none of whose queues is pinned is served by QEMU's main thread. Several queues in several threads need
QEMU 9.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from cloudvmm.config.disk import DiskConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.name import part_id
from cloudvmm.engine.qemu.parts import Properties
from cloudvmm.engine.qemu.qmp import QmpClient


class PinFailed(DeviceError):
    def __init__(self, disk_id: str, queue: int, host_cpus: list[int]) -> None:
        super().__init__(
            f"Queue {queue} of the disk {disk_id} cannot run on the host's processors {host_cpus}"
        )


def thread_ids(disk: DiskConfig) -> list[str]:
    """Return the QEMU id of the thread of each queue; none where no queue is pinned."""
    if disk.id is None or not disk.queue_affinity:
        return []
    return [part_id(disk.id, f"io{queue}") for queue in range(disk.num_queues)]


def thread_objects(disk: DiskConfig) -> list[Properties]:
    return [{"qom-type": "iothread", "id": name} for name in thread_ids(disk)]


def thread_properties(disk: DiskConfig) -> Properties:
    """Return the properties of the device that give each queue its thread."""
    names = thread_ids(disk)
    match names:
        case []:
            return {}
        case [name]:
            return {"iothread": name}
        case _:
            mapping = [{"iothread": name, "vqs": [queue]} for queue, name in enumerate(names)]
            return {"iothread-vq-mapping": mapping}


def pin_queues(client: QmpClient, disks: Iterable[DiskConfig]) -> None:
    """Blocking. Pin the threads of the queues of `disks`, which are made.

    :raises PinFailed: the host has no such processors, or they are not ours.
    :raises EngineError: QEMU does not answer.
    """
    pinned = [disk for disk in disks if thread_ids(disk)]
    if not pinned:
        return
    threads = {each["id"]: each["thread-id"] for each in client.execute("query-iothreads")}
    for disk in pinned:
        names = thread_ids(disk)
        for each in disk.queue_affinity or ():
            if each.queue_index < len(names):
                _pin(threads[names[each.queue_index]], disk, each.queue_index, each.host_cpus)


def _pin(thread_id: int, disk: DiskConfig, queue: int, host_cpus: list[int]) -> None:
    try:
        os.sched_setaffinity(thread_id, host_cpus)
    except (OSError, ValueError, OverflowError) as error:
        raise PinFailed(disk.id or "", queue, host_cpus) from error
