"""Every input that is kept holds, a few thousand mutants too, and a broken promise does not go unnoticed."""

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import config_json
import option_grammar
import runner
from cloudvmm.options.table import SCHEMAS
from support.deadline import HOST_S

FUZZ = Path(runner.__file__).parent
TARGETS = [importlib.import_module(name).TARGET for name in runner.names()]
KEPT = [(target, path) for target in TARGETS for path in target.corpus()]


def fail_on_two_dots(data):
    assert b".." not in data
    return len(data) > 3


def hang_on_a_dot(data):
    while b"." in data:
        pass


@pytest.mark.parametrize(("target", "path"), KEPT, ids=[f"{each.name}-{path.name}" for each, path in KEPT])
def test_kept_input_holds(target, path):
    target.check(path.read_bytes())


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_mutants_hold_and_come_to_many_outcomes(target):
    count, outcomes = runner.search(target, seed=1, runs=2000)
    assert count == 2000
    assert outcomes > 20


def test_each_flag_and_each_command_is_in_the_corpus():
    flags = {path.read_bytes().partition(b"\n")[0].decode() for path in option_grammar.TARGET.corpus()}
    assert SCHEMAS.keys() <= option_grammar.PARSERS.keys() <= flags
    commands = {path.read_bytes().partition(b"\n")[0].decode() for path in config_json.TARGET.corpus()}
    assert commands <= config_json.KINDS.keys()
    assert {"vm.create", "vm.add-disk", "vm.restore", "vm.resize"} <= commands


def test_same_seed_gives_the_same_mutants():
    corpus = [path.read_bytes() for path in config_json.TARGET.corpus()]
    breeds = [
        [runner.mutate(data, corpus, config_json.TARGET, noise) for data in corpus]
        for noise in (random.Random(7), random.Random(7), random.Random(8))
    ]
    assert breeds[0] == breeds[1] != breeds[2]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CORPUS", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "seed").write_bytes(b"a.b,c.d.e")
    return runner.Target("broken", fail_on_two_dots)


def test_broken_promise_is_found_made_small_and_kept(broken, tmp_path, capsys):
    with pytest.raises(runner.Failure) as failure:
        runner.search(broken, seed=1, runs=100_000)
    path = runner.report(broken, failure.value, tmp_path / "failures")
    assert path.read_bytes() == b".."
    said = capsys.readouterr().err
    assert "AssertionError" in said
    assert f"python fuzz/broken.py {path}" in said


def test_search_by_coverage_without_atheris_says_what_is_missing(tmp_path):
    (tmp_path / "atheris.py").write_text("raise ImportError")
    ended = run_coverage("qmp_codec", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr == "atheris is not installed, which this search needs: pip install 'cloudvmm[fuzz]'\n"


def test_search_by_coverage_looks_at_inputs(tmp_path):
    pytest.importorskip("atheris")
    ended = run_coverage("qmp_codec", "--seed", "1", "--seconds", "60", "--runs", "300", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "qmp_codec: seed 1, by coverage\n"
    assert list((tmp_path / "fuzz-failures" / "qmp_codec-found").iterdir())


def run_coverage(*words, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, str(FUZZ / "coverage.py"), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=HOST_S,
        check=False,
    )


def test_input_that_hangs_is_a_failure(broken, monkeypatch):
    monkeypatch.setattr(runner, "LONGEST_S", 0.05)
    with pytest.raises(runner.Failure) as failure:
        runner.search(broken._replace(check=hang_on_a_dot), seed=1, runs=1)
    assert isinstance(failure.value.__cause__, runner.TooSlow)
