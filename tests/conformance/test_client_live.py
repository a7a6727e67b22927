"""Each method of both clients against the whole program on the fake engine, in each state of a VM."""

import asyncio
import contextlib

import pytest

from cloudvmm import api
from cloudvmm.client import AsyncClient, Client, ServerError
from support.argument import ARGUMENTS, arguments_of, method_name

STATES = {
    "nothing": [],
    "created": ["vm.create"],
    "running": ["vm.create", "vm.boot"],
    "paused": ["vm.create", "vm.boot", "vm.pause"],
}
# One waits for another VMM, which is not there; the other ends the server, so it comes last.
NOT_HERE = ("vm.receive-migration", "vmm.shutdown")
COMMANDS = [request for request in api.COMMANDS if request.name not in NOT_HERE]


@pytest.fixture(params=["blocking", "asyncio"])
def call(request, fake_engine, cloudvmm_server):
    path = cloudvmm_server().socket_path
    with contextlib.ExitStack() as ending:
        if request.param == "blocking":
            client = ending.enter_context(Client(path, timeout_s=20, long_timeout_s=20))
            yield lambda name: getattr(client, method_name(name))(*arguments_of(name))
        else:
            runner = ending.enter_context(asyncio.Runner())
            other = AsyncClient(path, timeout_s=20, long_timeout_s=20)
            ending.callback(other.close)
            yield lambda name: runner.run(getattr(other, method_name(name))(*arguments_of(name)))


def assert_answer_is_of_the_commands_own(call, request_type):
    try:
        call(request_type.name)
    except ServerError as error:
        assert isinstance(error.__cause__, request_type.error)
        assert error.code
        assert error.chain[0] == "Error from API"
        assert error.command == request_type.name


@pytest.mark.parametrize("state", STATES)
def test_every_method_is_understood(call, state):
    for request_type in COMMANDS:
        call("vm.delete")
        for step in STATES[state]:
            call(step)
        assert_answer_is_of_the_commands_own(call, request_type)
    call("vmm.shutdown")


def test_arguments_are_for_commands_that_take_some():
    assert set(ARGUMENTS) == {request.name for request in api.COMMANDS if request.body is not None}
