"""Taking over the machine of a manager that is gone: from what it left in the folder, and from QEMU itself.

QEMU has our ends of its monitors open beside its own, and everything that its devices stand on. So the new
manager gets the very descriptors of the old one, the conversation goes on where it stopped, and what QEMU
said meanwhile is still there. What the old manager wrote down is compared with what QEMU says; where they
differ, QEMU is right.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, TypeVar

from cloudvmm.config import form
from cloudvmm.config.error import DecodeError
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.engine.base import Adopted, ConsoleSink, EngineError, MachineSpec, SinkKind
from cloudvmm.engine.qemu import keepsake
from cloudvmm.engine.qemu.adopted_process import AdoptedProcess
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.claim import sweep_claims
from cloudvmm.engine.qemu.codec import Event
from cloudvmm.engine.qemu.companion import Companion, ServedBacking, helper_files
from cloudvmm.engine.qemu.disk import DiskBacking
from cloudvmm.engine.qemu.keepsake import (
    Coming,
    Keepsake,
    KeepsakeInvalid,
    KeptBacking,
    KeptCompanion,
    Place,
    TakeCompanion,
    no_companion,
)
from cloudvmm.engine.qemu.launch import Monitors, pid_path
from cloudvmm.engine.qemu.machine import QemuMachine
from cloudvmm.engine.qemu.memory import RamBacking, module_id, module_name
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.parts import Command
from cloudvmm.engine.qemu.qmp import Observer, QmpClient, QmpError
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.vcpu import QUERY as VCPU_QUERY
from cloudvmm.engine.qemu.vcpu import is_taken
from cloudvmm.engine.qemu.vsock import VsockBacking
from cloudvmm.engine.qemu.zone import ZoneBacking
from cloudvmm.host.cgroup import ControlGroup, remove_group
from cloudvmm.host.doorway import Doorway, remove_doorway
from cloudvmm.host.foreign import ForeignProcess, OpenFile
from cloudvmm.host.pid_file import find_process, remove

_ANSWER_S: Final = 10.0
_UNDO_S: Final = 5.0
_END_S: Final = 10.0
_CALLED_OFF_S: Final = 30.0
_LOOK_S: Final = 0.01
_MIGRATES: Final = ("setup", "active", "device", "pre-switchover", "wait-unplug")
_GUEST_OFF: Final = "shutdown"
_WATCHDOG: Final = "watchdog"
_FAULT: Final = "internal-error"
_NO_SINK: Final = ConsoleSink(kind=SinkKind.OFF)

B = TypeVar("B", bound=Backing)


class NotAdoptable(EngineError):
    """The VM that the last manager left runs, and cannot be taken over"""


class MonitorLost(EngineError):
    """QEMU no longer has the connection over which it was spoken to"""


class DescriptorLost(EngineError):
    def __init__(self, number: int) -> None:
        super().__init__(f"QEMU no longer has what the last manager had open as {number}")


def adopt(state_dir: str, *, observe: Observer | None = None, warn: Warn = unheard) -> Adopted | None:
    """Blocking. As `Engine.adopt`. `warn` is told what could not be taken over, and is not missed."""
    found = find_process(pid_path(state_dir))
    if found is None:
        clear(state_dir)
        return None
    with ExitStack() as undo:
        undo.callback(found.close)
        try:
            kept = keepsake.read(state_dir)
            if kept is None or not _is_whole(found, kept, observe):
                _end(found, state_dir)
                return None
            with ExitStack() as failed:
                adopted = _take_over(state_dir, found, kept, failed, observe, warn)
                failed.pop_all()
                return adopted
        except (OSError, EngineError) as error:
            raise NotAdoptable from error


def discard(state_dir: str) -> None:
    """Blocking. As `Engine.discard`."""
    found = find_process(pid_path(state_dir))
    if found is None:
        clear(state_dir)
        return
    with contextlib.closing(found):
        _end(found, state_dir)


def _end(found: ForeignProcess, state_dir: str) -> None:
    found.kill()
    found.wait_end(_END_S)
    clear(state_dir)


def clear(state_dir: str) -> None:
    """Blocking. Remove what a machine that is gone has left in the folder and on the host."""
    with contextlib.suppress(EngineError):
        kept = keepsake.read(state_dir)
        if kept is not None:
            _close_backings(kept)
    _sweep(state_dir, ())
    remove_group(state_dir)
    with contextlib.suppress(OSError):
        remove_doorway(state_dir)
    keepsake.remove(state_dir)
    for name in ("pid", "argv", "qemu.log", "machine.new"):
        remove(f"{state_dir}/{name}")


def _sweep(state_dir: str, backings: Collection[Backing]) -> None:
    """End the helper programs of all but `backings`, and remove the sockets of the same.

    A manager that was killed while it made a device has them, and has written nothing else of it.
    """
    served = [backing.companion for backing in backings if isinstance(backing, ServedBacking)]
    kept = {companion.pid_file for companion in served if companion is not None}
    for path in helper_files(state_dir):
        if path in kept:
            continue
        helper = find_process(path)
        if helper is not None:
            helper.kill()
            helper.wait_end(_END_S)
            helper.close()
        remove(path)
    claims = [backing.claim for backing in backings if isinstance(backing, VsockBacking)]
    with contextlib.suppress(OSError):
        sweep_claims(state_dir, kept=[claim for claim in claims if claim is not None])


def _close_backings(kept: Keepsake) -> None:
    """Let go of what devices had on the host beside what they had open, such as limits and sockets."""
    for each in (*kept.backings.values(), *([] if kept.coming is None else [kept.coming.backing])):
        with contextlib.suppress(EngineError, OSError):
            backing = keepsake.restore(each)
            backing.move(lambda _: -1)
            backing.close()


def _is_whole(found: ForeignProcess, kept: Keepsake, observe: Observer | None) -> bool:
    """Say whether the machine was booted, or was about to be and runs.

    :raises EngineError: QEMU cannot be asked. :raises OSError: nor had.
    """
    if kept.was_booted:
        return True
    with contextlib.closing(_join(found, kept.monitors[0], observe)) as control:
        control.rejoin(timeout_s=_ANSWER_S)
        return bool(control.execute("query-status")["running"])


def _join(found: ForeignProcess, monitor: OpenFile, observe: Observer | None) -> QmpClient:
    for number, file in found.descriptors().items():
        if file == monitor:
            return QmpClient(socket.socket(fileno=found.take(number)), observe=observe)
    raise MonitorLost


def _take_over(
    state_dir: str,
    found: ForeignProcess,
    kept: Keepsake,
    undo: ExitStack,
    observe: Observer | None,
    warn: Warn,
) -> Adopted:
    clients = []
    for monitor in kept.monitors:
        clients.append(_join(found, monitor, observe))
        undo.callback(clients[-1].close)
    monitors = Monitors(*clients)
    heard = [event for client in clients for event in client.rejoin(timeout_s=_ANSWER_S)]
    control = monitors.control
    finder = _Finder(found, control)
    undo.callback(finder.close)
    _call_off(kept, control)
    settle(kept, finder, control)
    kept_fds = {number: finder.find(number, Place(file)) for number, file in kept.kept.items()}
    spec = _spec(kept, state_dir, tuple(kept_fds.values()))
    resources, ended = _resources(kept, spec.vm_config, finder, _peripherals(control))
    resources.user = found.user()
    if kept.has_doorway:
        resources.doorway = Doorway(state_dir, reader=resources.user)
    resources.group = _group(state_dir, kept, warn)
    if resources.group is not None:
        undo.callback(resources.group.leave)
    _sweep(state_dir, resources.backings.values())
    status = control.execute("query-status")
    events = _once(heard, since=kept.heard_at)
    events += _missed(events, status["status"], kept, control)
    process = AdoptedProcess(found, name="QEMU", pid_file=pid_path(state_dir), state_dir=state_dir)
    owned = ExitStack()
    owned.callback(resources.close)
    for client in clients:
        owned.callback(client.close)
    owned.callback(process.close)
    machine = QemuMachine(
        spec,
        process=process,
        monitors=monitors,
        resources=resources,
        undo=owned,
        refusal=None,
        facts=kept.facts,
        policy=kept.policy,
        kept=kept,
    )
    machine.watch(events, ended)
    machine.look(is_running=status["running"])
    machine.keep()
    return Adopted(
        machine,
        is_running=status["running"],
        kept_fds=kept_fds,
        device_ids=frozenset(kept.hotplug.slots),
        vcpus=sum(map(is_taken, control.execute(VCPU_QUERY))),
        modules=tuple(module.ram.size for module in resources.modules),
    )


def _group(state_dir: str, kept: Keepsake, warn: Warn) -> ControlGroup | None:
    """Return the machine's control group. Whoever cannot have it can have the guest all the same."""
    try:
        group = ControlGroup.adopt(state_dir)
    except OSError as error:
        warn(f"What is in the control group of the VM is not ended with it: {error}")
        return None
    if group is None and kept.policy.groups is not None:
        warn(f"The control group of the VM is not there any more, below {kept.policy.groups}")
    return group


def _call_off(kept: Keepsake, control: QmpClient) -> None:
    """End a saving or sending that nobody waits for any more; the guest runs on, if it did."""
    found = control.execute("query-migrate")
    told, has_sent = found.get("status", "none"), "ram" in found
    if told in _MIGRATES:
        control.execute("migrate_cancel")
        deadline = time.monotonic() + _CALLED_OFF_S
        while told in (*_MIGRATES, "cancelling") and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            told = control.execute("query-migrate").get("status", "none")
    if has_sent and not control.execute("query-status")["running"]:
        kept.is_spent = True
    for job in control.execute("query-block-jobs"):
        _try(control, Command("block-job-cancel", {"device": job["device"], "force": True}))


def _spec(kept: Keepsake, state_dir: str, kept_fds: tuple[int, ...]) -> MachineSpec:
    try:
        vm_config = form.decode_saved(bytes(kept.vm_config), VmConfig)
    except DecodeError as error:
        raise KeepsakeInvalid from error
    return MachineSpec(
        vm_config=vm_config,
        slots=kept.slots,
        serial=_NO_SINK,
        console=_NO_SINK,
        debug_console=_NO_SINK,
        state_dir=state_dir,
        modules=kept.spec_modules,
        kept_fds=kept_fds,
    )


class _Finder:
    """Gets what the old manager had open from QEMU, each descriptor of QEMU's once."""

    def __init__(self, found: ForeignProcess, control: QmpClient) -> None:
        self._found = found
        self._open = found.descriptors()
        sets = control.execute("query-fdsets")
        self._sets = {each["fdset-id"]: [entry["fd"] for entry in each["fds"]] for each in sets}
        self._taken: set[int] = set()
        self._ours: list[int] = []

    def find(self, number: int, place: Place | None) -> int:
        """Return a descriptor for what had this `number`.

        :raises DescriptorLost: QEMU does not have it.
        """
        if place is None:
            raise DescriptorLost(number)
        for candidate in self._candidates(number, place):
            if candidate not in self._taken and self._open.get(candidate) == place.file:
                self._taken.add(candidate)
                self._ours.append(self._found.take(candidate))
                return self._ours[-1]
        raise DescriptorLost(number)

    def find_if_any(self, number: int, place: Place | None) -> int:
        """As `find`, for what QEMU may have closed, with its device or behind a hang-up; then -1."""
        try:
            return self.find(number, place)
        except DescriptorLost:
            return -1

    def close(self) -> None:
        """Close all that was found."""
        for fd in self._ours:
            os.close(fd)

    def _candidates(self, number: int, place: Place) -> Iterable[int]:
        if place.fdset is not None:
            return self._sets.get(place.fdset, [])
        return [number, *self._open]


def settle(kept: Keepsake, finder: _Finder, control: QmpClient) -> None:
    """Finish or take back the addition that was under way, in QEMU and in `kept`."""
    if (coming := kept.coming) is not None:
        if qdev_id(coming.device_id) in _peripherals(control):
            _take_in(kept, coming)
        else:
            for command in coming.undo:
                _try(control, command)
            kept.hotplug.ejections.drop(coming.device_id)
            _drop_backing(coming, finder)
        kept.coming = None
    if (module := kept.coming_module) is not None:
        number = len(kept.modules)
        if any(each["data"].get("id") == module_name(number) for each in _memory_devices(control)):
            kept.modules.append(module)
            kept.ram_bytes += _restored(module, RamBacking).ram.size
        else:
            _try(control, Command("object-del", {"id": module_id(number)}))
        kept.coming_module = None


def _take_in(kept: Keepsake, coming: Coming) -> None:
    name = coming.device_id
    kept.hotplug.slots[name] = coming.slot
    kept.hotplug.remains[name] = coming.remains
    kept.hotplug.fdsets[name] = coming.fdsets
    kept.backings[name] = coming.backing
    kept.places |= coming.places
    kept.disks |= coming.disks


def _drop_backing(coming: Coming, finder: _Finder) -> None:
    """Let go of what the device stood on, as far as QEMU still has it: the rest went with the old manager."""
    with contextlib.suppress(EngineError, OSError):
        backing = keepsake.restore(coming.backing, _find_companion)
        backing.move(lambda number: finder.find_if_any(number, coming.places.get(number)))
        backing.release()
        backing.close()


def _resources(
    kept: Keepsake, vm_config: VmConfig, finder: _Finder, present: set[str]
) -> tuple[Resources, list[str]]:
    """Return what the machine stands on, and those of its devices whose helper programs have ended.

    `present` are the devices that QEMU has.
    """

    def restored(
        each: KeptBacking, kind: type[B], take: TakeCompanion = no_companion, *, is_present: bool = True
    ) -> B:
        backing = _restored(each, kind, take)
        is_needed = is_present and isinstance(backing, DiskBacking | RamBacking)
        find = finder.find if is_needed else finder.find_if_any
        moved: dict[int, int] = {}

        def move(number: int) -> int:
            moved[number] = find(number, kept.places.get(number))
            return moved[number]

        backing.move(move)
        if sets := kept.hotplug.fdsets.get(backing.device_id):
            kept.hotplug.fdsets[backing.device_id] = {moved[old]: sets[old] for old in sets if old in moved}
        return backing

    def find_helper(of: str, companion: KeptCompanion) -> Companion | None:
        found = _find_companion(companion)
        if found is None and qdev_id(of) in present:
            ended.append(of)
        return found

    ended: list[str] = []
    backings = {
        name: restored(each, Backing, partial(find_helper, name), is_present=qdev_id(name) in present)
        for name, each in kept.backings.items()
    }
    resources = Resources(
        memory=memory_of(vm_config),
        rams={name: restored(each, RamBacking) for name, each in kept.rams.items()},
        modules=[restored(each, RamBacking) for each in kept.modules],
        zones={name: restored(each, ZoneBacking) for name, each in kept.zones.items()},
        backings=backings,
    )
    return resources, ended


def _restored(each: KeptBacking, kind: type[B], take: TakeCompanion = no_companion) -> B:
    backing = keepsake.restore(each, take)
    if not isinstance(backing, kind):
        raise KeepsakeInvalid
    return backing


def _find_companion(kept: KeptCompanion) -> Companion | None:
    found = find_process(kept.pid_file)
    if found is None or found.process_id != kept.process_id:
        return None
    return Companion.adopt(found, name=kept.name, pid_file=kept.pid_file)


def _once(events: Iterable[Event], *, since: int) -> list[Event]:
    """Return `events`, which came over several monitors, once each, without those that were heard before."""
    unique = {(event.at, event.name, repr(event.data)): event for event in events if event.at > since}
    return [unique[key] for key in sorted(unique)]


def _missed(events: list[Event], status: str, kept: Keepsake, control: QmpClient) -> list[Event]:
    """Return what must have happened, since it is so, and what nobody tells of."""
    told = {event.name for event in events}
    missed = []
    present = _peripherals(control)
    gone = {event.data.get("device") for event in events if event.name == "DEVICE_DELETED"}
    for name in map(qdev_id, kept.backings):
        if name not in present and name not in gone:
            missed.append(Event("DEVICE_DELETED", {"device": name}))
    if kept.vcpus.target is not None:
        missed.append(Event("DEVICE_DELETED", {}))  # the vCPUs that are left are counted
    if status == _GUEST_OFF and "SHUTDOWN" not in told:
        missed.append(Event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}))
    if status == _WATCHDOG and "WATCHDOG" not in told:
        missed.append(Event("WATCHDOG", {"action": "pause"}))
    if status == _FAULT:
        missed.append(Event("STOP", {}))  # why it stands is asked then
    with contextlib.suppress(QmpError):  # there is no balloon
        missed.append(Event("BALLOON_CHANGE", {"actual": control.execute("query-balloon")["actual"]}))
    for device in _memory_devices(control):
        if device["type"] == "virtio-mem":
            data = {"id": device["data"].get("id", ""), "size": device["data"]["size"]}
            missed.append(Event("MEMORY_DEVICE_SIZE_CHANGE", data))
    return missed


def _peripherals(control: QmpClient) -> set[str]:
    return {each["name"] for each in control.execute("qom-list", {"path": "/machine/peripheral"})}


def _memory_devices(control: QmpClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = control.execute("query-memory-devices")
    return found


def _try(control: QmpClient, command: Command) -> None:
    with contextlib.suppress(QmpError):
        control.execute(command.name, command.arguments, timeout_s=_UNDO_S)
