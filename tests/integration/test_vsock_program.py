"""The vsock device where `vhost-device-vsock` is installed: a stand-in, and the real one if there is one.

CLOUDVMM_TEST_VHOST_DEVICE_VSOCK names the real program.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.booted import Booted, booting, vm_config
from support.caller import call, serve_at
from support.deadline import GUEST_S
from support.process import descendants_of
from support.socat import payload_with_socat
from support.vsock_program import write_stand_in

pytestmark = [pytest.mark.qemu, pytest.mark.root]


@pytest.fixture(params=["stand-in", "real"])
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the program first on the PATH of the server."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if request.param == "stand-in":
        write_stand_in(folder)
    else:
        real = os.environ.get("CLOUDVMM_TEST_VHOST_DEVICE_VSOCK")
        if real is None:
            pytest.skip("CLOUDVMM_TEST_VHOST_DEVICE_VSOCK names no program")
        (folder / "vhost-device-vsock").symlink_to(real)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def vm(installed: None, tmp_path: Path) -> Iterator[Booted]:
    with booting(tmp_path / "run", vm_config(payload=payload_with_socat(tmp_path))) as booted:
        yield booted


def test_installed_program_serves_a_device_that_comes_and_goes(vm, tmp_path):
    path = tmp_path / "vsock"
    for cid in (3, 4):
        vm.vmm.put("vm.add-vsock", {"id": "sock", "cid": cid, "socket": str(path)}, expect=200)
        assert any("vhost-device-vsock" in each.command for each in descendants_of(vm.server.pid))
        vm.run("(socat -u VSOCK-LISTEN:1500 SYSTEM:'cat >/tmp/h; mv /tmp/h /tmp/heard' &)")
        with call(path, 1500) as stream:
            stream.socket.sendall(b"to the guest")
        assert vm.run("until [ -e /tmp/heard ]; do usleep 20000; done; cat /tmp/heard") == "to the guest"
        with serve_at(path, 1501) as heard:
            vm.run("rm /tmp/heard; echo to the host | socat -u - VSOCK-CONNECT:2:1501")
            assert heard.get(timeout=GUEST_S) == b"to the host\n"
        vm.vmm.put("vm.remove-device", {"id": "sock"}, expect=204)
        vm.events.wait("vm/device-removed", count=cid - 2, timeout_s=GUEST_S)
        assert not path.exists()
        assert not any("vhost-device-vsock" in each.command for each in descendants_of(vm.server.pid))
