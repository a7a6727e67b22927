"""`vm.receive-migration`: a VM from another VMM (reference: lifecycle.md section 15).

It is an ordinary command, so what changes the VM waits behind it, while whoever only reads is answered. No
vCPU runs here before the other VMM has said `Complete`. Whatever fails once somebody has connected, in the
end nothing is held, and only then the other VMM is told: it may let its guest go on. What fails with Postcopy
after that leaves the VM as it is: it is here and nowhere else, though not all of its memory is.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, MigrationPhase, MigrationRole, VmState
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError, ValidationError
from cloudvmm.config.operation import MigrationMemoryMode, VmReceiveMigrationData
from cloudvmm.config.override import override
from cloudvmm.config.restore import check_net_fds
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.zone_update import ZoneUpdateError, update_zones
from cloudvmm.control.blueprint import check_config, check_numbering
from cloudvmm.control.descriptor import close_descriptors, descriptors_of, forget
from cloudvmm.control.holding import Holding
from cloudvmm.control.migration import Migration
from cloudvmm.control.numbering import device_ids
from cloudvmm.control.power import Power
from cloudvmm.control.record import VmRecord, decode_record
from cloudvmm.control.replacement import replace_net_fds, replace_vfio_fds
from cloudvmm.control.restore import Restore
from cloudvmm.control.worker import Cleanup, Job, Steps
from cloudvmm.engine.base import Engine, EngineError, EngineInfo, LinkLost, ReceivedFrom
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.migration.address import parse_address
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import (
    LinkDown,
    LinkTimeout,
    MemoryLost,
    MigrationError,
    PeerRefused,
    ProtocolError,
)
from cloudvmm.migration.link import Link
from cloudvmm.migration.listener import Listener, greet
from cloudvmm.migration.message import (
    MAX_NAME_CHARACTERS,
    Accept,
    Complete,
    Done,
    Offer,
    Ready,
    readable,
    refusal,
)
from cloudvmm.migration.patience import Patience
from cloudvmm.migration.rule import PostcopyNotAsked, check_receive, check_received

if TYPE_CHECKING:
    from cloudvmm.control.copied_disk import CopiedDisks

COMPLETE_S: Final = 60.0
RECONNECT_S: Final = 150.0  # a little longer than the other VMM tries


class OtherEngineRuns(MigrationError):
    def __init__(self, sender: str, receiver: str) -> None:
        sender = readable(sender, MAX_NAME_CHARACTERS)
        super().__init__(f"A VM of the engine {sender} cannot be received by {receiver}")


class Receive:
    """`holding` is the state that the steps work on."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        power: Power,
        restore: Restore,
        *,
        log: Callable[[str, str], None],
    ) -> None:
        self._engine = engine
        self._events = events
        self._holding = holding
        self._power = power
        self._restore = restore
        self._log = log
        self._copied: CopiedDisks | None = None

    def receive(self, data: VmReceiveMigrationData) -> Steps:
        if self._holding.vm is not None:
            raise api_error.MigratableReceive from api_error.ReceiveOverVm()
        info: EngineInfo = yield partial(_check, self._engine, data)
        self._holding.cut = cut = Cut()
        self._holding.migration = migration = Migration(MigrationRole.RECEIVER, cut)
        try:
            listener: Listener = yield partial(_listen, data, cut)
            try:
                downtime_ms = yield from self._serve(data, listener, migration, info)
            finally:
                yield Cleanup(listener.close)
        except Exception:
            migration.end(is_done=False)
            raise
        finally:
            self._holding.cut = None
            cut.close()
        migration.end(is_done=True, downtime_ms=downtime_ms)
        self._events.emit("vm", "migration-receive-finished")
        return Empty()

    def _serve(
        self, data: VmReceiveMigrationData, listener: Listener, migration: Migration, info: EngineInfo
    ) -> Generator[Job, Any, float | None]:
        """Return for how many milliseconds a guest that ran stood still, if the other VMM tells."""
        if self._holding.vm_config is not None:
            self._log("warn", "The existing VM config will be overwritten")
        self._events.emit("vm", "migration-receive-ready")
        try:
            control: Link = yield listener.accept_sender
        except MigrationError as error:
            raise api_error.MigratableSocket from error
        self._events.emit("vm", "migration-receive-started")
        try:
            return (yield from self._take_over(data, listener, control, migration, info))
        except MemoryLost as error:
            self._events.emit("vm", "migration-receive-failed")
            yield Cleanup(partial(control.send_last, refusal(error_chain(error))))
            raise _aborted(error)  # noqa: B904  its causes are set
        except Exception as error:
            is_gone = yield from self._clear()
            self._events.emit("vm", "migration-receive-failed")
            if is_gone and not isinstance(error, PeerRefused):
                yield Cleanup(partial(control.send_last, refusal(error_chain(error))))
            raise _aborted(error)  # noqa: B904  its causes are set
        finally:
            yield Cleanup(control.close)

    def _take_over(
        self,
        data: VmReceiveMigrationData,
        listener: Listener,
        control: Link,
        migration: Migration,
        info: EngineInfo,
    ) -> Generator[Job, Any, float | None]:
        migration.enter(MigrationPhase.PREPARING)
        yield partial(greet, control)
        offer: Offer = yield partial(control.receive, Offer)
        vm_config: VmConfig
        vm_config, record = yield partial(_examine, info, data, offer)
        yield from self._clear()
        if offer.copied_disks:
            self._copied = yield partial(_prepare_disks, vm_config, offer)
        self._holding.vm_config = vm_config
        forget(data, descriptors_of(vm_config))
        yield from self._power.open_consoles(is_continued=offer.is_local)
        token = os.urandom(16).hex()
        accept = Accept(token=token, is_postcopy=offer.is_postcopy, copied_disks=list(offer.copied_disks))
        yield partial(control.send, accept)
        count = offer.connections + len(offer.copied_disks)
        states: list[Link] = yield partial(listener.accept_states, token, control, count)
        try:
            yield from self._receive_state(offer, record, states, migration)
            downtime_ms = yield from self._complete(offer, control, migration)
            self._copied = None  # the VM's, from here on
            if offer.is_postcopy:
                migration.enter(MigrationPhase.POSTCOPY)
                yield from self._receive_rest(states, partial(_accept_again, listener, token, control))
            return downtime_ms
        finally:
            yield Cleanup(partial(_close_all, states))

    def _receive_state(
        self, offer: Offer, record: VmRecord, states: list[Link], migration: Migration
    ) -> Generator[Job, Any, None]:
        migration.enter(MigrationPhase.RECEIVING)
        fds = [state.lend() for state in states]
        link_fd, *more_fds = fds[: offer.connections]
        source = ReceivedFrom(
            link_fd,
            tuple(more_fds),
            offer.is_local,
            offer.is_postcopy,
            dict(zip(offer.copied_disks, fds[offer.connections :], strict=True)),
            on_transferred=migration.note_transferred,
        )
        yield from self._restore.go_on(record, source)
        if not offer.is_postcopy:
            yield Cleanup(partial(_close_all, states))

    def _complete(
        self, offer: Offer, control: Link, migration: Migration
    ) -> Generator[Job, Any, float | None]:
        """Let the guest run once it is ours; return for how many milliseconds it stood still."""
        migration.enter(MigrationPhase.LOADING)
        yield partial(control.send, Ready())
        complete: Complete = yield partial(control.receive, Complete, timeout_s=COMPLETE_S)
        migration.enter(MigrationPhase.COMPLETING)
        told_s = time.monotonic()
        self._holding.arrived = VmState.PAUSED if complete.is_paused else VmState.RUNNING
        self._holding.promise()  # a VMM after this one takes back what its sender may have
        if not complete.is_paused:
            yield from self._power.resume()
        if offer.is_local:
            yield from self._power.settle_consoles()
        downtime_ms = None
        if complete.stood_ms is not None and not complete.is_paused:
            downtime_ms = complete.stood_ms + (time.monotonic() - told_s) * 1000
        try:
            yield Cleanup(partial(control.send, Done()))
        except MigrationError as error:
            # The VM is here and runs; the other VMM keeps its own paused, as it cannot know.
            self._log("warn", f"The sender was not told of the end: {': '.join(error_chain(error))}")
        return downtime_ms

    def _receive_rest(self, states: list[Link], reconnect: Callable[[], Link]) -> Generator[Job, Any, None]:
        """Get the memory of a guest that runs already; `states` gets new links.

        :raises MemoryLost: it cannot be had.
        """
        vm = self._holding.running_vm()
        link_fd: int | None = None
        patience = Patience(RECONNECT_S)
        try:
            while True:
                patience.begin()
                try:
                    yield partial(vm.machine.transfer_rest, link_fd)
                    return
                except LinkLost as error:
                    patience.lose(error)
                    self._log("warn", f"{': '.join(error_chain(error))}: the sender is waited for")
                yield Cleanup(partial(_close_all, states))  # the sender is to see it, too
                states.clear()
                link: Link = yield reconnect
                states.append(link)
                link_fd = link.lend()
        except (EngineError, MigrationError) as error:
            raise MemoryLost from error

    def _clear(self) -> Generator[Job, Any, bool]:
        """Hold nothing. Return whether it is certain that nothing runs any more."""
        is_gone = True
        try:
            if self._holding.vm is not None:
                yield from self._power.drop_vm(self._holding.vm)
        except VmmError as error:
            is_gone = False
            self._log("error", f"The received VM ended badly: {': '.join(error_chain(error))}")
        yield from self._power.close_consoles()
        if self._holding.vm_config is not None:
            close_descriptors(descriptors_of(self._holding.vm_config))
            self._holding.vm_config = None
        if self._copied is not None:
            yield Cleanup(self._copied.discard)
            self._copied = None
        return is_gone


def _check(engine: Engine, data: VmReceiveMigrationData) -> EngineInfo:
    """Blocking. Refuse what does not go, and what there are no means for, before anybody is waited for.

    Return what the engine is that goes on with the guest.
    """
    try:
        check_receive(data)
    except MigrationError as error:
        raise api_error.MigratableReceive from _caused(api_error.InvalidReceiveMigration(), error)
    try:
        if data.memory_mode is MigrationMemoryMode.POSTCOPY:
            engine.check_postcopy(is_receiver=True)
        return engine.info
    except EngineError as error:
        raise api_error.MigratableReceive from error


def _prepare_disks(vm_config: VmConfig, offer: Offer) -> CopiedDisks:
    from cloudvmm.control.copied_disk import CopiedDisks

    return CopiedDisks(vm_config, offer.copied_disks)


def _accept_again(listener: Listener, token: str, control: Link) -> Link:
    """Blocking. Wait for another connection for the state; the old one is lost, and `control` perhaps too.

    Who connects may not have heard yet that the VM is here.

    :raises MigrationError: it does not come, or the other VMM has said over `control` that it will not.
    """
    try:
        (link,) = listener.accept_states(token, control, 1, timeout_s=RECONNECT_S)
    except LinkDown:
        (link,) = listener.accept_states(token, None, 1, timeout_s=RECONNECT_S)
    with contextlib.suppress(LinkDown):  # the engine will see that
        link.send(Done())
    return link


def _close_all(links: list[Link]) -> None:
    for link in links:
        link.close()


def _listen(data: VmReceiveMigrationData, cut: Cut) -> Listener:
    address = parse_address(data.receiver_url)
    assert address is not None
    try:
        tls = None
        if data.tls_dir is not None:
            from cloudvmm.migration.tls import Tls

            tls = Tls(data.tls_dir, is_server=True)
        return Listener(address, cut, tls=tls)
    except MigrationError as error:
        raise api_error.MigratableReceive from error


def _examine(info: EngineInfo, data: VmReceiveMigrationData, offer: Offer) -> tuple[VmConfig, VmRecord]:
    """Blocking. Return what is offered, with what this host gives it, or refuse it: its guest runs yet."""
    if offer.engine != info.name:
        raise OtherEngineRuns(offer.engine, info.name)
    try:
        vm_config = form.decode_saved(bytes(offer.config), VmConfig)
    except DecodeError as error:
        raise ProtocolError("The other VMM's configuration is malformed") from error
    if data.overrides is not msgspec.UNSET:
        config = override(msgspec.json.decode(offer.config), data.overrides)
        vm_config = form.decode_saved(msgspec.json.encode(config), VmConfig)
    if offer.is_postcopy and data.memory_mode is not MigrationMemoryMode.POSTCOPY:
        raise PostcopyNotAsked
    check_received(data, vm_config)
    try:
        check_net_fds(data.net_fds or (), vm_config)
    except ValidationError as error:
        raise api_error.ConfigValidation from error
    replace_net_fds(vm_config, data.net_fds or ())
    replace_vfio_fds(vm_config, data.vfio_fds, data.iommufd_fd)
    try:
        update_zones(vm_config, data.zone_updates)
    except ZoneUpdateError as error:
        raise api_error.ApplyMemoryZoneUpdate from error
    used_ids = check_config(copy.deepcopy(vm_config))
    record = decode_record(offer.vm)
    check_numbering(record.numbering(info), device_ids(vm_config, used_ids), info)
    return vm_config, record


def _aborted(error: Exception) -> Exception:
    """Name the failure of an incoming migration as the reference does, with its reason behind."""
    if isinstance(error, api_error.VmmShuttingDown):
        return error
    if isinstance(error, LinkDown | LinkTimeout):
        return _caused(api_error.MigratableSocket(), error)
    return _caused(api_error.CompleteMigration(), _caused(api_error.MigrationAborted(), error))


def _caused(error: VmmError, cause: Exception) -> VmmError:
    error.__cause__ = cause
    return error
