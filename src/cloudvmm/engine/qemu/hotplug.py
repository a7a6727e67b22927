"""Devices that come and go while a guest is there.

`Hotplug` knows, for one machine, which devices can go, what of QEMU's and of ours they hold, and which slots
are taken. The worker plugs and asks for removals, the control loop clears up when QEMU says that the guest
has let go: what both touch is behind a lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import (
    DeviceError,
    EngineError,
    EngineTimeout,
    MachineSpec,
    NotSupportedYet,
    PciBar,
    SlotError,
)
from cloudvmm.engine.qemu.affinity import pin_queues
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.confinement import FileNotShown, Policy, admit
from cloudvmm.engine.qemu.counter import counting_command
from cloudvmm.engine.qemu.disk import DiskBacking
from cloudvmm.engine.qemu.ejection import Ejections
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.keepsake import KeptHotplug
from cloudvmm.engine.qemu.kind import check_device_means, describe, open_backing
from cloudvmm.engine.qemu.launch import is_about_slot
from cloudvmm.engine.qemu.memory import NoRoomForMemory, RamBacking, is_about_room, module_parts
from cloudvmm.engine.qemu.name import device_id, node_name, qdev_id
from cloudvmm.engine.qemu.parts import Command, FdSet, Parts, has_nul, opened, remains, steps
from cloudvmm.engine.qemu.pci import placed_bars
from cloudvmm.engine.qemu.plan import NulCharacter, machine_parts
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.engine.qemu.resource import Resources, naming_system_errors
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.slot import check_slots
from cloudvmm.engine.qemu.text import check_texts
from cloudvmm.engine.qemu.vfio import has_iommufd

_STEP_TIMEOUT_S: Final = 30.0  # an image that was not closed in order is repaired when it is opened
_UNDO_TIMEOUT_S: Final = 10.0
_LEAVE_S: Final = 5.0  # for a guest to let go of what it has had for a moment
_LEAVE_LOOK_S: Final = 0.02
_NOT_FOUND: Final = "DeviceNotFound"
_UNDER_WAY: Final = "already in the process of unplug"


class DeviceIdInUse(DeviceError):
    def __init__(self, device_id: str) -> None:
        super().__init__(f"The machine has a device {device_id} already")


class DeviceUnknown(DeviceError):
    def __init__(self, device_id: str) -> None:
        super().__init__(f"The machine has no device {device_id}")


class DeviceCannotGo(DeviceError):
    def __init__(self, device_id: str, *, reason: str) -> None:
        super().__init__(f"The device {device_id} cannot be removed while the VM runs: {reason}")


class MemoryOnDemand(DeviceError):
    """The device needs shared memory, which a VM that was restored on demand has after a reboot only"""


class NoNetworkForQemu(DeviceError):
    """QEMU was started without the network: such a device needs passt, of 2024 or newer, to serve it"""


class NewDevice(msgspec.Struct, frozen=True):
    """A device that is about to be made, of these `parts`."""

    device: PciDevice
    slot: int
    backing: Backing
    parts: Parts


OnComing = Callable[[NewDevice | RamBacking | None], None]
OnLeaving = Callable[[], None]


def ignore_coming(_: NewDevice | RamBacking | None) -> None:
    """The `OnComing` of a machine that ends with us."""


def ignore_leaving() -> None:
    """The `OnLeaving` of a machine that ends with us."""


class Hotplug:
    """`control` is the worker's monitor, `resources` what the machine stands on; both are lent.

    What a plugged device stands on joins `resources`, so that their `close` releases all.
    """

    def __init__(
        self,
        spec: MachineSpec,
        resources: Resources,
        control: QmpClient,
        facts: QemuFacts,
        policy: Policy | None = None,
        *,
        kept: KeptHotplug | None = None,
        on_coming: OnComing = ignore_coming,
        on_leaving: OnLeaving = ignore_leaving,
    ) -> None:
        """`kept` is what another process left of a machine that was its own. `on_coming` is told of a device,
        or of a module, before QEMU is; of None when it is settled what came of it. `on_leaving` is called
        before a removal is asked for, and by that what a guest was told is on record.
        """
        self._lock = threading.Lock()
        self._control = control
        self._facts = facts
        self._attempt = Attempt(
            "The addition of the device",
            policy=policy,
            state_dir=spec.state_dir,
            user=resources.user,
            group=resources.group,
        )
        self._resources = resources
        self._vm_config = spec.vm_config
        self._on_coming = on_coming
        self._on_leaving = on_leaving
        if kept is None:
            has_network = resources.needs_network or self._attempt.policy.leaves_network
            kept = _first_state(spec, machine_parts(spec, resources, facts), has_network=has_network)
        self._has_network = kept.has_network
        self._slots = kept.slots
        self._remains = kept.remains
        self._doubtful = set(kept.doubtful)  # what QEMU may have, although its addition failed
        self._asked = set(kept.asked)  # what the guest was asked to let go of
        self._ejections = kept.ejections
        self._dropped = kept.dropped
        self._last_fdset = kept.last_fdset
        self._fdsets = kept.fdsets  # device id to descriptor of ours, to the set that QEMU has it in

    @naming_system_errors()
    def plug(self, device: PciDevice, slot: int) -> Backing:
        """Blocking. Plug `device` into `slot`, wholly or not at all; return what it stands on, lent.

        :raises NotSupportedYet: there are no means for such a device; nothing was touched.
        :raises SlotError: the slot is taken, or there is no such slot.
        :raises DeviceError: what it stands on cannot be had, or QEMU refused in its own words.
        :raises ImageLocked: another process holds its image.
        :raises MachineGone: QEMU ended, or `abort` was called.
        :raises EngineError: the host did not give what is needed.
        """
        check_device_means(device, self._facts)
        check_texts(device)
        slots = self._slots_with(id_of(device.id), slot)
        with contextlib.ExitStack() as undo:
            backing = open_backing(device, self._attempt)
            undo.callback(backing.close)
            backing.check_in(self._vm_config)
            if backing.maps_memory and self._resources.has_base:
                raise MemoryOnDemand
            if backing.needs_network and not self._has_network:
                raise NoNetworkForQemu
            backing.lock()
            seat = Seat(
                slots=slots,
                facts=self._facts,
                first_fdset=self._last_fdset + 1,
                has_iommufd=has_iommufd(self._vm_config.platform),
            )
            parts = describe(device, backing, seat)
            self._last_fdset += len(parts.fdsets)
            undo.callback(self._on_coming, None)
            with self._lock:
                self._ejections.plug(backing.device_id)
            undo.callback(self._forget_unplugged, backing.device_id)
            self._on_coming(NewDevice(device, slot, backing, parts))
            try:
                self._make(parts, device)
            except (DeviceError, SlotError):
                # QEMU 7.2 keeps descriptors that are removed while its guest is paused, and so their locks.
                backing.release()
                raise
            except EngineTimeout:
                self._note(backing.device_id, slot, parts)
                self._doubtful.add(backing.device_id)
                self._settle()
                raise
            self._note(backing.device_id, slot, parts)
            self._own(backing)
            undo.pop_all()
        self._on_coming(None)
        if isinstance(backing, DiskBacking):
            # Without it, only minimum and maximum are coarser: no reason to give up what is plugged, nor to
            # wait while the guest, which is looking at its new device, keeps QEMU busy.
            with contextlib.suppress(EngineTimeout):
                self._control.tell([counting_command(backing.device_id)])
        return backing

    def abort(self) -> None:
        """End the waiting of an addition for somebody else's program, and of all later ones. Any thread."""
        self._attempt.abort()

    def find_owed(self) -> list[str]:
        """Blocking, briefly. Return the devices that QEMU has until the guest lets go of them."""
        self._settle()
        with self._lock:
            return sorted(self._doubtful | self._asked)

    def plug_module(self, size: int) -> None:
        """Blocking. Plug a memory module of `size` bytes, as the first of the RAM, wholly or not at all.

        :raises DeviceError: QEMU refused in its own words.
        :raises RamError: the host has no such memory.
        """
        modules = self._resources.modules
        module = self._resources.module(len(modules), size)
        module.open()
        self._on_coming(module)
        try:
            self._make(module_parts(module, len(modules), vcpus=self._vm_config.cpus.boot_vcpus))
        except DeviceError:
            module.close()
            raise
        except EngineTimeout:
            modules.append(module)  # QEMU may have it
            raise
        finally:
            self._on_coming(None)
        modules.append(module)

    def sweep(self) -> None:
        """Blocking, briefly. Have QEMU close what failed additions left: 7.2 does so while its guest runs.

        Those of which nobody knew whether they had failed are asked for again.
        """
        dropped, self._dropped = self._dropped, []
        for command in dropped:
            self._undo(command)
        self._settle()

    def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        """Blocking. Give the image of a disk a new size, which the guest is told, and lock it as far.

        :raises DeviceError: it cannot be had: the image's type has no new sizes, or QEMU says why.
        :raises ImageLocked: another process holds what the image would grow into.
        """
        backing = self._resources.backings.get(disk_id)
        if not isinstance(backing, DiskBacking):
            raise DeviceUnknown(disk_id)
        before_bytes = self.disk_sizes([disk_id])[disk_id]
        with self._lock:
            backing.check_resize(size_bytes, before_bytes=before_bytes)
            backing.lock_for(size_bytes)
        try:
            self._control.execute(
                "block_resize",
                {"node-name": node_name(disk_id), "size": size_bytes},
                timeout_s=_STEP_TIMEOUT_S,
            )
        except QmpError as error:
            raise DeviceError(error.description) from None  # the same words
        finally:
            with self._lock:
                backing.settle_lock()

    def disk_sizes(self, disk_ids: Iterable[str]) -> dict[str, int]:
        """Blocking. Return how many bytes the guest has of each disk."""
        nodes = self._control.execute("query-named-block-nodes", {"flat": True})
        sizes = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
        return {disk_id: int(sizes[node_name(disk_id)]) for disk_id in disk_ids}

    def new_fdset(self) -> int:
        """Return a number that no set of descriptors in QEMU has had."""
        self._last_fdset += 1
        return self._last_fdset

    def note_overlay(self, disk_id: str, node: str, fdset: FdSet, *, base_node: str) -> None:
        """Know that the disk has an overlay `node` above `base_node`: it goes before that, its set last."""
        gone = Command("blockdev-del", {"node-name": node})
        with self._lock:
            before = self._remains.get(disk_id)
            if before is None:
                return  # the guest let go of it this moment
            names = [command.arguments.get("node-name") for command in before]
            # Where a filter is above, only that can go first, and takes with it what it was made with.
            at = names.index(base_node) if base_node in names else names.index(node_name(disk_id)) + 1
            remove = Command("remove-fd", {"fdset-id": fdset.set_id})
            self._remains[disk_id] = [*before[:at], gone, *before[at:], remove]
            self._fdsets[disk_id] = {**self._fdsets.get(disk_id, {}), fdset.fd: fdset.set_id}

    def forget_overlay(self, disk_id: str, node: str, fdset: int) -> None:
        """Know that the disk's overlay `node` is gone from QEMU, as is its set of descriptors."""
        gone = ({"node-name": node}, {"fdset-id": fdset})
        with self._lock:
            before = self._remains.get(disk_id, [])
            self._remains[disk_id] = [command for command in before if command.arguments not in gone]

    def ask_removal(self, device_id: str) -> None:
        """Blocking. Ask the guest to let go of a device.

        Its image is unlocked and our descriptors are closed now, as in the reference.

        QEMU has its own until the guest lets go, and the guest may write until then: whoever opens the image
        meanwhile is not kept from it.

        :raises DeviceUnknown: there is none that can go.
        :raises DeviceCannotGo: QEMU has no means to take such a device away.
        :raises NotSupportedYet: it is of another kind.
        """
        with self._lock:
            is_known, backing = device_id in self._slots, self._resources.backings.get(device_id)
        if not is_known:
            raise DeviceUnknown(device_id)
        if backing is None:
            raise NotSupportedYet(f"Not supported by this release: removal of the device {device_id}")
        if backing.stays is not None:
            raise DeviceCannotGo(device_id, reason=backing.stays)
        self._look_who_is_seen()
        with self._lock:
            if device_id not in self._slots:
                return  # the guest was quicker
            is_first = self._ejections.ask(device_id)
        self._on_leaving()
        try:
            self._ask_guest(device_id)
        except DeviceError:
            if is_first:
                with self._lock:
                    self._ejections.retract(device_id)
            raise
        with self._lock:
            if device_id in self._slots:
                self._asked.add(device_id)
            backing = self._resources.backings.get(device_id)
            if backing is not None:  # the guest may have been quicker
                backing.release()

    @property
    def unsettled_slots(self) -> frozenset[int]:
        """Slots that nothing is in, and where the guest may still eject what comes. Any thread."""
        with self._lock:
            return frozenset(self._ejections.unsettled.keys() - self._slots.values())

    def state(self) -> KeptHotplug:
        """Return what another process needs to go on with the machine. Any thread."""
        with self._lock:
            return KeptHotplug(
                slots=dict(self._slots),
                remains=dict(self._remains),
                doubtful=sorted(self._doubtful),
                asked=sorted(self._asked),
                ejections=self._ejections.copy(),
                dropped=list(self._dropped),
                last_fdset=self._last_fdset,
                fdsets={name: dict(sets) for name, sets in self._fdsets.items()},
                has_network=self._has_network,
            )

    def remains_of(self, device_id: str) -> list[Command] | None:
        """Return what clears up in QEMU behind a device that went; None where there was none. Any thread."""
        with self._lock:
            return self._remains.get(device_id)

    def forget(self, device_id: str) -> None:
        """Free the id and the slot of a device that is gone from QEMU, and what it stood on. Any thread.

        Nobody may have asked for its removal: a guest can eject what it likes, and be quicker than we are.
        """
        with self._lock:
            self._ejections.leave(device_id, self._slots.pop(device_id, None))
            self._remains.pop(device_id, None)
            self._fdsets.pop(device_id, None)
            self._doubtful.discard(device_id)
            self._asked.discard(device_id)
            backing = self._resources.backings.get(device_id)
            if backing is not None:
                backing.release()
                backing.close()
                self._resources.backings = {
                    name: each for name, each in self._resources.backings.items() if name != device_id
                }

    def _slots_with(self, device_id: str, slot: int) -> dict[str, int]:
        """Return who has which slot once `device_id` has `slot`; wait for one in doubt to leave it."""
        with self._lock:
            is_taken = device_id in self._slots
        self._settle()
        if is_taken:  # it may be free now, but that its device went may not have been heard yet
            raise DeviceIdInUse(device_id)
        deadline = time.monotonic() + _LEAVE_S
        while self._is_in_doubt(slot) and time.monotonic() < deadline:
            self._attempt.pause(_LEAVE_LOOK_S)
        with self._lock:
            slots = {**self._slots, device_id: slot}
        check_slots(slots)
        return slots

    def _is_in_doubt(self, slot: int) -> bool:
        with self._lock:
            return any(self._slots[name] == slot for name in self._doubtful)

    def _make(self, parts: Parts, device: PciDevice | None = None) -> None:
        if has_nul(parts):
            raise NulCharacter
        with contextlib.ExitStack() as undo:
            for step in steps(parts):
                if step.does.name == "add-fd":
                    undo.callback(self._dropped.append, step.undoes)
                # Last of all comes the device, which only the guest can give back.
                if step.does.name == "device_add" and isinstance(device, DiskConfig):
                    pin_queues(self._control, [device])
                # Before it is done: one that timed out may have been done. If it was not, QEMU just says so.
                undo.callback(self._undo, step.undoes)
                try:
                    if step.does.name == "object-add" and step.fd is not None:
                        self._reopen(step.does, step.fd)
                        continue
                    self._control.execute(
                        step.does.name,
                        step.does.arguments,
                        timeout_s=_STEP_TIMEOUT_S,
                        fds=() if step.fd is None else (step.fd,),
                    )
                except QmpError as error:
                    if is_about_room(error.description):
                        raise NoRoomForMemory from error
                    raise _named(error) from None  # the same words
            undo.pop_all()

    def _reopen(self, command: Command, fd: int) -> None:
        """Carry out `command`, which opens by its path what is open as `fd`."""
        with contextlib.ExitStack() as undo:
            lent = self._control.execute("add-fd", fds=(admit(self._resources.doorway, fd, undo),))
            undo.callback(self._undo, Command("remove-fd", {"fdset-id": lent["fdset-id"]}))
            arguments = command.arguments | {"mem-path": opened(lent["fd"])}
            try:
                self._control.execute(command.name, arguments, timeout_s=_STEP_TIMEOUT_S)
            except QmpError as error:
                is_denied = error.description.endswith(os.strerror(errno.EACCES))
                if is_denied and self._resources.user is not None:
                    raise FileNotShown from error
                raise

    def _undo(self, command: Command) -> None:
        with contextlib.suppress(EngineError):
            self._control.execute(command.name, command.arguments, timeout_s=_UNDO_TIMEOUT_S)

    def _settle(self) -> None:
        """Ask again for the devices in doubt, and clear up behind those that QEMU does not have.

        One that it has goes as others do, when the guest lets go of it; until then its id and slot are taken.
        """
        for name in tuple(self._doubtful):
            with self._lock:
                is_first = self._ejections.ask(name)
            try:
                self._control.execute("device_del", {"id": qdev_id(name)}, timeout_s=_UNDO_TIMEOUT_S)
            except QmpError as error:
                if error.error_class == _NOT_FOUND:
                    if is_first:  # it never was there
                        with self._lock:
                            self._ejections.drop(name)
                    for command in self.remains_of(name) or ():
                        self._undo(command)
                    self.forget(name)
            except EngineError:
                continue

    def _note(self, device_id: str, slot: int, parts: Parts) -> None:
        with self._lock:
            self._slots[device_id] = slot
            self._remains[device_id] = remains(parts)
            self._fdsets[device_id] = fdsets_of(parts)

    def _own(self, backing: Backing) -> None:
        with self._lock:
            self._resources.backings = {**self._resources.backings, backing.device_id: backing}

    def _look_who_is_seen(self) -> None:
        """A guest that has placed a BAR has heard of the device, and of all that was to go until then."""
        with self._lock:
            if not self._ejections.unseen:
                return
        bars: dict[str, list[PciBar]] = {}
        with contextlib.suppress(EngineTimeout, QmpError):  # then nobody is
            bars = placed_bars(self._control.execute("query-pci"), device_id)
        with self._lock:
            for name, placed in bars.items():
                if placed:
                    self._ejections.note_seen(name)

    def _forget_unplugged(self, device_id: str) -> None:
        """Know that an addition failed, unless QEMU may have the device."""
        with self._lock:
            if device_id not in self._slots:
                self._ejections.drop(device_id)

    def _ask_guest(self, device_id: str) -> None:
        try:
            self._control.execute("device_del", {"id": qdev_id(device_id)})
        except QmpError as error:
            # It is gone, which is about to be told, or the guest was asked a moment ago.
            if error.error_class != _NOT_FOUND and _UNDER_WAY not in error.description:
                raise DeviceError(error.description) from None  # the same words


def fdsets_of(parts: Parts) -> dict[int, int]:
    """Return which descriptor of ours is in which set of QEMU's."""
    return {fdset.fd: fdset.set_id for fdset in parts.fdsets}


def _first_state(spec: MachineSpec, parts: list[Parts], *, has_network: bool) -> KeptHotplug:
    return KeptHotplug(
        slots=dict(spec.slots),
        remains={name: remains(each) for each in parts for name in _device_ids(each)},
        doubtful=[],
        asked=[],
        ejections=Ejections(),
        dropped=[],
        last_fdset=max((fdset.set_id for each in parts for fdset in each.fdsets), default=0),
        fdsets={name: fdsets_of(each) for each in parts for name in _device_ids(each)},
        has_network=has_network,
    )


def _device_ids(parts: Parts) -> list[str]:
    found = (device_id(device["id"]) for device in parts.devices if "id" in device)
    return [name for name in found if name is not None]


def _named(error: QmpError) -> EngineError:
    if is_about_slot(error.description):
        return SlotError(error.description)
    return DeviceError(error.description)
