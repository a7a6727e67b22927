"""The vsock device's back end: started, refused, ended; nothing of it stays."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.config.device import VsockConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu import vsock
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.vsock import VsockBackendError, open_vsock
from cloudvmm.errors import error_chain
from cloudvmm.vhost.session import MEMORY_SLOT_LIMIT
from cloudvmm.vsock.muxer import STREAM_LIMIT
from support.leak import Holdings, command_of
from support.vsock_program import write_stand_in


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = Holdings()
    yield
    before.assert_nothing_added()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other back end is installed."""
    monkeypatch.setattr(vsock, "_PROGRAM", "no-such-vsock-program")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of programs that comes first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return folder


def config(path: Path) -> VsockConfig:
    return VsockConfig(cid=3, socket=str(path), id="v")


def refusal(path: Path) -> list[str]:
    with pytest.raises(VsockBackendError) as caught:
        open_vsock(config(path), Attempt())
    return error_chain(caught.value)


def test_back_end_serves_and_ends_with_its_backing(ours, tmp_path):
    path = tmp_path / "vsock"
    backing = open_vsock(config(path), Attempt())
    assert "cloudvmm.vsock 3" in command_of(backing.companion.pid)
    assert path.is_socket()
    assert backing.fds == [backing.fd]
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(str(path))
    backing.close()
    assert not path.exists()
    backing.close()


def test_back_end_imports_little(ours, tmp_path):
    backing = open_vsock(config(tmp_path / "vsock"), Attempt())
    status = Path(f"/proc/{backing.companion.pid}/status").read_text()
    (rss,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    backing.close()
    assert rss < 24 * 1024


def test_back_end_may_open_a_socket_for_each_stream_and_a_file_for_each_region(ours, tmp_path):
    backing = open_vsock(config(tmp_path / "vsock"), Attempt())
    soft, hard = resource.prlimit(backing.companion.pid, resource.RLIMIT_NOFILE)
    backing.close()
    assert soft >= min(hard, STREAM_LIMIT + MEMORY_SLOT_LIMIT)


def test_relative_place_is_that_of_the_manager(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backing = open_vsock(config(Path("vsock")), Attempt())
    monkeypatch.chdir("/")
    backing.close()
    assert not (tmp_path / "vsock").exists()


def test_place_that_somebody_took_over_is_left_to_them(ours, tmp_path):
    path = tmp_path / "vsock"
    backing = open_vsock(config(path), Attempt())
    path.unlink()
    path.write_text("mine")
    backing.close()
    assert path.read_text() == "mine"


def test_place_that_is_taken_is_told(ours, tmp_path):
    path = tmp_path / "vsock"
    path.write_text("mine")
    assert refusal(path) == [
        "Cannot create virtio-vsock backend",
        "Error binding to the host-side Unix socket",
        "Address already in use (os error 98)",
    ]
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["", "\0", "x" * 200])
def test_place_that_is_none_is_told(ours, name):
    with pytest.raises(VsockBackendError):
        open_vsock(VsockConfig(cid=3, socket=name, id="v"), Attempt())


def test_python_that_does_not_start_is_told(ours, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    write_stand_in(tmp_path, "#!/bin/sh\necho broken >&2; exit 3\n").rename(tmp_path / "python")
    assert refusal(tmp_path / "vsock")[1:] == ["The vsock back end exited with status 3: broken"]
    assert not (tmp_path / "vsock").exists()


def test_installed_program_is_taken_and_leaves_no_folder(installed, tmp_path):
    write_stand_in(installed)
    path = tmp_path / "vsock"
    backing = open_vsock(config(path), Attempt())
    assert "vhost-device-vsock --guest-cid 3" in command_of(backing.companion.pid)
    assert path.is_socket()
    assert list((tmp_path / "tmp").iterdir()) == []
    backing.close()
    assert not path.exists()


def test_installed_program_does_not_get_a_place_that_is_taken(installed, tmp_path):
    write_stand_in(installed)
    path = tmp_path / "vsock"
    path.write_text("mine")
    assert refusal(path)[-1] == "Address already in use (os error 98)"
    assert path.read_text() == "mine"


def test_installed_program_that_ends_is_told_in_its_own_words(installed, tmp_path):
    write_stand_in(installed, "#!/bin/sh\necho no such option >&2; exit 2\n")
    assert refusal(tmp_path / "vsock")[1:] == ["vhost-device-vsock exited with status 2: no such option"]
    assert not (tmp_path / "vsock").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_installed_program_that_does_not_listen_is_told(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(vsock, "_READY_S", 0.05)
    write_stand_in(installed, "#!/bin/sh\nexec sleep 1000\n")
    assert refusal(tmp_path / "vsock")[1:] == ["The vsock back end did not begin to serve"]
    assert not (tmp_path / "vsock").exists()


def test_device_without_an_id_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="without an id"):
        open_vsock(VsockConfig(cid=3, socket=str(tmp_path / "vsock")), Attempt())
