"""Finding a process again by its file, and what it has open."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from cloudvmm.host.foreign import ForeignProcess, ProcessId, identify, open_file
from cloudvmm.host.pid_file import GATE, PidFile, StillAlive, find_process

LONG_S = 20.0


@pytest.fixture
def sleeper(tmp_path):
    """A process started behind a file; the test is given both, and the number of a pipe that it has open."""
    reader, writer = os.pipe()
    file = PidFile(str(tmp_path / "pid"))
    process = subprocess.Popen(
        ["/bin/sh", "-c", GATE, "sh", "/bin/sleep", "300"], stdin=file.gate_fd, pass_fds=[writer]
    )
    file.tell(process.pid)
    file.close()
    yield process, str(tmp_path / "pid"), writer
    process.kill()
    process.wait()
    os.close(reader)
    os.close(writer)


def test_process_is_found_by_its_file_as_soon_as_it_was_started(sleeper):
    process, path, _ = sleeper
    found = find_process(path)

    assert found is not None
    assert found.process_id == identify(process.pid)
    found.close()


def test_nobody_else_can_be_behind_the_file_of_one_that_lives(sleeper):
    _, path, _ = sleeper

    with pytest.raises(StillAlive):
        PidFile(path)


def test_nobody_is_found_behind_the_file_of_one_that_has_ended(sleeper):
    process, path, _ = sleeper
    process.kill()
    process.wait()

    assert find_process(path) is None


def test_one_whose_parent_goes_before_it_has_told_of_it_ends_and_starts_nothing(tmp_path):
    file = PidFile(str(tmp_path / "pid"))
    command = ["/bin/sh", "-c", GATE, "sh", "/bin/sh", "-c", "echo it runs"]
    process = subprocess.Popen(command, stdin=file.gate_fd, stdout=subprocess.PIPE)
    file.close()

    assert process.communicate(timeout=LONG_S) == (b"", None)
    assert process.returncode != 0
    assert find_process(str(tmp_path / "pid")) is None


def test_nobody_is_found_where_there_is_no_file(tmp_path):
    assert find_process(str(tmp_path / "pid")) is None


def test_who_got_the_number_later_is_not_taken_for_who_had_it():
    ours = identify(os.getpid())
    assert ours is not None

    assert ForeignProcess.find(ProcessId(ours.pid, ours.started - 1)) is None


def test_what_is_taken_of_another_process_is_the_very_open_file(sleeper):
    _, path, number = sleeper
    found = find_process(path)
    assert found is not None
    fd = found.take(number)

    assert found.descriptors()[number] == open_file(fd) == open_file(number)
    os.close(fd)
    found.kill()
    assert found.wait_end(LONG_S)
    found.close()


def test_nobody_is_found_behind_a_file_from_before_the_host_was_started(sleeper):
    _, path, _ = sleeper
    with open(path) as file:
        pid, started, boot_id = file.read().split()
    with open(path, "w") as file:
        file.write(f"{pid} {started} {'0' * len(boot_id)}\n")

    assert find_process(path) is None


def test_child_has_no_descriptor_of_its_file(sleeper):
    process, path, _ = sleeper
    folder = f"/proc/{process.pid}/fd"

    found = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # it has just begun, and closes what it has read
            found.append(os.readlink(f"{folder}/{name}"))
    assert found
    assert path not in found
