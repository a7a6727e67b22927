"""Does everything hold on KVM? Asked inside an emulated outer machine, whose KVM works whatever this one has.

What runs in there: the probe of the accelerator, a VM's life through the REST API, and of the contract suite
the life of a machine; the whole suite is a long test. Beside that, what its kernel has and this one may not:
control groups that count processes.
Each inner pytest's own summary is shown in ours. A failure ends with the last words of the inner consoles.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from cloudvmm.guest import GuestNotBuilt, locate
from lane.image import build_image, project_archive
from lane.machine import LaneMachine
from lane.run import Lane, Tell, run_suite, teller

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Tell:
    return teller(request.config, "kvm")


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory, tell: Tell) -> Iterator[Lane]:
    try:
        guest = locate()
    except GuestNotBuilt as error:
        pytest.skip(f"The default guest is missing: {error}")
    started = time.monotonic()
    image, is_new = build_image(guest)
    project = project_archive()
    tell(f"image {'built' if is_new else 'cached'}, project packed in {time.monotonic() - started:.1f} s")
    with contextlib.closing(
        Lane(lambda: LaneMachine(image, guest, project, tmp_path_factory.mktemp("lane")), tell)
    ) as lane:
        yield lane
        lane.power_off()


# One after the other, although the machine has two processors: with two guests on KVM at the same time,
# emulated virtualisation has been seen to leave one of them hanging.


def test_kvm_is_found_and_a_vm_lives_its_whole_life_on_it(lane: Lane, tell: Tell) -> None:
    # One session for all files: under emulation each start of pytest costs seconds.
    names = ("accelerator", "lifecycle", "control_group")
    run_suite(lane, tell, " ".join(f"tests/lane/inside/{name}.py" for name in names))


def test_qemu_engine_keeps_the_contract_on_kvm(lane: Lane, tell: Tell) -> None:
    """A sample of it: the life of a machine."""
    run_suite(lane, tell, "tests/contract/test_lifecycle.py -m qemu")


@pytest.mark.long
def test_qemu_engine_keeps_the_whole_contract_on_kvm(lane: Lane, tell: Tell) -> None:
    run_suite(lane, tell, "tests/contract -m qemu")
