"""What asks the other VMM for its VM."""

from __future__ import annotations

import threading

from cloudvmm import api
from cloudvmm.api import MigrationPhase
from cloudvmm.cli.upgrade import VmNotSent, _Request
from cloudvmm.events.hub import EventHub

DEADLINE_S = 30.0


class Vmm:
    """As much of ours as the request uses."""

    def __init__(self) -> None:
        self.events = EventHub()
        self.api_evt = self.api_sender = None


class Progress:
    phase = MigrationPhase.FAILED


class Other:
    """The other VMM, which says that it sends, and then cannot reach us."""

    def vm_send_migration(self, data: object) -> None:
        pass

    def vm_migration_progress(self) -> Progress:
        return Progress()


def test_other_vmm_that_never_connects_is_not_waited_for(monkeypatch):
    called_off = threading.Event()
    monkeypatch.setattr(api, "vm_cancel_migration", lambda *_: called_off.set())
    vmm = Vmm()

    with _Request(Other(), vmm, "unix:/nowhere") as request:
        vmm.events.emit("vm", "migration-receive-ready")
        assert called_off.wait(DEADLINE_S)

    assert isinstance(request.failure, VmNotSent)
