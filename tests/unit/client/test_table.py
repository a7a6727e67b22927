"""The client's commands are those of `cloudvmm.api`, and each has its method, on both clients."""

import inspect

import pytest

from cloudvmm import api
from cloudvmm.client import AsyncMethods, Methods, table

ANSWERS = {
    api.Empty: ("nothing", "None"),
    api.VmmPingResponse: ("ping", "VmmPingResponse"),
    api.VmInfo: ("info", "VmInfo"),
    api.VmActionPayload: ("device", "PciDeviceInfo | None"),
    api.VmForkResponse: ("fork", "VmForkResponse"),
    api.VmMigrationProgress: ("migration-progress", "VmMigrationProgress"),
    api.VmmJobs: ("jobs", "VmmJobs"),
    api.VmSnapshotProgress: ("snapshot-progress", "VmSnapshotProgress"),
}


def expected_answer(request):
    if request is api.VmAction.COUNTERS.value:
        return "counters", "VmCounters"
    return ANSWERS[request.answer]


def method_name(name):
    return name.replace(".", "_").replace("-", "_")


def test_commands_are_those_of_the_api():
    assert [command.name for command in table.COMMANDS] == [request.name for request in api.COMMANDS]


@pytest.mark.parametrize(
    ("command", "request_type"), [*zip(table.COMMANDS, api.COMMANDS, strict=True)], ids=repr
)
def test_command_is_asked_for_as_the_server_expects(command, request_type):
    reads = request_type.effect is api.Effect.READS

    assert command.method == ("GET" if reads else "PUT")
    assert command.answer == expected_answer(request_type)[0]


@pytest.mark.parametrize("methods", [Methods, AsyncMethods])
@pytest.mark.parametrize("request_type", api.COMMANDS, ids=lambda request: request.name)
def test_each_command_has_its_method(methods, request_type):
    method = getattr(methods, method_name(request_type.name))
    _, *parameters = inspect.signature(method).parameters.values()
    wanted = [] if request_type.body is None else [request_type.body.__name__]

    assert [parameter.annotation for parameter in parameters] == wanted
    assert inspect.signature(method).return_annotation == expected_answer(request_type)[1]
    assert method.__doc__
    assert inspect.iscoroutinefunction(method) is (methods is AsyncMethods)


@pytest.mark.parametrize("methods", [Methods, AsyncMethods])
def test_no_method_is_without_a_command(methods):
    named = {name for name in vars(methods) if name.startswith(("vm_", "vmm_"))}

    assert named == {method_name(request.name) for request in api.COMMANDS}


def test_event_stream_is_the_one_of_the_api():
    assert [stream.name for stream in api.STREAMS] == [table.EVENTS]
