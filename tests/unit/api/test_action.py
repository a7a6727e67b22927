"""The command table is whole: every command has a function, an action and an error of its own."""

from __future__ import annotations

import re

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

    assert len(set(names)) == len(names) == 36
    assert all(str(command.error()).strip() for command in api.COMMANDS)


def test_everything_exported_is_there():
    assert all(hasattr(api, name) for name in api.__all__)
