"""vCPUs that come and go while a guest is there.

QEMU names each place for a vCPU by socket, die, core and thread, and says which are taken. They are filled
from the first one on and emptied from the last one, so that the topology stays that of a machine which was
started with as many. The guest lets go of a vCPU when it likes, and QEMU tells of it by events that name no
vCPU: after each of them the places are counted anew.

QEMU is asked for as little as can be while a guest takes vCPUs up, since it answers with the lock held that
the guest's own work on them needs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from cloudvmm.config.cpu import CoreScheduling, CpusConfig
from cloudvmm.engine.base import (
    EngineError,
    EngineTimeout,
    MachineGone,
    NotSupportedYet,
    RemovalPending,
    VcpusChanged,
    VcpusRemoved,
)
from cloudvmm.engine.qemu.codec import Event
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.keepsake import KeptVcpus
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.host.core_scheduling import CoreSchedulingError, has_smt, isolate, share

QUERY: Final = "query-hotpluggable-cpus"

_ID_PREFIX: Final = "cpu-"  # no id of a device of ours begins so
_PLACE_ORDER: Final = ("socket-id", "die-id", "core-id", "thread-id")
_TELLING: Final = ("ACPI_DEVICE_OST", "DEVICE_DELETED")
# What a guest's ACPI tells: the event that it speaks of, and what came of it.
_INSERTION: Final = 1
_DONE: Final = 0
_THREAD_NAME: Final = re.compile(rb"CPU (\d+)/")
_UNDER_WAY: Final = 132
# An older QEMU can crash when an emulated vCPU is added behind a removal. 10.0 is known to be sound.
_SOUND_UNDER_EMULATION: Final = (10, 0, 0)


class VcpuRefused(EngineError):
    """A vCPU could not be added or removed; the text is QEMU's own words."""


class NoVcpuThread(EngineError):
    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The emulation has had {limit} vCPUs since the boot and can have no other:"
            " reboot the VM, or use KVM"
        )


class VcpuGone(EngineError):
    """An emulated guest that has let go of a vCPU cannot be saved: reboot the VM before, or use KVM"""


class AffinityError(EngineError):
    def __init__(self, vcpu: int) -> None:
        super().__init__(f"vCPU {vcpu} could not be bound to its host CPUs")


class CoreSchedulingFailed(EngineError):
    """Core scheduling could not be set up for the vCPUs"""


def ignore_coming() -> None:
    """The `on_coming` of vCPUs that end with us."""


class Vcpus:
    """`control` is the worker's monitor, lent. `resize` and `bind` are the worker's, the rest is the loop's.

    Both share `_target`: the count that the guest is to get down to, None where it owes nothing. They share
    `_known`, too: QEMU's places with what was added since it told them, None where the guest may have let go.
    """

    def __init__(
        self,
        control: QmpClient,
        cpus: CpusConfig,
        facts: QemuFacts,
        *,
        pid: int | None,
        on_coming: Callable[[], None] = ignore_coming,
    ) -> None:
        """`on_coming` is called when a vCPU is about to be added, to write down what `state` gives then."""
        self._control = control
        self._on_coming = on_coming
        self._pid = pid
        self._known: list[dict[str, Any]] | None = None
        self._facts = facts
        self._affinity = {each.vcpu: set(each.host_cpus) for each in cpus.affinity or ()}
        self._scheduling = cpus.core_scheduling if has_smt() else CoreScheduling.OFF
        self._has_cookie = False
        self._target: int | None = None
        # QEMU ends itself when emulation is to run more vCPUs in its life than the machine has places.
        self._limit = cpus.max_vcpus
        self._had = cpus.boot_vcpus
        self._untaken: set[str] = set()  # those added that the guest has not taken up
        self._coming: str | None = None  # of those, the one that QEMU may not have yet
        self._told = cpus.boot_vcpus
        self._threads: dict[int, int] = {}
        self._started: deque[tuple[int, int]] = deque()

    def state(self) -> KeptVcpus:
        """Return what another process needs to go on with the machine. Any thread."""
        return KeptVcpus(
            target=self._target,
            had=self._had,
            untaken=sorted(self._untaken.copy()),
            told=self._told,
            threads=self._threads,
            has_cookie=self._has_cookie,
            coming=self._coming,
        )

    def go_on(self, kept: KeptVcpus) -> None:
        """Blocking. Know what another process has left of the machine."""
        self._target = kept.target
        self._had = kept.had
        self._untaken = set(kept.untaken)
        self._told = kept.told
        self._threads = kept.threads
        self._has_cookie = kept.has_cookie
        if kept.coming is not None:
            taken = [vcpu_id(place["props"]) for place in self._places() if is_taken(place)]
            if kept.coming not in taken:
                self._had -= 1
                self._untaken.discard(kept.coming)

    def resize(self, vcpus: int) -> None:
        """Blocking. As `Machine.resize_vcpus`; if one of several cannot be added, the others are taken back.

        :raises RemovalPending: the guest still has to let go of some.
        :raises NotSupportedYet: this QEMU cannot remove vCPUs safely.
        :raises NoVcpuThread: this emulated machine has had as many as it can.
        :raises VcpuRefused: QEMU refused.
        """
        places = self._known
        if places is None or self._target is not None:
            places = self._known = self._places()
        taken = [place for place in places if is_taken(place)]
        if self._target is not None and len(taken) > self._target:
            raise RemovalPending(f"The guest still has {len(taken)} vCPUs and is to have {self._target}")
        self._target = None
        if vcpus > len(taken):
            self._add([place for place in places if not is_taken(place)][: vcpus - len(taken)])
            self._bind(self._named_threads(vcpus) or self._ask_threads())
        elif vcpus < len(taken):
            self._check_removal()
            self._ask_removal(taken, vcpus)

    @property
    def are_owed(self) -> bool:
        """Whether the guest still has to let go of some."""
        return self._target is not None

    def bind(self) -> None:
        """Blocking. Have each vCPU run on the host CPUs, and beside whom, as the configuration says.

        :raises AffinityError: the host does not have them, or does not let us.
        :raises CoreSchedulingFailed: the kernel has core scheduling, and refuses it.
        """
        self._bind(self._ask_threads())

    def _bind(self, threads: dict[int, int]) -> None:
        self._started += [each for each in threads.items() if each not in self._threads.items()]
        self._threads = threads
        for vcpu, host_cpus in self._affinity.items():
            if vcpu not in threads:
                continue
            try:
                os.sched_setaffinity(threads[vcpu], host_cpus)
            except (OSError, ValueError, OverflowError) as error:
                raise AffinityError(vcpu) from error
        try:
            self._schedule(threads)
        except CoreSchedulingError as error:
            raise CoreSchedulingFailed from error

    def take_started(self) -> list[tuple[int, int]]:
        """Return the number of each vCPU whose thread was found since the last call, and that thread."""
        return [self._started.popleft() for _ in range(len(self._started))]

    def _ask_threads(self) -> dict[int, int]:
        found = {each["cpu-index"]: each["thread-id"] for each in self._control.execute("query-cpus-fast")}
        return dict(sorted(found.items()))

    def _named_threads(self, vcpus: int) -> dict[int, int]:
        """Return the thread of each of so many `vcpus` by QEMU's names; nothing where one has none."""
        found: dict[int, int] = {}
        with contextlib.suppress(OSError):  # a thread ended meanwhile
            for thread in os.listdir(f"/proc/{self._pid}/task"):
                with open(f"/proc/{self._pid}/task/{thread}/comm", "rb") as file:
                    name = _THREAD_NAME.match(file.read())
                if name:
                    found[int(name[1])] = int(thread)
        return dict(sorted(found.items())) if len(found) == vcpus else {}

    def check_savable(self) -> None:
        """Blocking. Raise what keeps QEMU from giving the guest's state.

        :raises VcpuGone: with emulation QEMU would wait for a vCPU that is gone, for ever.
        """
        if self._facts.accelerator == "tcg" and sum(map(is_taken, self._places())) < self._had:
            raise VcpuGone

    def is_told_by(self, event: Event) -> bool:
        """Say whether `event` may mean that the guest has taken up a vCPU, or let go of one it owes."""
        info = event.data.get("info", {})
        if info.get("source") == _INSERTION and info.get("status") == _DONE:
            has_taken = info.get("device") in self._untaken
            self._untaken.discard(info.get("device", ""))
            return has_taken
        if event.name in _TELLING:
            self._known = None
        return self._target is not None and event.name in _TELLING

    def is_refused_by(self, event: Event) -> bool:
        """Say whether `event` means that the guest does not take up, or let go of, a vCPU."""
        info = event.data.get("info", {})
        is_about_vcpu = info.get("slot-type") == "CPU"
        return is_about_vcpu and is_refusal(event) and (self._target is not None or bool(self._untaken))

    @property
    def known_places(self) -> list[dict[str, Any]] | None:
        """What an answer to `QUERY` would be, where that is known."""
        return self._known if self._target is None else None

    def judge(self, places: list[dict[str, Any]]) -> list[VcpusChanged | VcpusRemoved]:
        """Take an answer to `QUERY`; return what it means: how many the guest has, that it owes none."""
        events: list[VcpusChanged | VcpusRemoved] = []
        taken = [place for place in places if is_taken(place)]
        held = sum(vcpu_id(place["props"]) not in self._untaken for place in taken)
        if held != self._told:
            self._told = held
            events.append(VcpusChanged(held))
        if self._target is not None and len(taken) <= self._target:
            self._target = None
            events.append(VcpusRemoved(len(taken)))
        return events

    def _schedule(self, threads: dict[int, int]) -> None:
        """Done again for all when some come: who has a cookie keeps it, or gets another as good."""
        leader, *others = threads.values()
        match self._scheduling:
            case CoreScheduling.VCPU:
                isolate(threads.values())
            case CoreScheduling.VM:
                if not self._has_cookie:
                    isolate([leader])
                    self._has_cookie = True
                share(leader, others)
            case CoreScheduling.OFF:
                pass

    def _places(self) -> list[dict[str, Any]]:
        return sorted(self._control.execute(QUERY), key=_order)

    def _check_removal(self) -> None:
        if self._facts.accelerator == "tcg" and self._facts.version < _SOUND_UNDER_EMULATION:
            raise NotSupportedYet(
                f"QEMU {self._facts.version_text} can crash after the removal of an emulated vCPU:"
                " it needs KVM, or QEMU 10.0"
            )

    def _ask_removal(self, taken: list[dict[str, Any]], vcpus: int) -> None:
        self._target = vcpus
        for count in range(len(taken), vcpus, -1):
            try:
                self._remove(taken[count - 1]["qom-path"])
            except VcpuRefused:
                self._target = None if count == len(taken) else count
                raise

    def _add(self, places: list[dict[str, Any]]) -> None:
        if self._facts.accelerator == "tcg" and self._had + len(places) > self._limit:
            raise NoVcpuThread(self._limit)
        added: list[str] = []
        for place in places:
            name = vcpu_id(place["props"])
            self._untaken.add(name)
            place["qom-path"] = name  # before the guest can say that it has it
            self._had += 1  # whoever comes after us must not count one too few
            self._coming = name
            try:
                self._on_coming()
                self._control.execute("device_add", {"driver": place["type"], "id": name, **place["props"]})
            except (EngineTimeout, MachineGone):
                raise  # QEMU may have it
            except EngineError as error:
                self._take_back(name, added)
                if isinstance(error, QmpError):
                    raise VcpuRefused(error.description) from None
                raise
            finally:
                self._coming = None
            added.append(name)

    def _take_back(self, name: str, added: list[str]) -> None:
        """Know that QEMU does not have `name`, and let the guest have none of `added` beside it."""
        self._had -= 1
        self._untaken.discard(name)
        self._known = None
        for each in reversed(added):
            self._remove(each)

    def _remove(self, name: str) -> None:
        """Ask the guest to let go of a vCPU; `name` is its id, or its path where QEMU started with it."""
        try:
            self._control.execute("device_del", {"id": name})
        except QmpError as error:
            raise VcpuRefused(error.description) from None  # the same words


def is_refusal(event: Event) -> bool:
    """Say whether in `event` a guest's ACPI says no to what it was asked to plug in or let go of."""
    info = event.data.get("info", {})
    return event.name == "ACPI_DEVICE_OST" and info.get("status") not in (_DONE, _UNDER_WAY)


def is_taken(place: dict[str, Any]) -> bool:
    """Say whether the place of a ``query-hotpluggable-cpus`` has a vCPU."""
    return "qom-path" in place


def vcpu_id(props: dict[str, int]) -> str:
    """Return the id of the vCPU in the place `props`."""
    return _ID_PREFIX + "-".join(str(props[key]) for key in _PLACE_ORDER if key in props)


def _order(place: dict[str, Any]) -> list[int]:
    return [place["props"].get(key, 0) for key in _PLACE_ORDER]
