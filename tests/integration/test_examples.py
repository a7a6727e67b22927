"""Every example that needs no QEMU runs, those in the README too, and says what it promises to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60
# demo.py boots a real guest; ./demo.sh runs it.
NEEDS_QEMU = {"demo.py"}


def examples():
    return sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in NEEDS_QEMU)


def blocks_of_readme(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_example(name):
    return run(sys.executable, str(ROOT / "examples" / name))


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


def test_python_of_the_readme_boots_a_vm():
    (program,) = blocks_of_readme("python")

    ended = run(sys.executable, "-", text_in=program)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "VmState.RUNNING\n", "")


def test_shell_of_the_readme_parses():
    script = "\n".join(blocks_of_readme("sh"))

    ended = run("sh", "-n", text_in=script)

    assert (ended.returncode, ended.stderr) == (0, "")
