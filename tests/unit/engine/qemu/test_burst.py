"""One-time bursts: what is taken off, and what QEMU is told when one is spent."""

from __future__ import annotations

import pytest

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.rate_limit import RateLimiterConfig, RateLimiterGroupConfig, TokenBucketConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.qemu.burst import BurstWatch
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.qmp import QmpError

OWN = "limit.ddisk"


class PlayedQemu:
    """Says of each disk in `done`, by its id, how many bytes and requests were read and written."""

    def __init__(self):
        self.done = {}
        self.told = []
        self.looks = 0
        self.refusal = None

    def execute(self, command, arguments=None, *, timeout_s):
        if command == "query-blockstats":
            self.looks += 1
            return [stats_of(disk_id, *done) for disk_id, done in self.done.items()]
        assert command == "qom-set"
        assert arguments["property"] == "limits"
        self.told.append((arguments["path"], arguments["value"]))
        if self.refusal is not None:
            raise self.refusal
        return {}


def stats_of(disk_id, read_bytes, read_ops, write_bytes, write_ops):
    return {
        "qdev": f"/machine/peripheral/{qdev_id(disk_id)}/virtio-backend",
        "stats": {
            "rd_bytes": read_bytes,
            "rd_operations": read_ops,
            "wr_bytes": write_bytes,
            "wr_operations": write_ops,
            "rd_total_time_ns": 0,
            "wr_total_time_ns": 0,
        },
    }


def limiter(**buckets):
    return RateLimiterConfig(**buckets)


def bucket(size, burst):
    return TokenBucketConfig(size=size, refill_time=1000, one_time_burst=burst)


def disk_of(config, disk_id="disk"):
    return DiskConfig(id=disk_id, rate_limiter_config=config)


@pytest.fixture
def qemu():
    return PlayedQemu()


def test_limits_change_once_when_reads_and_writes_have_spent_the_burst(qemu):
    watch = BurstWatch(qemu, VmConfig(disks=[disk_of(limiter(bandwidth=bucket(100, 1000)))]))
    for done in ((400, 1, 500, 1), (400, 1, 600, 1), (900, 2, 900, 2)):
        qemu.done["disk"] = done
        watch.look()
    limits = {"bps-total": 100, "bps-total-max": 100, "iops-total": 0, "iops-total-max": 0}
    assert qemu.told == [(f"/objects/{OWN}", limits)]
    assert qemu.looks == 2


def test_other_burst_is_granted_as_far_as_it_is_left(qemu):
    config = limiter(bandwidth=bucket(100, 1000), ops=bucket(10, 50))
    watch = BurstWatch(qemu, VmConfig(disks=[disk_of(config)]))
    qemu.done["disk"] = (1000, 10, 0, 10)
    watch.look()
    assert qemu.told[-1][1] == {
        "bps-total": 100,
        "bps-total-max": 100,
        "iops-total": 10,
        "iops-total-max": 30,
    }
    qemu.done["disk"] = (1000, 10, 0, 40)
    watch.look()
    assert qemu.told[-1][1]["iops-total-max"] == 10
    assert len(qemu.told) == 2


def test_disks_of_a_group_spend_its_burst_together_whoever_comes_and_goes(qemu):
    group = RateLimiterGroupConfig(id="g", rate_limiter_config=limiter(ops=bucket(10, 100)))
    first, second = (DiskConfig(id=name, rate_limit_group="g") for name in ("first", "second"))
    watch = BurstWatch(qemu, VmConfig(rate_limit_groups=[group], disks=[first]))
    qemu.done["first"] = (0, 60, 0, 0)
    watch.look()
    watch.leave("first")
    del qemu.done["first"]
    watch.join(second)
    qemu.done["second"] = (0, 0, 0, 39)
    watch.look()
    assert qemu.told == []
    qemu.done["second"] = (0, 0, 0, 40)
    watch.look()
    assert [path for path, _ in qemu.told] == ["/objects/group.dg"]


def test_disk_that_comes_again_has_its_burst_anew(qemu):
    disk = disk_of(limiter(ops=bucket(10, 100)))
    watch = BurstWatch(qemu, VmConfig())
    for _ in range(2):
        watch.join(disk)
        qemu.done["disk"] = (0, 99, 0, 0)
        watch.look()
        watch.leave("disk")
    assert qemu.told == []


@pytest.mark.parametrize(
    "config",
    [
        limiter(),
        limiter(ops=bucket(10, 0)),
        limiter(ops=bucket(10, None)),
        limiter(ops=bucket(0, 100)),
        None,
    ],
)
def test_qemu_is_not_asked_where_there_is_no_burst(qemu, config):
    BurstWatch(qemu, VmConfig(disks=[disk_of(config)])).look()
    assert qemu.looks == 0


def test_limiter_that_is_gone_when_it_is_told_does_no_harm(qemu):
    watch = BurstWatch(qemu, VmConfig(disks=[disk_of(limiter(ops=bucket(10, 100)))]))
    qemu.done["disk"] = (0, 100, 0, 0)
    qemu.refusal = QmpError("qom-set", "DeviceNotFound", "gone")
    watch.look()
    assert len(qemu.told) == 1
