"""What takes its time ends soon once it is aborted, whatever it waits for."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from cloudvmm.config.device import FsConfig, TpmConfig, VsockConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.user_net import UserNetConfig
from cloudvmm.engine.base import DeviceError, MachineGone
from cloudvmm.engine.qemu import vsock
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.companion import version_of
from cloudvmm.engine.qemu.fs import open_fs
from cloudvmm.engine.qemu.net import open_net
from cloudvmm.engine.qemu.tpm import open_tpm
from cloudvmm.engine.qemu.vsock import open_vsock
from support.deadline import HOST_S
from support.leak import Holdings
from support.wait import wait_until
from support.watch import Watch

SOON_S = 3.0  # each would be waited for for five seconds at least


def open_file_system(folder, attempt):
    return open_fs(FsConfig(id="f", tag="f", shared_dir=str(folder)), attempt)


def open_our_tpm(folder, attempt):
    return open_tpm(TpmConfig(state_dir=str(folder)), attempt)


def open_stream_device(folder, attempt):
    return open_vsock(VsockConfig(cid=3, socket=str(folder / "vsock"), id="v"), attempt)


def open_user_networking(folder, attempt):
    return open_net(NetConfig(id="n", user=UserNetConfig()), attempt)


@pytest.fixture(autouse=True)
def nothing_left():
    before = Holdings()
    yield
    before.assert_nothing_added()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that comes first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def write_program(path, version, started):
    """Write a program that tells its version, and otherwise says nothing, for ever."""
    ask = f'[ "$1" = --version ] && {version}\n'
    path.write_text(f"#!/bin/sh\n{ask}touch {started}\nexec sleep 1000\n")
    path.chmod(0o755)


def assert_ends_soon(make, started):
    """Abort what `make` does once `started` is there."""
    attempt, outcome = Attempt(), []

    def run():
        try:
            outcome.append(make(attempt))
        except MachineGone as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(started, "the program runs", timeout_s=HOST_S)
    with Watch() as watch:
        attempt.abort()
        thread.join(HOST_S)
    assert watch.elapsed_s < SOON_S
    assert [str(error) for error in outcome] == ["The start of QEMU was aborted"]


RUST, RECENT = "exec echo virtiofsd 1.13.2", "exec echo passt 2025_05_03.587980c"
HANGS = "touch {started} && exec sleep 1000"


@pytest.mark.parametrize(
    ("name", "version", "make"),
    [
        pytest.param("virtiofsd", RUST, open_file_system, id="virtiofsd"),
        pytest.param("virtiofsd", HANGS, open_file_system, id="virtiofsd-version"),
        pytest.param("swtpm", "", open_our_tpm, id="swtpm"),
        pytest.param("vhost-device-vsock", "", open_stream_device, id="vhost-device-vsock"),
        pytest.param("passt", RECENT, open_user_networking, id="passt"),
        pytest.param("passt", HANGS, open_user_networking, id="passt-version"),
    ],
)
def test_wait_for_a_helper_program_that_is_silent_ends(tmp_path, programs, name, version, make):
    started = tmp_path / "started"
    write_program(programs / name, version.format(started=started) or "exit 1", started)
    assert_ends_soon(lambda attempt: make(tmp_path, attempt), started.exists)


def test_wait_for_our_own_stream_back_end_ends(tmp_path, monkeypatch):
    started = tmp_path / "started"
    write_program(tmp_path / "python", "exit 1", started)
    monkeypatch.setattr(vsock, "_PROGRAM", "no-such-vsock-program")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert_ends_soon(lambda attempt: open_stream_device(tmp_path, attempt), started.exists)


@pytest.mark.parametrize("has_room", [True, False], ids=["silent", "full"])
def test_wait_for_the_users_tpm_ends(tmp_path, has_room):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(path)
        listener.listen(0)
        if not has_room:
            other.connect(path)
        started = threading.Event()

        def make(attempt):
            started.set()
            return open_tpm(TpmConfig(socket=path), attempt)

        assert_ends_soon(make, started.is_set)


def test_aborted_attempt_begins_nothing(tmp_path, programs):
    started = tmp_path / "started"
    write_program(programs / "swtpm", "exit 1", started)
    attempt = Attempt()
    attempt.abort()
    with pytest.raises(MachineGone):
        open_our_tpm(tmp_path, attempt)


def test_program_that_does_not_tell_its_version_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.companion._VERSION_S", 0.05)
    write_program(tmp_path / "odd", "exec sleep 1000", tmp_path / "started")
    with pytest.raises(DeviceError, match="odd .* did not end within 0.05 s"):
        version_of(str(tmp_path / "odd"), name="odd", attempt=Attempt())
