"""Questions to the machine that must not wait behind a command: counters, and where the BARs lie.

A thread of its own asks the engine; the answers come back to the control loop, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from cloudvmm.api import action
from cloudvmm.api.data import VmActionPayload, VmState
from cloudvmm.api.error import VmMigrating, VmmShuttingDown, VmNotRunning
from cloudvmm.control.failure import failed
from cloudvmm.control.holding import Holding
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Job, Outcome, Worker
from cloudvmm.engine.base import Machine

END_S = 2.0


class Reader:
    """Used by the control loop's thread alone."""

    def __init__(self, holding: Holding) -> None:
        self.worker = Worker("vm-reader")
        self._holding = holding
        self._postponed: list[action.ApiRequest] = []  # until the VM has been rebooted
        self._waiting: deque[Callable[[Outcome], None]] = deque()
        self._is_looking = False
        self._must_look_again = False

    def answer_counters(self, request: action.ApiRequest) -> None:
        """Answer `vm.counters`, now or when the engine has; of a VM that is being rebooted, after that."""
        if self._holding.lent is not None:
            request.reply.send(failed(request.error, VmMigrating()))
            return
        if self._holding.rebooting is not None:
            self._postponed.append(request)
            return
        vm = self._holding.vm
        if vm is None or vm.is_ending:
            request.reply.send(failed(request.error, VmNotRunning()))
            return
        self._ask(partial(_encoded_counters, vm.machine), partial(self._send_counters, request, vm))

    def answer_postponed(self) -> None:
        """A command has ended: answer who waited for that, if it was a reboot."""
        postponed, self._postponed = self._postponed, []
        for request in postponed:
            self.answer_counters(request)

    def look_at_bars(self) -> None:
        """Find out where the guest has put its BARs; `vm.info` tells it from then on."""
        vm = self._holding.vm
        if vm is None or vm.state is VmState.CREATED or self._holding.lent is not None:
            return
        if self._is_looking:
            self._must_look_again = True
            return
        self._is_looking = True
        self._ask(vm.machine.pci_resources, partial(self._place_bars, vm))

    def take_outcomes(self) -> None:
        self.worker.done.read()
        while (outcome := self.worker.take()) is not None:
            self._waiting.popleft()(outcome)

    def end(self) -> None:
        """Answer what is still asked; the machine is gone, so the thread ends soon."""
        self.worker.stop(END_S)
        while (outcome := self.worker.take()) is not None:
            self._waiting.popleft()(outcome)
        while self._waiting:
            self._waiting.popleft()(Outcome(error=VmmShuttingDown()))
        # The last, as those whose VM went while it was asked are postponed, too.
        for request in self._postponed:
            request.reply.send(failed(request.error, VmmShuttingDown()))

    def _ask(self, job: Job, then: Callable[[Outcome], None]) -> None:
        self._waiting.append(then)
        self.worker.submit(job)

    def _send_counters(self, request: action.ApiRequest, vm: Vm, outcome: Outcome) -> None:
        if outcome.error is None:
            request.reply.send(VmActionPayload(outcome.value))
        elif vm.is_ending:  # it went while it was asked; it may be back
            self.answer_counters(request)
        else:
            request.reply.send(failed(request.error, outcome.error))

    def _place_bars(self, vm: Vm, outcome: Outcome) -> None:
        self._is_looking = False
        if outcome.error is None and vm is self._holding.vm:
            vm.place_bars(outcome.value)
        if self._must_look_again:
            self._must_look_again = False
            self.look_at_bars()


def _encoded_counters(machine: Machine) -> bytes:
    return msgspec.json.encode(machine.counters())
