"""How QEMU gets files that its user could not open."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import msgspec
import pytest

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.qemu.identity import in_groups_of, powers_for, setpriv_words
from cloudvmm.engine.qemu.loan import lend_files
from cloudvmm.host.capability import Capability
from cloudvmm.host.id_map import IdMap
from cloudvmm.host.user import User, Want

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="Needs root, to be somebody else")
SOMEBODY = User(2_013_300_000, 2_013_300_000)
START = """
import os, sys
from cloudvmm.engine.qemu.confinement import Confinement
from cloudvmm.host.capability import Capability
from cloudvmm.host.user import User, Want

told = Confinement(
    is_held=False,
    is_filtered=False,
    kept=(Capability.IPC_LOCK, Capability.NET_BIND_SERVICE),
    user=User(2_013_300_000, 2_013_300_000),
    wanted=[Want(sys.argv[1], os.R_OK)],
).enter([])
os.execvp("setpriv", ["setpriv", *told, "--", "grep", "CapEff", "/proc/self/status"])
"""


@pytest.fixture
def id_map():
    with IdMap(SOMEBODY) as id_map:
        yield id_map


@pytest.fixture
def closed(tmp_path):
    """A folder that is ours alone."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    return folder


def test_qemu_that_is_our_own_user_gets_nothing(tmp_path):
    payload = PayloadConfig(kernel=str(tmp_path / "missing"))
    with contextlib.ExitStack() as undo:
        loan = lend_files(None, payload, reopened=[], written=[], undo=undo)

    assert loan.payload is payload
    assert (loan.fds, loan.shown, loan.wanted, loan.names) == ([], {}, [], {})


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_kernel_in_a_folder_of_ours_comes_by_a_descriptor(closed, id_map, mode):
    kernel = closed / "kernel"
    kernel.write_bytes(b"a kernel")
    kernel.chmod(mode)
    with contextlib.ExitStack() as undo:
        payload = PayloadConfig(kernel=str(kernel), cmdline="panic=1")
        loan = lend_files(id_map, payload, reopened=[], written=[], undo=undo)
        assert loan.payload is not None
        if loan.wanted:
            pytest.skip("This file system or kernel has no id-mapped mounts")
        (fd,) = loan.fds
        assert loan.payload == msgspec.structs.replace(payload, kernel=f"/proc/self/fd/{fd}")
        assert loan.names == {f"/proc/self/fd/{fd}": str(kernel)}
        assert powers_for(SOMEBODY, [Want(f"/proc/self/fd/{fd}", os.R_OK)]) == []
        assert os.pread(fd, 100, 0) == b"a kernel"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.root
@needs_root
def test_kernel_that_cannot_be_shown_takes_the_power_to_read(closed, id_map, monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.loan.IdMap.open", _refuse)
    kernel = closed / "kernel"
    kernel.touch(mode=0o600)
    with contextlib.ExitStack() as undo:
        payload = PayloadConfig(kernel=str(kernel))
        loan = lend_files(id_map, payload, reopened=[], written=[], undo=undo)

        assert loan.payload == payload
        assert powers_for(SOMEBODY, loan.wanted) == [Capability.DAC_READ_SEARCH]


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY])
def test_memory_on_a_file_of_ours_is_shown_and_stays_locked(closed, id_map, flags):
    fd = os.open(closed / "memory", flags | os.O_CREAT, 0o600)
    with contextlib.ExitStack() as undo:
        loan = lend_files(id_map, None, reopened=[fd], written=[], undo=undo)
        if loan.wanted:
            pytest.skip("This file system or kernel has no id-mapped mounts")
        assert list(loan.shown) == [fd]
        assert powers_for(SOMEBODY, [Want(f"/proc/self/fd/{loan.shown[fd]}", os.R_OK)]) == []
        (held,) = loan.fds
        assert os.path.sameopenfile(held, fd)
        os.lseek(fd, 7, os.SEEK_SET)
        assert os.lseek(held, 0, os.SEEK_CUR) == 7  # the same opening, with its locks
    os.close(fd)


@pytest.mark.root
@needs_root
def test_memory_that_cannot_be_shown_takes_the_power_to_open(closed, id_map, monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.loan.IdMap.open", _refuse)
    fd = os.open(closed / "memory", os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.ExitStack() as undo:
        loan = lend_files(id_map, None, reopened=[fd], written=[], undo=undo)

        assert (loan.fds, loan.shown) == ([], {})
        assert powers_for(SOMEBODY, loan.wanted) == [Capability.DAC_OVERRIDE]
    os.close(fd)


@pytest.mark.root
@needs_root
def test_program_takes_the_power_to_search_where_all_may_run_it_and_to_override_where_not(closed):
    program = closed / "qemu"
    program.touch()
    program.chmod(0o755)
    assert powers_for(SOMEBODY, [Want(str(program), os.X_OK)]) == [Capability.DAC_READ_SEARCH]
    program.chmod(0o700)
    assert powers_for(SOMEBODY, [Want(str(program), os.X_OK)]) == [Capability.DAC_OVERRIDE]


@pytest.mark.root
@needs_root
def test_user_gets_the_group_that_may_use_a_device_and_no_other(tmp_path):
    for name, group, mode in (
        ("kvm", 36, 0o660),
        ("roots", 0, 0o660),
        ("read", 37, 0o640),
        ("own", 38, 0o600),
    ):
        (tmp_path / name).touch()
        os.chown(tmp_path / name, 0, group)
        (tmp_path / name).chmod(mode)
    devices = [str(path) for path in (*tmp_path.iterdir(), tmp_path / "missing")]

    assert in_groups_of(SOMEBODY, devices) == User(SOMEBODY.uid, SOMEBODY.gid, (36,))


@pytest.mark.root
@needs_root
def test_start_gives_no_power_that_we_lack_ourselves(closed):
    file = closed / "file"
    file.touch()
    few = ("setpriv", "--bounding-set=-dac_read_search,-ipc_lock,-net_bind_service")
    done = subprocess.run(
        [*few, sys.executable, "-c", START, str(file)], capture_output=True, text=True, check=False
    )

    assert done.stderr == ""
    assert int(done.stdout.split()[-1], 16) == 1 << Capability.DAC_OVERRIDE


def test_setpriv_is_told_of_user_groups_and_powers():
    words = setpriv_words(User(5, 6, (7, 8)), [Capability.DAC_READ_SEARCH, Capability.IPC_LOCK])

    told = dict(zip(words[::2], words[1::2], strict=True))
    assert (told["--reuid"], told["--regid"], told["--groups"]) == ("5", "6", "7,8")
    powers = {told[name] for name in ("--inh-caps", "--ambient-caps", "--bounding-set")}
    assert powers == {"-all,+dac_read_search,+ipc_lock"}
    assert "--clear-groups" in setpriv_words(SOMEBODY, [])


def _refuse(*_):
    raise OSError(22, "Invalid argument")
