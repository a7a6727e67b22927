"""Error replies, from this server, the reference and its older releases, as exceptions."""

import msgspec
import pytest

from cloudvmm import api, client
from cloudvmm.api.error import NoVmToMigrate
from cloudvmm.client.chain import failure
from cloudvmm.client.reply import Reply
from cloudvmm.config.error import IdentifierNotUnique, ValidationError
from cloudvmm.config.net import InvalidMtu
from cloudvmm.engine.base import DeviceError
from cloudvmm.errors import VmmError, error_chain, error_code


def reply(status, *texts, code=None):
    headers = {} if code is None else {"x-cloudvmm-error": code}
    return Reply(status, headers, msgspec.json.encode(texts))


def kinds(error):
    found = []
    while (error := error.__cause__) is not None:
        found.append(type(error))
    return found


# The examples of rest.md section 4.
REFERENCE = [
    ("vm.info", 404, ["Error from API", "The VM info is not available", "VM is not created"],
     [api.VmInfoError, api.VmNotCreated]),
    ("vm.pause", 500, ["Error from API", "The VM could not be paused", "VM is not running"],
     [api.VmPauseError, api.VmNotRunning]),
    ("vm.pause", 500, ["Error from API", "The VM could not be paused", "Cannot pause VM",
                       "Failed to pause migratable component",
                       "Invalid transition: InvalidStateTransition(Paused, Paused)"],
     [api.VmPauseError, api.VmPauseFailed, api.MigratablePause, api.InvalidTransition]),
    ("vm.send-migration", 500, ["Error from API", "Error dispatching the migration worker",
                                "Failed to send migratable component snapshot", "VM is not running"],
     [api.VmSendMigrationError, api.MigratableSend, NoVmToMigrate]),
    ("vm.create", 500, ["Error from API", "The VM could not be created", "VM is already created"],
     [api.VmCreateError, api.VmAlreadyCreated]),
    ("vm.add-disk", 409, ["Error from API", "The disk could not be added to the VM",
                          "Failed to validate config", "Identifier d0 is not unique"],
     [api.VmAddDiskError, api.ConfigValidation, IdentifierNotUnique]),
    ("vm.remove-device", 404, ["Error from API", "The device could not be removed from the VM",
                               'No device with id "x" to remove'],
     [api.VmRemoveDeviceError, api.NoDeviceToRemove]),
    ("vm.power-button", 500, ["Error from API", "Error triggering power button",
                              "Error triggering power button"],
     [api.VmPowerButtonError, api.PowerButton]),
    ("vm.create", 400, ["Failed to deserialize JSON", "missing field `id` at line 1 column 2"], [VmmError]),
]  # fmt: skip


@pytest.mark.parametrize(("command", "status", "texts", "causes"), REFERENCE)
def test_causes_are_rebuilt_from_texts_alone(command, status, texts, causes):
    error = failure(command, reply(status, *texts))

    assert kinds(error) == causes
    assert error_chain(error)[1:] == texts[1:]
    assert error.chain == tuple(texts)
    assert error.status == status


@pytest.mark.parametrize(("command", "status", "texts", "causes"), REFERENCE[:-1])
def test_code_is_the_same_with_and_without_the_header(command, status, texts, causes):
    code = causes[-1].__name__

    assert failure(command, reply(status, *texts)).code == code
    assert failure(command, reply(status, *texts, code=code)).code == code


@pytest.mark.parametrize(
    ("status", "first", "kind"),
    [
        (400, "Bad Request", client.BadRequest),
        (404, "Error from API", client.NotFound),
        (404, "Not Found", client.NotSupported),
        (409, "Error from API", client.Conflict),
        (429, "Too Many Requests", client.TooManyRequests),
        (500, "Internal Server Error", client.InternalServerError),
        (503, "Too many open event streams", client.ServerFull),
        (405, "Method Not Allowed", client.ServerError),
    ],
)
def test_status_decides_the_kind(status, first, kind):
    error = failure("vm.boot", reply(status, first))

    assert type(error) is kind
    assert error.may_have_run is False


def test_header_names_the_innermost_error_whose_text_varies():
    texts = ["Error from API", "The network device could not be added to the VM", "Failed to validate config"]
    told = "Provided MTU 5 is lower than 1280 (expected by VIRTIO specification)"

    error = failure("vm.add-net", reply(400, *texts, told, code="InvalidMtu"))

    assert error.code == "InvalidMtu"
    assert str(error.find(InvalidMtu)) == told
    assert error.find(ValidationError) is error.find(InvalidMtu)


def test_rule_that_is_not_known_is_still_a_rule():
    texts = ["Error from API", "The VM could not boot", "Failed to validate config", "A rule of next year"]

    error = failure("vm.boot", reply(400, *texts))

    assert str(error.find(ValidationError)) == "A rule of next year"


def test_header_does_not_rename_what_the_system_said():
    texts = ["Error from API", "The VM could not boot", "Error from device manager",
             "The disk cannot be opened", "No such file or directory: /d (os error 2)"]  # fmt: skip

    error = failure("vm.boot", reply(500, *texts, code="DeviceError"))

    assert kinds(error) == [api.VmBootError, api.DeviceManager, DeviceError, VmmError]
    assert error.code == "DeviceError"


def test_code_of_a_newer_server_is_kept_though_nobody_knows_it():
    error = failure("vm.boot", reply(500, "Error from API", "The VM could not boot", "New", code="Newest"))

    assert error.code == "Newest"
    assert kinds(error) == [api.VmBootError, VmmError]


@pytest.mark.parametrize(
    ("body", "chain"),
    [
        (b"VmPause(VmNotRunning)", ("VmPause(VmNotRunning)",)),
        (b'{ "error": "Too many open connections" }', ('{ "error": "Too many open connections" }',)),
        (
            b'{ "error": "Invalid request.\nAll previous" }',
            ('{ "error": "Invalid request.\nAll previous" }',),
        ),
        (b"\xff\xfe", ("\ufffd\ufffd",)),
        (b"", ()),
        (b"[" * 100_000, ("[" * 100_000,)),
        (b'["half', ('["half',)),
        (b"[1, 2]", ("[1, 2]",)),
    ],
)
def test_body_that_is_no_chain_is_kept_as_text(body, chain):
    error = failure("vm.pause", Reply(500, {}, body))

    assert error.chain == chain
    assert error.code == ""
    assert error.__cause__ is None
    assert all(text in str(error) for text in chain)


def test_text_holds_the_whole_chain():
    error = failure(
        "vm.pause", reply(500, "Error from API", "The VM could not be paused", "VM is not running")
    )

    assert str(error) == "vm.pause failed with status 500: The VM could not be paused: VM is not running"


def test_find_gives_none_where_there_is_no_such_cause():
    error = failure(
        "vm.pause", reply(500, "Error from API", "The VM could not be paused", "VM is not running")
    )

    assert error.find(api.VmNotCreated) is None


@pytest.mark.parametrize("request_type", api.COMMANDS, ids=lambda request: request.name)
def test_each_commands_own_error_is_recognised(request_type):
    error = failure(request_type.name, reply(500, "Error from API", str(request_type.error())))

    assert kinds(error) == [request_type.error]
    assert error.code == error_code(request_type.error())
