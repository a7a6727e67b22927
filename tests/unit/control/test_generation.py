"""The VM generation id on the fake engine: who keeps it, and who has one of its own."""

from __future__ import annotations

import re

import pytest

from cloudvmm import api
from cloudvmm.config.operation import (
    RestoreConfig,
    VmReceiveMigrationData,
    VmSendMigrationData,
    VmSnapshotConfig,
)
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.engine.fake import FakeEngine

from .conftest import Caller

GUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
GIVEN = "1C1FF3DC-6e5d-4b1c-9a5f-2f6fb0b3d3a1"


def vmgenid_of(caller):
    return caller(api.vm_info).config.platform.vmgenid


@pytest.fixture
def other():
    caller = Caller(FakeEngine())
    yield caller
    caller.close()


@pytest.fixture
def booted(caller, vm_config):
    vm_config.platform = PlatformConfig(vmgenid="auto")
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    return caller


@pytest.fixture
def saved(booted, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    booted(api.vm_pause)
    booted(api.vm_snapshot, VmSnapshotConfig(destination_url=f"file://{folder}"))
    return RestoreConfig(source_url=f"file://{folder}")


def test_new_one_is_made_at_the_first_boot_and_stays(booted):
    vmgenid = vmgenid_of(booted)
    assert GUID.fullmatch(vmgenid)
    booted(api.vm_reboot)
    assert vmgenid_of(booted) == vmgenid
    booted(api.vm_shutdown)
    booted(api.vm_boot)
    assert vmgenid_of(booted) == vmgenid


def test_one_that_is_given_is_taken_as_it_is(caller, vm_config):
    vm_config.platform = PlatformConfig(vmgenid=GIVEN)
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    assert vmgenid_of(caller) == GIVEN


def test_two_vms_have_two(booted, other, vm_config):
    other(api.vm_create, vm_config)
    other(api.vm_boot)
    assert vmgenid_of(other) != vmgenid_of(booted)


def test_each_restore_has_another_and_the_saved_vm_keeps_its_own(booted, saved, other):
    vmgenids = {vmgenid_of(booted)}
    for _ in range(2):
        other(api.vm_restore, saved)
        vmgenids.add(vmgenid_of(other))
        other(api.vm_reboot)
        assert vmgenid_of(other) in vmgenids
        other(api.vm_delete)
    assert len(vmgenids) == 3
    assert vmgenid_of(booted) in vmgenids


def test_migration_keeps_it(booted, other, tmp_path):
    vmgenid, url = vmgenid_of(booted), f"unix:{tmp_path}/migration"
    answer = other.beside(api.vm_receive_migration, VmReceiveMigrationData(receiver_url=url))
    other.wait_for_event("vm/migration-receive-ready")
    booted(api.vm_send_migration, VmSendMigrationData(destination_url=url))
    answer.result()
    assert vmgenid_of(other) == vmgenid


def test_vm_without_one_gets_none(caller, vm_config, other, tmp_path):
    vm_config.platform = PlatformConfig(system_serial_number="one")
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    caller(api.vm_pause)
    caller(api.vm_snapshot, VmSnapshotConfig(destination_url=f"file://{tmp_path}"))
    other(api.vm_restore, RestoreConfig(source_url=f"file://{tmp_path}"))
    assert (vmgenid_of(caller), vmgenid_of(other)) == (None, None)
