"""The table of sub-commands against the list of commands that everything is derived from."""

import pytest

from cloudvmm.api import COMMANDS
from cloudvmm.api.action import STREAMS
from cloudvmm.cli.remote.bus import ABSENT
from cloudvmm.cli.remote.command import BY_NAME, SUBCOMMANDS
from cloudvmm.cli.remote.parser import build_parser
from cloudvmm.cli.remote.request import _BUILDERS

READING = {"counters", "events", "info", "jobs", "migration-progress", "ping", "snapshot-progress"}


def bare(name):
    return name.partition(".")[2]


def test_every_command_and_stream_has_one_subcommand():
    names = sorted(command.name for command in (*COMMANDS, *STREAMS))
    assert sorted(subcommand.api_command for subcommand in SUBCOMMANDS) == names


def test_subcommands_are_in_alphabetical_order():
    names = [subcommand.name for subcommand in SUBCOMMANDS]
    assert names == sorted(names)


@pytest.mark.parametrize("subcommand", SUBCOMMANDS, ids=lambda subcommand: subcommand.name)
def test_name_follows_the_command(subcommand):
    special = {"vmm.shutdown": "shutdown-vmm"}
    assert subcommand.name == special.get(subcommand.api_command, bare(subcommand.api_command))


def test_what_reads_is_a_get():
    assert {subcommand.name for subcommand in SUBCOMMANDS if subcommand.method == "GET"} == READING


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_body_is_sent_where_the_command_takes_one(command):
    subcommand = next(one for one in SUBCOMMANDS if one.api_command == command.name)
    assert (subcommand.name in _BUILDERS) is (command.body is not None)


def test_dbus_lacks_what_the_interface_lacks():
    expected = {bare(command.name) for command in COMMANDS if not command.is_on_dbus}
    assert expected | {"events"} == ABSENT


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ping", "VmmPing"),
        ("shutdown-vmm", "VmmShutdown"),
        ("info", "VmInfo"),
        ("add-generic-vhost-user", "VmAddGenericVhostUser"),
        ("power-button", "VmPowerButton"),
    ],
)
def test_dbus_method_is_camel_case(name, method):
    assert BY_NAME[name].dbus_method == method


def test_everything_is_described():
    parser = build_parser("cloudvmm-remote")
    subparsers = next(action for action in parser._actions if action.dest == "command")
    assert set(subparsers.choices) == {*BY_NAME, "help"}
    for one in [parser, *subparsers.choices.values()]:
        assert all(action.help for action in one._actions if action.dest != "command")
