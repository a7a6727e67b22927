"""Whether userfaultfd may be had: by a device, or by the system call."""

from __future__ import annotations

import errno

import pytest

from cloudvmm.host import userfault
from support.leak import Holdings


def test_answer_leaves_nothing_open():
    before = Holdings()
    userfault.refusal()
    before.assert_nothing_added()


@pytest.mark.parametrize("is_device_there", [False, True])
def test_device_that_is_none_leaves_the_system_call(tmp_path, is_device_there):
    device = tmp_path / "userfaultfd"
    if is_device_there:
        device.touch()

    refused = userfault.refusal(str(device))

    assert refused is None or refused.errno in (errno.EPERM, errno.ENOSYS)
