"""What commands answer while the VM is lent to an outgoing migration (reference: rest.md 8, column M)."""

from __future__ import annotations

from functools import partial

from cloudvmm.api import action
from cloudvmm.api import error as api_error
from cloudvmm.config.pci import PciDevice
from cloudvmm.control.holding import Holding
from cloudvmm.control.worker import Steps
from cloudvmm.events.hub import EventHub


def unless_lent(holding: Holding, events: EventHub, request: action.ApiRequest, steps: Steps) -> Steps:
    """The steps of `request`, or its refusal if the VM is lent when its turn comes."""
    if holding.lent is None:
        return (yield from steps)
    steps.close()
    match request:
        case action.VmReboot():
            events.emit("vm", "rebooting")  # as always, also before a failure
        case action.VmSendMigration():
            raise api_error.MigratableSend from api_error.AlreadyMigrating()
        case action.VmReceiveMigration():
            raise api_error.MigratableReceive from api_error.AlreadyMigrating()
        case _ if isinstance(request.data, PciDevice):
            from cloudvmm.control import edit

            # A broken rule wins over the migration.
            yield partial(edit.with_device, holding.created_config(), request.data)
        case _:
            pass
    raise api_error.VmMigrating
