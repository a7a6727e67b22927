"""The methods follow from the commands; arguments and results take D-Bus's form."""

import subprocess
import sys

import pytest

from cloudvmm import api
from cloudvmm.api import COMMANDS, PciDeviceInfo, VmActionPayload, VmInfo, VmState
from cloudvmm.config.vm import VmConfig
from cloudvmm.dbus.error import Failed
from cloudvmm.dbus.method import METHODS


def test_each_command_on_dbus_has_a_method_and_no_other():
    assert {method.command for method in METHODS.values()} == {
        command for command in COMMANDS if command.is_on_dbus
    }
    assert not {"VmNmi", "VmResizeDisk"} & METHODS.keys()


@pytest.mark.parametrize(
    ("name", "takes", "gives", "argument"),
    [
        ("VmmPing", "", "s", ""),
        ("VmmShutdown", "", "", ""),
        ("VmAddDevice", "s", "s", "device_config"),
        ("VmAddDisk", "s", "s", "disk_config"),
        ("VmAddFs", "s", "s", "fs_config"),
        ("VmAddGenericVhostUser", "s", "s", "generic_vhost_user_config"),
        ("VmAddNet", "s", "s", "net_config"),
        ("VmAddPmem", "s", "s", "pmem_config"),
        ("VmAddUserDevice", "s", "s", "vm_add_user_device"),
        ("VmAddVdpa", "s", "s", "vdpa_config"),
        ("VmAddVsock", "s", "s", "vsock_config"),
        ("VmBoot", "", "", ""),
        ("VmCoredump", "s", "", "vm_coredump_data"),
        ("VmCounters", "", "s", ""),
        ("VmCreate", "s", "", "vm_config"),
        ("VmInfo", "", "s", ""),
        ("VmRemoveDevice", "s", "", "vm_remove_device"),
        ("VmResize", "s", "", "vm_resize"),
        ("VmResizeZone", "s", "", "vm_resize_zone"),
        ("VmRestore", "s", "", "restore_config"),
        ("VmReceiveMigration", "s", "", "receive_migration_data"),
        ("VmSendMigration", "s", "", "send_migration_data"),
        ("VmSnapshot", "s", "", "vm_snapshot_config"),
    ],
)
def test_method_takes_and_gives_what_the_references_does(name, takes, gives, argument):
    method = METHODS[name]
    assert (method.takes, method.gives, method.argument) == (takes, gives, argument)


def test_argument_is_the_body_of_the_rest_request():
    disk = METHODS["VmAddDisk"].decode(('{"path":"/d"}',))
    assert disk.path == "/d"


def test_argument_that_does_not_decode_fails_with_the_parsers_words():
    with pytest.raises(Failed, match="^missing field `id`"):
        METHODS["VmRemoveDevice"].decode(("{}",))


@pytest.mark.parametrize(
    ("name", "response", "result"),
    [
        ("VmBoot", api.Empty(), ("", ())),
        ("VmAddDisk", VmActionPayload(b'{"id":"d"}'), ("s", ('{"id":"d"}',))),
        ("VmAddDisk", VmActionPayload(None), ("s", ("",))),
    ],
)
def test_result_that_is_not_there_is_the_empty_string(name, response, result):
    assert METHODS[name].result(response) == result


def test_info_is_written_as_in_rest():
    info = VmInfo(config=VmConfig(), state=VmState.CREATED, memory_actual_size=1)
    signature, (text,) = METHODS["VmInfo"].result(info)
    assert signature == "s"
    assert text.startswith('{"config":{"cpus":')
    assert text.endswith('"state":"Created","memory_actual_size":1}')


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (api.VmBootError(), "The VM could not boot"),
        (PciDeviceInfo(id="d", bdf="b"), "Wrong response payload type"),
    ],
)
def test_failure_has_its_outermost_text_alone(response, text):
    with pytest.raises(Failed, match=f"^{text}$"):
        METHODS["VmBoot"].result(response)


def test_program_loads_no_dbus_before_it_is_asked_for():
    script = "import sys, cloudvmm.cli.serve; print([name for name in sys.modules if 'jeepney' in name])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "[]\n"
