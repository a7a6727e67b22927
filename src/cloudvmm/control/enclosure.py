"""A VMM that is held to the files of its VM: from when on, and which of its threads.

Which paths those are is told by the VM's configuration, its `landlock_rules`, the engine, and by what any
VMM needs (`landlock.py`). It is in force from then on, for the control loop's thread, the workers' and all
that they start, for as long as this VMM lives: the kernel lets nobody out. A later VM that asks for it gets
what both allow. The threads of front ends belong to whoever starts them.

Reference: lifecycle.md section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty
from cloudvmm.config.error import ValidationError
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import Engine, EngineError
from cloudvmm.host.error import HostError

if TYPE_CHECKING:
    from cloudvmm.host.landlock import Ruleset


class Enclosure:
    """Used by the control loop's thread. `renew` has it start other threads in the workers' place."""

    def __init__(self, engine: Engine, renew: Callable[[], None], *, state_dir: str | None) -> None:
        self._engine = engine
        self._renew = renew
        self._state_dir = state_dir
        self._in_force: tuple[Any, ...] = ()
        self.is_closed = False

    def close_around(self, vm_config: VmConfig, *, readable: Sequence[str] = ()) -> Steps:
        """Hold this VMM to what the VM of `vm_config` may reach, if it asks for that.

        `readable` is what it is made from. Where this fails, and `is_closed` is false, the VMM may be held to
        it all the same, or in part.

        :raises ApplyLandlock: the kernel refuses, or a rule is none; the cause tells why.
        """
        self.is_closed = False
        if vm_config.landlock_enable:
            try:
                rules: tuple[Any, ...] = yield partial(self._rules, vm_config, readable)
                if rules != self._in_force:  # the kernel would count them as one more of few
                    ruleset: Ruleset = yield partial(_ruleset, rules)
                    self._enter(ruleset)
            except (HostError, EngineError, ValidationError, OSError, RuntimeError) as error:
                raise api_error.ApplyLandlock from error
            self._in_force = rules
        self.is_closed = True
        return Empty()

    def close_at_once(self, vm_config: VmConfig) -> None:
        """Blocking. As `close_around`, for who answers nobody yet.

        :raises VmmError: the kernel refuses, or the engine.
        """
        steps = self.close_around(vm_config)
        with contextlib.suppress(StopIteration):
            job = next(steps)
            while True:
                job = steps.send(job())

    def _enter(self, ruleset: Ruleset) -> None:
        with ruleset:
            ruleset.restrict_thread()
        self._renew()

    def _rules(self, vm_config: VmConfig, readable: Sequence[str]) -> tuple[Any, ...]:
        from cloudvmm.control import latecomer
        from cloudvmm.control.landlock import rules_of

        latecomer.preload()  # what they link to on the host may be out of reach afterwards
        return rules_of(vm_config, self._engine, state_dir=self._state_dir, readable=readable)


def _ruleset(rules: tuple[Any, ...]) -> Ruleset:
    from cloudvmm.control.landlock import ruleset_of

    return ruleset_of(rules)
