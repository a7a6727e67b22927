"""A machine in memory: what an engine promises, without a guest. Public, for whoever tests a client.

`FakeEngine` keeps the whole contract of `engine.base`: the same checks, errors, events and state rules as
a real engine, in microseconds and without privileges. What it does not do: lock disk images, make TAP
devices, run a payload. `machine.guest` plays the guest, which lets go of devices and follows new sizes at
once unless told otherwise; `Faults` lets any operation fail, hang, drag on or kill the machine.
"""

from cloudvmm.engine.fake.engine import FakeEngine
from cloudvmm.engine.fake.fault import Delay, Die, Fail, Fault, Faults, Hang
from cloudvmm.engine.fake.guest import FakeGuest, PressSeen
from cloudvmm.engine.fake.machine import FakeMachine

__all__ = [
    "Delay",
    "Die",
    "Fail",
    "FakeEngine",
    "FakeGuest",
    "FakeMachine",
    "Fault",
    "Faults",
    "Hang",
    "PressSeen",
]
