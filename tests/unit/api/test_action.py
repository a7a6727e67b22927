"""The command table is whole: every command has a function, an action and an error of its own."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys

import pytest

import cloudvmm.api as api
from cloudvmm.api import call


def test_every_command_has_a_function_of_its_name():
    wanted = {re.sub(r"[.-]", "_", command.name) for command in api.COMMANDS}
    given = {name for name in vars(call) if re.match(r"vmm?_", name) and name != "vm_action"}

    assert given == wanted


def test_every_command_on_the_vm_is_an_action():
    wanted = {command for command in api.COMMANDS if command.name.startswith("vm.")}

    assert {variant.value for variant in api.VmAction} == wanted - {api.COMMANDS[2], api.COMMANDS[4]}


def test_names_are_unique_and_errors_speak():
    names = [command.name for command in api.COMMANDS]

    assert len(set(names)) == len(names) == 38
    assert all(str(command.error()).strip() for command in api.COMMANDS)


def test_everything_exported_is_there():
    assert all(hasattr(api, name) for name in api.__all__)


def test_every_module_can_be_the_first_to_be_loaded():
    names = {module.name for module in pkgutil.iter_modules(api.__path__)}
    assert names == set(api._MODULES)
    for name in names:
        subprocess.run([sys.executable, "-c", f"from cloudvmm.api import {name}"], check=True, timeout=60)


def test_every_module_is_found_in_the_room_alone():
    look = "for name in api._MODULES: assert getattr(api, name).__name__ == f'cloudvmm.api.{name}'"
    subprocess.run([sys.executable, "-c", f"from cloudvmm import api\n{look}"], check=True, timeout=60)


def test_what_is_not_there_is_missed_where_it_was_looked_for():
    assert {"VmInfo", "vm_boot", "error"} <= set(dir(api))
    with pytest.raises(AttributeError, match=r"module 'cloudvmm\.api' has no attribute 'nothing'"):
        api.nothing  # noqa: B018
