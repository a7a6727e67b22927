"""Every example runs, those in the README too, and says what it promises to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.booted import default_guest
from support.vm import choose_engine

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60
# It boots a real guest, twice.
NEEDS_QEMU = {"demo.py"}


def examples():
    return sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in NEEDS_QEMU)


def blocks_of_readme(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_example(name, *arguments):
    return run(sys.executable, str(ROOT / "examples" / name), *arguments)


def run(*argv, text_in=""):
    return subprocess.run(
        argv,
        input=text_in,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("name", examples())
def test_example_ends_well(name):
    ended = run_example(name)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_internal_api_example_shows_each_state():
    lines = run_example("internal_api.py").stdout.splitlines()

    states = [line.split(",")[0] for line in lines if ", devices: " in line]
    assert states == [
        "created: Created",
        "booted: Running",
        "paused: Paused",
        "resumed: Running",
        "shut down: Created",
    ]


def test_client_example_takes_a_vm_through_its_life():
    lines = run_example("client.py").stdout.splitlines()

    assert "refused: VmNotCreated, status 404" in lines
    assert lines[-1] == "event: paused"


def test_async_client_example_sees_every_event():
    lines = run_example("async_client.py").stdout.splitlines()

    numbers = [int(line.split(":")[0]) for line in lines if line.startswith("  ")]
    assert numbers == list(range(len(numbers)))
    assert lines[-1].endswith("vmm/shutdown")


@pytest.mark.parametrize("engine", ["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def test_in_process_example_runs_on_each_engine(engine):
    choose_engine(engine)
    ended = run_example("in_process.py", "--engine", engine)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "state: Running",
        "the guest drives: __rng",
        "booted twice: VmAlreadyCreated",
        "ended: True",
    ]


@pytest.mark.qemu
def test_demo_holds_in_every_step():
    choose_engine("qemu")
    default_guest()
    ended = run_example("demo.py")

    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    _, summary, verdict = ended.stdout.rsplit(f"{'=' * 78}\n", 2)
    assert [line.split()[0] for line in summary.splitlines()] == ["ok"] * 10
    assert verdict == "Every step held.\n"


def test_python_of_the_readme_boots_a_vm():
    (program,) = blocks_of_readme("python")

    ended = run(sys.executable, "-", text_in=program)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "VmState.RUNNING\n", "")


def test_shell_of_the_readme_parses():
    script = "\n".join(blocks_of_readme("sh"))

    ended = run("sh", "-n", text_in=script)

    assert (ended.returncode, ended.stderr) == (0, "")
