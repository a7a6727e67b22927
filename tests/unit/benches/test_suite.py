"""The suite ends by itself, keeps what it had, and tells what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import suite
from suite import BENCHES, Bench, is_done, run

FOLDER = Path(suite.__file__).parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks and results instead of our own."""
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    return tmp_path


def write(folder: Path, name: str, body: str) -> None:
    (folder / f"{name}.py").write_text(
        f"import sys, time\nto = sys.argv[sys.argv.index('--json') + 1]\n{body}\n"
    )


def test_result_is_kept_with_how_it_was_measured(folder: Path) -> None:
    write(folder, "good", "open(to, 'w').write('{\"runs\": ' + sys.argv[2] + '}')")
    assert run(Bench("good", 9, 2, 30.0), is_quick=True, peer=None) is None
    result = json.loads((folder / "bench-good.json").read_text())
    assert result["runs"] == 2
    assert result["suite"]["is_quick"] is True
    assert is_done("good", is_quick=True)
    assert not is_done("good", is_quick=False)


@pytest.mark.parametrize(
    ("body", "limit_s", "words"),
    [
        ("sys.exit(3)", 30.0, "ended with status 3"),
        ("pass", 30.0, "ended with status 0"),
        ("time.sleep(60)", 0.2, "not done within 0.2 s"),
    ],
)
def test_failure_is_told_and_the_old_result_stays(
    folder: Path, body: str, limit_s: float, words: str
) -> None:
    (folder / "bench-bad.json").write_text("{}")
    write(folder, "bad", body)
    assert run(Bench("bad", 1, 1, limit_s), is_quick=False, peer=None) == words
    assert (folder / "bench-bad.json").read_text() == "{}"


def test_peer_is_named_to_those_that_take_it() -> None:
    commands = {bench.name: bench.command(Path("x"), is_quick=False, peer="/ch") for bench in BENCHES}
    named = {name for name, command in commands.items() if command[-2:] == ["--cloud-hypervisor", "/ch"]}
    assert named == {"start", "api_latency", "throughput"}


def test_every_benchmark_is_there() -> None:
    assert all((FOLDER / f"{bench.name}.py").exists() for bench in BENCHES)
