"""A TPM in a guest, played by a swtpm of the test or by one that the engine starts."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import Booted, booting, serving, vm_config
from support.deadline import GUEST_S, HOST_S
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

READ_CLOCK = r"\200\001\000\000\000\012\000\000\001\201"  # TPM2_ReadClock, without a session
TPM_RC_SUCCESS = bytes(4)
RESET_COUNT_BYTES = slice(26, 30)


@pytest.fixture(scope="module", autouse=True)
def swtpm() -> str:
    program = shutil.which("swtpm")
    if program is None:
        pytest.skip("swtpm is missing")
    return program


@contextlib.contextmanager
def swtpm_at(path: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a swtpm that serves at the socket `path`."""
    state = path.parent / "state"
    state.mkdir()
    arguments = ["socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={path}"]
    process = subprocess.Popen([program, *arguments], stderr=subprocess.DEVNULL)
    try:
        wait_until(path.exists, "swtpm listens", timeout_s=HOST_S)
        yield process
    finally:
        process.kill()
        process.wait(timeout=HOST_S)


def reset_count(vm: Booted) -> int:
    """Return how often the TPM was ever reset: it keeps that number for life."""
    answer = b""

    def is_answered() -> bool:
        nonlocal answer
        vm.run(
            f"exec 3<>/dev/tpm0; printf '{READ_CLOCK}' >&3; dd bs=4096 count=1 <&3 2>/dev/null >/tmp/answer"
        )
        answer = bytes.fromhex(vm.run("hexdump -v -e '1/1 \"%02x\"' /tmp/answer"))
        return answer[6:10] == TPM_RC_SUCCESS

    # A TPM that is busy, or so slow that the driver gives up on it, is to be asked again.
    wait_until(is_answered, "the TPM has told its clock", timeout_s=GUEST_S)
    return int.from_bytes(answer[RESET_COUNT_BYTES], "big")


def programs(vm: Booted) -> list[str]:
    return [child.command for child in vm.server.children() if "swtpm" in child.command]


def test_swtpm_at_a_socket_serves_the_guest_over_a_reboot(tmp_path: Path, swtpm: str) -> None:
    path = tmp_path / "swtpm.sock"
    with swtpm_at(path, swtpm) as process:
        with booting(tmp_path / "run", vm_config(tpm={"socket": str(path)})) as vm:
            assert vm.run("cat /sys/class/tpm/tpm0/tpm_version_major") == "2"
            assert vm.run("cat /sys/class/tpm/tpm0/pcr-sha256/0") == "0" * 64
            assert vm.run("test -c /dev/tpm0 && echo there") == "there"
            count = reset_count(vm)
            vm.vmm.put("vm.reboot")
            vm.wait_ready()
            assert reset_count(vm) == count + 1
            assert vm.config()["tpm"] == {"socket": str(path)}
        assert process.poll() is None  # it is the user's


def test_swtpm_of_ours_keeps_its_state_and_ends_with_the_vm(tmp_path: Path) -> None:
    state = tmp_path / "state, of a TPM"
    state.mkdir()
    config = vm_config(tpm={"state_dir": str(state)})
    with booting(tmp_path / "run", config) as vm:
        count = reset_count(vm)
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        assert reset_count(vm) == count + 1
        assert len(programs(vm)) == 1
        vm.vmm.put("vm.shutdown")
        wait_until(lambda: programs(vm) == [], "swtpm has ended", timeout_s=HOST_S)
        vm.vmm.put("vm.boot")
        vm.open_shell()
        vm.wait_ready()
        assert reset_count(vm) == count + 2
        vm.vmm.put("vm.delete")
        wait_until(lambda: programs(vm) == [], "swtpm has ended", timeout_s=HOST_S)
    assert [path.name for path in state.iterdir() if path.name.endswith(".permall")] == ["tpm2-00.permall"]


def refused(server: Booted, tpm: dict[str, Any]) -> list[str]:
    """Return the answer to the boot of a VM with `tpm`, which is none, and make way for the next."""
    server.vmm.put("vm.create", vm_config(tpm=tpm))
    answer = server.vmm.put("vm.boot", expect=500)
    assert server.info()["state"] == "Created"
    assert programs(server) == []
    server.vmm.put("vm.delete")
    return [str(text) for text in answer]


def answering(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4)
        connection.sendall(answer)


def no_socket(folder: Path) -> dict[str, str]:
    return {"socket": str(folder / "missing.sock")}


def dead_socket(folder: Path) -> dict[str, str]:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "dead.sock"))
    return {"socket": str(folder / "dead.sock")}


def no_folder(folder: Path) -> dict[str, str]:
    return {"state_dir": str(folder / "missing")}


def file_as_folder(folder: Path) -> dict[str, str]:
    (folder / "file").touch()
    return {"state_dir": str(folder / "file")}


REFUSALS: list[tuple[Callable[[Path], dict[str, str]], list[str]]] = [
    (no_socket, ["The control channel of swtpm cannot be connected to", "No such file or directory"]),
    (dead_socket, ["The control channel of swtpm cannot be connected to", "Connection refused"]),
    (no_folder, ["The folder for the state of the TPM cannot be opened", "No such file or directory"]),
    (file_as_folder, ["The folder for the state of the TPM cannot be opened", "Not a directory"]),
]


def test_what_is_no_tpm_is_refused_with_the_reason(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as server:
        for make, words in REFUSALS:
            answer = refused(server, make(tmp_path))
            assert "Cannot create tmp device" in answer
            assert all(word in text for word, text in zip(words, answer[-2:], strict=True)), answer


def test_listener_that_is_no_swtpm_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener, serving(tmp_path / "run") as server:
        listener.bind(str(path))
        listener.listen()
        for answer, words in (
            (b"", "Nobody answers on the control channel"),
            (bytes(8), "Required capabilities not supported by tpm backend"),
        ):
            thread = threading.Thread(target=answering, args=(listener, answer))
            thread.start()
            found = refused(server, {"socket": str(path)})
            thread.join(timeout=HOST_S)
            assert any(words in text for text in found), found
        assert any("timed out" in text for text in refused(server, {"socket": str(path)}))


def test_state_in_use_by_another_vm_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    config = vm_config(tpm={"state_dir": str(state)})
    with booting(tmp_path / "one", config) as vm, serving(tmp_path / "two") as server:
        answer = refused(server, {"state_dir": str(state)})
        assert answer[-1] == "Another TPM has its state in this folder"
        assert reset_count(vm) >= 0


def test_missing_swtpm_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("qemu-system-x86_64", "setpriv", "sh"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    with serving(tmp_path / "run") as server:
        answer = refused(server, {"state_dir": str(tmp_path)})
        assert answer[-1] == "There is no swtpm on this host: install the package swtpm"
