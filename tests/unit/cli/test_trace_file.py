"""Spans in Chrome's trace format."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from cloudvmm.cli.error import TraceFileCreation
from cloudvmm.cli.trace.file import TraceFile
from cloudvmm.cli.trace.table import JOBS, TABLE, install, job_name, owner_of
from cloudvmm.control.worker import Cleanup, Worker
from support.deadline import HOST_S
from support.trace import Trace
from support.wait import wait_until


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def test_span_tells_thread_begin_and_length_in_microseconds(path):
    trace = TraceFile(str(path))
    trace.span("work", 5_000, 7_500, error="Refused")
    trace.close()
    (event,) = [event for event in json.loads(path.read_text()) if event["ph"] == "X"]
    assert (event["name"], event["ts"], event["dur"]) == ("work", 5.0, 2.5)
    assert event["tid"] == threading.get_native_id()
    assert event["args"] == {"error": "Refused"}


def test_file_that_was_not_closed_lacks_nothing_but_the_end_of_the_list(path):
    trace = TraceFile(str(path))
    trace.span("work", 0, 1)
    text = path.read_text()
    assert json.loads(text.rstrip(",\n") + "]")[-1]["name"] == "work"
    trace.close()


def test_what_comes_after_the_end_is_lost(path):
    trace = TraceFile(str(path))
    trace.close()
    trace.span("late", 0, 1)
    trace.close()
    assert Trace(path).spans == []


def test_many_threads_write_whole_lines(path):
    trace = TraceFile(str(path))
    threads = [
        threading.Thread(target=lambda: [trace.span("x", at, at + 1) for at in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HOST_S)
    trace.close()
    assert len(Trace(path).spans) == 800


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TraceFileCreation):
        TraceFile(str(tmp_path / "none" / "trace"))


@pytest.mark.parametrize(("module", "path_there"), [(module, path) for module, path, _ in TABLE])
def test_every_line_of_the_table_names_a_function(module, path_there):
    __import__(module)
    owner, name = owner_of(module, path_there)
    assert callable(getattr(owner, name))


def test_names_of_jobs_are_those_of_functions():
    from cloudvmm.control.blueprint import build_vm
    from cloudvmm.control.console import Consoles, open_consoles
    from cloudvmm.engine.qemu.machine import QemuMachine

    found = [build_vm, open_consoles, Consoles.renew_streams, QemuMachine.boot, QemuMachine.close]
    assert {function.__qualname__ for function in found} | {"deepcopy"} == set(JOBS)
    assert job_name(Cleanup(QemuMachine.close)) == "end QEMU"


@pytest.fixture
def installed(path, monkeypatch):
    """A trace of this process, for as long as the test takes."""
    wrapped = [(module, there) for module, there, _ in TABLE]
    wrapped += [
        ("cloudvmm.control.worker", "Worker.submit"),
        ("cloudvmm.engine.qemu.engine", "QemuEngine.build"),
    ]
    for module, there in wrapped:
        if module in sys.modules:
            owner, name = owner_of(module, there)
            monkeypatch.setattr(owner, name, getattr(owner, name))
    trace = TraceFile(str(path))
    install(trace)
    yield trace
    trace.close()


def test_wrapped_job_is_a_span_and_fails_as_before(path, installed):
    def fail():
        raise KeyError

    worker = Worker("a-worker")
    worker.submit(fail)
    outcomes = []
    wait_until(lambda: outcomes.append(worker.take()) or outcomes[-1], "the job is done", timeout_s=HOST_S)
    assert isinstance(outcomes[-1].error, KeyError)
    assert worker.stop(HOST_S)
    installed.close()
    (span,) = Trace(path).spans
    assert (span.row, span.error) == ("a-worker", "KeyError")


def test_nothing_is_wrapped_twice(installed):
    before = Worker.submit
    install(installed)
    assert Worker.submit is before
