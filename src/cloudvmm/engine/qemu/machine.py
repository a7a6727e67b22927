"""A VM as a QEMU process: what `engine.base.Machine` promises, said in QMP.

The worker's calls go over the monitor `control`, the reader's over `reader`, the loop listens on `events`;
so neither waits for the other. Starting QEMU is `launch.py`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import (
    Base,
    BeginsAt,
    DeviceRemoved,
    DriverChanged,
    DriverKind,
    EngineError,
    EngineEvent,
    EngineTimeout,
    Exited,
    FrozenDisk,
    HelperEnded,
    MachineGone,
    MachineSpec,
    OnSaved,
    PciBar,
    PciChanged,
    ReceivedFrom,
    Saved,
    SavedIn,
    SentTo,
    VcpuStarted,
    drop_saved,
)
from cloudvmm.engine.qemu import keepsake
from cloudvmm.engine.qemu.affinity import pin_queues
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.burst import BurstWatch
from cloudvmm.engine.qemu.codec import Event
from cloudvmm.engine.qemu.companion import ServedBacking
from cloudvmm.engine.qemu.confinement import Policy
from cloudvmm.engine.qemu.counter import (
    balloon_counters,
    counting_command,
    disk_counters,
    net_counters,
    statistics_question,
)
from cloudvmm.engine.qemu.debugger import DebugWatch, serve_debugger
from cloudvmm.engine.qemu.device import balloon_target_bytes, statistics_source
from cloudvmm.engine.qemu.driver import DriverWatch
from cloudvmm.engine.qemu.event import EventStream
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.hotplug import Hotplug
from cloudvmm.engine.qemu.keeper import Keeper, encode_config
from cloudvmm.engine.qemu.keepsake import Keepsake, NotKept
from cloudvmm.engine.qemu.launch import Monitors
from cloudvmm.engine.qemu.migration import Carrier
from cloudvmm.engine.qemu.name import device_id, qdev_id
from cloudvmm.engine.qemu.pci import placed_bars
from cloudvmm.engine.qemu.platform import has_vmgenid
from cloudvmm.engine.qemu.process import ChildProcess
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.room import check_disk
from cloudvmm.engine.qemu.saved import MemoryBase, cpu_model
from cloudvmm.engine.qemu.snapshot import NotRestorable, Saver, let_run, load_state
from cloudvmm.engine.qemu.vcpu import Vcpus
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking
from cloudvmm.host.foreign import open_file

if TYPE_CHECKING:
    from cloudvmm.engine.qemu.postcopy import PostcopyCarrier

_STOP_TIMEOUT_S = 60.0  # what the disks have under way is finished first
_QUERY_TIMEOUT_S = 10.0  # a host that is busy stands still for seconds
_END_TIMEOUT_S = 1.0  # from the end of its monitor to its own
_DUMP_TIMEOUT_S = 30.0
_DUMP_THREAD = "dump_thread"
_DUMP_THREAD_END_S = 5.0
_DUMP_BYTES_PER_S = 10 * 1024 * 1024


class DumpFailed(EngineError):
    """QEMU could not write the core; the text is its own words."""


class GuestElsewhere(EngineError):
    """The guest has gone on in the other VMM and has written to its memory since: delete the VM"""


class DeviceNotSaved(EngineError):
    def __init__(self, device_id: str, *, reason: str) -> None:
        super().__init__(f"A VM with the device {device_id} cannot be saved: {reason}")


class QemuMachine:
    """Owns `process`, `monitors` and what `undo` releases. Made by `QemuEngine.build`.

    `refusal` is what `boot` has to say about images or payload, which QEMU was then started without.
    """

    def __init__(
        self,
        spec: MachineSpec,
        *,
        process: ChildProcess,
        monitors: Monitors,
        resources: Resources,
        undo: contextlib.ExitStack,
        refusal: EngineError | None,
        facts: QemuFacts,
        policy: Policy,
        kept: Keepsake | None = None,
    ) -> None:
        self._process = process
        self._monitors = monitors
        self._resources = resources
        self._undo = undo
        self._refusal = refusal
        self._ram_bytes = resources.memory.size + sum(spec.modules)
        self._balloon_target_bytes = balloon_target_bytes(spec, resources.memory.size)
        self._statistics_source = statistics_source(spec)
        self._disks = {
            disk.id: disk for disk in spec.vm_config.disks or [] if disk.id and not disk.vhost_user
        }
        # Device id to interface and what it had counted before.
        self._taps = {name: (tap, net_counters(tap)) for name, tap in resources.interfaces.items()}
        self._unmeasured = list(self._disks)  # QEMU does not yet keep how long their requests take
        self._was_booted = False
        self._was_restored = False
        self._is_unlocked = False
        self._postcopy: PostcopyCarrier | None = None
        self._is_elsewhere = False
        self._facts = facts
        self._killed = False
        self._policy = policy
        self._spec = spec
        self._config = encode_config(spec.vm_config) if spec.state_dir is not None else keepsake.NOTHING
        self._keeper = Keeper(spec.state_dir, self._keepsake)
        self._untold: list[EngineEvent] = []
        self._hotplug = Hotplug(
            spec,
            resources,
            monitors.control,
            facts,
            policy,
            kept=None if kept is None else kept.hotplug,
            on_coming=self._keeper.note_coming,
            on_leaving=self._keeper.keep,
        )
        self._saver = Saver(
            monitors.control,
            resources,
            facts,
            cpu=cpu_model(spec.vm_config.cpus, facts),
            has_ivshmem=spec.vm_config.ivshmem is not None,
            has_vmgenid=has_vmgenid(spec.vm_config.platform),
        )
        self._debugger_fd = None if spec.debugger_fd is None else os.dup(spec.debugger_fd)
        if self._debugger_fd is not None:
            undo.callback(os.close, self._debugger_fd)
        self._debugger = DebugWatch()
        self._waits_for_debugger = spec.vm_config.gdb
        self._vcpus = Vcpus(
            monitors.control,
            spec.vm_config.cpus,
            facts,
            pid=process.pid,
            on_coming=self._keeper.keep_surely,
        )
        self._stream = EventStream(
            monitors.events,
            process,
            remains_of=self._hotplug.remains_of,
            vcpus=self._vcpus,
            debugger=None if self._debugger_fd is None else self._debugger,
        )
        self._bursts = BurstWatch(monitors.reader, spec.vm_config)
        self._drivers = DriverWatch(
            monitors.reader,
            kind_of=self._driver_kind_of,
            has_driver=self._has_driver,
            beside=self._bursts.look,
            dies_of_status=facts.dies_of_virtio_status,
            is_vhost_user=self._is_vhost_user,
        )
        self._stream.add_source(self._drivers)
        for backing in resources.backings.values():
            self._watch_helper(backing)
        if kept is not None:
            self._go_on(kept)

    @property
    def process_id(self) -> int | None:
        return self._process.pid

    @property
    def image_types(self) -> dict[str, ImageType]:
        return self._resources.image_types

    @property
    def unsettled_slots(self) -> frozenset[int]:
        return self._hotplug.unsettled_slots

    def fileno(self) -> int:
        return self._stream.fileno()

    def take_events(self) -> list[EngineEvent]:
        told = self._stream.take()  # before the drivers: what was found of a device that went comes first
        events: list[EngineEvent] = [*self._untold, *self._drivers.take()]
        self._untold = []
        if events:
            events.append(PciChanged())  # a driver has its device's BARs placed before it takes it
        for event in told:
            if isinstance(event, DeviceRemoved):
                kind = self._driver_kind_of(event.device_id)
                self._stream.leave_helper(event.device_id)
                self._hotplug.forget(event.device_id)
                self._bursts.leave(event.device_id)
                self._taps.pop(event.device_id, None)
                if self._drivers.forget(event.device_id):
                    events.append(DriverChanged(event.device_id, is_active=False, kind=kind))
            if isinstance(event, Exited):
                self._drivers.end()  # nothing comes behind it
            events.append(event)
        pid = self._process.pid
        events += [VcpuStarted(vcpu, thread_id, pid) for vcpu, thread_id in self._vcpus.take_started()]
        for client in (self._monitors.control, self._monitors.reader):
            # QEMU sends its events there too and would keep what is not fetched.
            with contextlib.suppress(EngineError):
                client.poll_events()
        if events:
            self._keeper.keep()
        return events

    def bind_vcpus(self) -> None:
        """Blocking. Have each vCPU run where the configuration binds it to.

        :raises EngineError: the host does not have such CPUs, or does not let us.
        """
        with self._end_explained():
            self._vcpus.bind()

    def pin_queues(self, disks: list[DiskConfig]) -> None:
        """Blocking. Pin what is to be pinned; to be done before the vCPUs run."""
        with self._end_explained():
            pin_queues(self._monitors.control, disks)

    def boot(self) -> None:
        if self._was_restored:
            raise EngineError("The machine goes on from a state: it is resumed, not booted")
        if self._killed:
            raise MachineGone("The machine was ended before it was booted")
        if self._refusal is not None:
            raise self._refusal
        with self._end_explained():
            if self._balloon_target_bytes is not None:
                self._monitors.control.execute("balloon", {"value": self._balloon_target_bytes})
            if not self._waits_for_debugger:
                self._let_run()
            self._serve_debugger()
        self._measure_requests()
        self._was_booted = True
        self._keeper.keep()
        self._drivers.run()

    def pause(self) -> None:
        self._debugger.want(is_to_run=False)
        self._saver.note_run()  # it has, if by a debugger's will
        with self._end_explained():
            self._monitors.control.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        self._keeper.keep()
        self._drivers.rest()

    def resume(self) -> None:
        if self._is_elsewhere:
            raise GuestElsewhere
        self._take_back()
        if self._is_unlocked:  # the guest was sent, and is ours all the same
            self._resources.lock_images()
            self._is_unlocked = False
        with self._end_explained():
            self._let_run()
        self._measure_requests()
        self._saver.note_run()
        self._hotplug.sweep()
        self._keeper.keep()
        self._drivers.run()

    def power_button(self) -> None:
        self._saver.note_change()
        with self._end_explained():
            self._monitors.control.execute("system_powerdown")

    def nmi(self) -> None:
        self._saver.note_change()
        with self._end_explained():
            self._monitors.control.execute("inject-nmi")

    def coredump(self, fd: int) -> None:
        check_disk(fd, self._ram_bytes)
        # A manager that was killed may have left a dump: QEMU ends itself where two meet.
        if not self._process.wait_thread_end(_DUMP_THREAD, timeout_s=_DUMP_THREAD_END_S):
            raise DumpFailed("QEMU is still writing the dump that another manager began")
        control = self._monitors.control
        request = {"paging": False, "protocol": "fd:core", "detach": True, "format": "elf"}
        timeout_s = _DUMP_TIMEOUT_S + self._ram_bytes / _DUMP_BYTES_PER_S
        with self._end_explained():
            control.execute("getfd", {"fdname": "core"}, fds=[fd])
            try:
                done = control.execute_until(
                    "dump-guest-memory", request, event="DUMP_COMPLETED", timeout_s=timeout_s
                )
            finally:
                # The thread says that it is done before it clears up. A next dump that is begun in between
                # would lose its file to that.
                self._process.wait_thread_end(_DUMP_THREAD, timeout_s=_DUMP_THREAD_END_S)
        if done.data["result"]["status"] != "completed":
            raise DumpFailed(done.data.get("error", "The dump failed"))

    def add_device(self, device: PciDevice, slot: int) -> None:
        self._begin_change()
        with self._end_explained():
            backing = self._hotplug.plug(device, slot)
        if backing.interface is not None:
            self._taps[backing.device_id] = (backing.interface, net_counters(backing.interface))
        if isinstance(device, DiskConfig):
            self._bursts.join(device)
            self._disks[backing.device_id] = device
        self._watch_helper(backing)
        self._keeper.keep()
        self._drivers.hurry()

    def remove_device(self, device_id: str) -> None:
        self._begin_change()
        self._drivers.look_at(device_id)
        with self._end_explained():
            self._hotplug.ask_removal(device_id)
        self._keeper.keep()

    def resize_vcpus(self, vcpus: int) -> None:
        self._begin_change()
        with self._end_explained():
            self._vcpus.resize(vcpus)
        self._keeper.keep()

    def add_memory(self, size_bytes: int) -> None:
        self._begin_change()
        with self._end_explained():
            self._hotplug.plug_module(size_bytes)
        self._ram_bytes += size_bytes
        self._keeper.keep()

    def request_zone_size(self, zone_id: str, plugged_bytes: int) -> None:
        self._begin_change()
        request = {
            "path": f"/machine/peripheral/{qdev_id(zone_id)}",
            "property": "requested-size",
            "value": plugged_bytes,
        }
        with self._end_explained():
            self._monitors.control.execute("qom-set", request)

    def resize_balloon(self, balloon_bytes: int) -> None:
        self._begin_change()
        with self._end_explained():
            # QEMU wants to know what the balloon leaves, and takes no 0.
            left_bytes = max(self._ram_bytes - balloon_bytes, 1)
            self._monitors.control.execute("balloon", {"value": left_bytes})

    def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        self._begin_change()
        self._saver.check_images()
        with self._end_explained():
            self._hotplug.resize_disk(disk_id, size_bytes)
        self._keeper.keep()

    def save(self, folder: str, on_saved: OnSaved = drop_saved) -> None:
        self._check_booted()
        self._check_savable()
        with self._end_explained():
            self._check_still()

            def tell(saved: Saved) -> None:
                self._check_alive()
                if saved.bytes == saved.total_bytes:
                    self._check_still()  # a debugger may have let it go on meanwhile
                on_saved(saved)

            self._saver.save(folder, tell)
        self._keeper.keep()

    def frozen_disks(self, disk_ids: Iterable[str]) -> dict[str, FrozenDisk]:
        from cloudvmm.engine.qemu.overlay import frozen_disks  # few disks ever are

        self._check_booted()
        self._saver.check_freezes()
        return frozen_disks(disk_ids, hotplug=self._hotplug, resources=self._resources)

    def freeze_disks(self, overlays: Mapping[str, str]) -> None:
        from cloudvmm.engine.qemu.overlay import Freeze

        self._check_not_kept("disks that go on in overlays")
        with self._end_explained(), contextlib.ExitStack() as undo:
            freeze = Freeze(
                overlays,
                self._disks,
                control=self._monitors.control,
                hotplug=self._hotplug,
                resources=self._resources,
            )
            undo.callback(freeze.undo)
            self._check_still()
            freeze.switch()
        self._keeper.keep()

    def fork(self, overlays: Mapping[str, str]) -> Base:
        from cloudvmm.engine.qemu.fork import fork_guest  # few machines ever are

        self._check_not_kept("a fork")
        self._check_booted()
        self._check_savable()
        with self._end_explained():
            base = fork_guest(
                overlays,
                self._disks,
                control=self._monitors.control,
                resources=self._resources,
                hotplug=self._hotplug,
                saver=self._saver,
                facts=self._facts,
                debugger=self._debugger,
                check=self._check_alive,
            )
        self._keeper.keep()
        return base

    def take_back(self, base: Base) -> None:
        assert isinstance(base, MemoryBase)
        with self._end_explained():
            base.rejoin()
        self._keeper.keep()

    def restore(self, origin: SavedIn | BeginsAt) -> None:
        """Blocking. Take the state that `origin` gives: to be done once, instead of `boot`.

        :raises StateError: it is not the state of such a machine.
        """
        try:
            with self._end_explained():
                load_state(self._monitors.control, origin, self._facts, ram_bytes=self._ram_bytes)
        except MachineGone as error:
            raise NotRestorable("QEMU could not go on from the state") from error
        self._serve_debugger()
        self._was_restored = self._was_booted = True
        self._keeper.keep()

    def send(self, target: SentTo) -> float:
        self._check_booted()
        self._check_savable()
        self._saver.check_unspent()
        if target.is_postcopy:
            self._check_not_kept("memory that follows its guest")
            return self._send_early(target)
        memories = self._saver.memories_apart()
        is_sent = False
        with self._end_explained(), contextlib.closing(self._carrier(target)) as carrier:
            try:
                with self._copying(target) as finish_disks:
                    self._debugger.want(is_to_run=False)  # from here on QEMU stops it
                    stopped_s = None
                    if not self._facts.tells_every_write and not (target.is_local and memories):
                        self._stand_still()
                        stopped_s = time.monotonic()
                    last_stopped_s = carrier.send(
                        target,
                        memories=memories,
                        taps=self._resources.shareable_taps,
                        reader=self._monitors.reader,
                        unlock=self._unlock_images,
                        finish_disks=finish_disks,
                    )
                is_sent = True
                return last_stopped_s if stopped_s is None else stopped_s
            except EngineError:
                carrier.cancel()
                raise
            finally:
                if is_sent:  # it stands still: the other machine waits, and the guest with it
                    self._drivers.rest()
                else:
                    self._stand_still()

    def receive(self, source: ReceivedFrom) -> None:
        """Blocking. Take the state that `send` of another machine sends: to be done once, instead of `boot`.

        :raises StateError: it is not the state of such a machine. :raises LinkLost: the sender is gone.
        :raises ImageLocked: another process holds an image, the sender for one.
        """
        if source.is_postcopy:
            self._postcopy_carrier(is_sender=False).receive(source, lock=self._resources.lock_images)
        else:
            with contextlib.closing(self._carrier(source)) as carrier, self._serving(source) as lock:
                is_ram_apart = any(memory.is_adopted for memory in self._resources.memories.values())
                carrier.receive(source, is_ram_apart=is_ram_apart, lock=lock)
        self._serve_debugger()
        self._was_restored = self._was_booted = True
        self._keeper.keep()

    def transfer_rest(self, link_fd: int | None = None) -> None:
        carrier = self._postcopy
        if carrier is None:
            raise EngineError("No memory is on the way")
        self._is_elsewhere = carrier.is_sender
        with self._end_explained():
            carrier.transfer_rest(link_fd)

    def counters(self) -> dict[str, dict[str, int]]:
        stats = self._monitors.reader.execute("query-blockstats", timeout_s=_QUERY_TIMEOUT_S)
        counters = disk_counters(stats, device_id)
        for net_id, (tap, before) in list(self._taps.items()):  # devices come and go meanwhile
            now = net_counters(tap)
            if now is not None and before is not None:
                counters[net_id] = {name: now[name] - before[name] for name in now}
        if self._statistics_source is not None:
            question = statistics_question(self._statistics_source)
            told = balloon_counters(
                self._monitors.reader.execute("qom-get", question, timeout_s=_QUERY_TIMEOUT_S)
            )
            if told is not None:
                counters[self._statistics_source] = told
        return counters

    def pci_resources(self) -> dict[str, list[PciBar]]:
        buses = self._monitors.reader.execute("query-pci", timeout_s=_QUERY_TIMEOUT_S)
        return placed_bars(buses, device_id)

    def kill(self) -> None:
        if not self._process.has_ended():
            self._killed = True
        self._stream.expect_end()
        self._process.kill()
        self._hotplug.abort()
        self._monitors.control.abort()
        self._monitors.reader.abort()

    def _let_run(self) -> None:
        self._debugger.want(is_to_run=True)
        let_run(self._monitors.control)

    def _serve_debugger(self) -> None:
        if self._debugger_fd is not None:
            serve_debugger(self._monitors.control, self._debugger_fd)
            self._measure_requests()  # it may let the guest run at any time

    def _measure_requests(self) -> None:
        """Have QEMU keep how long each request of a disk takes: at once, but nobody waits for it.

        It takes QEMU some 5 ms to read of each disk, in their order, and the guest is on its way to its first
        request meanwhile. One that is quicker counts as well, but for minimum and maximum.
        """
        disks, self._unmeasured = self._unmeasured, []
        with contextlib.suppress(EngineError):  # they are then coarser, and whatever ended QEMU is told
            self._monitors.control.tell([counting_command(disk) for disk in disks])

    def _watch_helper(self, backing: Backing) -> None:
        if isinstance(backing, ServedBacking) and backing.companion is not None:
            self._stream.watch_helper(backing.device_id, backing.companion)

    def _driver_kind_of(self, device_id: str) -> DriverKind:
        backing = self._resources.backings.get(device_id)
        return DriverKind.VIRTIO if backing is None else backing.driver_kind

    def _is_vhost_user(self, device_id: str) -> bool:
        return isinstance(self._resources.backings.get(device_id), VhostUserBacking)

    def _has_driver(self, device_id: str) -> bool | None:
        backing = self._resources.backings.get(device_id)
        return None if backing is None else backing.has_driver()

    def _check_not_kept(self, what: str) -> None:
        """:raises NotKept: the machine outlives its manager, and `what` it is to do would not."""
        if self._spec.state_dir is not None:
            raise NotKept(what)

    def _check_booted(self) -> None:
        if not self._was_booted:
            raise EngineError("The machine does not run yet: its devices cannot change")

    def _carrier(self, way: SentTo | ReceivedFrom) -> Carrier:
        return Carrier(self._monitors.control, self._process, (way.link_fd, *way.more_fds))

    @contextlib.contextmanager
    def _copying(self, target: SentTo) -> Iterator[Callable[[], None] | None]:
        """Copy the disks that go along; give what finishes that, None where there is none."""
        if not target.disk_fds:
            yield None
            return
        from cloudvmm.engine.qemu.disk_copy import DiskSender

        sender = DiskSender(self._monitors.reader, target.disk_fds, stop=self._stand_still)
        with contextlib.closing(sender):
            sender.copy()
            yield sender.finish

    @contextlib.contextmanager
    def _serving(self, source: ReceivedFrom) -> Iterator[Callable[[], None]]:
        """Take the disks that come along; give what locks the images, which then are as they were there."""
        if not source.disk_fds:
            yield self._resources.lock_images
            return
        from cloudvmm.engine.qemu.disk_copy import DiskReceiver

        with contextlib.closing(DiskReceiver(self._monitors.control, source.disk_fds)) as receiver:
            for disk in self._resources.disks:
                if disk.device_id in source.disk_fds:
                    disk.lock()  # nobody else is to have it while it is written over
            receiver.serve()

            def lock() -> None:
                receiver.close()
                self._resources.lock_images()

            yield lock

    def _send_early(self, target: SentTo) -> float:
        """Send as much as the other machine needs to run; the rest goes on by itself."""
        carrier = self._postcopy_carrier(is_sender=True)
        self._debugger.want(is_to_run=False)
        with self._end_explained():
            try:
                return carrier.send(target, stop=self._stand_still, unlock=self._unlock_images)
            except EngineError:
                with contextlib.suppress(EngineError):
                    self._take_back()
                raise
            finally:
                self._stand_still()

    def _take_back(self) -> None:
        """The other machine does not go on with the guest."""
        carrier = self._postcopy
        if carrier is not None and carrier.is_sender:
            carrier.take_back()
            self._postcopy = None

    def _postcopy_carrier(self, *, is_sender: bool) -> PostcopyCarrier:
        """:raises NotSupportedYet: a piece of RAM cannot be had page by page."""
        from cloudvmm.engine.qemu.postcopy import PostcopyCarrier, check_memories

        check_memories(self._resources.memories.values())
        urgent = None if is_sender else self._monitors.urgent
        self._postcopy = PostcopyCarrier(self._monitors.control, self._process, urgent, is_sender=is_sender)
        return self._postcopy

    def _unlock_images(self) -> None:
        """Let the machine that goes on with the guest have its images."""
        self._saver.note_sent()
        self._is_unlocked = True
        for disk in self._resources.disks:
            disk.unlock()
        self._keeper.keep()

    def _stand_still(self) -> None:
        with contextlib.suppress(EngineError):
            self._monitors.control.execute("stop", timeout_s=_STOP_TIMEOUT_S)
        self._drivers.rest()

    def _begin_change(self) -> None:
        self._check_booted()
        self._saver.note_change()

    def _check_alive(self) -> None:
        if self._killed or self._process.has_ended():
            raise MachineGone("QEMU ended")

    def _check_still(self) -> None:
        if self._monitors.control.execute("query-status")["running"]:
            raise EngineError("The guest runs: its state cannot be saved")

    def _check_savable(self) -> None:
        for backing in self._resources.backings.values():
            if backing.unsaved is not None:
                raise DeviceNotSaved(backing.device_id, reason=backing.unsaved)
        if self._vcpus.are_owed:
            raise EngineError("The guest still has to let go of vCPUs that were to be removed")
        self._vcpus.check_savable()
        if owed := self._hotplug.find_owed():
            raise EngineError(f"The guest still has to let go of what was removed: {', '.join(owed)}")

    @contextlib.contextmanager
    def _end_explained(self) -> Iterator[None]:
        """Say how QEMU ended where it did so by itself: that its monitor fell silent is only the symptom."""
        try:
            yield
        except MachineGone as gone:
            with contextlib.suppress(EngineTimeout):
                self._process.wait(timeout_s=_END_TIMEOUT_S)
            if self._killed or not self._process.has_ended():
                raise
            raise MachineGone(str(gone)) from MachineGone(self._process.ending())

    def keep(self) -> None:
        """Write down what whoever takes the machine over has to know.

        :raises EngineError: it cannot be written.
        """
        self._keeper.keep_surely()

    def _keepsake(self) -> Keepsake:
        resources, hotplug = self._resources, self._hotplug.state()
        memories = resources.memories
        backings = {**resources.backings}
        sets = {fd: number for each in hotplug.fdsets.values() for fd, number in each.items()}
        monitors = self._monitors
        control, reader, events = (
            client.fileno() for client in (monitors.control, monitors.reader, monitors.events)
        )
        return Keepsake(
            facts=self._facts,
            policy=self._policy,
            has_doorway=resources.doorway is not None,
            vm_config=self._config,
            slots=self._spec.slots,
            spec_modules=self._spec.modules,
            ram_bytes=self._ram_bytes,
            monitors=(open_file(control), open_file(reader), open_file(events)),
            kept={fd: open_file(fd) for fd in self._spec.kept_fds},
            places=keepsake.place_all([*memories.values(), *backings.values()], sets),
            rams={name: keepsake.keep(ram) for name, ram in resources.rams.items()},
            modules=[keepsake.keep(module) for module in resources.modules],
            zones={name: keepsake.keep(zone) for name, zone in resources.zones.items()},
            backings={name: keepsake.keep(backing) for name, backing in backings.items()},
            hotplug=hotplug,
            vcpus=self._vcpus.state(),
            disks={name: keepsake.encode_disk(disk) for name, disk in list(self._disks.items())},
            taps=dict(self._taps),
            active=self._drivers.active,
            unmeasured=self._unmeasured,
            was_booted=self._was_booted,
            is_spent=self._saver.is_spent,
            is_unlocked=self._is_unlocked,
            heard_at=self._stream.heard_at,
        )

    def _go_on(self, kept: Keepsake) -> None:
        """Know what another process has left of the machine, which runs or stands where it did."""
        self._ram_bytes = kept.ram_bytes
        self._disks = {name: keepsake.decode_disk(disk) for name, disk in kept.disks.items()}
        self._taps = kept.taps
        self._was_booted = True
        self._unmeasured = kept.unmeasured
        self._is_unlocked = kept.is_unlocked
        if kept.is_spent:
            self._saver.note_sent()
        self._vcpus.go_on(kept.vcpus)
        self._drivers.go_on(kept.active)
        for name in self._disks.keys() - {disk.id for disk in self._spec.vm_config.disks or ()}:
            self._bursts.join(self._disks[name])

    def watch(self, events: Iterable[Event], helpless: Iterable[str]) -> None:
        """Tell first of `events`, which nobody has heard, and of devices whose helpers have ended."""
        self._stream.preload(events)
        self._untold = [HelperEnded(name, "It ended while nobody looked after it") for name in helpless]

    def look(self, *, is_running: bool) -> None:
        """Look after the drivers, as after a boot, of a machine that was taken over."""
        self._debugger.want(is_to_run=is_running)
        if is_running:
            self._drivers.run()

    def close(self) -> None:
        self.kill()
        self._saver.note_change()
        self._drivers.close()
        self._stream.close()
        if self._postcopy is not None:
            self._postcopy.close()
        self._keeper.end()
        self._undo.close()
