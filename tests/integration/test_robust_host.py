"""A hostile host: full disks and pipes, no descriptors left, images and kernels that change under the VM."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.attack import bare_config, booted, qemu_of, read_events
from support.deadline import HOST_S
from support.server import Server
from support.vm import EngineChoice, choose_engine
from support.wait import wait_until

ServerFactory = Callable[..., Server]

DISK_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("Mounting needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "small", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free on the file system of `folder`."""
    with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as ballast:
        while ballast.write(b"x" * 4096):
            pass
    assert os.statvfs(folder).f_bavail == 0


def works(server: Server, engine: EngineChoice, folder: Path) -> None:
    """Carry a VM through its life."""
    booted(server, engine, folder)
    server.vmm.put("vm.pause")
    server.vmm.put("vm.resume")
    server.vmm.put("vm.delete")


def allow_descriptors(server: Server, count: int) -> None:
    _, most = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (count, most))


def open_count(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


@pytest.mark.root
def test_events_log_and_journal_on_a_full_disk_stop_nothing(
    fake_engine: EngineChoice, cloudvmm_server: ServerFactory, tmp_path: Path, small_disk: Path
) -> None:
    events, log, state = small_disk / "events", small_disk / "log", small_disk / "state"
    server = cloudvmm_server(
        *("--event-monitor", f"path={events}"), *("-vv", "--log-file", str(log)), *("--state-dir", str(state))
    )
    fill(small_disk)
    works(server, fake_engine, tmp_path)
    (small_disk / "ballast").unlink()
    works(server, fake_engine, tmp_path)
    assert read_events(events)[-2:] == ["vm/shutdown", "vm/deleted"]
    assert b'"vm.delete","phase":"done"' in (state / "journal").read_bytes()


@pytest.mark.root
def test_state_folder_on_a_disk_that_is_full_from_the_start_is_refused_clearly(
    fake_engine: EngineChoice, cloudvmm_server: ServerFactory, small_disk: Path
) -> None:
    fill(small_disk)
    server = cloudvmm_server("--state-dir", str(small_disk / "state"), ready=False)
    server.expected_status = 1
    assert server.wait_end() == 1
    assert "No space left on device" in server.stderr
    assert "Traceback" not in server.stderr


@pytest.mark.qemu
@pytest.mark.root
def test_state_folder_that_fills_up_refuses_the_boot_and_keeps_the_vmm(
    cloudvmm_server: ServerFactory, tmp_path: Path, small_disk: Path
) -> None:
    server = cloudvmm_server("--state-dir", str(small_disk / "state"))
    server.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path))
    fill(small_disk)
    assert server.vmm.put("vm.boot", expect=500)[-1].startswith("No space left on device")
    (small_disk / "ballast").unlink()
    server.vmm.put("vm.boot")


def test_events_into_a_pipe_that_nobody_empties_stop_nothing(
    fake_engine: EngineChoice, cloudvmm_server: ServerFactory, tmp_path: Path
) -> None:
    read_fd, write_fd = os.pipe()
    try:
        server = cloudvmm_server("--event-monitor", f"fd={write_fd}", pass_fds=[write_fd])
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(write_fd, False)
            while os.write(write_fd, b"x" * 4096):
                pass
        works(server, fake_engine, tmp_path)
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_events_into_a_pipe_that_is_closed_stop_nothing(
    fake_engine: EngineChoice, cloudvmm_server: ServerFactory, tmp_path: Path
) -> None:
    read_fd, write_fd = os.pipe()
    server = cloudvmm_server("--event-monitor", f"fd={write_fd}", pass_fds=[write_fd])
    os.close(read_fd)
    os.close(write_fd)
    works(server, fake_engine, tmp_path)


@pytest.mark.root
def test_coredump_onto_a_full_disk_is_refused_and_the_guest_goes_on(
    any_engine: EngineChoice, server: Server, tmp_path: Path, small_disk: Path
) -> None:
    booted(server, any_engine, tmp_path)
    core = small_disk / "core"
    fill(small_disk)
    words = server.vmm.put("vm.coredump", {"destination_url": f"file://{core}"}, expect=500)
    assert words[:2] == ["Error from API", "The VM could not be coredumped"]
    assert any("No space left on device" in word or "dump" in word.lower() for word in words[3:])
    assert not core.exists()
    assert server.vmm.get("vm.info")["state"] == "Running"
    server.vmm.put("vm.coredump", {"destination_url": f"file://{tmp_path}/core"})


@pytest.mark.parametrize("path", ["/nonexistent/core", "/", "/\0", "core\0", "/dev/null", "/" + "c" * 300])
def test_coredump_to_where_no_file_can_be_is_refused_and_the_guest_goes_on(
    fake_engine: EngineChoice, server: Server, tmp_path: Path, path: str
) -> None:
    booted(server, fake_engine, tmp_path)
    words = server.vmm.put("vm.coredump", {"destination_url": f"file://{path}"}, expect=500)
    assert words[2:4] == ["Error coredumping VM", "coredump file"]
    assert server.vmm.get("vm.info")["state"] == "Running"


@pytest.mark.parametrize("spare", range(8))
def test_server_without_descriptors_answers_clearly_and_recovers(
    any_engine: EngineChoice, server: Server, tmp_path: Path, spare: int
) -> None:
    config = bare_config(any_engine, tmp_path, console={"mode": "Pty"})
    server.vmm.put("vm.create", config)
    allow_descriptors(server, open_count(server) + spare)
    reply = server.vmm.exchange("PUT", "vm.boot")
    assert reply.status == 204 or (reply.status == 500 and "os error 24" in reply.texts()[-1]), reply.raw
    server.vmm.get("vmm.ping")
    allow_descriptors(server, 1024)
    server.vmm.put("vm.delete")
    server.vmm.put("vm.create", config)
    server.vmm.put("vm.boot")


def test_client_that_finds_no_descriptor_waits_and_is_served_later(
    fake_engine: EngineChoice, server: Server
) -> None:
    server.vmm.get("vmm.ping")
    allow_descriptors(server, open_count(server))
    with server.vmm.connect() as client:
        client.send(b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n")
        server.vmm.get("vmm.ping")
        allow_descriptors(server, 1024)
        assert client.reply().status == 200


@pytest.mark.parametrize("count", [*range(8, 15), 16, 18, 20, 22])
def test_start_with_few_descriptors_serves_or_says_why_not(tmp_path: Path, count: int) -> None:
    socket_path = tmp_path / "api"
    command = ["python3", "-m", "cloudvmm.cli.main", "--engine", "fake", "--api-socket", str(socket_path)]
    process = subprocess.Popen(
        ["sh", "-c", f'ulimit -n {count}; exec "$@"', "sh", *command],
        stderr=subprocess.PIPE,
        env={**os.environ, "PATH": f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}"},
        text=True,
    )
    try:
        wait_until(lambda: socket_path.exists() or process.poll() is not None, "it starts", timeout_s=HOST_S)
        process.terminate()
        _, words = process.communicate(timeout=HOST_S)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in words, words
    assert process.returncode in (0, 1), words
    assert process.returncode == 0 or "Too many open files" in words or "No file descriptors" in words, words


@pytest.mark.qemu
def test_disk_image_deleted_under_the_guest_disturbs_nobody(server: Server, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    booted(server, choose_engine("qemu"), tmp_path, disks=[{"path": str(image), "image_type": "Raw"}])
    image.unlink()
    server.vmm.put("vm.pause")
    server.vmm.put("vm.resume")
    assert "_disk0" in server.vmm.get("vm.counters")
    words = server.vmm.put("vm.reboot", expect=500)
    assert words[-2:] == [
        f"I/O error (path={image} op=open)",
        f"No such file or directory (os error {errno.ENOENT})",
    ]
    assert server.vmm.get("vm.info")["state"] == "Created"


@pytest.mark.qemu
def test_disk_image_truncated_under_the_guest_disturbs_nobody(server: Server, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    booted(server, choose_engine("qemu"), tmp_path, disks=[{"path": str(image), "image_type": "Raw"}])
    os.truncate(image, 0)
    server.vmm.put("vm.pause")
    server.vmm.put("vm.resume")
    assert server.vmm.get("vm.info")["state"] == "Running"
    server.vmm.put("vm.shutdown")


@pytest.mark.qemu
@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 1000, b"\x7fELF" + b"\xff" * 4096], ids=["empty", "text", "elf"]
)
def test_kernel_that_became_garbage_is_refused_and_a_good_one_boots(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    config = bare_config(choose_engine("qemu"), tmp_path)
    kernel = tmp_path / "kernel"
    good = config["payload"]["kernel"]
    kernel.symlink_to(good)
    config["payload"] = {**config["payload"], "kernel": str(kernel)}
    server.vmm.put("vm.create", config)
    kernel.unlink()
    kernel.write_bytes(content)
    words = server.vmm.put("vm.boot", expect=500)
    assert words[1] == "The VM could not boot"
    assert len(words) >= 3
    # The final step failed: a VM object is there and has to be shut down (rest.md section 8).
    assert server.vmm.put("vm.boot", expect=500)[-1] == "VM is already created"
    server.vmm.put("vm.shutdown")
    kernel.unlink()
    kernel.symlink_to(good)
    server.vmm.put("vm.boot")
    qemu_of(server)
