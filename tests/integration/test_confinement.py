"""What QEMU's process cannot do while a guest runs, looked at from outside and tried from within."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from errno import EACCES, ENOSYS, EPERM
from pathlib import Path

import pytest

from cloudvmm.host.capability import Capability, keep_capabilities
from cloudvmm.host.landlock import landlock_version
from support.booted import Booted, booting, serving, vm_config
from support.deadline import GUEST_S
from support.id_map import check_id_maps
from support.inject import held
from support.old_qemu import old_qemu_tree
from support.process import status_of
from support.served_file import served_file
from support.server import process_of
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

FILTERED = 2  # SECCOMP_MODE_FILTER
# By number, so that the C library does not stand between.
DENIED = {"fork": "57", "execve": "59, 0, 0, 0", "setuid": "105, 0", "setpriority": "141, 0, 0, 0"}
GETPID = "39"
SIGSYS = signal.SIGSYS.value
OPEN, SOCKET, PTRACE_ATTACH = 2, 41, 16
OPENAT, UNLINKAT, RENAMEAT = 257, 263, 264
FREE = ["--seccomp", "false", "--qemu-landlock", "false"]
PIECE = struct.pack("=2Q", 1 << 16, 8)  # of memory
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="Whoever is not root gives QEMU no other user")
needs_landlock = pytest.mark.skipif(landlock_version() < 6, reason="Landlock is missing or cannot do it all")


@pytest.fixture(params=["installed", "oldest"])
def qemu(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The flags that choose a QEMU."""
    return [] if request.param == "installed" else ["--qemu", str(old_qemu_tree(tmp_path / "old"))]


def threads_of(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def ids_of(pid: int) -> set[tuple[int, ...]]:
    """Return the users of its threads: the real, the effective, the saved, and that of files."""
    return {numbers_of(thread, "Uid") for thread in threads_of(pid)} | {
        numbers_of(thread, "Gid") for thread in threads_of(pid)
    }


def numbers_of(thread: int, name: str) -> tuple[int, ...]:
    found = re.search(rf"^{name}:(.*)$", Path(f"/proc/{thread}/status").read_text(), re.MULTILINE)
    return () if found is None else tuple(map(int, found[1].split()))


def powers_of(pid: int) -> dict[str, int]:
    found = re.findall(r"^(Cap\w+):\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return {name: int(mask, 16) for name, mask in found}


Call = tuple[int | bytes, ...]


def tried(vm: Booted, calls: Sequence[Call]) -> list[int]:
    """Have QEMU's process make each system call, by its number; return the answers, below zero for errors."""
    with held(vm.qemu_pid()) as thread:
        return [thread.call(int(number), *arguments) for number, *arguments in calls]


def opened_by(pid: int) -> dict[int, str]:
    return {int(link.name): os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}


def named(path: object) -> bytes:
    return os.fsencode(str(path)) + b"\0"


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        pytest.param([], FILTERED, id="default"),
        pytest.param(["--seccomp", "errno"], FILTERED, id="errno"),
        pytest.param(["--seccomp", "false"], 0, id="false"),
        pytest.param(["--seccomp", "log"], 0, id="log"),
    ],
)
def test_every_thread_of_qemu_is_behind_the_filter_unless_told_otherwise(
    flags: list[str], mode: int, tmp_path: Path
) -> None:
    with booting(tmp_path, vm_config(), *flags, shell=None) as vm:
        threads = threads_of(vm.qemu_pid())
        assert len(threads) > 1
        assert {status_of(thread, "Seccomp") for thread in threads} == {mode}
        assert {status_of(thread, "NoNewPrivs") for thread in threads} == {1}


def test_qemu_learns_nothing_of_our_environment_and_leaves_no_core(qemu: list[str], tmp_path: Path) -> None:
    with booting(tmp_path, vm_config(), *qemu, shell=None) as vm:
        pid = vm.qemu_pid()
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert [line for line in environment if line and not line.startswith((b"PWD=", b"_="))] == []
        told = Path(f"/proc/{pid}/limits").read_text()
        limits = dict(re.findall(r"^(.+?) {2,}\S+ +(\S+)", told, re.MULTILINE))
        assert limits["Max core file size"] == "0"
        assert int(limits["Max open files"]) <= 65536


@pytest.mark.parametrize("name", DENIED)
def test_qemu_that_starts_a_program_or_gains_rights_is_refused_or_ended(name: str, tmp_path: Path) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("gdb is missing")
    with booting(tmp_path, vm_config(), "--no-shutdown", shell=None) as vm:
        pid = vm.qemu_pid()
        calls = [f"print (long)syscall({numbers})" for numbers in (GETPID, DENIED[name])]
        told = subprocess.run(
            [gdb, "-nx", "-batch", *(word for call in calls for word in ("-ex", call)), "-p", str(pid)],
            capture_output=True,
            text=True,
            cwd=tmp_path,  # where its core goes
            timeout=GUEST_S,
            check=False,  # gdb itself may not survive what it has done
        ).stdout
        answers = re.findall(r"^\$\d+ = (-?\d+)$", told, re.MULTILINE)
        assert answers[0] == str(pid), told
        if answers[1:] != ["-1"]:
            wait_until(lambda: f"signal {SIGSYS}" in vm.server.stderr, "QEMU is ended", timeout_s=GUEST_S)


@needs_landlock
def test_qemu_opens_nothing_but_what_is_its_own(qemu: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"of another guest")
    config = vm_config()
    with booting(tmp_path, config, *qemu, "--seccomp", "false", shell=None) as vm:
        calls = {
            "read": (OPEN, b"/etc/passwd\0", os.O_RDONLY),
            "read another's image": (OPEN, named(other), os.O_RDONLY),
            "write it": (OPEN, named(other), os.O_RDWR),
            "truncate it": (76, named(other), 0),
            "remove it": (87, named(other)),
            "link it": (86, named(other), named(tmp_path / "link")),
            "make a file": (85, named(tmp_path / "made"), 0o600),
            "make a folder": (83, named(tmp_path / "folder"), 0o700),
            "list": (OPEN, named(tmp_path), os.O_RDONLY | os.O_DIRECTORY),
            "our memory": (OPEN, named(f"/proc/{vm.server.pid}/mem"), os.O_RDWR),
            "our descriptors": (OPEN, named(f"/proc/{vm.server.pid}/fd/0"), os.O_RDONLY),
            "execute": (59, b"/usr/bin/id\0", 0, 0),
        }
        answers = dict(zip(calls, tried(vm, list(calls.values())), strict=True))
        assert answers.pop("link it") in (-EACCES, -EPERM)  # the kernel may protect what is another's
        assert answers == dict.fromkeys(answers, -EACCES)
        # Root's own folders are closed to QEMU, which has the kernel all the same.
        (null,) = tried(vm, [(OPEN, b"/dev/null\0", os.O_RDONLY)])
        assert null > 0
    assert other.read_bytes() == b"of another guest"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="Whoever is not root has no such powers")
def test_qemu_that_stays_root_has_few_of_its_powers(qemu: list[str], tmp_path: Path) -> None:
    kept = Capability.DAC_OVERRIDE, Capability.NET_BIND_SERVICE, Capability.IPC_LOCK
    # For on-demand restores, where this QEMU does not know the device for them, or there is none.
    most = {*kept, Capability.SYS_PTRACE} if qemu or not os.path.exists("/dev/userfaultfd") else {*kept}
    with booting(tmp_path, vm_config(), *qemu, *FREE, "--qemu-user", "root", shell=None) as vm:
        assert ids_of(vm.qemu_pid()) == {(0, 0, 0, 0)}
        wanted = sum(1 << number for number in most)
        found = powers_of(vm.qemu_pid())
        assert {found[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {wanted}
        calls = {
            "raw packets": (SOCKET, socket.AF_PACKET, socket.SOCK_RAW, 0),
            "another user": (105, 1),
            "another root": (161, b"/\0"),
            "another host name": (170, b"other\0", 5),
            "a device": (133, named(tmp_path / "device"), 0o20600, 259),
            "the clock": (227, 0, bytes(16)),
        }
        assert dict(zip(calls, tried(vm, list(calls.values())), strict=True)) == dict.fromkeys(calls, -EPERM)


@pytest.mark.root
@needs_root
def test_qemu_of_root_is_a_user_that_nobody_else_is_without_any_power(tmp_path: Path) -> None:
    check_id_maps(tmp_path)
    kernel = Path(shutil.copy(vm_config()["payload"]["kernel"], tmp_path / "kernel"))
    kernel.chmod(0o600)  # in folders that are root's, too
    config = vm_config()
    config["payload"]["kernel"] = str(kernel)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        booting(tmp_path / "one", config, *FREE, shell=None) as one,
        booting(tmp_path / "two", vm_config(), *FREE, shell=None) as two,
    ):
        pids = one.qemu_pid(), two.qemu_pid()
        users = [ids_of(pid) for pid in pids]
        assert len(set.union(*users)) == 2
        assert 0 not in set().union(*set.union(*users))
        assert [numbers_of(pid, "Groups") for pid in pids] == [(), ()]
        assert [set(powers_of(pid).values()) for pid in pids] == [{0}, {0}]
        assert_alone(one, other=pids[1])


@pytest.mark.root
@needs_root
def test_qemu_that_outlives_its_manager_has_its_consoles_without_any_power(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    state = tmp_path / "state"
    config = vm_config(serial={"mode": "Socket", "socket": str(tmp_path / "serial")})
    with (
        booting(tmp_path / "run", config, *FREE, "--state-dir", str(state)) as vm,
        booting(tmp_path / "other", vm_config(), *FREE, shell=None) as other,
    ):
        qemu = vm.qemu_pid()
        assert 0 not in set().union(*ids_of(qemu))
        assert set(powers_of(qemu).values()) == {0}
        vm.server.kill()
        vm.server.restart()
        vm.open_shell()
        assert vm.run("echo said") == "said"

        folder, *_ = (number for number, path in opened_by(qemu).items() if path == f"{state}/consoles")
        pipes = sorted(os.listdir(state / "consoles"))
        assert pipes == ["console.in", "console.out", "serial.in", "serial.out"]
        calls: list[Call] = [
            (OPENAT, folder, b".\0", os.O_RDONLY | os.O_DIRECTORY),
            (OPENAT, folder, b"made\0", os.O_CREAT | os.O_RDWR, 0o600),
            (OPENAT, folder, b"../pid\0", os.O_RDONLY),
            (OPENAT, folder, b"../made\0", os.O_CREAT | os.O_RDWR, 0o600),
            (UNLINKAT, folder, b"console.in\0", 0),
            (RENAMEAT, folder, b"console.in\0", folder, b"console.out\0"),
        ]
        with held(qemu) as thread:
            assert [thread.call(*call) for call in calls] == [-EACCES] * len(calls)
        others = [(OPEN, named(state / "consoles" / pipe), os.O_RDWR | os.O_NONBLOCK) for pipe in pipes]
        assert tried(other, others) == [-EACCES] * len(others)
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        assert vm.run("echo said") == "said"
        vm.vmm.put("vm.delete")
        assert not (state / "consoles").exists()


@pytest.mark.root
@needs_root
def test_qemu_that_lies_in_a_folder_of_root_reads_there_and_is_still_nobody(tmp_path: Path) -> None:
    program = old_qemu_tree(tmp_path / "old")
    with booting(tmp_path, vm_config(), *FREE, "--qemu", str(program), shell=None) as vm:
        ((uid, *others),) = ids_of(vm.qemu_pid())
        assert uid != 0
        assert others == [uid] * 3
        assert set(powers_of(vm.qemu_pid()).values()) == {1 << Capability.DAC_READ_SEARCH}


@pytest.mark.root
@needs_root
def test_qemu_is_the_user_that_was_named_and_dies_with_its_manager(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    with serving(tmp_path, "--qemu-user", "nobody") as vm:
        vm.vmm.put("vm.create", vm_config())
        vm.vmm.put("vm.boot")
        assert ids_of(vm.qemu_pid()) == {(nobody.pw_uid,) * 4, (nobody.pw_gid,) * 4}
        qemu = process_of(vm.qemu_pid())
        vm.server.kill()
        wait_until(lambda: not qemu.is_alive(), "QEMU is gone", timeout_s=GUEST_S)
        vm.server.restart()
        vm.vmm.put("vm.create", vm_config())
        vm.vmm.put("vm.boot")  # takes away what was left


@pytest.mark.root
@needs_root
def test_manager_that_may_not_look_into_other_users_processes_keeps_qemu_its_own(tmp_path: Path) -> None:
    def boot() -> None:
        keep_capabilities(set(Capability) - {Capability.SYS_PTRACE})  # of this thread, and what it starts
        with booting(tmp_path, vm_config(), shell=None) as vm:
            assert ids_of(vm.qemu_pid()) == {(0, 0, 0, 0)}
            assert "QEMU runs as root: " in vm.server.stderr
            assert "we lack CAP_SYS_PTRACE" in vm.server.stderr

    with ThreadPoolExecutor(1) as pool:
        pool.submit(boot).result()


@pytest.mark.root
@needs_root
def test_qemu_stays_root_for_a_kernel_to_which_no_other_user_gets_by_any_power(tmp_path: Path) -> None:
    config = vm_config()
    with served_file(tmp_path / "mounted", Path(config["payload"]["kernel"])) as kernel:
        config["payload"]["kernel"] = str(kernel)
        with booting(tmp_path, config, shell=None) as vm:
            assert ids_of(vm.qemu_pid()) == {(0, 0, 0, 0)}
            assert "knows no powers of root" in vm.server.stderr


def assert_alone(vm: Booted, *, other: int) -> None:
    """Have a QEMU whose system calls nobody filters try what only root or its own user could."""
    opened = (OPEN, named(f"/proc/{vm.server.pid}/mem"), os.O_RDWR), (OPEN, b"/etc/shadow\0", os.O_RDONLY)
    calls: dict[Call, int] = dict.fromkeys(opened, EACCES)
    calls[OPEN, named(f"/proc/{other}/mem"), os.O_RDWR] = EACCES
    calls[OPEN, named(f"/proc/{other}/fd/0"), os.O_RDONLY] = EACCES
    for thread in {*threads_of(vm.server.pid), other, os.getpid()}:
        for call in (
            (62, thread, 0),  # a signal
            (200, thread, 0),
            (101, PTRACE_ATTACH, thread, 0, 0),
            (310, thread, PIECE, 1, PIECE, 1, 0),  # its memory
            (302, thread, 7, struct.pack("=2Q", 3, 3), 0),  # how many files it may have
            (203, thread, 8, struct.pack("=Q", 1)),  # its processors
            (141, 0, thread, 19),  # its priority
        ):
            calls[call] = EPERM
    calls[105, 0] = EPERM  # to be root
    calls[SOCKET, socket.AF_PACKET, socket.SOCK_RAW, 0] = EPERM
    answers = dict(zip(calls, tried(vm, list(calls)), strict=True))
    assert answers == {call: -error for call, error in calls.items()}
    vm.vmm.get("vmm.ping")


@needs_landlock
def test_qemu_reaches_no_address_and_no_process_without_its_filter_either(
    qemu: list[str], tmp_path: Path
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        booting(tmp_path, vm_config(), *qemu, "--seccomp", "false", shell=None) as vm,
    ):
        name = b"\0cloudvmm-test-%d" % os.getpid()
        abstract.bind(name)
        abstract.listen()
        port = struct.pack("=H", socket.AF_INET) + struct.pack("!H", server.getsockname()[1])
        to_server, to_abstract = port + socket.inet_aton("127.0.0.1") + bytes(8), b"\1\0" + name
        tcp, unix = tried(vm, [(SOCKET, socket.AF_INET, 1, 0), (SOCKET, socket.AF_UNIX, 1, 0)])
        assert min(tcp, unix) > 0
        calls = {
            "connect": ((42, tcp, to_server, len(to_server)), EACCES),
            "bind": ((49, tcp, to_server, len(to_server)), EACCES),
            "abstract": ((42, unix, to_abstract, len(to_abstract)), EPERM),
            "trace": ((101, PTRACE_ATTACH, vm.server.pid, 0, 0), EPERM),
            "signal": ((62, vm.server.pid, 0), EPERM),
            "signal another": ((62, os.getpid(), 0), EPERM),
        }
        answers = tried(vm, [call for call, _ in calls.values()])
        assert dict(zip(calls, answers, strict=True)) == {name: -error for name, (_, error) in calls.items()}


def test_qemu_reaches_no_network_and_no_process_by_its_filter_alone(qemu: list[str], tmp_path: Path) -> None:
    same = ["--qemu-user", "root", "--qemu-landlock", "false"]
    with booting(tmp_path, vm_config(), *qemu, *same, shell=None) as vm:
        # The thread that started QEMU is confined as QEMU is, so that Landlock would let it be reached.
        ours = threads_of(vm.server.pid)
        calls: dict[Call, int] = {
            (SOCKET, socket.AF_INET, socket.SOCK_STREAM, 0): EPERM,
            (SOCKET, socket.AF_INET6, socket.SOCK_DGRAM, 0): EPERM,
            (SOCKET, socket.AF_NETLINK, socket.SOCK_RAW, 0): EPERM,
            (SOCKET, socket.AF_VSOCK, socket.SOCK_STREAM, 0): EPERM,
            (425, 8, bytes(256)): ENOSYS,  # a ring, which would pass the filter by
            (434, vm.server.pid, 0): EPERM,  # pidfd
            **{(101, PTRACE_ATTACH, thread, 0, 0): EPERM for thread in ours},
            **{(310, thread, 0, 0, 0, 0, 0): EPERM for thread in ours},  # its memory
            **{(234, vm.server.pid, thread, 0): EPERM for thread in ours},  # a signal
            **{(200, thread, 0): EPERM for thread in ours},
            **{(62, thread, 0): EPERM for thread in ours},
        }
        assert tried(vm, list(calls)) == [-error for error in calls.values()]
        vm.vmm.get("vmm.ping")


def test_qemu_that_a_script_starts_is_not_held_and_that_is_told(tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-x86_64-script"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("qemu-system-x86_64")} "$@"\n')
    program.chmod(0o755)
    with booting(tmp_path, vm_config(), "--qemu", str(program), shell=None) as vm:
        assert f"{program} is a script: QEMU is not held to the files of its VM" in vm.server.stderr
        if os.geteuid() == 0:
            assert f"{program} is a script: QEMU runs as root" in vm.server.stderr
            assert ids_of(vm.qemu_pid()) == {(0, 0, 0, 0)}
