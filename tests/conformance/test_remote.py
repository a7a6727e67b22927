"""`cloudvmm-remote` as a program: output, exit status and standard error, against real servers.

The servers are `cloudvmm` on the fake engine, the REST front end before a scripted VMM, and bytes that follow
a script: between them every sub-command succeeds and fails.
"""

import json
import os
import subprocess

import pytest

from cloudvmm.api import VmActionPayload, VmAddDiskError, VmInfoError, VmNotCreated
from cloudvmm.cli.remote.command import SUBCOMMANDS
from support.peer import Peer, answering
from support.remote import Remote
from support.rest import PONG, same_file
from support.server import Server

HEAD = "Error: ch-remote exited with the following chain of errors:\n"
CONFIG = {"payload": {"kernel": "/bin/sh"}, "console": {"mode": "Off"}}
ADDED = '{"id":"_disk0","bdf":"0000:00:01.0"}\n'
NOT_CREATED = "VM is not created"
NOT_RUNNING = "VM is not running"

WORDS = {
    "add-device": ["path=/sys/d"],
    "add-disk": ["path=/x"],
    "add-fs": ["tag=t,socket=/s"],
    "add-generic-vhost-user": ["device_type=26,socket=/s,queue_sizes=[1024]"],
    "add-net": ["tap=t"],
    "add-pmem": ["file=/p"],
    "add-user-device": ["socket=/s"],
    "add-vdpa": ["path=/v"],
    "add-vsock": ["cid=3,socket=/s"],
    "coredump": ["file:///nowhere/c"],
    "create": [os.devnull],
    "receive-migration": ["receiver_url=unix:/m"],
    "remove-device": ["x"],
    "resize": ["--cpus", "1"],
    "resize-disk": ["--disk", "d", "--size", "1G"],
    "resize-zone": ["--id", "z", "--size", "1G"],
    "restore": ["source_url=file:///nowhere"],
    "send-migration": ["destination_url=unix:/m"],
    "snapshot": ["file:///nowhere"],
}
COMMANDS = [subcommand for subcommand in SUBCOMMANDS if not subcommand.is_ours]
ADDING = [subcommand.name for subcommand in COMMANDS if subcommand.name.startswith("add-")]


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A server without a VM; no test here gives it one."""
    folder = tmp_path_factory.mktemp("idle")
    server = Server(folder / "server", ["--engine", "fake"])
    try:
        server.wait_ready()
        yield Remote(folder, "--api-socket", server.socket_path)
    finally:
        server.check_end()


@pytest.fixture
def live(tmp_path):
    """A server of one's own, and the remote that speaks to it."""
    server = Server(tmp_path / "server", ["--engine", "fake"])
    try:
        server.wait_ready()
        yield Remote(tmp_path, "--api-socket", server.socket_path)
    finally:
        server.check_end()


@pytest.fixture
def remote(server, socket_path, tmp_path):
    """Speaks to the scripted VMM of `vmm`."""
    return Remote(tmp_path, "--api-socket", socket_path)


@pytest.fixture
def offline(tmp_path):
    return Remote(tmp_path)


def write_config(folder, config=CONFIG):
    path = folder / "vm.json"
    path.write_text(json.dumps(config))
    return str(path)


def refused(remote, *words):
    """Run what fails; return the server's own chain."""
    outcome = remote(*words)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("[TIME ERROR cloud_hypervisor] Fatal error: HttpApiClient(")
    assert f"\n{HEAD}  0: http client error\n" in outcome.err
    return outcome.chain()[1:]


# Success


@pytest.mark.parametrize("subcommand", COMMANDS, ids=lambda subcommand: subcommand.name)
def test_success_of_every_command(subcommand, remote, vmm, tmp_path):
    words = {**WORDS, "create": [write_config(tmp_path)]}.get(subcommand.name, [])
    outcome = remote(subcommand.name, *words)
    assert (outcome.status, outcome.err) == (0, "")
    assert vmm.names() == [subcommand.api_command]


def test_body_is_printed_as_it_is_with_a_line_end(remote):
    fields = f'"version":"{PONG.version}","pid":7,"features":["io_uring","kvm"]'
    assert remote("ping").out == f'{{"build_version":"{PONG.build_version}",{fields}}}\n'


@pytest.mark.parametrize("name", ADDING)
def test_hot_add_prints_where_the_device_is(name, remote):
    assert remote(name, *WORDS[name]).out == ADDED


def test_cold_add_prints_nothing(remote, vmm):
    vmm.answer("vm.add-disk", VmActionPayload(None))
    assert remote("add-disk", "path=/x") == (0, "", "")


def test_empty_answer_prints_an_empty_line(remote):
    assert remote("shutdown-vmm") == (0, "\n", "")


def test_no_answer_body_prints_nothing(remote):
    assert remote("boot") == (0, "", "")


def test_a_life_of_a_vm(live, tmp_path):
    assert live("create", stdin=json.dumps(CONFIG).encode()) == (0, "", "")
    assert live("add-disk", f"path={tmp_path},id=d") == (0, "", "")
    assert live("remove-device", "d") == (0, "", "")
    assert live("resize", "--memory", "256M") == (0, "", "")
    assert live("boot") == (0, "", "")
    info = json.loads(live("info").out)
    assert (info["state"], info["config"]["memory"]["size"]) == ("Running", 256 << 20)
    assert json.loads(live("counters").out) == {}
    for name in ("pause", "resume", "nmi", "reboot", "shutdown", "delete"):
        assert live(name) == (0, "", "")
    assert refused(live, "info")[-1] == NOT_CREATED
    assert live("shutdown-vmm") == (0, "\n", "")


# What the server refuses

WITHOUT_VM = {
    **{
        name: ["Server responded with NotFound", NOT_CREATED]
        for name in [*ADDING, "info", "reboot", "resize"]
    },
    **{
        name: ["Server responded with InternalServerError", NOT_RUNNING]
        for name in ("counters", "coredump", "nmi", "pause", "power-button", "resume", "shutdown", "snapshot")
    },
    "boot": ["Server responded with NotFound", "VM config is missing"],
    "remove-device": ["Server responded with NotFound", NOT_CREATED],
    "resize-disk": ["Server responded with NotFound", NOT_CREATED],
    "resize-zone": ["Server responded with NotFound", NOT_CREATED],
}


@pytest.mark.parametrize("name", sorted(WITHOUT_VM))
def test_refusal_without_a_vm(name, idle):
    chain = refused(idle, name, *WORDS.get(name, []))
    assert [chain[0], chain[1], chain[-1]] == [WITHOUT_VM[name][0], "Error from API", WITHOUT_VM[name][1]]


def test_whole_text_of_a_refusal(idle):
    assert idle("info") == (
        1,
        "",
        "[TIME ERROR cloud_hypervisor] Fatal error: HttpApiClient(ServerResponse(NotFound, "
        r'Some("[\"Error from API\",\"The VM info is not available\",\"VM is not created\"]")))'
        f"\n{HEAD}  0: http client error\n  1: Server responded with NotFound\n  2: Error from API\n"
        "  3: The VM info is not available\n  4: VM is not created\n",
    )


def test_log_line_can_be_silenced(idle):
    assert idle("info", env={"RUST_LOG": "off"}).err.startswith(HEAD)


def test_conflict_has_no_name(live, tmp_path):
    path = write_config(tmp_path, {**CONFIG, "disks": [{"path": "/x", "id": "d"}]})
    assert live("create", path).status == 0
    assert refused(live, "add-disk", "path=/y,id=d") == [
        "Server responded with Unknown",
        "Error from API",
        "The disk could not be added to the VM",
        "Failed to validate config",
        "Identifier d is not unique",
    ]


def test_configuration_that_is_no_json(idle):
    chain = refused(idle, "create", "/proc/version")
    assert chain[:2] == ["Server responded with BadRequest", "Failed to deserialize JSON"]


def test_answer_without_texts_is_shown_as_it_is(idle):
    outcome = idle("create")
    assert outcome.status == 1
    assert outcome.err.partition(HEAD)[2] == (
        "  0: http client error\n  X: Can't get remote's error messages from JSON response: "
        "EOF while parsing a value at line 1 column 0: body=''\n"
    )


def test_server_that_is_full(socket_path, tmp_path):
    full = b'HTTP/1.1 503\r\nConnection: close\r\nContent-Length: 7\r\n\r\n{"a":1}'
    with Peer(socket_path, answering(full)):
        outcome = Remote(tmp_path, "--api-socket", socket_path)("ping")
    assert outcome.status == 1
    assert outcome.err.endswith("at line 1 column 7: body='{\"a\":1}'\n")


# What does not get through


def test_no_server(offline):
    assert offline("--api-socket", "/nowhere/api", "ping") == (
        1,
        "",
        "[TIME ERROR ch_remote] Error opening HTTP socket: No such file or directory (os error 2)\n",
    )


def test_no_server_is_noticed_before_anything_is_read(offline):
    outcome = offline("--api-socket", "/nowhere/api", "add-disk", "frob")
    assert outcome.err.startswith("[TIME ERROR ch_remote] Error opening HTTP socket: ")


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"", "HTTP output is missing protocol statement"),
        (b"SSH-2.0-x\r\n\r\n", "HTTP output is missing protocol statement"),
    ],
    ids=["closed", "not-http"],
)
def test_answer_that_is_none(socket_path, tmp_path, reply, text):
    with Peer(socket_path, answering(reply)):
        outcome = Remote(tmp_path, "--api-socket", socket_path)("boot")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.chain()[:2] == ["http client error", text]


def test_timeout(socket_path, tmp_path):
    with Peer(socket_path, lambda talk: talk.read_request() and talk.wait_closed()):
        outcome = Remote(tmp_path, "--api-socket", socket_path, "--timeout", "0.3")("boot")
    assert outcome.status == 1
    assert outcome.chain()[:3] == [
        "http client error",
        "Error writing to or reading from HTTP socket",
        "No answer to vm.boot; it may or may not have run",
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            [],
            "Please either provide the api-socket option or dbus-service-name and dbus-object-path options",
        ),
        (
            ["--dbus-object-path", "/x"],
            "Please either provide the api-socket option or dbus-service-name and dbus-object-path options",
        ),
        (
            ["--api-socket", "/s", "--dbus-service-name", "a.b"],
            "`api-socket` and (dbus-service-name or dbus-object-path) are mutually exclusive",
        ),
    ],
    ids=["neither", "half", "both"],
)
def test_unclear_way_to_the_server(offline, flags, text):
    assert offline(*flags, "info") == (1, "", f"[TIME ERROR ch_remote] {text}\n")


def test_usage_error(offline):
    outcome = offline("restore")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.endswith(
        "Usage: cloudvmm-remote restore <restore_config>\n\nFor more information, try '--help'.\n"
    )


def test_installed_as_the_reference_it_has_its_name(tmp_path):
    remote = Remote(tmp_path, name="ch-remote")
    assert remote("--version") == (0, "ch-remote v54.0.0\n", "")
    assert "Usage: ch-remote [OPTIONS] <COMMAND>\n" in remote("frob").err


def test_bytes_of_an_error_are_not_lost(remote, vmm):
    error = VmInfoError()
    error.__cause__ = VmNotCreated()
    vmm.answer("vm.info", error)
    vmm.answer("vm.add-disk", VmAddDiskError())
    assert refused(remote, "info")[-1] == NOT_CREATED
    assert refused(remote, "add-disk", "path=/x")[-1] == "The disk could not be added to the VM"


def test_reader_that_has_gone(remote):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        outcome = remote("ping", stdout=writer)
    finally:
        os.close(writer)
    assert (outcome.status, outcome.err) == (1, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_not_mistaken_for_the_server(closed, live):
    words = " ".join([str(live.path), *live.flags, "create", closed])
    done = subprocess.run(["sh", "-c", words], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert live("ping").status == 0


# Descriptors


@pytest.fixture
def files(tmp_path):
    fds = [os.open(tmp_path / f"file{number}", os.O_CREAT | os.O_RDWR) for number in range(5)]
    yield fds
    for fd in fds:
        os.close(fd)


def assert_received(received, sent):
    assert len(received) == len(sent)
    assert all(same_file(one, other) for one, other in zip(received, sent, strict=True))
    for fd in received:
        os.close(fd)


def test_add_net_passes_its_descriptors(remote, vmm, files):
    words = f"fd=[{files[1]},{files[0]}],num_queues=4,id=n"
    assert remote("add-net", words, fds=files) == (0, ADDED, "")
    net = vmm.await_request("vm.add-net").data
    assert (net.id, net.num_queues) == ("n", 4)
    assert_received(net.fds, [files[1], files[0]])


def test_add_device_passes_its_descriptor(remote, vmm, files):
    assert remote("add-device", f"fd={files[2]}", fds=files) == (0, ADDED, "")
    assert_received([vmm.await_request("vm.add-device").data.fd], [files[2]])


def test_restore_passes_all_kinds(remote, vmm, files):
    net = f"net_fds=[a@[{files[4]},{files[0]}]]"
    words = f"source_url=file:///s,iommufd_fd={files[1]},vfio_fds=[v@{files[2]}],{net}"
    assert remote("restore", words, fds=files) == (0, "", "")
    data = vmm.await_request("vm.restore").data
    received = [*data.net_fds[0].fds, data.vfio_fds[0].fd, data.iommufd_fd]
    assert_received(received, [files[4], files[0], files[2], files[1]])


def test_receive_migration_passes_all_kinds(remote, vmm, files):
    words = f"receiver_url=unix:/m,iommufd_fd={files[1]},vfio_fds=[v@{files[2]},w@{files[0]}]"
    assert remote("receive-migration", words, fds=files) == (0, "", "")
    data = vmm.await_request("vm.receive-migration").data
    received = [data.vfio_fds[0].fd, data.vfio_fds[1].fd, data.iommufd_fd]
    assert_received(received, [files[2], files[0], files[1]])


def test_descriptor_that_is_not_open(remote, vmm):
    outcome = remote("add-net", "fd=[99]")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.chain()[:2] == ["http client error", "Error sending file descriptors"]
    assert outcome.chain()[-1] == "Bad file descriptor (os error 9)"
    assert vmm.names() == []
