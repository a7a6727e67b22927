"""QEMU's and the kernel's numbers under the names of the reference."""

from __future__ import annotations

import pytest

from cloudvmm.engine.qemu.counter import (
    LATENCY_BOUNDARIES_NS,
    NEVER,
    NEVER_AVERAGE,
    balloon_counters,
    disk_counters,
    net_counters,
)

IDLE = {
    "rd_bytes": 0,
    "rd_operations": 0,
    "rd_total_time_ns": 0,
    "failed_rd_operations": 0,
    "wr_bytes": 0,
    "wr_operations": 0,
    "wr_total_time_ns": 0,
    "failed_wr_operations": 0,
}
QDEV = "/machine/peripheral/d_disk0/virtio-backend"


def known(qdev_id: str) -> str | None:
    return {"d_disk0": "_disk0"}.get(qdev_id)


def counters(**stats):
    return disk_counters([{"qdev": QDEV, "stats": {**IDLE, **stats}}], known)["_disk0"]


def test_disk_before_its_first_request():
    assert counters() == {
        "read_bytes": 0,
        "read_ops": 0,
        "write_bytes": 0,
        "write_ops": 0,
        "read_latency_min": 18446744073709551615,
        "read_latency_max": 18446744073709551615,
        "read_latency_avg": 1844674407370955,
        "write_latency_min": 18446744073709551615,
        "write_latency_max": 18446744073709551615,
        "write_latency_avg": 1844674407370955,
    }


def test_never_is_what_the_reference_shows():
    assert (NEVER, NEVER_AVERAGE) == (18446744073709551615, 1844674407370955)


def test_latencies_come_from_sum_and_histogram():
    histogram = {"boundaries": [1000, 10_000, 100_000], "bins": [0, 3, 1, 0]}
    seen = counters(rd_operations=4, rd_total_time_ns=60_000, rd_latency_histogram=histogram)

    assert (seen["read_latency_min"], seen["read_latency_avg"], seen["read_latency_max"]) == (1, 15, 100)
    assert seen["write_latency_min"] == NEVER


@pytest.mark.parametrize(("bins", "low", "high"), [([5, 0, 0], 0, 9), ([0, 0, 5], 9, 10)])
def test_outer_bins_and_an_average_beyond_them_stay_in_order(bins, low, high):
    histogram = {"boundaries": [1000, 10_000], "bins": bins}
    seen = counters(wr_operations=5, wr_total_time_ns=45_000, wr_latency_histogram=histogram)

    assert (seen["write_latency_min"], seen["write_latency_max"]) == (low, high)
    assert low <= seen["write_latency_avg"] <= high


def test_without_histogram_the_average_is_all_that_is_known():
    seen = counters(rd_operations=2, rd_total_time_ns=8_000)

    assert {seen[f"read_latency_{kind}"] for kind in ("min", "max", "avg")} == {4}


def test_failed_requests_count_in_the_average():
    assert counters(rd_operations=1, failed_rd_operations=1, rd_total_time_ns=8_000)["read_latency_avg"] == 4


def test_devices_that_are_not_ours_are_left_out():
    others = [{"qdev": "/machine/unattached/device[5]", "stats": IDLE}, {"stats": IDLE}]

    assert disk_counters(others, known) == {}


def test_what_a_guest_says_of_its_memory_has_the_names_of_qemu_and_nothing_unknown():
    stats = {"stat-total-memory": 1 << 28, "stat-swap-in": 0, "stat-htlb-pgalloc": NEVER}
    answer = {"stats": stats, "last-update": 1_700_000_000}

    told = {"total_memory": 1 << 28, "swap_in": 0, "last_update": 1_700_000_000}
    assert balloon_counters(answer) == told


def test_guest_that_has_said_nothing_of_its_memory_has_no_numbers():
    assert balloon_counters({"stats": {"stat-total-memory": NEVER}, "last-update": 0}) is None


def test_boundaries_rise_from_a_microsecond_to_a_hundred_seconds():
    assert LATENCY_BOUNDARIES_NS[0] == 1000
    assert LATENCY_BOUNDARIES_NS[-1] == 100_000_000_000
    assert sorted(set(LATENCY_BOUNDARIES_NS)) == LATENCY_BOUNDARIES_NS


def test_what_the_host_sends_is_what_the_guest_receives(tmp_path, monkeypatch):
    table = tmp_path / "dev"
    table.write_text(
        "Inter-|   Receive                      |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop\n"
        "  tap: 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n"
        "  tap0: 3 4 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n"
    )
    monkeypatch.setattr("cloudvmm.engine.qemu.counter.NET_TABLE", str(table))

    assert net_counters("tap0") == {"rx_bytes": 1, "rx_frames": 2, "tx_bytes": 3, "tx_frames": 4}
    assert net_counters("tap1") is None
