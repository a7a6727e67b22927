"""Benchmarks beside the real Cloud Hypervisor, with a program in its place: what they ask and say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import stand_in
from support.deadline import HOST_S

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A binary to be named."""
    path = tmp_path / "cloud-hypervisor"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {stand_in.__file__} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("bench", "series", "claims"),
    [
        ("start", "Cloud Hypervisor: exec to first answer", 0),
        ("api_latency", "Cloud Hypervisor: vmm.ping", 6),
    ],
)
def test_peer_takes_its_turns(bench: str, series: str, claims: int, peer: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    words = [sys.executable, str(BENCHES / f"{bench}.py"), "--runs", "1", "--json", str(result)]
    subprocess.run(
        [*words, "--cloud-hypervisor", str(peer)], check=True, timeout=2 * HOST_S, capture_output=True
    )
    report = json.loads(result.read_text())
    assert series in [one["series"] for one in report["series"]]
    assert len([one for one in report["claims"] if "Cloud Hypervisor" in one["claim"]]) == claims
