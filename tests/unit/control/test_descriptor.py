"""Descriptors that came with a command are closed once, when nothing holds them any more."""

from __future__ import annotations

import os

import pytest

from cloudvmm import api
from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import RestoredNetConfig, RestoredVfioConfig


@pytest.fixture
def fds():
    given = [os.open("/dev/null", os.O_RDWR) for _ in range(3)]
    yield given
    assert not any(is_open(fd) for fd in given), "a descriptor was left open"


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def net(fds: list[int], **members) -> NetConfig:
    return NetConfig(fds=fds, num_queues=2 * len(fds), **members)


def test_a_refused_add_closes_them(caller, fds):
    caller.refusal(api.vm_add_net, net(fds))


def test_a_refused_create_closes_them_and_leaves_those_of_the_config(caller, vm_config, fds):
    vm_config.net = [net(fds[:1])]
    caller(api.vm_create, vm_config)

    vm_config.net = [net(fds[1:])]
    caller.refusal(api.vm_create, vm_config)

    assert [is_open(fd) for fd in fds] == [True, False, False]
    caller(api.vm_delete)


def test_an_added_device_keeps_them_until_it_is_removed(caller, vm_config, fds):
    vm_config.cpus.boot_vcpus = vm_config.cpus.max_vcpus = 4
    caller(api.vm_create, vm_config)
    caller(api.vm_add_net, net(fds, id="n0"))
    assert all(map(is_open, fds))

    caller(api.vm_remove_device, api.VmRemoveDeviceData(id="n0"))


def test_the_end_of_the_vmm_closes_them(caller, vm_config, fds):
    vm_config.net = [net(fds)]
    caller(api.vm_create, vm_config)

    caller(api.vmm_shutdown)


@pytest.mark.parametrize("kind", ["device", "restore", "receive"])
def test_other_commands_that_fail_close_them(caller, fds, kind):
    vfio = [RestoredVfioConfig(id="v", fd=fds[1])]
    if kind == "device":
        for fd in fds:
            caller.refusal(api.vm_add_device, DeviceConfig(fd=fd))
    elif kind == "restore":
        nets = [RestoredNetConfig(id="n", num_fds=1, fds=fds[:1])]
        caller.refusal(
            api.vm_restore,
            api.RestoreConfig(source_url="file:///x", net_fds=nets, vfio_fds=vfio, iommufd_fd=fds[2]),
        )
    else:
        caller.refusal(api.vm_add_net, net(fds[:1]))
        caller.refusal(
            api.vm_receive_migration,
            api.VmReceiveMigrationData(receiver_url="nowhere:/x", vfio_fds=vfio, iommufd_fd=fds[2]),
        )
