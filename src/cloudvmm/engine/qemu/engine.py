"""The QEMU engine: which binary and accelerator, and the making of machines."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import partial

import msgspec

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.engine.base import (
    Adopted,
    BeginsAt,
    ConsoleSink,
    EngineError,
    EngineInfo,
    ImageLocked,
    MachineSpec,
    Origin,
    PayloadError,
    Reach,
    ReceivedFrom,
    SavedIn,
)
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.binary import find_binary, learn_facts
from cloudvmm.engine.qemu.confinement import Policy, confine_qemu, landlock_gap, reach_of
from cloudvmm.engine.qemu.console import written_files
from cloudvmm.engine.qemu.cpu import MAX_VCPUS
from cloudvmm.engine.qemu.disk import ImageLockError
from cloudvmm.engine.qemu.fact import KVM_DEVICE, QemuFacts
from cloudvmm.engine.qemu.handover import Handover, QueueGuard, take
from cloudvmm.engine.qemu.identity import Wish, find_obstacle, find_user
from cloudvmm.engine.qemu.keepsake import NotKept, check_kept
from cloudvmm.engine.qemu.kernel import check_payload
from cloudvmm.engine.qemu.kind import check_means
from cloudvmm.engine.qemu.launch import LaunchSpec, launch
from cloudvmm.engine.qemu.loan import lend_files
from cloudvmm.engine.qemu.machine import QemuMachine
from cloudvmm.engine.qemu.memory import module_id
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.parts import opened
from cloudvmm.engine.qemu.plan import arguments
from cloudvmm.engine.qemu.platform import has_vmgenid
from cloudvmm.engine.qemu.probe import WantedAccelerator, choose_accelerator
from cloudvmm.engine.qemu.qmp import Observer
from cloudvmm.engine.qemu.resource import Resources, acquire, naming_system_errors
from cloudvmm.engine.qemu.saved import SavedMachine, check_machine, check_on_demand, read_machine
from cloudvmm.engine.qemu.slot import FIRST_SLOT, LAST_SLOT
from cloudvmm.engine.qemu.snapshot import INCOMING, load_memory
from cloudvmm.engine.qemu.support import check_supported
from cloudvmm.engine.qemu.text import check_texts
from cloudvmm.engine.qemu.zone import zones_of
from cloudvmm.host.cgroup import parent_of_group
from cloudvmm.host.foreign import NotTraceable, check_traceable
from cloudvmm.host.id_map import IdMap
from cloudvmm.host.user import Want

_START_TIMEOUT_S = 30.0
_PREFAULT_BYTES_PER_S = 64 * 1024 * 1024


class QemuEngine:
    """An `engine.base.Engine`. Costs nothing to make: binary and accelerator are looked at on first use.

    `kvm_device` is where KVM is looked for and what guests then run on; another than /dev/kvm needs a QEMU
    that can be told so (9.0), and is no usable KVM to an older one. Without `has_sandbox` QEMU runs without
    seccomp filters, its own and ours, without `has_landlock` it and its companions are not held to their
    files. `user` says as whom QEMU runs where we are root. `groups` is a folder of control groups, in which
    each machine gets one. `observe` sees every QMP command of every machine
    before it is sent; `warn` is told where the host does not let QEMU be confined as it is to be, or
    the control group of a machine that is taken over be had.
    """

    outlives_manager = True

    def __init__(
        self,
        binary: str | None = None,
        accel: WantedAccelerator = "auto",
        *,
        kvm_device: str = KVM_DEVICE,
        has_sandbox: bool = True,
        has_landlock: bool = True,
        user: Wish = "auto",
        groups: str | None = None,
        observe: Observer | None = None,
        warn: Warn | None = None,
    ) -> None:
        self._binary = binary
        self._accel: WantedAccelerator = accel
        self._kvm_device = kvm_device
        self._has_sandbox = has_sandbox
        self._policy = Policy(has_landlock=has_landlock, has_filter=has_sandbox, user=user, groups=groups)
        self._observe = observe
        self._warn = warn
        self._known: QemuFacts | None = None
        self._adopted_groups: str | None = None
        self._lock = threading.Lock()
        self._attempts: set[Attempt] = set()

    @property
    def info(self) -> EngineInfo:
        """What this engine is.

        :raises EngineError: there is no QEMU that serves, or KVM was asked for and cannot be used.
        """
        facts = self.facts()
        return EngineInfo(
            name="QEMU",
            version=facts.version_text,
            accelerator=facts.accelerator,
            accelerator_reason=facts.accelerator_reason,
            first_slot=FIRST_SLOT,
            last_slot=LAST_SLOT,
            max_vcpus=MAX_VCPUS,
        )

    def facts(self) -> QemuFacts:
        """Return what is known about the QEMU in use. Blocking the first time, see `info`.

        :raises MachineGone: `abort_build` was called meanwhile.
        """
        with self._lock, self._attempt(self._policy) as attempt, naming_system_errors():
            if self._known is None:
                facts = learn_facts(find_binary(self._binary), attempt)
                accelerator, reason = choose_accelerator(
                    self._accel, facts, kvm_device=self._kvm_device, attempt=attempt
                )
                self._known = msgspec.structs.replace(
                    facts,
                    accelerator=accelerator,
                    accelerator_reason=reason,
                    kvm_device=self._kvm_device,
                )
            return self._known

    def build(self, spec: MachineSpec) -> QemuMachine:
        check_supported(spec.vm_config)
        if spec.state_dir is not None:
            _check_outlives(spec)
        check_texts(spec.vm_config)
        payload_error = _payload_error(spec)
        policy = msgspec.structs.replace(self._policy, is_enclosed=spec.vm_config.landlock_enable)
        with self._attempt(policy, spec.state_dir) as attempt, naming_system_errors():
            if payload_error is None:
                try:
                    return self._build(spec, attempt, payload_error=None)
                except PayloadError as error:
                    # It looked well but QEMU cannot load it. The devices are still to be tried.
                    payload_error = error
            try:
                return self._build(_without_payload(spec), attempt, payload_error=payload_error)
            except PayloadError as error:
                # There was none: the words were not about it.
                raise EngineError(str(error)) from error.__cause__

    def adopt(self, state_dir: str) -> Adopted | None:
        from cloudvmm.engine.qemu.adoption import adopt  # once in a life, if ever

        with naming_system_errors():
            adopted = adopt(state_dir, observe=self._observe, warn=self._warn or unheard)
        # It is removed there, be that where we make groups or not.
        self._adopted_groups = parent_of_group(state_dir)
        return adopted

    def discard(self, state_dir: str) -> None:
        from cloudvmm.engine.qemu.adoption import discard

        discard(state_dir)

    def check_postcopy(self, *, is_receiver: bool) -> None:
        from cloudvmm.engine.qemu.postcopy import check_postcopy

        check_postcopy(self.facts(), is_receiver=is_receiver)

    def reach(self, vm_config: VmConfig) -> Reach:
        return reach_of(self._policy, self.facts(), vm_config, adopted_groups=self._adopted_groups)

    def another(self) -> QemuEngine:
        engine = QemuEngine(
            self._binary,
            self._accel,
            kvm_device=self._kvm_device,
            has_sandbox=self._has_sandbox,
            has_landlock=self._policy.has_landlock,
            user=self._policy.user,
            groups=self._policy.groups,
            observe=self._observe,
            warn=self._warn,
        )
        engine._known = self._known
        return engine

    def abort_build(self) -> None:
        for attempt in tuple(self._attempts):
            attempt.abort()

    def _tell_gaps(self, *gaps: str | None) -> None:
        """Warn, once, where QEMU is not held as it is to be."""
        found = [gap for gap in gaps if gap is not None]
        if found and self._warn is not None:
            for gap in found:
                self._warn(gap)
            self._warn = None

    @contextlib.contextmanager
    def _attempt(self, policy: Policy, state_dir: str | None = None) -> Iterator[Attempt]:
        attempt = Attempt(policy=policy, state_dir=state_dir)
        self._attempts.add(attempt)
        try:
            yield attempt
        finally:
            self._attempts.discard(attempt)

    def _build(
        self, spec: MachineSpec, attempt: Attempt, *, payload_error: PayloadError | None
    ) -> QemuMachine:
        facts = self.facts()
        memory = spec.vm_config.memory
        check_means(spec.vm_config, facts)
        user, user_gap = find_user(self._policy.user, facts.binary)
        attempt.user = user
        self._tell_gaps(landlock_gap(self._policy, facts), user_gap)
        origin = spec.origin
        saved = _check_saved(spec, origin, facts) if isinstance(origin, SavedIn | BeginsAt) else None
        with contextlib.ExitStack() as lent, contextlib.ExitStack() as undo:
            owned = undo.enter_context(contextlib.ExitStack())
            id_map = None if user is None else lent.enter_context(IdMap(user))
            if id_map is not None and isinstance(origin, SavedIn) and origin.is_on_demand:
                id_map.prepare()  # QEMU will open the saved memory, which is ours
            handover = Handover()
            if isinstance(spec.origin, ReceivedFrom) and spec.origin.is_local:
                handover = take(spec.origin.link_fd, lent, attempt.check)
            resources = acquire(spec, owned, attempt=attempt, handover=handover)
            if spec.state_dir is not None:
                check_kept(resources.backings.values())
            # A QEMU that opens an image for writing writes at once: it repairs, and marks bitmaps as in use.
            # The images of a guest that comes are its sender's until it is here; QEMU leaves them alone.
            is_coming = isinstance(origin, ReceivedFrom)
            lock_error = None if is_coming else _lock_error(resources)
            if lock_error is not None and origin is not None:
                raise lock_error
            if isinstance(origin, SavedIn | BeginsAt) and saved is not None:
                is_on_demand = isinstance(origin, BeginsAt) or origin.is_on_demand
                load_memory(
                    saved,
                    resources.memories,
                    origin,
                    # Who else maps it must see what the guest writes.
                    is_on_demand=is_on_demand and not resources.maps_memory,
                    check=attempt.check,
                )
            if lock_error is not None:
                resources.release_images()
                spec = _without_disks(spec)
            loan = lend_files(
                id_map,
                spec.vm_config.payload,
                reopened=resources.reopened_fds,
                written=resources.private_fds,
                undo=lent,
            )
            if (gap := find_obstacle(self._policy.user, loan.wanted)) is not None:
                user = attempt.user = None
                resources.stay_ours()
                loan = lend_files(None, spec.vm_config.payload, reopened=(), written=(), undo=lent)
                self._tell_gaps(gap)
            if id_map is not None:
                id_map.close()
            has_urgent = isinstance(origin, ReceivedFrom) and origin.is_postcopy
            launch_spec = LaunchSpec(
                arguments=[
                    *arguments(_with_payload(spec, loan.payload), resources, facts),
                    *(INCOMING if origin is not None else ()),
                ],
                has_sandbox=self._has_sandbox,
                has_urgent=has_urgent,
                confine=partial(
                    confine_qemu(
                        attempt.policy,
                        facts,
                        spec.vm_config,
                        files=written_files(zip(_sinks(spec), resources.streams, strict=True)),
                        private_files=map(opened, resources.private_fds),
                        doorway=resources.doorway,
                        has_network=resources.needs_network,
                        has_faults=has_urgent,
                        user=user,
                        wanted=[*loan.wanted, *(Want(path, os.W_OK) for path in resources.connected_paths)],
                    ).enter,
                    resources.reopened_fds,
                ),
                fds=[*resources.inherited_fds, *spec.kept_fds, *loan.fds],
                shown=loan.shown,
                names=loan.names,
                group_fd=None if resources.group is None else resources.group.procs_fd,
                state_dir=spec.state_dir,
                thp=memory.thp,
                timeout_s=_START_TIMEOUT_S + resources.memory.size / _PREFAULT_BYTES_PER_S,
            )
            with QueueGuard(handover.queues):
                process, monitors = launch(launch_spec, facts, owned, attempt=attempt, observe=self._observe)
            machine = QemuMachine(
                spec,
                process=process,
                monitors=monitors,
                resources=resources,
                undo=owned,
                refusal=lock_error or payload_error,
                facts=facts,
                policy=attempt.policy,
            )
            undo.callback(machine.close)
            machine.bind_vcpus()
            machine.pin_queues(spec.vm_config.disks or [])
            machine.keep()
            try:
                _go_on(machine, origin)
            finally:
                attempt.check()
            undo.pop_all()
        return machine


def _sinks(spec: MachineSpec) -> tuple[ConsoleSink, ConsoleSink, ConsoleSink]:
    return spec.serial, spec.console, spec.debug_console


def _check_outlives(spec: MachineSpec) -> None:
    """:raises NotKept: a machine that outlives us cannot be had, or not such a one."""
    if spec.debugger_fd is not None or spec.vm_config.gdb:
        raise NotKept("a debugger")
    if isinstance(spec.origin, ReceivedFrom) and spec.origin.is_postcopy:
        raise NotKept("memory that follows its guest")
    try:
        check_traceable()
    except NotTraceable as error:
        raise NotKept("a user who may not trace its own processes") from error


def _go_on(machine: QemuMachine, origin: Origin | None) -> None:
    match origin:
        case SavedIn() | BeginsAt():
            machine.restore(origin)
        case ReceivedFrom():
            machine.receive(origin)
        case None:
            pass


def _check_saved(spec: MachineSpec, origin: SavedIn | BeginsAt, facts: QemuFacts) -> SavedMachine:
    """Return what the machine in `origin` says of itself.

    :raises StateError: that of `spec` cannot go on from it.
    """
    vm_config = spec.vm_config
    saved, rams = read_machine(origin), memory_of(vm_config).rams
    first = next(iter(rams.values()))
    modules = {module_id(number): first.module(size) for number, size in enumerate(spec.modules)}
    zones = {zone_id: zone.ram for zone_id, zone in zones_of(vm_config.memory).items()}
    check_machine(
        saved,
        origin,
        facts,
        vm_config.cpus,
        {**rams, **modules, **zones},
        has_vmgenid=has_vmgenid(vm_config.platform),
    )
    if isinstance(origin, SavedIn) and origin.is_on_demand:
        check_on_demand(saved, facts, rams.items())
    return saved


def _payload_error(spec: MachineSpec) -> PayloadError | None:
    try:
        check_payload(spec.vm_config.payload)
    except PayloadError as error:
        return error
    return None


def _lock_error(resources: Resources) -> EngineError | None:
    try:
        resources.lock_images()
    except (ImageLocked, ImageLockError) as error:
        return error
    return None


def _without_disks(spec: MachineSpec) -> MachineSpec:
    vm_config = msgspec.structs.replace(spec.vm_config, disks=None)
    return msgspec.structs.replace(spec, vm_config=vm_config)


def _without_payload(spec: MachineSpec) -> MachineSpec:
    return _with_payload(spec, None)


def _with_payload(spec: MachineSpec, payload: PayloadConfig | None) -> MachineSpec:
    vm_config = msgspec.structs.replace(spec.vm_config, payload=payload)
    return msgspec.structs.replace(spec, vm_config=vm_config)
