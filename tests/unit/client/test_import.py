"""What `import cloudvmm.client` loads, and what it leaves for when it is needed."""

import os
import subprocess
import sys

import pytest

LIMIT_S = 0.040
HEAVY = ("msgspec", "asyncio", "json", "inspect", "http.client", "dataclasses", "logging", "subprocess")
ROOMS = ("engine", "control", "http", "cli", "daemon", "guest", "config", "options", "api")


def loaded_by(program):
    code = f"import sys; bare = set(sys.modules)\n{program}\nprint(*(set(sys.modules) - bare))"
    ended = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return ended.stdout.split()


@pytest.fixture(scope="module")
def loaded():
    return loaded_by("import cloudvmm.client")


def test_import_loads_the_client(loaded):
    assert "cloudvmm.client.client" in loaded


@pytest.mark.parametrize("name", HEAVY)
def test_import_loads_nothing_heavy(loaded, name):
    assert name not in loaded


@pytest.mark.parametrize("room", ROOMS)
def test_import_loads_no_other_room(loaded, room):
    assert [name for name in loaded if f"{name}.".startswith(f"cloudvmm.{room}.")] == []


def test_data_types_do_not_bring_an_engine():
    loaded = loaded_by("import cloudvmm.client.codec, cloudvmm.client.chain, cloudvmm.client.event")

    assert not [name for name in loaded if name.startswith(("cloudvmm.engine.qemu", "cloudvmm.engine.fake"))]
    assert not [name for name in loaded if name.startswith(("cloudvmm.control", "cloudvmm.http"))]
    assert "asyncio" not in loaded


def test_asyncio_comes_with_the_async_client():
    assert "asyncio" in loaded_by("from cloudvmm.client import AsyncClient")


def test_package_knows_no_other_name():
    import cloudvmm
    import cloudvmm.client

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cloudvmm.client.Nothing
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cloudvmm.Nothing


def test_all_names_are_there():
    import cloudvmm
    import cloudvmm.client

    assert all(hasattr(cloudvmm.client, name) for name in cloudvmm.client.__all__)
    assert all(hasattr(cloudvmm, name) for name in cloudvmm.__all__)


def test_package_alone_loads_nothing_of_itself():
    assert [name for name in loaded_by("import cloudvmm") if name.startswith("cloudvmm.")] == []


def test_import_costs_little_above_a_bare_interpreter():
    # Processor time of the best of several, which a busy machine changes least.
    bare, ours = (min(cpu_s(program) for _ in range(5)) for program in ("pass", "import cloudvmm.client"))

    assert ours - bare < LIMIT_S


def cpu_s(program):
    """Return the processor time that an interpreter takes for `program`."""
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ)
    _, status, usage = os.wait4(process, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime
