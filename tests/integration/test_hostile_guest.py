"""A guest that means harm, as far as a guest by itself can: what it writes."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.booted import MIB, Booted, booting, make_image, vm_config
from support.deadline import HOST_S
from support.shared import Shared, shared
from support.vmm import error_words

pytestmark = [pytest.mark.qemu]

SECTOR_BYTES = 512
DISK_BYTES = 4 * MIB
IMAGE = "image"


@shared()
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with a disk of which nobody has said what it is."""
    folder = tmp_path_factory.mktemp("hostile")
    make_image(folder / IMAGE, DISK_BYTES)
    disks = [{"path": str(folder / IMAGE)}]
    with booting(folder, vm_config(disks=disks)) as vm:
        yield vm


@pytest.fixture
def vm(attacker: Shared[Booted], request: pytest.FixtureRequest) -> Booted:
    return attacker.lend(request)


def header_over(secret: Path, folder: Path) -> bytes:
    """Return the beginning of a qcow2 image that stands on `secret`."""
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is missing")
    image = folder / "bad.qcow2"
    command = [program, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(image)]
    subprocess.run(command, check=True, timeout=HOST_S)
    return image.read_bytes()[: 2 * SECTOR_BYTES]


def test_image_header_that_the_guest_writes_opens_no_file_to_it(vm: Booted, tmp_path: Path) -> None:
    secret, image = make_image(tmp_path / "secret", DISK_BYTES), vm.folder / IMAGE
    header = header_over(secret, tmp_path)
    vm.run(f"echo {base64.b64encode(header).decode()} | base64 -d > /tmp/header")
    vm.run("dd if=/tmp/header of=/dev/vda bs=512 conv=fsync 2>/dev/null")
    assert image.read_bytes().startswith(header)

    vm.vmm.put("vm.shutdown")
    refused = vm.vmm.exchange("PUT", "vm.boot")

    assert refused.status == 500
    # What the first boot found is in the configuration, and holds.
    assert error_words(refused)[-1].endswith("specified = raw, detected = qcow2")
    # It has taken its own disk from itself; whoever gives it back has the VM again.
    image.write_bytes(bytes(DISK_BYTES))
    vm.vmm.put("vm.boot")
    vm.open_shell()
    vm.wait_ready()
