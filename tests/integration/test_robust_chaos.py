"""Faults between the VMM and QEMU at steps of commands: told in time, and the next VM is as good as any.

The sample is that of `CLOUDVMM_TEST_CHAOS_SEED`, 1 where it is not set; all of them run with `--long`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chaos import COMMANDS, FAULTS, HOST_FAULTS, SLOW_FAULTS, WRITES, Chaos

SEED = int(os.environ.get("CLOUDVMM_TEST_CHAOS_SEED", "1"))
SAMPLE = 2
HOST_SAMPLE = 2
# For a VM that would outlive its manager: what ends a conversation, or makes it odd.
STATE_FAULTS = ("kill", "cut", "half", "garbage", "refuse")


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    chaos = Chaos(tmp_path)
    yield chaos
    chaos.close()


def strike_each_step(chaos: Chaos, command: str, fault: str) -> None:
    for step in range(1, len(chaos.steps(command)) + 1):
        chaos.strike(command, step=step, fault=fault)


@pytest.fixture
def lasting_chaos(tmp_path: Path) -> Iterator[Chaos]:
    """With a state folder."""
    chaos = Chaos(tmp_path, has_state=True)
    yield chaos
    chaos.close()


@pytest.mark.qemu
@pytest.mark.parametrize("which", ["chaos", "lasting_chaos"])
def test_sample_of_faults_is_told_and_survived(request: pytest.FixtureRequest, which: str) -> None:
    chaos: Chaos = request.getfixturevalue(which)
    noise = random.Random(SEED)
    pairs = [(command, fault) for command in COMMANDS for fault in FAULTS]
    for command, fault in noise.sample(pairs, SAMPLE):
        count = len(chaos.steps(command))  # none where all that is done is to end QEMU
        chaos.strike(command, step=noise.randint(1, max(1, count)), fault=fault)


@pytest.mark.qemu
@pytest.mark.root
def test_sample_of_what_the_host_lacks_is_told_and_survived(chaos: Chaos) -> None:
    noise = random.Random(SEED)
    for command in noise.sample(list(COMMANDS), HOST_SAMPLE):
        chaos.strike(command, step=noise.choice(HOST_FAULTS["few descriptors"]), fault="few descriptors")
    for command in WRITES:
        chaos.strike(command, step=noise.choice(HOST_FAULTS["full disk"]), fault="full disk")


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_fault_at_each_step_is_told_and_survived(chaos: Chaos, command: str, fault: str) -> None:
    strike_each_step(chaos, command, fault)


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_fault_at_each_step_is_survived_where_vms_outlive_their_manager(
    lasting_chaos: Chaos, command: str
) -> None:
    for fault in STATE_FAULTS:
        strike_each_step(lasting_chaos, command, fault)


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", SLOW_FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_silence_at_each_step_ends_with_a_deadline(chaos: Chaos, command: str, fault: str) -> None:
    strike_each_step(chaos, command, fault)


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", COMMANDS)
def test_want_of_descriptors_at_each_step_is_told_and_survived(chaos: Chaos, command: str) -> None:
    for spare in HOST_FAULTS["few descriptors"]:
        chaos.strike(command, step=spare, fault="few descriptors")


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.root
@pytest.mark.parametrize("command", WRITES)
def test_disk_that_fills_up_is_told_and_survived(chaos: Chaos, command: str) -> None:
    for free_blocks in HOST_FAULTS["full disk"]:
        chaos.strike(command, step=free_blocks, fault="full disk")
