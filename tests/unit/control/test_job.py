"""`vmm.jobs` and `vmm.cancel-job` on the fake engine: what is told, what ends, what is refused."""

from __future__ import annotations

import time

import pytest

from cloudvmm import api
from cloudvmm.engine.fake import Hang
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller


@pytest.fixture
def booting(caller, engine, vm_config):
    """A VMM whose `vm.boot` does not end before `let_go`."""
    engine.faults.set("boot", Hang())
    caller(api.vm_create, vm_config)
    boot = caller.beside(api.vm_boot)
    wait_until(lambda: jobs(caller), "vm.boot is under way", timeout_s=DEADLINE_S)
    return caller, boot


def jobs(caller: Caller) -> list[api.VmmJob]:
    return caller(api.vmm_jobs).jobs


def cancel(caller: Caller, job_id: int) -> None:
    caller(api.vmm_cancel_job, api.VmmCancelJobData(id=job_id))


def refusal(caller: Caller, job_id: int) -> list[str]:
    return caller.refusal(api.vmm_cancel_job, api.VmmCancelJobData(id=job_id))


def queued(caller: Caller, count: int) -> list[api.VmmJob]:
    """Return the jobs that wait once there are `count`."""

    def waiting():
        found = [job for job in jobs(caller) if job.state is api.JobState.QUEUED]
        return found if len(found) == count else None

    return wait_until(waiting, f"{count} jobs wait", timeout_s=DEADLINE_S)


def test_a_vmm_that_does_nothing_has_no_jobs(booted):
    assert jobs(booted) == []


def test_what_is_under_way_is_told(booting):
    caller, _ = booting
    (job,) = jobs(caller)

    assert (job.command, job.state, job.can_cancel) == ("vm.boot", api.JobState.RUNNING, False)
    assert job.since == pytest.approx(time.time(), abs=60)
    assert 0 <= job.elapsed_ms < 60_000
    assert (job.done_bytes, job.total_bytes, job.percent) == (None, None, None)


def test_what_waits_is_told_in_its_order(booting):
    caller, _ = booting
    pause = caller.beside(api.vm_pause)
    queued(caller, 1)
    resume = caller.beside(api.vm_resume)
    found = queued(caller, 2)

    assert [job.command for job in found] == ["vm.pause", "vm.resume"]
    assert all(job.can_cancel for job in found)
    running, *_ = jobs(caller)
    assert running.id < found[0].id < found[1].id
    assert not pause.is_done
    assert not resume.is_done


def test_a_command_that_waits_is_dropped_and_its_caller_is_told(booting):
    caller, boot = booting
    pause = caller.beside(api.vm_pause)
    (waiting,) = queued(caller, 1)

    cancel(caller, waiting.id)

    error = pause.result()
    assert isinstance(error, api.VmPauseError)
    assert isinstance(error.__cause__, api.JobCancelled)
    assert [job.command for job in jobs(caller)] == ["vm.boot"]
    assert not boot.is_done


def test_a_job_that_cannot_end_early_says_so(booting):
    caller, boot = booting
    (job,) = jobs(caller)

    assert refusal(caller, job.id)[-1] == ("A job of this kind or at this point cannot be cancelled: vm.boot")
    assert not boot.is_done


def test_a_job_that_has_ended_is_not_there(booted):
    assert refusal(booted, 1) == ["Error cancelling the job", "There is no job 1"]
    assert refusal(booted, 2**64 - 1)[-1] == f"There is no job {2**64 - 1}"
