"""`cloudvmm daemon` as a process on the fake engine: its API on the wire, its client, its command lines."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading

import jsonschema_rs
import pytest

from cloudvmm import api
from cloudvmm.api.error import InvalidVmmId, NoSuchVmm, TooManyVmms, VmmExists
from cloudvmm.api.fleet import (
    DAEMON_COMMANDS,
    VmmsCancelJobData,
    VmmsCreateData,
    VmmsCreateError,
    VmmsDeleteData,
)
from cloudvmm.client import (
    AsyncDaemonClient,
    BadRequest,
    Client,
    Conflict,
    ConnectionFailed,
    DaemonClient,
    InternalServerError,
    NotFound,
)
from cloudvmm.http.daemon_openapi import document
from support.argument import ARGUMENTS
from support.daemon import COMMAND, Daemon
from support.deadline import HOST_S
from support.rest import RestClient
from support.wait import wait_until

CONFIG = ARGUMENTS["vm.create"]
DOCUMENT = document()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One for the whole module, which each test leaves without VMs."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon") / "d")
    daemon.wait_ready()
    yield daemon
    daemon.check_end()


@pytest.fixture
def client(daemon):
    yield daemon.client
    for vmm in daemon.client.vmms_list().vmms:
        daemon.client.vmms_delete(VmmsDeleteData(id=vmm.id))


@pytest.fixture
def rest(daemon, client):
    with RestClient(daemon.path, is_documented=False) as connected:
        yield connected


def create(client, vmm_id):
    return client.vmms_create(VmmsCreateData(id=vmm_id))


def boot(path):
    with Client(path, timeout_s=HOST_S) as vm:
        vm.vm_create(CONFIG)
        vm.vm_boot()


def check_body(command, status, body):
    """Fail if the answer is not in the document."""
    method = "get" if command.effect is api.Effect.READS else "put"
    described = DOCUMENT["paths"][f"/{command.name}"][method]["responses"][str(status)]
    if name := described.get("$ref", "").rpartition("/")[2]:
        described = DOCUMENT["components"]["responses"][name]
    if "content" not in described:
        assert body == b""
        return
    schema = described["content"]["application/json"]["schema"]
    jsonschema_rs.validator_for({**schema, "components": DOCUMENT["components"]}).validate(json.loads(body))


def test_life_of_a_vm_beside_another(client):
    made = create(client, "web")
    create(client, "db")
    boot(made.api_socket)

    told = client.vmms_list().vmms
    assert [(vmm.id, vmm.vm_state) for vmm in told] == [("web", api.VmState.RUNNING), ("db", None)]
    ping = client.daemon_ping()
    assert (ping.vmms, ping.max_vmms) == (2, 256)
    client.vmms_delete(VmmsDeleteData(id="web"))
    assert [vmm.id for vmm in client.vmms_list().vmms] == ["db"]
    with pytest.raises(ConnectionFailed), Client(made.api_socket) as vm:
        vm.vmm_ping()


def test_every_answer_is_in_the_document(rest):
    bodies = {
        "vmms.create": {"id": "web"},
        "vmms.delete": {"id": "web"},
        "vmms.cancel-job": {"vmm": "x", "id": 1},
    }
    commands = {command.name: command for command in DAEMON_COMMANDS if command.name != "daemon.shutdown"}
    for name in (*commands, "vmms.create", "vmms.create", "vmms.list", "vmms.delete", "vmms.delete"):
        command = commands[name]
        method = "GET" if command.effect is api.Effect.READS else "PUT"
        reply = rest.ask(method, name, bodies.get(name))
        check_body(command, reply.status, reply.body)


def test_its_document_is_served(rest):
    reply = rest.ask("GET", "openapi.json")

    assert (reply.status, json.loads(reply.body)) == (200, json.loads(json.dumps(DOCUMENT)))


@pytest.mark.parametrize("name", ["vm.info", "vmm.ping", "vm.create", "vm.events", "nothing"])
def test_a_vmms_commands_are_not_the_daemons(rest, name):
    assert rest.ask("GET", name).status == 404


@pytest.mark.parametrize(
    ("method", "name", "body", "status", "texts"),
    [
        ("GET", "vmms.create", None, 400, ["Bad Request"]),
        ("PUT", "vmms.list", None, 400, ["Bad Request"]),
        ("PUT", "vmms.create", None, 400, ["Bad Request"]),
        ("PUT", "vmms.create", b"{", 400, None),
        ("PUT", "vmms.create", {"id": 7}, 400, None),
        ("PUT", "vmms.create", {}, 400, None),
        ("PUT", "vmms.create", {"id": "../x"}, 400, None),
        ("PUT", "vmms.delete", {"id": "none"}, 404, None),
        ("PUT", "vmms.cancel-job", {"vmm": "none", "id": 1}, 404, None),
        ("PUT", "daemon.shutdown", {}, 400, ["Bad Request"]),
    ],
)
def test_what_is_wrong_is_refused(rest, method, name, body, status, texts):
    reply = rest.ask(method, name, body)

    assert reply.status == status
    assert texts is None or reply.texts() == texts
    assert rest.ask("GET", "daemon.ping").status == 200


def test_errors_have_their_codes_and_their_classes(client):
    create(client, "web")
    with pytest.raises(Conflict) as taken:
        create(client, "web")
    with pytest.raises(BadRequest) as bad:
        create(client, "a/b")
    with pytest.raises(NotFound) as none:
        client.vmms_delete(VmmsDeleteData(id="none"))
    with pytest.raises(NotFound) as no_job:
        client.vmms_cancel_job(VmmsCancelJobData(vmm="web", id=99))

    assert taken.value.chain == (
        "Error from API",
        "The VMM could not be created",
        "There is a VMM called web already",
    )
    assert (taken.value.code, taken.value.find(VmmExists) is not None) == ("VmmExists", True)
    assert taken.value.find(VmmsCreateError) is not None
    assert (bad.value.code, bad.value.find(InvalidVmmId) is not None) == ("InvalidVmmId", True)
    assert (none.value.code, none.value.find(NoSuchVmm) is not None) == ("NoSuchVmm", True)
    assert no_job.value.code == "NoSuchJob"


def test_a_vmm_that_is_flooded_does_not_disturb_the_others(client):
    flooded, other = create(client, "flooded"), create(client, "other")
    held = []
    try:
        for _ in range(40):  # more than the connections that it may have
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(HOST_S)
            connection.connect(flooded.api_socket)
            connection.sendall(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
            held.append(connection)
        boot(other.api_socket)
        with Client(other.api_socket, timeout_s=HOST_S) as vm:
            assert vm.vm_info().state is api.VmState.RUNNING
        assert {vmm.id for vmm in client.vmms_list().vmms} == {"flooded", "other"}
        client.vmms_delete(VmmsDeleteData(id="flooded"))
    finally:
        for connection in held:
            connection.close()
    assert [vmm.id for vmm in client.vmms_list().vmms] == ["other"]


def test_any_number_of_clients_may_make_vms_at_once(daemon, client):
    outcomes = []

    def work(number):
        with DaemonClient(daemon.path, timeout_s=HOST_S) as own:
            boot(create(own, f"vm{number}").api_socket)
            outcomes.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HOST_S)

    assert sorted(outcomes) == list(range(12))
    assert {vmm.vm_state for vmm in client.vmms_list().vmms} == {api.VmState.RUNNING}


def test_asyncio_client_does_the_same(daemon, client):
    async def life():
        async with AsyncDaemonClient(daemon.path, timeout_s=HOST_S) as own:
            made = await own.vmms_create(VmmsCreateData(id="web"))
            found = [vmm.id for vmm in (await own.vmms_list()).vmms]
            jobs = (await own.vmms_jobs()).jobs
            await own.vmms_delete(VmmsDeleteData(id="web"))
            return made.id, found, jobs, (await own.daemon_ping()).vmms

    assert asyncio.run(life()) == ("web", ["web"], [], 0)


def run_vms(daemon, *words):
    done = subprocess.run(
        [sys.executable, "-m", "cloudvmm.cli.main", "vms", "--api-socket", daemon.path, *words],
        capture_output=True,
        text=True,
        timeout=HOST_S,
    )
    return done.returncode, done.stdout, done.stderr


def test_command_line_makes_lists_and_deletes(daemon, client):
    status, out, err = run_vms(daemon, "create", "web")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"id": "web", "api_socket": f"{daemon.path}.d/web.sock", "state": "Running"}
    assert [vmm["id"] for vmm in json.loads(run_vms(daemon, "list")[1])["vmms"]] == ["web"]
    assert json.loads(run_vms(daemon, "jobs")[1]) == {"jobs": [], "silent": []}
    assert json.loads(run_vms(daemon, "ping")[1])["vmms"] == 1
    assert run_vms(daemon, "create", "web") == (
        1,
        "",
        "cloudvmm vms: vmms.create failed with status 409: The VMM could not be created: "
        "There is a VMM called web already\n",
    )
    assert run_vms(daemon, "delete", "web") == (0, "", "")


@pytest.mark.parametrize("words", [[], ["--api-socket", "/x"], ["--api-socket", "/x", "create"], ["list"]])
def test_command_line_that_does_not_fit_is_a_usage_error(words):
    done = subprocess.run(
        [sys.executable, "-m", "cloudvmm.cli.main", "vms", *words], capture_output=True, timeout=HOST_S
    )
    assert done.returncode == 2


def test_shutdown_ends_all(tmp_path):
    daemon = Daemon(tmp_path / "d")
    daemon.wait_ready()
    for vmm_id in ("web", "db"):
        boot(create(daemon.client, vmm_id).api_socket)
    status, out, err = run_vms(daemon, "shutdown")

    assert (status, out, err) == (0, "", "")
    assert daemon.wait_end() == 0
    daemon.check_end()


def test_signal_ends_all(tmp_path):
    daemon = Daemon(tmp_path / "d", ("--engine", "fake", "--state-dir", str(tmp_path / "state")))
    daemon.wait_ready()
    boot(create(daemon.client, "web").api_socket)

    daemon.terminate()

    assert daemon.wait_end() == 0
    daemon.check_end()


def test_the_next_daemon_has_the_same_vmms_after_a_kill(tmp_path):
    flags = ("--engine", "fake", "--state-dir", str(tmp_path / "state"))
    first = Daemon(tmp_path / "d", flags)
    first.wait_ready()
    for vmm_id in ("web", "db", "gone"):
        create(first.client, vmm_id)
    first.client.vmms_delete(VmmsDeleteData(id="gone"))
    first.kill()

    second = Daemon(tmp_path / "d", flags)
    wait_until(lambda: restored(second) == ["web", "db"], "the VMMs are there again", timeout_s=HOST_S)
    with second.vm("web") as vm:
        assert vm.vmm_ping().pid == second.pid
    first.client.close()
    second.check_end()


def restored(daemon):
    try:
        return [vmm.id for vmm in daemon.client.vmms_list().vmms if vmm.state is api.data.HeldState.RUNNING]
    except ConnectionFailed:
        return []


def test_there_is_one_daemon_at_a_socket(daemon):
    done = subprocess.run(
        [*COMMAND, "--engine", "fake", "--api-socket", daemon.path],
        capture_output=True,
        text=True,
        timeout=HOST_S,
    )
    assert done.returncode == 1
    assert "already in use" in done.stderr
    assert daemon.client.daemon_ping().pid == daemon.pid
    assert os.path.isdir(f"{daemon.path}.d")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "fake"], "A daemon needs --api-socket with the path of its own socket"),
        (["--api-socket", "fd=3"], "A daemon needs --api-socket with the path of its own socket"),
        (["--api-socket", "/nowhere/at/all/api"], "Error creation API server's socket"),
        (["--api-socket", "API", "--max-vms", "0"], "Error parsing --max-vms"),
        (["--api-socket", "API", "--max-vms", "many"], "Error parsing --max-vms"),
        (["--api-socket", "API", "--state-dir", "/dev/null/x"], "cannot be used"),
        (["--api-socket", "API", "--socket-dir", "/dev/null"], "cannot be used"),
    ],
)
def test_a_start_that_cannot_be_says_why_and_leaves_nothing(tmp_path, flags, words):
    flags = [str(tmp_path / "api") if flag == "API" else flag for flag in flags]
    done = subprocess.run(
        [sys.executable, "-m", "cloudvmm.cli.main", "daemon", *flags],
        capture_output=True,
        text=True,
        timeout=HOST_S,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert set(os.listdir(tmp_path)) <= {"api.lock"}


def test_a_socket_folder_that_nobody_chose_and_others_may_write_to_is_refused(tmp_path):
    folder = tmp_path / "api.d"
    folder.mkdir()
    folder.chmod(0o777)  # whoever may write there puts a socket of his own in a VM's place
    done = subprocess.run(
        [sys.executable, "-m", "cloudvmm.cli.main", "daemon", f"--api-socket={tmp_path}/api"],
        capture_output=True,
        text=True,
        timeout=HOST_S,
    )
    assert done.returncode == 1
    assert "yours alone" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["api.d", "api.lock"]


def test_there_are_no_more_vms_than_allowed(tmp_path):
    daemon = Daemon(tmp_path / "d", ("--engine", "fake", "--max-vms", "1"))
    daemon.wait_ready()
    create(daemon.client, "web")
    with pytest.raises(InternalServerError) as caught:
        create(daemon.client, "db")

    assert caught.value.find(TooManyVmms) is not None
    daemon.check_end()
