"""The typed clients against the bytes that the real Cloud Hypervisor sends, of today and of 2022.

The bytes are those of the reference: no reason phrase, no code for errors, no event stream.
"""

import asyncio

import pytest

from cloudvmm import api, client
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.error import IdentifierNotUnique
from support.argument import arguments_of
from support.peer import Peer, Talk, answering


def response(status, body=b""):
    head = b"HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n" % status
    if status in (100, 204):
        return head + b"\r\n"
    return head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


DONE = response(204)
PING = response(
    200,
    b'{"build_version":"v53.0-246-gae44c2971","version":"54.0.0","pid":7,"features":["io_uring","kvm"]}',
)
NOT_CREATED = response(404, b'["Error from API","The VM info is not available","VM is not created"]')
FULL = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)
LIBRARY_ERROR = response(
    400, b'{ "error": "Invalid request.\nAll previous unanswered requests will be dropped." }'
)


def info(state):
    return response(200, b'{"config":{},"state":"%s","memory_actual_size":536870912}' % state)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "ch.sock")


@pytest.fixture(params=["blocking", "asyncio"])
def call(request, path):
    """`call("vm_boot", ...)` on a client that lives as long as the test."""
    if request.param == "blocking":
        with client.Client(path, timeout_s=10) as made:
            yield lambda name, *arguments, **options: getattr(made, name)(*arguments, **options)
    else:
        with asyncio.Runner() as runner:
            made = client.AsyncClient(path, timeout_s=10)
            yield lambda name, *arguments, **options: runner.run(getattr(made, name)(*arguments, **options))
            made.close()


def test_life_of_a_vm_over_one_connection(path, call):
    replies = [PING, DONE, info(b"Created"), DONE, info(b"Running"), response(200, b"{}"), response(200)]
    with Peer(path, answering(*replies)):
        assert call("vmm_ping").build_version == "v53.0-246-gae44c2971"
        assert call("vm_create", *arguments_of("vm.create")) is None
        assert call("vm_info").state is api.VmState.CREATED
        assert call("vm_boot") is None
        assert call("vm_info").memory_actual_size == 512 << 20
        assert call("vm_counters") == {}
        assert call("vmm_shutdown") is None


def test_adds_are_hot_or_cold(path, call):
    with Peer(path, answering(response(200, b'{"id":"_disk4","bdf":"0000:00:06.0"}'), DONE)):
        assert call("vm_add_disk", DiskConfig(path="/d")).bdf == "0000:00:06.0"
        assert call("vm_add_disk", DiskConfig(path="/d")) is None


def test_state_error_has_its_causes(path, call):
    with Peer(path, answering(NOT_CREATED)), pytest.raises(client.NotFound) as caught:
        call("vm_info")

    assert caught.value.code == "VmNotCreated"
    assert isinstance(caught.value.__cause__, api.VmInfoError)


def test_conflict_names_the_identifier(path, call):
    body = (
        b'["Error from API","The disk could not be added to the VM","Failed to validate config",'
        b'"Identifier d0 is not unique"]'
    )
    with Peer(path, answering(response(409, body))), pytest.raises(client.Conflict) as caught:
        call("vm_add_disk", DiskConfig(path="/d", id="d0"))

    assert str(caught.value.find(IdentifierNotUnique)) == "Identifier d0 is not unique"


def test_too_many_requests(path, call):
    with (
        Peer(path, answering(response(429, b'["Too Many Requests"]'))),
        pytest.raises(client.TooManyRequests),
    ):
        call("vm_resize", *arguments_of("vm.resize"))


def test_empty_400_has_an_empty_chain(path, call):
    with Peer(path, answering(response(400))), pytest.raises(client.BadRequest) as caught:
        call("vm_boot")

    assert (caught.value.chain, caught.value.code) == ((), "")


def test_error_of_the_http_library_keeps_its_text_and_the_connection(path, call):
    with Peer(path, answering(LIBRARY_ERROR, PING)):
        with pytest.raises(client.BadRequest, match="Invalid request"):
            call("vm_boot")
        assert call("vmm_ping").pid == 7


def test_full_server_is_asked_again_on_a_new_connection(path, call):
    with Peer(path, lambda talk: talk.send(FULL), answering(PING)):
        with pytest.raises(client.ServerFull):
            call("vmm_ping")
        assert call("vmm_ping").pid == 7


@pytest.mark.parametrize(
    "body",
    [
        b"VmPause(VmNotRunning)",  # up to v37: the error as a programmer sees it
        b"The VM could not be paused",  # v38 to v46: the outermost text
    ],
)
def test_plain_text_of_older_releases_is_kept(path, call, body):
    with Peer(path, answering(response(500, body))), pytest.raises(client.InternalServerError) as caught:
        call("vm_pause")

    assert caught.value.chain == (body.decode(),)
    assert body.decode() in str(caught.value)


def test_command_of_a_newer_release_is_not_supported(path, call):
    with Peer(path, answering(response(404, b'["Not Found"]'))), pytest.raises(client.NotSupported):
        call("vm_nmi")


def test_reason_phrase_makes_no_difference(path, call):
    with Peer(path, answering(PING.replace(b"200 ", b"200 OK"), DONE.replace(b"204 ", b"204 No Content"))):
        assert call("vmm_ping").pid == 7
        call("vm_boot")


def test_wait_until_running_asks_until_it_runs(path, call):
    states = [NOT_CREATED, info(b"Created"), info(b"Paused"), info(b"Running")]
    with Peer(path, answering(*states)):
        assert call("wait_until_running", 10).state is api.VmState.RUNNING


def test_wait_until_running_ends_at_its_deadline(path, call):
    # Enough answers for any number of questions in that time, and an end that the test need not wait for.
    def script(talk: Talk):
        talk.keep_answering(info(b"Created"), idle_s=0.5)

    with Peer(path, script), pytest.raises(TimeoutError) as caught:
        call("wait_until_running", 0.05)

    assert str(caught.value) == "The VM does not run after 0.05 s; the last state seen is Created"


def test_wait_for_event_says_that_there_is_no_stream(path, call):
    with Peer(path, answering(response(404, b'["Not Found"]'))), pytest.raises(client.NotSupported) as caught:
        call("wait_for_event", "vm", "booted", 5)

    assert caught.value.command == "vm.events"


def test_wait_until_ready_outlasts_a_full_server(path, call):
    with Peer(path, lambda talk: talk.send(FULL), lambda talk: talk.send(FULL), answering(PING)):
        call("wait_until_ready", 10)


def test_wait_until_ready_says_what_was_the_matter(path, call):
    with pytest.raises(TimeoutError, match="does not answer") as caught:
        call("wait_until_ready", 0.03)

    assert isinstance(caught.value.__cause__, client.ConnectionFailed)
