"""Who asks for counters is answered, however the VMM ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from cloudvmm.api import action
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.control.holding import Holding
from cloudvmm.control.reader import Reader

DEADLINE_S = 10.0


def test_counters_of_a_vm_that_went_while_they_were_asked_are_refused_at_the_end() -> None:
    has_gone = threading.Event()

    def counters() -> Any:
        assert has_gone.wait(DEADLINE_S)
        raise RuntimeError("gone")

    holding = Holding(lambda _: None, lambda _: None)
    vm: Any = SimpleNamespace(machine=SimpleNamespace(counters=counters), is_ending=False)
    holding.vm = vm
    reader = Reader(holding)
    request = action.VmCountersRequest(None, ReplyChannel())
    reader.answer_counters(request)
    vm.is_ending, holding.rebooting = True, vm  # a reboot that never comes to its end
    has_gone.set()

    reader.end()

    with pytest.raises(request.error):
        request.reply.recv(timeout_s=0)
