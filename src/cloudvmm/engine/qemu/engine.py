"""The QEMU engine: which binary and accelerator, and the making of machines."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import msgspec

from cloudvmm.engine.base import (
    BeginsAt,
    EngineError,
    EngineInfo,
    ImageLocked,
    MachineSpec,
    Origin,
    PayloadError,
    ReceivedFrom,
    SavedIn,
)
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.binary import find_binary, learn_facts
from cloudvmm.engine.qemu.cpu import MAX_VCPUS
from cloudvmm.engine.qemu.disk import ImageLockError
from cloudvmm.engine.qemu.fact import KVM_DEVICE, QemuFacts
from cloudvmm.engine.qemu.handover import Handover, QueueGuard, take
from cloudvmm.engine.qemu.kernel import check_payload
from cloudvmm.engine.qemu.kind import check_means
from cloudvmm.engine.qemu.launch import LaunchSpec, launch
from cloudvmm.engine.qemu.machine import QemuMachine
from cloudvmm.engine.qemu.memory import module_id
from cloudvmm.engine.qemu.numa import memory_of
from cloudvmm.engine.qemu.plan import arguments
from cloudvmm.engine.qemu.probe import WantedAccelerator, choose_accelerator
from cloudvmm.engine.qemu.qmp import Observer
from cloudvmm.engine.qemu.resource import Resources, acquire, naming_system_errors
from cloudvmm.engine.qemu.saved import SavedMachine, check_machine, check_on_demand, read_machine
from cloudvmm.engine.qemu.slot import FIRST_SLOT, LAST_SLOT
from cloudvmm.engine.qemu.snapshot import INCOMING, load_memory
from cloudvmm.engine.qemu.support import check_supported
from cloudvmm.engine.qemu.text import check_texts
from cloudvmm.engine.qemu.zone import zones_of

_START_TIMEOUT_S = 30.0
_PREFAULT_BYTES_PER_S = 64 * 1024 * 1024


class QemuEngine:
    """An `engine.base.Engine`. Costs nothing to make: binary and accelerator are looked at on first use.

    `kvm_device` is where KVM is looked for and what guests then run on; another than /dev/kvm needs a QEMU
    that can be told so (9.0), and is no usable KVM to an older one. Without `has_sandbox` QEMU runs without
    its seccomp filter. `observe` sees every QMP command of every
    machine before it is sent.
    """

    def __init__(
        self,
        binary: str | None = None,
        accel: WantedAccelerator = "auto",
        *,
        kvm_device: str = KVM_DEVICE,
        has_sandbox: bool = True,
        observe: Observer | None = None,
    ) -> None:
        self._binary = binary
        self._accel: WantedAccelerator = accel
        self._kvm_device = kvm_device
        self._has_sandbox = has_sandbox
        self._observe = observe
        self._known: QemuFacts | None = None
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
        with self._lock, self._attempt() as attempt, naming_system_errors():
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
        check_texts(spec.vm_config)
        payload_error = _payload_error(spec)
        with self._attempt() as attempt, naming_system_errors():
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

    def check_postcopy(self, *, is_receiver: bool) -> None:
        from cloudvmm.engine.qemu.postcopy import check_postcopy

        check_postcopy(self.facts(), is_receiver=is_receiver)

    def another(self) -> QemuEngine:
        engine = QemuEngine(
            self._binary,
            self._accel,
            kvm_device=self._kvm_device,
            has_sandbox=self._has_sandbox,
            observe=self._observe,
        )
        engine._known = self._known
        return engine

    def abort_build(self) -> None:
        for attempt in tuple(self._attempts):
            attempt.abort()

    @contextlib.contextmanager
    def _attempt(self) -> Iterator[Attempt]:
        attempt = Attempt()
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
        origin = spec.origin
        saved = _check_saved(spec, origin, facts) if isinstance(origin, SavedIn | BeginsAt) else None
        with contextlib.ExitStack() as undo:
            owned = undo.enter_context(contextlib.ExitStack())
            handover = Handover()
            if isinstance(spec.origin, ReceivedFrom) and spec.origin.is_local:
                handover = take(spec.origin.link_fd, undo, attempt.check)
            resources = acquire(spec, owned, attempt=attempt, handover=handover)
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
            launch_spec = LaunchSpec(
                arguments=[
                    *arguments(spec, resources, facts),
                    *(INCOMING if origin is not None else ()),
                ],
                has_sandbox=self._has_sandbox,
                fds=resources.inherited_fds,
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
            )
            undo.callback(machine.close)
            machine.start_counting()
            machine.bind_vcpus()
            machine.pin_queues(spec.vm_config.disks or [])
            try:
                _go_on(machine, origin)
            finally:
                attempt.check()
            undo.pop_all()
        return machine


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
    check_machine(saved, origin, facts, vm_config.cpus, {**rams, **modules, **zones})
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
    vm_config = msgspec.structs.replace(spec.vm_config, payload=None)
    return msgspec.structs.replace(spec, vm_config=vm_config)
