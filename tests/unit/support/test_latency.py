from __future__ import annotations

import pytest

from support.latency import ADOPTION, CHANGE_CEILING_S, READ_CEILING_S, LatencyLog, ceiling_s


def test_call_above_its_ceiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOUDVMM_LATENCY_FACTOR", raising=False)
    log = LatencyLog()
    log.record("fake", "vmm.ping", READ_CEILING_S)
    with pytest.raises(AssertionError, match=r"vmm\.ping took 1\.100 s, more than its ceiling of 1 s"):
        log.record("fake", "vmm.ping", READ_CEILING_S + 0.1)


def test_factor_widens_every_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDVMM_LATENCY_FACTOR", "3")
    log = LatencyLog()
    log.record("fake", "vmm.ping", 3 * READ_CEILING_S)
    assert "ceiling=3 s" in log.report()[0]


def test_report_has_a_line_per_engine_and_command() -> None:
    log = LatencyLog()
    log.record("qemu", "vm.info", 0.002)
    log.record("fake", "vm.info", 0.001)
    log.record("fake", "vm.info", 0.003)
    lines = log.report()
    assert [line.split()[:3] for line in lines] == [["fake", "vm.info", "n=2"], ["qemu", "vm.info", "n=1"]]
    assert "p50=     2.00 ms  p99=     3.00 ms  max=     3.00 ms" in lines[0]


def test_report_tells_how_many_vms_were_taken_over_within_a_second() -> None:
    log = LatencyLog()
    for number in range(100):
        log.record("qemu", ADOPTION, 0.5 if number else 2.0)
    line, within = log.report()
    assert "n=100   p50=   500.00 ms  p99=   500.00 ms  max=  2000.00 ms" in line
    assert within.endswith("99 of 100 within 1 s")


def test_command_without_a_ceiling_of_its_own_has_the_one_for_changes() -> None:
    assert ceiling_s("vm.resize") == CHANGE_CEILING_S
