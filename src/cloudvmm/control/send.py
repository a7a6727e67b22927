"""`vm.send-migration`: the VM to another VMM (reference: lifecycle.md section 15).

The command checks what was asked for and lends the VM; the rest happens beside the queue (`lane.py`), and
what comes of it is told by events and in the log. The VM runs on one side at most, whatever fails:

* Until all of `Complete` is sent the other VMM lets no vCPU run, so whatever goes wrong the VM is ours and
  goes on.
* From then on it is ours again only if the other VMM says that it has nothing of it left.
* Where its answer is lost nobody can know. The VM stays paused here, and the log says what to do. With
  Postcopy the answer is given again over the connection that is made anew for the memory.
* With Postcopy it has the VM and not all of its memory. What fails then loses the VM, which stays paused here
  and cannot be resumed; a lost connection is made anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, MigrationPhase, MigrationRole, VmState
from cloudvmm.config import form
from cloudvmm.config.operation import MigrationMemoryMode, TimeoutStrategy, VmSendMigrationData
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.holding import GUEST_RESET, Holding, Lent, Postponed
from cloudvmm.control.lane import Lane, LaneEnd, LaneSteps
from cloudvmm.control.migration import Migration
from cloudvmm.control.power import Power
from cloudvmm.control.record import encode_record
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Job, Steps
from cloudvmm.engine.base import Engine, EngineError, ImageLocked, LinkLost, Machine, NotSupportedYet, SentTo
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.migration.address import Address, parse_address
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import (
    ConnectFailed,
    LinkDown,
    LinkTimeout,
    MemoryLost,
    MigrationError,
    OutcomeUnknown,
    PeerRefused,
    ProtocolError,
    TlsFailed,
)
from cloudvmm.migration.link import Link, connect
from cloudvmm.migration.message import Accept, Complete, Done, Offer, Ready, Welcome, check_welcome, refusal
from cloudvmm.migration.patience import Patience
from cloudvmm.migration.rule import check_send

if TYPE_CHECKING:
    from cloudvmm.migration.tls import Tls

# The other VMM opens consoles before it accepts, and lets the guest run before it is done.
ANSWER_S: Final = 60.0
GOODBYE_S: Final = 2.0
# For how long, and how often, who serves a guest's memory tries to reach it again.
RECONNECT_S: Final = 120.0
RECONNECT_PAUSE_S: Final = 0.2

# The other VMM runs the guest, or may.
_NOT_OURS: Final = (OutcomeUnknown, MemoryLost)
# The other VMM may hold the images until it has waited for `Complete` in vain, 60 s, and ended its machine.
RELEASE_S: Final = 75.0
_RELEASE_LOOK_S: Final = 0.1

Part = Generator[Job, Any, None]


class TookTooLong(MigrationError):
    def __init__(self, timeout_s: int) -> None:
        super().__init__(f"The migration did not come to its end within {timeout_s} s")


class Send:
    """`holding` is the state that the steps work on."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        power: Power,
        *,
        lane: Lane,
        log: Callable[[str, str], None],
    ) -> None:
        self._engine = engine
        self._events = events
        self._holding = holding
        self._power = power
        self._lane = lane
        self._log = log

    def send(self, data: VmSendMigrationData) -> Steps:
        """Steps of the command: after the last one the VM is lent."""
        vm = self._holding.vm
        if vm is None:
            raise api_error.MigratableSend from api_error.NoVmToMigrate()
        try:
            yield partial(check_send, data)
        except MigrationError as error:
            raise api_error.MigratableSend from _caused(api_error.InvalidSendMigration(), error)
        vm_config = self._holding.created_config()
        if data.local and not _is_memory_shared(vm_config):
            raise api_error.MigratableSend from api_error.LocalNeedsSharedMemory()
        if vm.state not in (VmState.RUNNING, VmState.PAUSED):
            raise api_error.MigratableSend from api_error.NotMigratable(vm.state.value)
        try:
            sizes: dict[str, int] = {}
            if data.copy_disks:
                sizes = yield partial(_copied_sizes, vm_config, data.copy_disks, vm.machine)
            offer: Offer = yield partial(self._offer, encode_record(vm), vm_config, data, sizes)
        except (EngineError, MigrationError) as error:
            raise api_error.MigratableSend from error
        self._holding.lent = Lent(self._holding.info())
        self._holding.cut = cut = Cut()
        self._holding.migration = migration = Migration(MigrationRole.SENDER, cut)
        self._lane.start(self._migrate(vm, data, offer, migration, cut))
        return Empty()

    def _offer(
        self, record: msgspec.Raw, vm_config: VmConfig, data: VmSendMigrationData, sizes: dict[str, int]
    ) -> Offer:
        """Blocking. Look whether there are means, and describe the VM."""
        info = self._engine.info
        if _is_postcopy(data):
            self._engine.check_postcopy(is_receiver=False)
        return Offer(
            config=msgspec.Raw(form.encode(vm_config)),
            vm=record,
            engine=info.name,
            engine_version=info.version,
            # A source that is kept keeps its memory to itself.
            is_local=data.local and not data.preserve_source,
            is_postcopy=_is_postcopy(data),
            copied_disks=sizes,
            connections=data.connections,
        )

    def _migrate(
        self, vm: Vm, data: VmSendMigrationData, offer: Offer, migration: Migration, cut: Cut
    ) -> LaneSteps:
        """What the lane carries out. With its VM elsewhere the VMM is to end."""
        was_running = vm.state is VmState.RUNNING
        lent = self._holding.lent
        assert lent is not None
        self._events.emit("vm", "migration-started")
        try:
            stood_since_s = yield from self._hand_over(vm, data, offer, migration, cut)
        except Exception as error:
            migration.end(is_done=False)
            self._events.emit("vm", "migration-failed")
            self._log("error", f"The migration failed: {': '.join(error_chain(error))}")
            if was_running and not isinstance(error, _NOT_OURS):
                yield from self._let_go_on(vm, lent)
            return LaneEnd(postponed=_allowed_after(error, lent.postponed), error=error)
        else:
            migration.end(is_done=True, downtime_ms=_since_ms(stood_since_s) if was_running else None)
            self._events.emit("vm", "migration-finished")
            if data.preserve_source:
                return LaneEnd(postponed=lent.postponed)
            self._holding.left = lent
            self._holding.write_down()
            try:
                yield from self._power.drop_vm(vm)
            except VmmError as error:
                self._log("error", f"The VM that has left ended badly: {': '.join(error_chain(error))}")
            return LaneEnd(is_to_leave=True)
        finally:
            self._holding.lent = None
            self._holding.cut = None
            cut.close()

    def _hand_over(
        self, vm: Vm, data: VmSendMigrationData, offer: Offer, migration: Migration, cut: Cut
    ) -> Generator[Job, Any, float]:
        """Return since when the guest stands still."""
        address = parse_address(data.destination_url)
        assert address is not None
        control: Link
        tls: Tls | None
        control, token, tls = yield partial(_propose, address, offer, cut, data.tls_dir)
        states: list[Link] = []
        try:
            try:
                was_running = vm.state is VmState.RUNNING
                if data.preserve_source and was_running:
                    yield from self._power.pause_lent(vm)
                states = yield partial(_connect_states, address, offer, cut, token, tls)
                migration.enter(MigrationPhase.SENDING)
                stood_since_s = yield from self._send_state(vm, data, offer, control, states, migration, cut)
                migration.enter(MigrationPhase.LOADING)
                yield partial(control.receive, Ready, timeout_s=ANSWER_S)
                migration.enter(MigrationPhase.COMPLETING)
                stood_ms = _since_ms(stood_since_s) if was_running else None
                self._give()
                # Where this fails a part of it is not sent: the other VMM cannot have read it.
                yield partial(control.send, Complete(is_paused=not was_running, stood_ms=stood_ms))
            except PeerRefused:
                raise
            except Exception as error:
                yield Cleanup(partial(control.send_last, refusal(error_chain(error))))
                raise
            try:
                yield from _wait_done(control)
                is_there = True
            except OutcomeUnknown:
                if not offer.is_postcopy:
                    raise
                is_there = False  # it is said again over another connection
            if offer.is_postcopy:
                reconnect = partial(_connect_again, address, control, cut, token, tls)
                yield from self._send_rest(vm, control, states, reconnect, migration, is_there=is_there)
            return stood_since_s
        finally:
            yield Cleanup(partial(_close_all, states))
            yield Cleanup(control.close)

    def _give(self) -> None:
        """Write that the other VMM may have the VM from here on.

        :raises VmmError: it cannot be written; a VMM after this one would run the VM.
        """
        assert self._holding.lent is not None
        self._holding.lent.is_given = True
        self._holding.promise()

    def _send_rest(
        self,
        vm: Vm,
        control: Link,
        states: list[Link],
        reconnect: Callable[[], Link],
        migration: Migration,
        *,
        is_there: bool,
    ) -> Part:
        """Serve the memory of a guest that runs elsewhere until it is there; `states` gets new links.

        Where it is not certain that it `is_there`, whoever accepts another link says so.
        """
        link_fd: int | None = None
        patience = Patience(RECONNECT_S)
        try:
            while True:
                if is_there:
                    migration.enter(MigrationPhase.POSTCOPY)
                    patience.begin()
                    try:
                        yield partial(vm.machine.transfer_rest, link_fd)
                        break
                    except LinkLost as error:
                        patience.lose(error)
                        self._log("warn", f"{': '.join(error_chain(error))}: it is tried again")
                yield Cleanup(partial(_close_all, states))  # the other VMM is to see it, too
                states.clear()
                link: Link = yield reconnect
                is_there = True
                states.append(link)
                link_fd = link.lend()
        except Exception as error:
            yield Cleanup(partial(control.send_last, refusal(error_chain(error))))
            if isinstance(error, EngineError | MigrationError):
                raise (MemoryLost if is_there else OutcomeUnknown) from error
            raise
        self._events.emit("vm", "postcopy-migration-completed")

    def _send_state(
        self,
        vm: Vm,
        data: VmSendMigrationData,
        offer: Offer,
        control: Link,
        states: list[Link],
        migration: Migration,
        cut: Cut,
    ) -> Generator[Job, Any, float]:
        must_cancel = data.timeout_strategy is TimeoutStrategy.CANCEL
        try:
            fds = [state.lend() for state in states]
            link_fd, *more_fds = fds[: offer.connections]
            target = SentTo(
                link_fd=link_fd,
                more_fds=tuple(more_fds),
                is_local=offer.is_local,
                is_postcopy=offer.is_postcopy,
                disk_fds=dict(zip(offer.copied_disks, fds[offer.connections :], strict=True)),
                downtime_ms=data.downtime_ms,
                insist_s=None if must_cancel else data.timeout_s,
                on_transferred=migration.note_transferred,
            )
            limit_s = data.timeout_s if must_cancel else None
            stood_since_s: float = yield partial(_send_within, vm.machine, target, cut, limit_s)
        except NotSupportedYet:
            raise
        except EngineError as error:
            self._note_stopped(vm)  # the seam's promise, whatever happened
            if isinstance(error, LinkLost):  # the other VMM can say why
                refused: PeerRefused | None = yield partial(control.pending_refusal, timeout_s=GOODBYE_S)
                if refused is not None:
                    raise refused from error
            raise
        except MigrationError:
            self._note_stopped(vm)
            raise
        self._note_stopped(vm)
        self._events.emit("vm", "snapshotting")
        self._events.emit("vm", "snapshotted")
        return stood_since_s

    def _note_stopped(self, vm: Vm) -> None:
        if vm.state is not VmState.RUNNING:
            return
        vm.state = VmState.PAUSED
        if vm.exit_reason is None:
            self._events.emit("vm", "pausing")
            self._events.emit("vm", "paused")

    def _let_go_on(self, vm: Vm, lent: Lent) -> Part:
        """Resume a guest that was stopped for a migration which came to nothing."""
        is_to_end = self._lane.is_leaving or vm.exit_reason is not None or lent.postponed
        if is_to_end or vm.state is not VmState.PAUSED:
            return
        self._events.emit("vm", "resuming")
        try:
            yield from resume_when_released(vm.machine)
        except EngineError as error:
            # The reference ends here, and the VM with it.
            self._log("error", f"The VM stays paused: {': '.join(error_chain(error))}; call vm.resume")
            return
        vm.state = VmState.RUNNING
        self._events.emit("vm", "resumed")


def _connect_states(address: Address, offer: Offer, cut: Cut, token: str, tls: Tls | None) -> list[Link]:
    links: list[Link] = []
    try:
        for number in range(offer.connections + len(offer.copied_disks)):
            links.append(connect(address, "state", cut, token=token, number=number, tls=tls))
    except BaseException:
        _close_all(links)
        raise
    return links


def _connect_again(address: Address, control: Link, cut: Cut, token: str, tls: Tls | None) -> Link:
    """Blocking. Connect for the state anew, as soon as the other VMM is reached and says that it has the VM.

    :raises MigrationError: it cannot, or has said over `control` that nobody waits there.
    """
    deadline_s = time.monotonic() + RECONNECT_S
    while True:
        cut.pause(RECONNECT_PAUSE_S)
        refused = control.pending_refusal(timeout_s=0)
        if refused is not None:
            raise refused
        try:
            link = connect(address, "state", cut, token=token, tls=tls)
            try:
                link.receive(Done)
            except BaseException:
                link.close()
                raise
        except (ConnectFailed, LinkDown, LinkTimeout, TlsFailed):
            if time.monotonic() > deadline_s:
                raise
        else:
            return link


def _close_all(links: list[Link]) -> None:
    for link in links:
        link.close()


def _propose(address: Address, offer: Offer, cut: Cut, tls_dir: str | None) -> tuple[Link, str, Tls | None]:
    """Connect and offer the VM; return the link, the token of who takes it, and what `tls_dir` gave."""
    tls = None
    if tls_dir is not None:
        from cloudvmm.migration.tls import Tls

        tls = Tls(tls_dir, is_server=False)
    control = connect(address, "control", cut, tls=tls)
    try:
        check_welcome(control.receive(Welcome))
        control.send(offer)
        accept = control.receive(Accept, timeout_s=ANSWER_S)
        if offer.is_postcopy and not accept.is_postcopy:
            raise ProtocolError("The other VMM's release does not know memory_mode Postcopy")
        if accept.copied_disks != list(offer.copied_disks):
            raise ProtocolError("The other VMM's release does not know copy_disks")
        return control, accept.token, tls
    except BaseException:
        control.close()
        raise


def _send_within(machine: Machine, target: SentTo, cut: Cut, limit_s: int | None) -> float:
    """Have the engine send; cut everything if it is not done within `limit_s` seconds."""
    if limit_s is None:
        return machine.send(target)
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        cut.now()

    timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        return machine.send(target)
    except EngineError as error:
        if is_late.is_set():
            raise TookTooLong(limit_s) from error
        raise
    finally:
        timer.cancel()


def resume_when_released(machine: Machine) -> Part:
    """Resume a guest whose images the other VMM, which does not run it and never will, may hold yet.

    :raises EngineError: it holds them for too long, or something else is in the way.
    """
    deadline_s = time.monotonic() + RELEASE_S
    while True:
        try:
            yield machine.resume
        except ImageLocked:
            if time.monotonic() > deadline_s:
                raise
            yield partial(time.sleep, _RELEASE_LOOK_S)
        else:
            return


def _since_ms(moment_s: float) -> float:
    return (time.monotonic() - moment_s) * 1000


def _wait_done(control: Link) -> Part:
    try:
        yield partial(control.receive, Done, timeout_s=ANSWER_S)
    except PeerRefused:
        raise
    except MigrationError as error:
        raise OutcomeUnknown from error


def _allowed_after(error: Exception, postponed: Postponed) -> Postponed:
    """A reset builds a VM that runs: not where the other VMM may run it too."""
    if not isinstance(error, _NOT_OURS):
        return postponed
    return [(name, steps) for name, steps in postponed if name != GUEST_RESET]


def _copied_sizes(vm_config: VmConfig, ids: list[str], machine: Machine) -> dict[str, int]:
    from cloudvmm.control.copied_disk import sizes_of

    return sizes_of(vm_config, ids, machine.image_types)


def _is_postcopy(data: VmSendMigrationData) -> bool:
    return data.memory_mode is MigrationMemoryMode.POSTCOPY


def _is_memory_shared(vm_config: VmConfig) -> bool:
    memory = vm_config.memory
    if memory.shared or memory.hugepages:
        return True
    return memory.size == 0 and all(zone.shared or zone.hugepages for zone in memory.zones or ())


def _caused(error: VmmError, cause: VmmError) -> VmmError:
    error.__cause__ = cause
    return error
