"""Landlock around a VMM's own threads, tried with a machine that opens what its configuration names."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from cloudvmm import api
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.operation import RestoreConfig, VmSnapshotConfig
from cloudvmm.control import latecomer
from cloudvmm.control.landlock import hold_thread
from cloudvmm.control.worker import Worker
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.host.landlock import landlock_version
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller

pytestmark = pytest.mark.skipif(landlock_version() < 3, reason="Landlock is missing or too old")
DENIED = "Permission denied"


@pytest.fixture
def images(tmp_path):
    """Four images, by their names."""
    paths = {name: tmp_path / f"{name}.raw" for name in ("own", "ruled", "read", "other")}
    for path in paths.values():
        path.write_bytes(bytes(1 << 20))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def enclosed(vm_config, images):
    """A config that asks to be held to its disk, and to two more images."""
    vm_config.landlock_enable = True
    vm_config.disks = [DiskConfig(path=images["own"])]
    vm_config.landlock_rules = [
        LandlockConfig(path=images["ruled"], access="rw"),
        LandlockConfig(path=images["read"], access="r"),
    ]
    return vm_config


def test_a_vm_has_what_its_config_names_and_what_the_rules_add(caller, enclosed, images):
    caller(api.vm_create, enclosed)
    caller(api.vm_boot)

    caller(api.vm_add_disk, DiskConfig(path=images["ruled"]))
    caller(api.vm_add_disk, DiskConfig(path=images["read"], readonly=True))


@pytest.mark.parametrize(("name", "readonly"), [("other", True), ("other", False), ("read", False)])
def test_a_vm_gets_nothing_else(caller, enclosed, images, name, readonly):
    caller(api.vm_create, enclosed)
    caller(api.vm_boot)

    chain = caller.refusal(api.vm_add_disk, DiskConfig(path=images[name], readonly=readonly))

    assert chain[-1].startswith(DENIED)
    caller(api.vm_reboot)  # what it has it has again


def test_what_is_late_is_loaded_before_anything_is_out_of_reach(caller, enclosed, images, monkeypatch):
    seen = []
    monkeypatch.setattr(latecomer, "preload", lambda: seen.append(len(Path(images["other"]).read_bytes())))

    caller(api.vm_create, enclosed)
    caller(api.vm_boot)

    assert seen == [1 << 20]


def test_another_vm_of_the_same_vmm_is_held_to_what_both_may(caller, enclosed, images, vm_config):
    caller(api.vm_create, enclosed)
    caller(api.vm_delete)
    enclosed.disks = [DiskConfig(path=images["other"])]
    enclosed.landlock_enable = False
    caller(api.vm_create, enclosed)

    assert caller.refusal(api.vm_boot)[-1].startswith(DENIED)


def test_the_same_vm_may_come_and_go_as_often_as_one_likes(caller, enclosed):
    for _ in range(20):  # the kernel takes 16 sets of rules
        caller(api.vm_create, enclosed)
        caller(api.vm_boot)
        caller(api.vm_delete)


def test_more_sets_of_rules_than_the_kernel_takes_are_refused_and_the_vm_does_not_run(
    caller, enclosed, tmp_path
):
    refusals = []
    while not refusals and len(os.listdir(tmp_path)) < 40:
        folder = tmp_path / f"rule{len(os.listdir(tmp_path))}"
        folder.mkdir()
        enclosed.landlock_rules = [LandlockConfig(path=str(folder), access="r")]
        try:
            caller(api.vm_create, enclosed)
        except api.VmCreateError:
            refusals = caller.refusal(api.vm_boot)
        caller(api.vm_delete)

    assert "Failed to apply landlock config during vm_create" in refusals
    assert refusals[-1].startswith("Argument list too long")


def test_a_vmm_beside_is_free(caller, enclosed, images, vm_config):
    caller(api.vm_create, enclosed)
    beside = Caller(FakeEngine())
    try:
        enclosed.landlock_enable = False
        enclosed.disks = [DiskConfig(path=images["other"])]
        beside(api.vm_create, enclosed)
        beside(api.vm_boot)
    finally:
        beside.close()
    with open(images["other"], "rb"):
        pass  # so is the thread that asked


def test_the_next_vmm_on_the_folder_holds_itself_too(enclosed, images, tmp_path):
    first = Caller(FakeEngine(), state_dir=str(tmp_path / "state"))
    first(api.vm_create, enclosed)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    first.close()
    second = Caller(FakeEngine(), state_dir=str(tmp_path / "copy"))
    try:
        second(api.vm_boot)
        chain = second.refusal(api.vm_add_disk, DiskConfig(path=images["other"]))
        assert chain[-1].startswith(DENIED)
    finally:
        second.close()


def test_an_access_that_is_none_is_refused_and_the_config_stays(caller, enclosed):
    enclosed.landlock_rules = [LandlockConfig(path="/", access="rx")]

    assert caller.refusal(api.vm_create, enclosed)[1:] == [
        "Failed to apply landlock config during vm_create",
        "Invalid landlock access: Invalid Landlock access: Invalid access: x",
    ]
    assert caller(api.vm_info).state is api.VmState.CREATED


def test_a_restored_vm_is_held_to_its_own_and_reads_its_snapshot(caller, enclosed, images, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    enclosed.landlock_rules = [LandlockConfig(path=str(folder), access="rw")]
    caller(api.vm_create, enclosed)
    caller(api.vm_boot)
    caller(api.vm_pause)
    caller(api.vm_snapshot, VmSnapshotConfig(destination_url=f"file://{folder}"))
    restored = Caller(FakeEngine())
    try:
        restored(api.vm_restore, RestoreConfig(source_url=f"file://{folder}"))

        chain = restored.refusal(api.vm_add_disk, DiskConfig(path=images["other"]))
        assert chain[-1].startswith(DENIED)
    finally:
        restored.close()


def test_a_thread_that_serves_others_opens_nothing_but_what_python_needs(images, tmp_path):
    outcome = {}

    def look():
        hold_thread([str(tmp_path / "api")])
        for path in (images["own"], threading.__file__):
            try:
                with open(path, "rb"):
                    outcome[path] = None
            except OSError as error:
                outcome[path] = type(error)
        (tmp_path / "api").unlink()
        try:
            (tmp_path / "made").write_bytes(b"")
        except OSError as error:
            outcome["made"] = type(error)

    (tmp_path / "api").write_bytes(b"")
    thread = threading.Thread(target=look)
    thread.start()
    thread.join(DEADLINE_S)

    assert outcome == {images["own"]: PermissionError, threading.__file__: None, "made": PermissionError}


def test_a_worker_that_is_renewed_does_its_jobs_in_order_and_ends():
    worker = Worker("test")
    hold, seen = threading.Event(), []
    worker.submit(lambda: hold.wait(DEADLINE_S))
    worker.submit(lambda: seen.append(threading.get_ident()))
    worker.renew()
    worker.submit(lambda: seen.append(threading.get_ident()))
    assert seen == []
    hold.set()

    wait_until(lambda: len(seen) == 2, "both jobs are done", timeout_s=DEADLINE_S)
    assert seen[0] != seen[1]
    assert worker.stop(DEADLINE_S)
