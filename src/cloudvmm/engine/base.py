"""The seam between control and whatever runs a VM: config types in, plain values and events out.

Nothing above this file has heard of QEMU, nothing below it of HTTP.

Threads. `Engine.build` and every method of `Machine` marked *blocking* are called by the VMM's worker
thread, one at a time, in order. `fileno`, `take_events` belong to the control loop and never block.
`counters` and `pci_resources` belong to the reader thread: they must not wait for a blocking call that is
under way. `kill` may be called by any thread at any time, is idempotent, and makes every blocking
call under way fail soon with `MachineGone`.

Life of a machine::

    build ──► built ──boot──► running ◄─pause/resume─► paused
                │                │                       │
                └────────────────┴───────close───────────┘

`build` creates the whole machine, all devices included, with no vCPU running: disks, TAPs and sockets that
cannot be had fail here. `boot` is the reference's final step: it refuses where a disk image is locked by
somebody else, checks the payload (a missing or invalid kernel fails here, not in `build`) and starts the
vCPUs. An engine that touches the images before must lock them in `build`, and still refuses in `boot`.
After any failure of `boot` the machine stays built and must be closed. A reboot is a `close` and a new
`build`: the engine turns a reset that the guest asks for into the event `ResetRequested` and lets the guest
stand still. A machine whose spec names an `origin` is not booted: `build` gives it back paused, its images
locked, exactly as it was saved or sent.

Changes to a machine that exists (devices, sizes) are whole or absent: what fails leaves the machine as it
was. An engine that has no means for one raises `NotSupportedYet` before it touches anything. Ids, slots,
names and the rules about sizes are control's; the engine is told results.

Each blocking call has a deadline of its own and raises `EngineTimeout` when it passes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from cloudvmm.config.disk import ImageType
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import VmmError


class EngineError(VmmError):
    """What runs the VM refused or failed; the text carries its own words.

    EngineError
    ├── EngineTimeout      no answer within the deadline: the operation may or may not have happened
    ├── MachineGone        the machine ended, or was killed, while it was asked
    ├── NotSupportedYet    the means for this come with a later release
    ├── PayloadError       kernel, firmware or initramfs is missing or invalid
    ├── ImageLocked        another process holds a disk image
    ├── RamError           the guest's RAM cannot be had
    ├── SlotError          a PCI slot cannot be had
    ├── DeviceError        a device could not be made
    ├── RemovalPending     the guest still has to let go of a vCPU that was to be removed
    ├── StateError         a saved or received state is incomplete, damaged or of another kind
    ├── NotForkable        other machines cannot begin where this one stands
    └── LinkLost           the other side of a migration is gone, or says what it must not
    """


class EngineTimeout(EngineError):
    pass


class MachineGone(EngineError):
    pass


class NotSupportedYet(EngineError):
    pass


class PayloadError(EngineError):
    pass


class ImageLocked(EngineError):
    """Cannot lock images of all block devices"""


class RamError(EngineError):
    pass


class SlotError(EngineError):
    pass


class DeviceError(EngineError):
    pass


class RemovalPending(EngineError):
    pass


class StateError(EngineError):
    pass


class NotForkable(EngineError):
    pass


class LinkLost(EngineError):
    pass


class SinkKind(enum.Enum):
    """Where the bytes of a console go, seen from the engine."""

    OFF = "off"  # the device is absent
    NULL = "null"  # the device is there, its output dropped
    FILE = "file"  # the engine appends to `path`, which exists
    # The engine writes to the pipe `path`.out and reads from `path`.in, which exist. It may give them to who
    # opens them, and let everybody pass through their folder.
    PIPES = "pipes"
    STREAM = "stream"  # both ways over `stream_fd`


class ConsoleSink(msgspec.Struct, frozen=True, kw_only=True):
    """`stream_fd` is one end of a connected stream socket. Lent: the engine duplicates it."""

    kind: SinkKind
    path: str | None = None
    stream_fd: int | None = None


class SavedIn(msgspec.Struct, frozen=True):
    """`folder` holds what `Machine.save` wrote. It is read, never changed, and may be used again.

    RAM that `is_on_demand` stays in the folder and is read as the guest touches it: the folder must stay as
    it is until the machine is closed. With `has_prefault` all RAM is taken from the host before it runs.
    """

    folder: str
    is_on_demand: bool = False
    has_prefault: bool = False


class Base(Protocol):
    """The state of a guest at one moment, which any number of machines may begin with; nobody changes it.

    It costs the host the guest's memory once, until it is closed and all those machines are.
    """

    @property
    def stood_still_s(self) -> float:
        """How long the guest that it was taken from stood still for it; 0 for one that was paused."""

    def make_overlay(self, disk_id: str, path: str) -> None:
        """Blocking. Make a new image at `path`, in which a machine that begins here has the disk `disk_id`.

        :raises DeviceError: it cannot be made; then nothing is there.
        """

    def close(self) -> None:
        """Release it, but for what machines that were built from it need. Idempotent."""


class BeginsAt(msgspec.Struct, frozen=True):
    """`base` is what `Machine.fork` gave. Memory stays there, as far as it can, and is read as it is used."""

    base: Base


class Transferred(msgspec.Struct, frozen=True, kw_only=True):
    """How far a machine's state is on its way. None is what is not known, as all but `bytes` is who receives.

    `bytes` are those that went over the link. `iteration` counts the passes over the guest's memory from 0;
    `remaining_bytes` are left of the one under way. `expected_downtime_ms` is how long the guest would stand
    still if it were stopped now.
    """

    bytes: int
    iteration: int | None = None
    remaining_bytes: int | None = None
    dirty_bytes_per_s: int | None = None
    expected_downtime_ms: int | None = None


OnTransferred = Callable[[Transferred], None]


def drop_transferred(_: Transferred) -> None:
    """The `OnTransferred` of those who do not want to know."""


class ReceivedFrom(msgspec.Struct, frozen=True):
    """`link_fd` is a connected stream socket at whose other end `Machine.send` runs. Lent.

    `more_fds` are further ones, as many and in the same order as at the other end. `on_transferred` is called
    now and then by the thread that builds. `is_local` and `is_postcopy` are as at the other end. What the
    disks of the ids `disk_fds` hold comes over these links, likewise.
    """

    link_fd: int
    more_fds: tuple[int, ...] = ()
    is_local: bool = False
    is_postcopy: bool = False
    disk_fds: dict[str, int] = {}
    on_transferred: OnTransferred = drop_transferred


class SentTo(msgspec.Struct, frozen=True, kw_only=True):
    """`link_fd` is a connected stream socket at whose other end a machine is built from it. Lent.

    An engine that sends memory while the guest runs stops it once `downtime_ms` should do for the rest, and
    after `insist_s` seconds whatever that takes; None waits for ever. `on_transferred` is called now and then
    by the thread that sends. `more_fds` are further sockets of the kind, over which the state may go, too.

    With `is_local` the link is a UNIX socket, and memory is handed over, not copied, where it can be. The
    guest runs until the other machine stands; then its memory is the other machine's, unless that fails.

    With `is_postcopy` the guest is stopped once all memory was gone over, or after `insist_s`, and the other
    machine can go on with it before it has all; `Machine.transfer_rest` does what is left.

    The disks of the ids `disk_fds` are copied before, each over a link of its own, lent too. Ours stay.
    """

    link_fd: int
    more_fds: tuple[int, ...] = ()
    is_local: bool = False
    is_postcopy: bool = False
    disk_fds: dict[str, int] = {}
    downtime_ms: int = 300
    insist_s: int | None = None
    on_transferred: OnTransferred = drop_transferred


class Saved(msgspec.Struct, frozen=True):
    """How far the saving of a machine is: `bytes` of `total_bytes` are done with, written or holes."""

    bytes: int
    total_bytes: int


OnSaved = Callable[[Saved], None]


def drop_saved(_: Saved) -> None:
    """The `OnSaved` of those who do not want to know."""


class FrozenDisk(msgspec.Struct, frozen=True, kw_only=True):
    """The image at `path` is only read from now on; the guest has `size_bytes` of it."""

    path: str
    image_type: ImageType
    size_bytes: int


PCI_DEVICES: Final = 32
PCI_FUNCTIONS: Final = 8


def slot_of(device: int, function: int) -> int:
    """Return what is called a slot here: for function 0 it is the device number on bus 0."""
    return device + PCI_DEVICES * function


def device_number(slot: int) -> int:
    return slot % PCI_DEVICES


def function_number(slot: int) -> int:
    return slot // PCI_DEVICES


def is_slot(slot: int, first: int, last: int) -> bool:
    """Say whether there is such a function, of a device whose number is `first` to `last`."""
    return first <= device_number(slot) <= last and 0 <= function_number(slot) < PCI_FUNCTIONS


Origin = SavedIn | ReceivedFrom | BeginsAt


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that `Engine.build` needs.

    `vm_config` is validated and complete: ids and MACs are filled in. The engine does not change it and
    keeps no reference to it. `slots` gives the PCI slot per device id, see `slot_of`. File
    descriptors inside (`net[].fds`) are lent, not given. `state_dir` is a folder for the machine's own
    files, or None: then the machine ends with its manager, and leaves no file behind. `origin` is where the
    guest's state comes from; without it the guest starts from its payload. `modules` are the sizes in bytes
    of the memory modules that such a guest has beside the RAM of `vm_config`, in the order of their addition.
    On `debugger_fd`, a listening stream socket that is lent, debuggers are served from `boot` on, or once
    the machine stands where it goes on; an engine without means for it leaves it alone.

    A machine that has a `state_dir` outlives its manager, unless it is closed: `Engine.adopt` gives it to the
    next one on that folder. It holds `kept_fds`, which are lent, open for that one.
    """

    vm_config: VmConfig
    slots: dict[str, int]
    serial: ConsoleSink
    console: ConsoleSink
    debug_console: ConsoleSink
    state_dir: str | None = None
    origin: Origin | None = None
    debugger_fd: int | None = None
    modules: tuple[int, ...] = ()
    kept_fds: tuple[int, ...] = ()


class PciBar(msgspec.Struct, frozen=True, kw_only=True):
    """A base address register as the guest's firmware or kernel placed it."""

    index: int
    base: int
    size: int
    kind: Literal["Io", "Mmio32", "Mmio64"]
    prefetchable: bool


class GuestPanicked(msgspec.Struct, frozen=True):
    """The guest's panic device spoke; the machine goes on as the guest wishes."""

    kind: Literal["panic", "crash_loaded", "unknown_event"]


class ResetRequested(msgspec.Struct, frozen=True):
    """The guest (or its watchdog) asked for a reset and stands still until it is closed and built anew."""

    by_watchdog: bool = False


class PoweredOff(msgspec.Struct, frozen=True):
    """The guest switched itself off and stands still until it is closed."""


class DebuggerStopped(msgspec.Struct, frozen=True):
    """A debugger has stopped the guest, which stood still by nobody else's will."""


class DebuggerContinued(msgspec.Struct, frozen=True):
    """A debugger lets the guest run, which stood still before by whoever's will."""


class Exited(msgspec.Struct, frozen=True):
    """The machine ended although nobody asked for it; `reason` is a sentence for people."""

    reason: str


class BalloonChanged(msgspec.Struct, frozen=True):
    """`actual_bytes` are left to the guest of its RAM, in which what virtio-mem gives is not counted."""

    actual_bytes: int


class PciChanged(msgspec.Struct, frozen=True):
    """`pci_resources` may answer differently from now on."""


class DeviceRemoved(msgspec.Struct, frozen=True):
    """The guest has let go of a device, asked for by `remove_device` or not; its slot is free."""

    device_id: str


class RemovalRefused(msgspec.Struct, frozen=True):
    """The guest says that it does not let go of a device that `remove_device` asked for."""

    device_id: str


class HelperEnded(msgspec.Struct, frozen=True):
    """The engine's own program that served a device ended unasked; `reason` is a sentence for people."""

    device_id: str
    reason: str


class DriverKind(enum.Enum):
    """What a driver of the guest drives, as far as it is told of in different ways."""

    VIRTIO = "virtio"
    VHOST_USER = "vhost-user"
    """A vhost-user disk or network device; other vhost-user devices are VIRTIO."""
    VDPA = "vdpa"


class DriverChanged(msgspec.Struct, frozen=True):
    """The guest's driver has taken a device into use (`is_active`), or has reset it."""

    device_id: str
    is_active: bool
    kind: DriverKind = DriverKind.VIRTIO


class VcpusRemoved(msgspec.Struct, frozen=True):
    """The guest has let go of every vCPU that `resize_vcpus` asked back; `vcpus` are left."""

    vcpus: int


class VcpusChanged(msgspec.Struct, frozen=True):
    """The guest has taken up or let go of vCPUs since `resize_vcpus`: it has `vcpus`, as it says itself."""

    vcpus: int


class ModuleTaken(msgspec.Struct, frozen=True):
    """The guest says that it has taken up the memory module of `add_memory`; `number` counts them from 0."""

    number: int


class ResizeRefused(msgspec.Struct, frozen=True):
    """The guest says that it does not take up, or let go of, what it was asked to."""

    kind: Literal["vcpus", "modules"]


class VcpuStarted(msgspec.Struct, frozen=True):
    """The vCPU of this number has a thread on the host: `thread_id` of the process `process_id`."""

    vcpu: int
    thread_id: int
    process_id: int


class MemoryPassSent(msgspec.Struct, frozen=True):
    """`send` has gone over the guest's memory once more; `number` counts the passes from 0."""

    number: int


class ZoneChanged(msgspec.Struct, frozen=True):
    """`plugged_bytes` of the zone's virtio-mem device are in the guest's hands now."""

    zone_id: str
    plugged_bytes: int


EngineEvent = (
    GuestPanicked
    | ResetRequested
    | PoweredOff
    | DebuggerStopped
    | DebuggerContinued
    | Exited
    | BalloonChanged
    | PciChanged
    | DeviceRemoved
    | RemovalRefused
    | HelperEnded
    | DriverChanged
    | VcpusRemoved
    | VcpusChanged
    | ModuleTaken
    | ResizeRefused
    | VcpuStarted
    | ZoneChanged
    | MemoryPassSent
)


class Adopted(msgspec.Struct, frozen=True):
    """A machine that another process has built. `is_running` is whether its vCPUs do.

    `kept_fds` gives descriptors that are now the caller's, by the numbers in `MachineSpec.kept_fds`.
    `device_ids` are the devices that it has, or has until the guest lets go of them; `vcpus` and `modules`,
    sizes in bytes, likewise.
    """

    machine: Machine
    is_running: bool
    kept_fds: dict[int, int]
    device_ids: frozenset[str]
    vcpus: int
    modules: tuple[int, ...]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`first_slot`..`last_slot` are the PCI device numbers that devices may have."""

    name: str
    version: str
    accelerator: str
    accelerator_reason: str
    first_slot: int
    last_slot: int
    max_vcpus: int


class Machine(Protocol):
    """One VM that an engine runs."""

    @property
    def process_id(self) -> int | None:
        """The pid of the process that runs the guest, if it is one of its own."""

    @property
    def image_types(self) -> dict[str, ImageType]:
        """Disk id to what its image was found to be; empty where the engine does not look."""

    @property
    def unsettled_slots(self) -> frozenset[int]:
        """Free slots where the guest may still eject what comes, unasked: they are to be given out last."""

    def fileno(self) -> int:
        """A descriptor that is readable while `take_events` has something to give. Owned by the machine."""

    def take_events(self) -> list[EngineEvent]:
        """What happened since the last call, in order; never blocks. `Exited` is the last that ever comes."""

    def boot(self) -> None:
        """Blocking. Have the images locked, check the payload, start the vCPUs.

        With `gdb` in the configuration they stand still until `resume`, or until a debugger lets them go.

        :raises ImageLocked: another process holds an image.
        :raises PayloadError: kernel, firmware or initramfs is missing or invalid.
        """

    def pause(self) -> None:
        """Blocking. Stop every vCPU."""

    def resume(self) -> None:
        """Blocking. Start every vCPU again."""

    def power_button(self) -> None:
        """Blocking. Press the ACPI power button; returns before the guest reacts."""

    def nmi(self) -> None:
        """Blocking. Inject a non-maskable interrupt into every vCPU."""

    def coredump(self, fd: int) -> None:
        """Blocking until the dump is whole. Write an ELF64 core of a paused guest to `fd`, which is lent."""

    def add_device(self, device: PciDevice, slot: int) -> None:
        """Blocking. Plug `device`, whose `id` is set, into `slot`; descriptors inside are lent.

        Allowed while running and while paused. What a disk's image was found to be is in `image_types` then.

        :raises DeviceError: it could not be made.
        :raises ImageLocked: another process holds its image.
        """

    def remove_device(self, device_id: str) -> None:
        """Blocking. Ask the guest to let go of a device; asking again is allowed. Its image is unlocked.

        `DeviceRemoved` comes when the guest has, if ever.
        """

    def resize_vcpus(self, vcpus: int) -> None:
        """Blocking. Plug vCPUs, or ask the guest to let go of some; `VcpusRemoved` comes when it has.

        `VcpusChanged` comes with every step that it takes.

        :raises RemovalPending: the guest still has to let go of some that were asked for before.
        """

    def add_memory(self, size_bytes: int) -> None:
        """Blocking. Plug a memory module of `size_bytes` by ACPI; `ModuleTaken` comes when the guest has."""

    def request_zone_size(self, zone_id: str, plugged_bytes: int) -> None:
        """Blocking. Ask the guest to have `plugged_bytes` of the zone's virtio-mem device.

        Returns before the guest reacts; `ZoneChanged` comes with every step that it takes.
        """

    def resize_balloon(self, balloon_bytes: int) -> None:
        """Blocking. Ask the guest to give back `balloon_bytes`; `BalloonChanged` comes as it does."""

    def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        """Blocking. Give the image a new size and tell the guest."""

    def save(self, folder: str, on_saved: OnSaved = drop_saved) -> None:
        """Blocking. Write the state of a paused guest into `folder`, which exists; it stays paused.

        Every file is new and is synced; their names begin with `engine-`. On failure none is left.
        `on_saved` is called now and then by the thread that saves, and last when all is written. What it
        raises calls the saving off, which then fails with that.
        """

    def frozen_disks(self, disk_ids: Iterable[str]) -> dict[str, FrozenDisk]:
        """Blocking. Tell what `freeze_disks` will freeze, by the ids of disks.

        :raises DeviceError: a disk cannot go on in an overlay.
        """

    def freeze_disks(self, overlays: Mapping[str, str]) -> None:
        """Blocking. Let disks of a paused guest, that may have been saved, go on in new images.

        `overlays` are the paths of those, by the ids of the disks, whose images are only read from then on.
        All of them do, or none, and then no file is left.

        :raises DeviceError: they cannot.
        """

    def fork(self, overlays: Mapping[str, str]) -> Base:
        """Blocking. Give what other machines can begin with; the guest stands still for a moment at most.

        `overlays` are paths of new images, by the ids of all disks that the guest can write: it goes on in
        those, and the images until now are only read from then on. On failure everything is as it was.

        :raises NotForkable: there are no means for it, or what the machine has cannot be there twice.
        """

    def take_back(self, base: Base) -> None:
        """Blocking. Have the disks in the images that they had before the last `fork`, which gave `base`.

        What was written since is in them then, and the images it was written to are gone. No machine that
        began at `base` may be there any more. On failure the disks stay where they are.
        """

    def send(self, target: SentTo) -> float:
        """Blocking. Stop the guest and hand its whole state over.

        The guest stands paused afterwards, whatever happened. Return since when, on the monotonic clock.

        :raises LinkLost: the other side is gone; whether it has the whole state is not known.
        """

    def transfer_rest(self, link_fd: int | None = None) -> None:
        """Blocking. On either side, behind a postcopy `send` or build: wait for the rest of the memory.

        That goes on by itself, over the link of then. From the first call on the guest is the receiver's: the
        sender's stands still for good. After `LinkLost` it is called again with a new link, on either side;
        until then the guest stands still where it wants what it has not.

        :raises LinkLost: the other side is gone.
        """

    def counters(self) -> dict[str, dict[str, int]]:
        """Device id to counter name to value, as lifecycle.md section 8 says. Answers within a second."""

    def pci_resources(self) -> dict[str, list[PciBar]]:
        """Device id to the BARs that the guest has placed. Answers within a second."""

    def kill(self) -> None:
        """End the guest at once, from any thread; what is under way fails with `MachineGone`."""

    def close(self) -> None:
        """Blocking. End the guest if it still runs, release everything, wait until its process is gone."""


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """Paths that an engine needs beside those that a configuration names: programs, files, devices.

    A path may be missing, and stands for all beneath it where it is a folder.
    """

    runnable: Sequence[str] = ()
    readable: Sequence[str] = ()
    usable: Sequence[str] = ()


class Engine(Protocol):
    """Makes machines, for one VMM alone. Holds what is found out: binary, version, accelerator."""

    outlives_manager: bool
    """Whether machines with a `state_dir` do."""

    @property
    def info(self) -> EngineInfo:
        """What this engine is. The first call may probe (blocking, seconds at worst, cached on disk)."""

    def build(self, spec: MachineSpec) -> Machine:
        """Blocking. Make a machine whose vCPUs do not run yet; on failure nothing is left behind.

        :raises NotSupportedYet: the config asks for what this engine cannot give.
        :raises DeviceError: a device could not be made; the cause tells why.
        :raises RamError: the guest's RAM cannot be had.
        :raises StateError: what `origin` gives is not the state of such a machine.
        :raises ImageLocked: another process holds an image of a machine that has an `origin`.
        :raises EngineError: the machine could not be made; the text carries the engine's words.
        """

    def adopt(self, state_dir: str) -> Adopted | None:
        """Blocking, some 100 ms. Take over the machine that another process has left in this folder.

        What was under way is finished or taken back, and then the machine is as after `build` and `boot`. Its
        events go on with what happened meanwhile. None where no machine lives, or none was whole yet: what
        is left of it, helper programs, interfaces and files, is removed.

        :raises EngineError: a machine lives, and cannot be taken over; it goes on as it is.
        """

    def discard(self, state_dir: str) -> None:
        """Blocking. End the machine that another process has left in this folder, as it is, with what it had.

        For one that cannot be taken over. Nothing happens where there is none.
        """

    def check_postcopy(self, *, is_receiver: bool) -> None:
        """Blocking. Look whether a guest may go on before all of its memory is there.

        :raises NotSupportedYet: it may not, with this engine or on this host; the text tells why.
        """

    def reach(self, vm_config: VmConfig) -> Reach:
        """Blocking. Return what machines of `vm_config`, changed ones too, need of the host.

        :raises EngineError: as `info`.
        """

    def another(self) -> Engine:
        """Return an engine of the same kind, for another VMM; what was found out is taken along."""

    def abort_build(self) -> None:
        """Make a `build` under way in another thread fail soon with `MachineGone`."""
