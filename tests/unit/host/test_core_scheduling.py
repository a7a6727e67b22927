"""Cookies of core scheduling: who gets which, on a kernel that is played, and on the one that is there."""

from __future__ import annotations

import errno
import itertools
import threading

import pytest

from cloudvmm.errors import error_chain
from cloudvmm.host.core_scheduling import CoreSchedulingError, has_smt, isolate, share


class PlayedKernel:
    """Keeps the cookie of each thread; callers are known by their own ids."""

    def __init__(self):
        self.cookies = {}
        self.new = itertools.count(1)
        self.refuses = {}

    def prctl(self, operation, thread):
        if thread in self.refuses:
            return self.refuses[thread]
        caller = f"caller {threading.get_ident()}"
        match operation:
            case 1:
                self.cookies[thread] = next(self.new)
            case 2:
                self.cookies[thread] = self.cookies.get(caller)
            case 3:
                self.cookies[caller] = self.cookies.get(thread)
        return 0


@pytest.fixture
def kernel():
    return PlayedKernel()


def test_each_thread_alone(kernel):
    isolate([10, 11, 12], kernel.prctl)
    assert kernel.cookies == {10: 1, 11: 2, 12: 3}


def test_all_threads_together_and_not_the_one_that_says_so(kernel):
    isolate([10], kernel.prctl)
    share(10, [11, 12], kernel.prctl)
    assert [kernel.cookies[thread] for thread in (10, 11, 12)] == [1, 1, 1]
    assert f"caller {threading.get_ident()}" not in kernel.cookies


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV])
def test_kernel_without_the_means_is_passed_over(kernel, number):
    kernel.refuses = dict.fromkeys((10, 11), number)
    isolate([10], kernel.prctl)
    share(10, [11], kernel.prctl)
    assert 11 not in kernel.cookies


def test_other_refusals_are_told(kernel):
    kernel.refuses[11] = errno.EPERM
    for call in (lambda: isolate([11], kernel.prctl), lambda: share(10, [11], kernel.prctl)):
        with pytest.raises(CoreSchedulingError) as caught:
            call()
        assert error_chain(caught.value)[0].startswith("The kernel has core scheduling")
        assert "Operation not permitted" in error_chain(caught.value)[1]


def test_kernel_that_is_there_does_it_or_has_no_means():
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(2)]
    for each in threads:
        each.start()
    try:
        isolate([threads[0].native_id])
        share(threads[0].native_id, [threads[1].native_id])
    finally:
        done.set()
        for each in threads:
            each.join()


@pytest.mark.parametrize(("text", "is_active"), [("1\n", True), ("0\n", False)])
def test_smt_is_what_the_kernel_says(tmp_path, text, is_active):
    (tmp_path / "active").write_text(text)
    assert has_smt(str(tmp_path / "active")) is is_active
    assert not has_smt(str(tmp_path / "none"))
