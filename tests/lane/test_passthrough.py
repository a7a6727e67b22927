"""Do guests get devices of the host? Asked inside an emulated outer machine that has an IOMMU and vDPA.

Its tests boot guests under its KVM, so all that is real but the hardware. Not in any suite, for its kernel is
fetched: `nox -s passthrough`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.guest import GuestBuildError, GuestNotBuilt, locate
from cloudvmm.guest.module import WANTED
from lane import passthrough
from lane.image import build_image, project_archive
from lane.kernel import fetch_kernel, guest_on, module_tree
from lane.machine import LaneMachine
from lane.run import Lane, Tell, run_suite, teller
from support.old_qemu import OLD_QEMU

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Tell:
    return teller(request.config, "passthrough")


def old_qemus() -> list[Path]:
    """Return the folder of the oldest supported QEMU, if it was unpacked."""
    root = os.environ.get(OLD_QEMU)
    return [] if root is None else [Path(root)]


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory, tell: Tell) -> Iterator[Lane]:
    try:
        guest, kernel = locate(), fetch_kernel()
    except (GuestNotBuilt, GuestBuildError) as error:
        pytest.skip(f"The default guest or the generic kernel is missing: {error}")
    started = time.monotonic()
    folder = tmp_path_factory.mktemp("lane")
    image, is_new = build_image(guest, programs=passthrough.PROGRAMS, trees=old_qemus())
    outer = guest_on(kernel, guest, folder, modules=passthrough.MODULES)
    project = project_archive(module_tree(kernel, (*WANTED, *passthrough.MODULES)))
    tell(f"image {'built' if is_new else 'cached'}, all packed in {time.monotonic() - started:.1f} s")

    def start() -> LaneMachine:
        own = tmp_path_factory.mktemp("machine")
        drive = own / "drive.raw"
        drive.write_bytes(b"from the drive".ljust(passthrough.DRIVE_BYTES, b"\0"))
        return LaneMachine(image, outer, project, own, hardware=passthrough.hardware(drive))

    with contextlib.closing(Lane(start, tell)) as lane:
        yield lane
        lane.power_off()


def test_guests_get_devices_of_the_host(lane: Lane, tell: Tell) -> None:
    run_suite(lane, tell, "tests/lane/inside/passthrough.py")


def test_oldest_qemu_gives_them_too(lane: Lane, tell: Tell) -> None:
    if not old_qemus():
        pytest.skip(f"{OLD_QEMU} does not name an unpacked QEMU")
    environment = f"{OLD_QEMU}={old_qemus()[0]}"
    run_suite(lane, tell, "tests/lane/inside/passthrough_old.py", environment=environment)
