"""Which errors become which status, and how their chain reads: rest.md sections 3 and 4."""

import itertools

import pytest

from cloudvmm import api
from cloudvmm.config.error import DuplicateDevicePath, IdentifierNotUnique, InvalidIdentifier
from cloudvmm.http.sample import SAMPLES
from support.rest import RestClient


def chain(*errors: Exception) -> Exception:
    """Link errors as `raise … from …` does, outermost first."""
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


CASES = [
    (
        "GET",
        "vm.info",
        None,
        chain(api.VmInfoError(), api.VmNotCreated()),
        404,
        b'["Error from API","The VM info is not available","VM is not created"]',
    ),
    (
        "PUT",
        "vm.boot",
        None,
        chain(api.VmBootError(), api.VmMissingConfig()),
        404,
        b'["Error from API","The VM could not boot","VM config is missing"]',
    ),
    (
        "PUT",
        "vm.remove-device",
        {"id": "x"},
        chain(api.VmRemoveDeviceError(), api.NoDeviceToRemove("x")),
        404,
        rb'["Error from API","The device could not be removed from the VM",'
        rb'"No device with id \"x\" to remove"]',
    ),
    (
        "PUT",
        "vm.remove-device",
        {"id": "x"},
        chain(api.VmRemoveDeviceError(), api.DeviceManager(), api.UnknownDeviceId("x")),
        404,
        b'["Error from API","The device could not be removed from the VM","Error from device manager",'
        b'"Failed to find device corresponding to the given identifier: x"]',
    ),
    (
        "PUT",
        "vm.resize-disk",
        {"id": "x", "desired_size": 1},
        chain(api.VmResizeDiskError(), api.DeviceManager(), api.UnknownDeviceId("x")),
        404,
        b'["Error from API","The disk could not be resized","Error from device manager",'
        b'"Failed to find device corresponding to the given identifier: x"]',
    ),
    (
        "PUT",
        "vm.add-disk",
        {"path": "/d"},
        chain(api.VmAddDiskError(), api.ConfigValidation(), IdentifierNotUnique("d0")),
        409,
        b'["Error from API","The disk could not be added to the VM","Failed to validate config",'
        b'"Identifier d0 is not unique"]',
    ),
    (
        "PUT",
        "vm.add-device",
        {"path": "/d"},
        chain(api.VmAddDeviceError(), api.ConfigValidation(), DuplicateDevicePath("/d")),
        409,
        b'["Error from API","The device could not be added to the VM","Failed to validate config",'
        b'"Duplicated device path: /d"]',
    ),
    (
        "PUT",
        "vm.add-disk",
        {"path": "/d"},
        chain(api.VmAddDiskError(), api.ConfigValidation(), InvalidIdentifier("__x")),
        400,
        b'["Error from API","The disk could not be added to the VM","Failed to validate config",'
        b'"Identifier __x is not valid"]',
    ),
    (
        "PUT",
        "vm.resize",
        {"desired_vcpus": 1},
        chain(api.VmResizeError(), api.CpuManager(), api.VcpuRemovalPending()),
        429,
        b'["Too Many Requests"]',
    ),
    (
        "PUT",
        "vm.resize",
        {"desired_vcpus": 1},
        chain(api.VmResizeError(), api.CpuManager()),
        500,
        b'["Error from API","The VM could not be resized","Error from CPU manager"]',
    ),
    (
        "PUT",
        "vm.create",
        {},
        chain(api.VmCreateError(), api.VmAlreadyCreated()),
        500,
        b'["Error from API","The VM could not be created","VM is already created"]',
    ),
    (
        "PUT",
        "vm.pause",
        None,
        chain(
            api.VmPauseError(),
            api.VmPauseFailed(),
            api.MigratablePause(),
            api.InvalidTransition("Paused", "Paused"),
        ),
        500,
        b'["Error from API","The VM could not be paused","Cannot pause VM",'
        b'"Failed to pause migratable component",'
        b'"Invalid transition: InvalidStateTransition(Paused, Paused)"]',
    ),
    (
        "PUT",
        "vm.add-disk",
        {"path": "/d"},
        chain(api.VmAddDiskError(), api.DeviceManager(), IdentifierNotUnique("d0")),
        500,
        b'["Error from API","The disk could not be added to the VM","Error from device manager",'
        b'"Identifier d0 is not unique"]',
    ),
    (
        "PUT",
        "vm.receive-migration",
        {"receiver_url": "unix:/m"},
        chain(api.VmReceiveMigrationError(), api.MigratableSend(), api.ConfigValidation()),
        500,
        b'["Error from API","Error receiving migration",'
        b'"Failed to send migratable component snapshot","Failed to validate config"]',
    ),
    ("PUT", "vm.nmi", None, api.VmNmiError(), 500, b'["Error from API","Error triggering NMI"]'),
    (
        "PUT",
        "vm.coredump",
        {"destination_url": "file:///x"},
        chain(api.VmCoredumpError(), api.Coredump(), FileNotFoundError(2, "No such file or directory", "/x")),
        500,
        b'["Error from API","The VM could not be coredumped","Error coredumping VM",'
        b'"No such file or directory: /x (os error 2)"]',
    ),
    (
        "PUT",
        "vm.snapshot",
        {"destination_url": "file:///x"},
        chain(api.VmSnapshotError(), FileNotFoundError(2, "No such file or directory", "/\udcff")),
        500,
        b'["Error from API","The VM could not be snapshotted","No such file or directory: /? (os error 2)"]',
    ),
]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (api.VmNmiError(), "VmNmiError"),
        (chain(api.VmPauseError(), api.VmNotRunning()), "VmNotRunning"),
        (
            chain(api.VmAddDiskError(), api.ConfigValidation(), IdentifierNotUnique("d")),
            "IdentifierNotUnique",
        ),
        (chain(api.VmCoredumpError(), api.Coredump(), OSError(5, "Input/output error")), "Coredump"),
        (chain(api.VmResizeError(), api.CpuManager(), api.VcpuRemovalPending()), "VcpuRemovalPending"),
    ],
)
def test_code_is_the_innermost_error_of_ours(client, vmm, error, code):
    name = next(command.name for command in api.COMMANDS if command.error is type(error))
    vmm.answer(name, error)
    assert client.ask("PUT", name, SAMPLES.get(name)).code == code


def test_success_has_no_code(client):
    assert [client.ask("PUT", "vm.boot").code, client.ping().code] == ["", ""]


@pytest.mark.parametrize(("method", "name", "body", "error", "status", "text"), CASES)
def test_error_becomes_its_status_with_its_chain(client, vmm, method, name, body, error, status, text):
    vmm.answer(name, error)
    reply = client.ask(method, name, body)
    assert (reply.status, reply.body) == (status, text)


def test_error_s_headers_are_a_success_s_and_its_code(client, vmm):
    vmm.answer("vm.boot", chain(api.VmBootError(), api.VmMissingConfig()))
    body = b'["Error from API","The VM could not boot","VM config is missing"]'
    assert client.ask("PUT", "vm.boot").raw == (
        b"HTTP/1.1 404 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b"X-Cloudvmm-Error: VmMissingConfig\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


def test_missing_member_is_told_with_the_serde_message(client):
    reply = client.ask("PUT", "vm.remove-device", {})
    assert (reply.status, reply.body) == (
        400,
        b'["Failed to deserialize JSON","missing field `id` at line 1 column 2"]',
    )


def test_vmm_thread_that_has_ended_is_told_and_the_server_stays(client, vmm, socket_path):
    vmm.leave()
    with RestClient(socket_path) as other:
        for one in (client, other):
            reply = one.ping()
            assert (reply.status, reply.texts()) == (500, ["Error from API", "API request send error"])
