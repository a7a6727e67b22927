"""The built wheel in an empty environment: the commands, the client, and types that mypy checks."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cloudvmm.client import Client

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
TYPED_EXAMPLES = ("client.py", "async_client.py", "in_process.py")

WRONG = """
from cloudvmm import Vmm
from cloudvmm.client import AsyncClient, Client
from cloudvmm.config.disk import DiskConfig

def wrong(client: Client, vmm: Vmm, other: AsyncClient) -> None:
    client.vm_boot(1)
    client.vm_add_disk("d")
    vmm.vm_add_disk(DiskConfig(path=1))
    client.vm_info().state.no_such_member
    other.vm_info().state
    Vmm("xen")
"""


def scripts():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def run(*argv, cwd=None, **options):
    return subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, timeout=LIMIT_S, cwd=cwd, **options
    )


def well(ended):
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with our wheel and those of what it depends on."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--no-input"]
    reached = run(*pip, "download", "-q", "--no-deps", "-d", folder / "probe", "hatchling", check=False)
    if reached.returncode != 0:
        pytest.skip("pip reaches no package index, which building and installing a wheel needs")
    well(run(*pip, "wheel", "-q", "-w", folder, ROOT, check=False))
    return folder


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    """The interpreter of an environment that has the wheel and nothing of this tree."""
    folder = tmp_path_factory.mktemp("environment")
    well(run(sys.executable, "-m", "venv", folder, check=False))
    python = folder / "bin" / "python"
    (wheel,) = wheels.glob("cloudvmm-*.whl")
    well(run(python, "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels, wheel, check=False))
    return python


@pytest.mark.parametrize("name", scripts())
def test_command_runs(environment, name, tmp_path):
    ended = well(run(environment.with_name(name), "--help", cwd=tmp_path, check=False))

    assert name in ended.stdout


def test_both_commands_are_declared():
    assert set(scripts()) == {"cloudvmm", "cloudvmm-remote"}


def test_commands_serve_and_ask(environment, tmp_path):
    """A VM comes and goes by the two commands alone, with nothing installed but the wheel."""
    (tmp_path / "vm.json").write_text('{"payload":{"kernel":"/bin/sh"},"console":{"mode":"Off"}}')
    remote = [environment.with_name("cloudvmm-remote"), "--api-socket", "api"]
    words = [environment.with_name("cloudvmm"), "--engine", "fake", "--api-socket", "api"]
    server = subprocess.Popen(words, cwd=tmp_path)
    try:
        with Client(tmp_path / "api") as client:
            client.wait_until_ready(LIMIT_S)
        for command in (["create", "vm.json"], ["boot"], ["pause"]):
            well(run(*remote, *command, cwd=tmp_path, check=False))
        info = well(run(*remote, "info", cwd=tmp_path, check=False)).stdout
        well(run(*remote, "shutdown-vmm", cwd=tmp_path, check=False))

        assert json.loads(info)["state"] == "Paused"
        assert server.wait(LIMIT_S) == 0
    finally:
        server.kill()
        server.wait()


def test_d_bus_is_there(environment):
    program = "from cloudvmm.api import start_dbus_thread; import cloudvmm.dbus"

    well(run(environment, "-W", "error", "-c", program, check=False))


def test_package_is_the_installed_one(environment, tmp_path):
    ended = well(
        run(environment, "-c", "import cloudvmm; print(cloudvmm.__file__)", cwd=tmp_path, check=False)
    )

    assert str(environment.parents[1]) in ended.stdout


def test_client_is_there_and_brings_no_engine(environment, tmp_path):
    program = "import sys, cloudvmm.client; print(*(n for n in sys.modules if n.startswith('cloudvmm.')))"
    loaded = well(run(environment, "-c", program, cwd=tmp_path, check=False)).stdout.split()

    assert "cloudvmm.client.client" in loaded
    assert [name for name in loaded if not name.startswith(("cloudvmm.client", "cloudvmm.errors"))] == []


@pytest.mark.parametrize("name", TYPED_EXAMPLES)
def test_example_runs(environment, tmp_path, name):
    ended = well(run(environment, "-W", "error", ROOT / "examples" / name, cwd=tmp_path, check=False))

    assert ended.stderr == ""


def mypy(environment, program, folder):
    cache = folder / "cache"
    return run(
        sys.executable, "-m", "mypy", "--strict", "--python-executable", environment, "--cache-dir", cache,
        "--config-file", "/dev/null", program, cwd=folder, check=False,
    )  # fmt: skip


def test_types_of_the_examples_hold(environment, tmp_path):
    for name in TYPED_EXAMPLES:
        (tmp_path / name).write_bytes((ROOT / "examples" / name).read_bytes())

        ended = mypy(environment, name, tmp_path)

        assert ended.stdout.startswith("Success"), ended.stdout


def test_wrong_types_are_noticed(environment, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)

    lines = mypy(environment, "wrong.py", tmp_path).stdout.splitlines()

    assert sorted({int(line.split(":")[1]) for line in lines if ": error:" in line}) == [7, 8, 9, 10, 11, 12]
