"""virtiofsd as we start it: which of the two, with which options, and what is said where it fails."""

from __future__ import annotations

import os

import pytest

from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu import virtiofsd
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.companion import CompanionFailed, NoProgram
from cloudvmm.engine.qemu.virtiofsd import SharedDirError, VirtiofsdForRoot, share
from support.leak import Holdings

IN_C = "echo virtiofsd version 7.2.22"
IN_RUST = "echo virtiofsd 1.13.2"
NAMESPACE, CHROOT = 1 << 21, 1 << 18
MOUNTS = "29 1 8:1 / / rw - ext4 /dev/vda rw\n30 29 0:5 / /proc rw - proc proc rw\n"


@pytest.fixture(autouse=True)
def no_leak():
    before = Holdings()
    yield
    before.assert_nothing_added()


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """Put a program on the PATH that is what its version says, and otherwise runs a script."""

    def make(version: str, script: str = "exit 1", rights: int | None = None) -> str:
        program = tmp_path / "virtiofsd"
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ {version}; exit; }}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        if rights is not None:
            (tmp_path / "mountinfo").write_text(MOUNTS)
            monkeypatch.setattr(virtiofsd, "_MOUNTS", str(tmp_path / "mountinfo"))
            monkeypatch.setattr(virtiofsd, "_rights", lambda: rights)
        return str(program)

    return make


def words_of(said: str) -> list[str]:
    """Return the arguments that the daemon was started with, as it told them."""
    return said.partition(": ")[2].splitlines()


ECHO = "printf '%s\\n' \"$@\" >&2; exit 1"


@pytest.mark.parametrize(
    ("version", "rights", "options"),
    [
        (IN_C, NAMESPACE | CHROOT, ["-f", "-o", "source={folder},sandbox=namespace"]),
        (IN_C, CHROOT, ["-f", "-o", "source={folder},sandbox=chroot"]),
        (IN_RUST, NAMESPACE, ["--shared-dir", "{folder}", "--sandbox", "namespace"]),
        (IN_RUST, CHROOT, ["--shared-dir", "{folder}", "--sandbox", "chroot"]),
        (IN_RUST, 0, ["--shared-dir", "{folder}", "--sandbox", "namespace"]),
    ],
)
def test_each_daemon_gets_its_own_options(tmp_path, daemon, version, rights, options):
    daemon(version, ECHO, rights)
    with pytest.raises(CompanionFailed) as caught:
        share("one", str(tmp_path), queues=2, attempt=Attempt())
    listener, most_files, *rest = words_of(str(caught.value))
    assert listener.startswith("--fd=")
    assert most_files.startswith("--rlimit-nofile=")
    assert rest == [option.format(folder=tmp_path) for option in options]


def test_daemon_in_c_gets_commas_and_backslashes_escaped(tmp_path, daemon):
    daemon(IN_C, ECHO, NAMESPACE)
    folder = tmp_path / "a,b\\c"
    folder.mkdir()
    with pytest.raises(CompanionFailed) as caught:
        share("one", str(folder), queues=2, attempt=Attempt())
    assert words_of(str(caught.value))[-1] == f"source={tmp_path}/a\\,b\\\\c,sandbox=namespace"


def test_daemon_in_c_is_for_root_alone(tmp_path, daemon):
    program = daemon(IN_C, rights=0)
    with pytest.raises(VirtiofsdForRoot, match=f"{program} works for root alone: install the package"):
        share("one", str(tmp_path), queues=2, attempt=Attempt())


def test_daemon_that_fails_is_told_in_its_own_words(tmp_path, daemon):
    daemon(IN_RUST, "echo no namespaces here >&2; exit 3")
    with pytest.raises(CompanionFailed, match="virtiofsd exited with status 3: no namespaces here"):
        share("one", str(tmp_path), queues=2, attempt=Attempt())


def test_daemon_that_hangs_is_given_up(tmp_path, daemon, monkeypatch):
    monkeypatch.setattr(virtiofsd, "_START_S", 0.2)
    monkeypatch.setattr(virtiofsd, "_END_S", 0.1)
    daemon(IN_RUST, "exec sleep 1000")
    with pytest.raises(DeviceError, match="Get features failed") as caught:
        share("one", str(tmp_path), queues=2, attempt=Attempt())
    assert "did not answer" in str(caught.value.__cause__)


def test_missing_daemon_is_refused_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofsd, "_FOLDERS", ())
    with pytest.raises(NoProgram, match="There is no virtiofsd on this host: install the package virtiofsd"):
        share("one", str(tmp_path), queues=2, attempt=Attempt())


@pytest.mark.parametrize(
    ("name", "cause"), [("none", FileNotFoundError), ("file", NotADirectoryError), ("a\0b", ValueError)]
)
def test_folder_that_is_none_is_refused(tmp_path, name, cause):
    (tmp_path / "file").touch()
    with pytest.raises(SharedDirError) as caught:
        share("one", str(tmp_path / name), queues=2, attempt=Attempt())
    assert isinstance(caught.value.__cause__, cause)


def test_root_that_is_no_mount_leaves_the_chroot(monkeypatch, tmp_path):
    """As in a chroot, where the kernel refuses to change the mount of the root."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(virtiofsd, "_MOUNTS", str(mounts))
    monkeypatch.setattr(virtiofsd, "_rights", lambda: NAMESPACE | CHROOT)
    assert virtiofsd._sandbox(may_mount=True) == "namespace"
    assert virtiofsd._sandbox(may_mount=False) == "chroot"
    mounts.write_text(MOUNTS.splitlines()[1])
    assert virtiofsd._sandbox(may_mount=True) == "chroot"
