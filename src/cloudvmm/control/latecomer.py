"""Commands that few VMMs are ever asked for: sizes, devices, and the ways out of this VMM and into it.

What they need comes to a third of all that a VMM imports. So a start does without, and what is not there when
a command is asked for is imported by the worker, which keeps the control loop free meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from cloudvmm.api import action
from cloudvmm.api.data import ApiResponsePayload
from cloudvmm.config.pci import PciDevice
from cloudvmm.control.holding import Holding
from cloudvmm.control.lane import Lane
from cloudvmm.control.power import Power
from cloudvmm.control.sibling import BeginVm, Siblings
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import Engine
from cloudvmm.events.hub import EventHub

if TYPE_CHECKING:
    from cloudvmm.control.fork import Fork
    from cloudvmm.control.hotplug import Hotplug
    from cloudvmm.control.receive import Receive
    from cloudvmm.control.resize import Resize
    from cloudvmm.control.restore import Restore
    from cloudvmm.control.send import Send
    from cloudvmm.control.snapshot import Snapshot

L = TypeVar("L")


def preload() -> None:
    """Import it all. Blocking; for a thread of its own, once the API answers.

    A VMM may outlive an upgrade of its own package, to be migrated to the new one: from then on an import
    would give another version's code.
    """
    from cloudvmm.control import coredump, fork, hotplug, receive, resize, restore, send, snapshot  # noqa: F401


class Latecomers:
    """`holding` is the state that the steps work on; `delete` are the steps that leave nothing of a VM."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        power: Power,
        *,
        lane: Lane,
        delete: Callable[[], Steps],
        log: Callable[[str, str], None],
        state_dir: str | None,
        siblings: Siblings | None,
    ) -> None:
        self._siblings = siblings
        self._engine = engine
        self._events = events
        self._holding = holding
        self._power = power
        self._lane = lane
        self._delete = delete
        self._log = log
        self._state_dir = state_dir

    def steps(self) -> dict[type[action.ApiRequest], Callable[[Any], Steps]]:
        """Return what begins each of the commands, by the command."""
        hotplug, resize = self._load_hotplug, self._load_resize
        return {
            **{command: _steps(hotplug, lambda late, data: late.add_device(data)) for command in _ADD_DEVICE},
            action.VmRemoveDevice: _steps(hotplug, lambda late, data: late.remove_device(data.id)),
            action.VmResize: _steps(resize, lambda late, data: late.resize(data)),
            action.VmResizeZone: _steps(resize, lambda late, data: late.resize_zone(data)),
            action.VmResizeDisk: _steps(resize, lambda late, data: late.resize_disk(data)),
            action.VmSnapshot: _steps(self._load_snapshot, lambda late, data: late.snapshot(data)),
            action.VmFork: _steps(self._load_fork, lambda late, data: late.fork(data)),
            BeginVm: _steps(self._load_restore, lambda late, data: late.begin(data)),
            action.VmRestore: _steps(self._load_restore, lambda late, data: late.restore(data)),
            action.VmReceiveMigration: _steps(self._load_receive, lambda late, data: late.receive(data)),
            action.VmSendMigration: _steps(self._load_send, lambda late, data: late.send(data)),
        }

    # Jobs of the worker.

    def _load_hotplug(self) -> Hotplug:
        from cloudvmm.control.hotplug import Hotplug

        return Hotplug(self._holding, partial(self._log, "warn"))

    def _load_resize(self) -> Resize:
        from cloudvmm.control.resize import Resize

        return Resize(self._events, self._holding)

    def _load_snapshot(self) -> Snapshot:
        from cloudvmm.control.snapshot import Snapshot

        return Snapshot(self._engine, self._events, self._holding)

    def _load_fork(self) -> Fork:
        from cloudvmm.control.fork import Fork

        return Fork(self._events, self._holding, self._siblings, log=self._log)

    def _load_restore(self) -> Restore:
        from cloudvmm.control.restore import Restore

        return Restore(
            self._engine,
            self._events,
            self._holding,
            self._power,
            delete=self._delete,
            state_dir=self._state_dir,
            log=self._log,
        )

    def _load_send(self) -> Send:
        from cloudvmm.control.send import Send

        return Send(self._engine, self._events, self._holding, self._power, lane=self._lane, log=self._log)

    def _load_receive(self) -> Receive:
        from cloudvmm.control.receive import Receive

        restore = self._load_restore()
        return Receive(self._engine, self._events, self._holding, self._power, restore, log=self._log)


_ADD_DEVICE = [
    command for command in action.COMMANDS if command.body is not None and issubclass(command.body, PciDevice)
]


def _steps(load: Callable[[], L], begin: Callable[[L, Any], Steps]) -> Callable[[Any], Steps]:
    """Return what gives the steps that `begin` finds in what `load` returns."""

    def steps(data: Any) -> Generator[Callable[[], Any], Any, ApiResponsePayload]:
        late: L = yield load
        return (yield from begin(late, data))

    return steps
